"""What a user may set about an engine's memory, checked, and the pool that it asks for.

Sizes are bytes, but for blocks: one block is ``block_tokens`` tokens in every layer of a program's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Final

import torch

from fpcompile.engine.programs import Programs
from fpcompile.errors import InvalidInputError, UnknownNameError
from fpcompile.executor.device import Device
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.pool import KVPool, Layout, layout_of
from fpcompile.scheduler.policy import Policy, StepPolicy

__all__ = ["USUAL_RATE", "MemoryOptions", "copy_rate", "make_pools"]

_PROBE: Final = 8 << 20  # bytes that are copied to learn how fast that is
USUAL_RATE: Final = 8e9  # bytes per second, where the clock says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """``kv_blocks``: size of the pool, or ``{program: size}`` for the one program that shall have it.

    ``kv_memory``: the same in bytes. ``prefix_cache``: begin behind the blocks of an earlier prompt that
    began alike. ``memory_budget``: device memory that paused runs and requests that decode may hold
    besides blocks, None for any. ``host_memory``: host memory for what is moved off the device, None for a
    quarter of the machine's.
    ``deterministic`` turns off what changes bits: prefix reuse.
    """

    kv_blocks: int | Mapping[str, int] | None = None
    kv_memory: int | None = None
    block_tokens: int = 16
    prefix_cache: bool = False
    memory_budget: int | None = None
    host_memory: int | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        sizes = dict(self.kv_blocks) if isinstance(self.kv_blocks, Mapping) else {"": self.kv_blocks}
        if not sizes:
            raise InvalidInputError("kv_blocks names no program", expected="{program: blocks}", got="{}")
        for name, blocks in sizes.items():
            _whole(f"kv_blocks of {name!r}" if name else "kv_blocks", blocks, 1)
        for name, least in (("kv_memory", 1), ("block_tokens", 1), ("memory_budget", 0), ("host_memory", 0)):
            _whole(name, getattr(self, name), least)
        if self.kv_blocks is not None and self.kv_memory is not None:
            raise InvalidInputError(
                "kv_blocks and kv_memory say the same in two ways",
                expected="one of them",
                got=f"kv_blocks={self.kv_blocks!r}, kv_memory={self.kv_memory!r}",
            )
        if self.prefix_cache and not self.pooled:
            raise InvalidInputError(
                "prefix_cache needs a pool to keep prefixes in",
                expected="kv_blocks or kv_memory",
                got="neither",
            )

    @property
    def pooled(self) -> bool:
        """Whether there is a pool."""
        return self.kv_blocks is not None or self.kv_memory is not None

    @property
    def reuses(self) -> bool:
        """Whether prompts may begin behind cached blocks."""
        return self.prefix_cache and not self.deterministic

    @property
    def budget(self) -> float:
        """Bytes that paused runs may hold besides blocks."""
        return inf if self.memory_budget is None else self.memory_budget

    @property
    def host_limit(self) -> int:
        """Bytes of host memory that may be used."""
        if self.host_memory is not None:
            return self.host_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4

    def check_policy(self, policy: Policy, packs: bool) -> None:
        """Raise :class:`InvalidInputError` for a policy that cannot be executed as the options ask.

        ``packs``: whether requests are packed.
        """
        if self.deterministic and (packs or policy.grain.unit == "tokens" or isinstance(policy, StepPolicy)):
            raise InvalidInputError(
                f"policy {policy.name!r} packs requests or slices prompts, which changes their bits",
                expected="a policy that runs one whole request at a time",
                got="deterministic=True",
                remedy="leave out pack=, or use 'fpcompile', 's-edf' or 'fcfs'",
            )
        if self.memory_budget is not None and isinstance(policy, StepPolicy):
            raise InvalidInputError(
                f"policy {policy.name!r} composes steps, whose members are never moved off the device",
                expected="memory_budget=None",
                got=repr(self.memory_budget),
                remedy="bound the members by kv_blocks, or use a policy that runs whole requests or chunks",
            )


def make_pools(programs: Programs, options: MemoryOptions) -> dict[str, KVPool]:
    """The pool, by the name of each program that uses it; all of them have the same layout.

    Raises :class:`InvalidInputError` when there is none, or several layouts and no choice.
    """
    if not options.pooled:
        return {}
    layouts = _layouts(programs, options.kv_blocks)
    if len(set(layouts.values())) > 1:
        raise InvalidInputError(
            "the programs' caches differ, and a pool has one layout",
            expected="one program with a pool",
            got=", ".join(layouts),
            remedy="name it: kv_blocks={" + repr(next(iter(layouts))) + ": ...}; others own their caches",
        )
    layout = next(iter(layouts.values()))
    size = options.block_tokens * layout.token_bytes
    if isinstance(options.kv_blocks, Mapping):
        blocks = max(options.kv_blocks.values())
    else:
        blocks = options.kv_blocks or (options.kv_memory or 0) // size
    if blocks < 1:
        raise InvalidInputError(
            "kv_memory is less than one block", expected=f"at least {size} bytes", got=repr(options.kv_memory)
        )
    pool = KVPool(layout, blocks, options.block_tokens, programs.device)
    return dict.fromkeys(layouts, pool)


def _layouts(programs: Programs, chosen: int | Mapping[str, int] | None) -> dict[str, Layout]:
    named = chosen if isinstance(chosen, Mapping) else None
    for name in named or ():
        if name not in programs.names:
            raise UnknownNameError("program", name, known=programs.names)
    found: dict[str, Layout] = {}
    for name in programs.names if named is None else named:
        program = programs[name]
        if isinstance(program, PackedProgram):
            found[name] = layout_of(program.attention, program.dtype)
        elif named is not None:
            raise InvalidInputError(
                f"program {name!r} cannot have cache blocks",
                expected="a program of the packed route",
                got=type(program).__name__,
                remedy="its state is bounded by memory_budget",
            )
    if not found:
        raise InvalidInputError(
            "no program of this engine can have cache blocks",
            expected="a program of the packed route",
            got=", ".join(f"{name}: {type(programs[name]).__name__}" for name in programs.names),
            remedy="leave kv_blocks and kv_memory out; memory_budget bounds the state of any program",
        )
    return found


def copy_rate(device: Device, clock: Callable[[], float]) -> float:
    """Bytes per second of a copy between device and host, as measured now."""
    source = torch.zeros(_PROBE, dtype=torch.uint8, device=device.torch_device)
    seconds = 0.0
    for _ in range(2):  # the first one pays for pinned memory
        device.synchronize()
        begin = clock()
        _, event = device.copy_to_host([source])
        event.wait()
        seconds = clock() - begin
    return _PROBE / seconds if seconds > 0 else USUAL_RATE


def _whole(name: str, value: Any, least: int) -> None:
    if value is None and name != "block_tokens":
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(f"{name} is wrong", expected=f"a whole number >= {least}", got=repr(value))

"""What a user may set on the scheduler besides the policy; the defaults change nothing.

Every time is in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from math import inf
from numbers import Integral, Real
from typing import Any

from fpcompile.errors import InvalidInputError

__all__ = ["SchedulerOptions", "make_options"]

_WHOLE = ("kv_blocks", "block_tokens", "max_segments", "pack")


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """Options of any preemptive order.

    ``max_queue_s``: a request that has waited so long without being started is rejected.
    ``kv_blocks``: size of the device's cache in blocks; None: memory is not the core's business.
    ``block_tokens``: tokens of a block, where the driver reports what decodes (``Reserved``): then a run that
    generates is begun only if the predicted peak of all that do stays within the cache. 0: it does not.
    ``lockstep``: whether what decodes gets its tokens together; else all that it may need is kept free.
    ``move_s``: device seconds to move one block away and back, if the driver knows; 0: policies do not ask.
    ``trail_cap``: a run that has executed more than this fraction of its size is paused only when the
    challenger would otherwise miss its deadline (TRAIL's limited preemption). inf: off.
    ``suspension_cap_s``: a run paused for longer goes first, and is not paused again. inf: off.
    ``hysteresis_s``: a run with less than this left is paused only when the challenger would otherwise miss.
    ``max_segments``: launch quota, passed through; None: run until paused or done.
    ``pack``: most tokens of a run that packs several new requests, if every member's deadline allows it; 0:
    no packing. Policies that pack by a rule of their own keep it, those that compose steps share anyway.
    """

    max_queue_s: float = inf
    kv_blocks: int | None = None
    block_tokens: int = 0
    lockstep: bool = True
    move_s: float = 0.0
    trail_cap: float = inf
    suspension_cap_s: float = inf
    hysteresis_s: float = 0.0
    max_segments: int | None = None
    pack: int = 0

    def __post_init__(self) -> None:
        def need(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise InvalidInputError(
                    f"scheduler option {name} is wrong", expected=expected, got=repr(getattr(self, name))
                )

        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool):
                need(field.name, isinstance(value, bool), "a bool")
                continue
            kind, expected = (Integral, "a whole number") if field.name in _WHOLE else (Real, "a number")
            number = isinstance(value, kind) and not isinstance(value, bool)
            none = ", or None" if field.default is None else ""
            need(field.name, number or (value is None and bool(none)), expected + none)
        need("max_queue_s", self.max_queue_s > 0, "seconds > 0")
        need("kv_blocks", self.kv_blocks is None or self.kv_blocks > 0, "blocks > 0, or None")
        need("block_tokens", self.block_tokens >= 0, "tokens >= 0")
        need("move_s", 0 <= self.move_s < inf, "finite seconds >= 0")
        need("trail_cap", self.trail_cap >= 0, "a fraction >= 0")
        need("suspension_cap_s", self.suspension_cap_s > 0, "seconds > 0")
        need("hysteresis_s", 0 <= self.hysteresis_s < inf, "finite seconds >= 0")
        need("pack", self.pack >= 0, "tokens >= 0")
        need("max_segments", self.max_segments is None or self.max_segments > 0, "segments > 0, or None")


def make_options(base: SchedulerOptions | None, changes: dict[str, Any]) -> SchedulerOptions:
    """``base`` with ``changes``; an unknown one raises :class:`InvalidInputError` with the legal ones."""
    given: Any = base
    if given is not None and not isinstance(given, SchedulerOptions):
        raise InvalidInputError(
            "options is no SchedulerOptions",
            expected="SchedulerOptions(...), or None",
            got=repr(given),
            remedy="pass single options by name: Scheduler(policy, max_queue_s=2.0)",
        )
    known = [field.name for field in fields(SchedulerOptions)]
    for name in sorted(set(changes) - set(known)):
        near = get_close_matches(name, known, n=1)
        raise InvalidInputError(
            f"unknown scheduler option {name!r}",
            expected=f"one of {', '.join(known)}",
            got=name,
            remedy=f"did you mean {near[0]!r}?" if near else None,
        )
    return replace(base or SchedulerOptions(), **changes)

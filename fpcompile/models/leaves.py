"""Opaque leaves: submodules captured as one operator (tensors) -> (tensors), called as they are.

Two kinds are used by the packed route. *Experts*: the model's own experts forward, whose sorting by expert
crosses tokens inside but whose rows depend only on their own token. *Rotary*: position embeddings whose
frequencies depend on the longest position (dynamic NTK, longrope); each sequence is evaluated alone, on a
fresh copy of the module's state, so sequences and runs never see one another.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fpcompile.models.division import Division, divide

LeafFunction = Callable[[Sequence[Tensor], tuple[int, ...]], tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """How a leaf is made again without a trace: the shadow's ``module`` and plain ``arguments``."""

    module: nn.Module
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """One opaque leaf. ``run(tensors, lengths)`` takes the lengths of the packed sequences, in tokens.

    ``flops_per_token`` and ``weight_bytes`` feed the cost model. ``tokenwise`` says that any range of tokens
    may be computed by itself. ``division`` says how its experts may be executed in ranges. Without a
    ``recipe`` a leaf cannot be saved.
    """

    name: str
    kind: str
    run: LeafFunction
    fake: Callable[[Sequence[Tensor]], list[Tensor]]
    flops_per_token: int
    weight_bytes: int
    tokenwise: bool
    recipe: Recipe | None = None
    division: Division | None = None


@torch.library.custom_op("fpcompile::leaf", mutates_args=())
def _leaf(tensors: list[Tensor], leaf: int) -> list[Tensor]:
    raise NotImplementedError("fpcompile::leaf is a marker for the compiler and is never executed")


@_leaf.register_fake
def _(tensors: list[Tensor], leaf: int) -> list[Tensor]:
    return _leaves.get()[leaf].fake(tensors)


_leaves: contextvars.ContextVar[list[Leaf]] = contextvars.ContextVar("fpcompile_leaves")


@contextlib.contextmanager
def collecting() -> Iterator[list[Leaf]]:
    """While it is open, leaves can be emitted; yields the list they are collected in (trace time only)."""
    leaves: list[Leaf] = []
    token = _leaves.set(leaves)
    try:
        yield leaves
    finally:
        _leaves.reset(token)


def emit(leaf: Leaf, tensors: list[Tensor]) -> list[Tensor]:
    """Add ``leaf`` to the trace that is being collected and return its node's outputs."""
    leaves = _leaves.get()
    leaves.append(leaf)
    out: list[Tensor] = torch.ops.fpcompile.leaf(tensors, len(leaves) - 1)
    return out


def experts_leaf(module: nn.Module, implementation: str, top_k: int) -> Leaf:
    """Leaf of an experts module under the model's own ``implementation`` (eager, grouped_mm, batched_mm)."""
    original = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    forward = ALL_EXPERTS_FUNCTIONS.get_interface(implementation, original)

    def run(tensors: Sequence[Tensor], lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        return (forward(module, *tensors),)

    weights = list(module.parameters())
    per_expert = sum(p.numel() // p.shape[0] for p in weights if p.dim() >= 3)
    return Leaf(
        name="experts",
        kind="experts",
        run=run,
        fake=lambda tensors: [torch.empty_like(tensors[0], memory_format=torch.contiguous_format)],
        flops_per_token=2 * top_k * per_expert,
        weight_bytes=sum(p.numel() * p.element_size() for p in weights),
        tokenwise=True,
        recipe=Recipe(module, {"implementation": implementation, "top_k": top_k}),
        division=divide(module, forward, implementation, top_k),
    )


def _experts_entry(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    implementation = module._fpcompile_experts  # set on the shadow by capture
    leaf = experts_leaf(module, str(implementation), int(top_k_index.shape[-1]))
    return emit(leaf, [hidden, top_k_index, top_k_weights])[0]


ALL_EXPERTS_FUNCTIONS.register("fpcompile", _experts_entry)


def rope_kinds(module: nn.Module) -> set[str]:
    """The kinds of frequencies of a rotary module; none for another module."""
    kind = getattr(module, "rope_type", None)
    return {k for k in (kind.values() if isinstance(kind, dict) else [kind]) if isinstance(k, str)}


def needs_rotary_leaf(module: nn.Module) -> bool:
    """Whether a rotary module's frequencies depend on the positions of the call (dynamic, longrope)."""
    return any("dynamic" in kind or kind == "longrope" for kind in rope_kinds(module))


def install_rotary_leaf(module: nn.Module) -> None:
    """Make ``module.forward`` emit a leaf. ``module`` belongs to a shadow: its state is its own."""
    kept = copy.deepcopy(module)

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with disable_proxy_modes_tracing(), unset_fake_temporarily():
            leaf = rotary_leaf(kept, x.dtype, args, kwargs)
        recipe = Recipe(module, {"dtype": x.dtype, "args": args, "kwargs": kwargs})
        return tuple(emit(dataclasses.replace(leaf, recipe=recipe), [position_ids]))

    module.forward = forward


def rotary_leaf(module: nn.Module, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leaf:
    """Leaf of a rotary module called with further ``args`` and ``kwargs``; its outputs have ``dtype``.

    Each call begins with a copy that forgot the longest call of the model's past: one position alone makes
    transformers' dynamic frequencies start over.
    """
    kept = copy.deepcopy(module)

    def call(x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        fresh = copy.deepcopy(kept)
        fresh(x, position_ids.new_zeros(1, 1), *args, **kwargs)
        return tuple(fresh(x, position_ids, *args, **kwargs))

    device = next(kept.buffers()).device
    dims = [p.shape[-1] for p in call(torch.zeros(1, device=device), torch.arange(2, device=device)[None])]

    def fake(tensors: Sequence[Tensor]) -> list[Tensor]:
        ids = tensors[0]
        return [ids.new_empty(*ids.shape, dim, dtype=dtype) for dim in dims]

    def run(tensors: Sequence[Tensor], lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        like = torch.zeros(1, dtype=dtype, device=tensors[0].device)
        parts = [call(like, ids) for ids in torch.split(tensors[0], list(lengths), dim=1)]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(p, dim=1) for p in zip(*parts, strict=True))

    recipe = Recipe(module, {"dtype": dtype, "args": args, "kwargs": kwargs})
    return Leaf(
        "rotary", "rotary", run, fake, flops_per_token=0, weight_bytes=0, tokenwise=False, recipe=recipe
    )


def remake(kind: str, module: nn.Module, arguments: dict[str, Any]) -> Leaf:
    """The leaf that a :class:`Recipe` describes."""
    made: dict[str, Callable[..., Leaf]] = {"experts": experts_leaf, "rotary": rotary_leaf}
    return made[kind](module, **arguments)

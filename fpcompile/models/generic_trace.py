"""One trace of a model by the generic route: a shadow, wrapped between flat tensors, exported.

The wrapper rebuilds the model's own arguments out of flat tensors and flattens what it returns. While the
model runs under the trace, forward hooks follow which submodule is at work, so that an error, or a length
that became a constant, can be blamed on one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpcompile.models.attention import NAME as _PACKED
from fpcompile.models.generic import length_dims, top_level
from fpcompile.models.generic_decisions import Deciding, Decision, as_eager
from fpcompile.models.generic_tree import Flat, flatten, unflatten
from fpcompile.models.kept import assigned, attributes, forget, parts, renew
from fpcompile.models.lengths import LengthWatch
from fpcompile.models.opaque import install
from fpcompile.models.shadow import shadow


class Wrapper(nn.Module):
    """The model between flat inputs and flat outputs. ``note`` collects what one trace leaves behind."""

    def __init__(self, model: nn.Module, flat: Flat, real: Sequence[Tensor], cloned: frozenset[int]) -> None:
        super().__init__()
        self.model = model
        self.trace = Trace(flat, real, cloned)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.trace.run(self.model, tensors)


class Trace(LengthWatch):
    """State of one trace, outside the wrapper's attributes, which export restores."""

    def __init__(self, flat: Flat, real: Sequence[Tensor], cloned: frozenset[int]) -> None:
        super().__init__()
        self.flat, self.real, self.cloned = flat, real, cloned
        self.result: Flat | None = None
        self.decisions: tuple[Decision, ...] = ()
        self.kept: frozenset[str] = frozenset()
        self.memoised: frozenset[str] = frozenset()

    def run(self, model: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        count = len(self.flat.tensors)
        given = [t.clone() if i in self.cloned else t for i, t in enumerate(tensors[:count])]
        args, kwargs = unflatten(self.flat.spec, given, [t.shape[0] for t in tensors[count:]])
        self.shape_env = tensors[0].fake_mode.shape_env  # type: ignore[attr-defined]
        top = top_level(self.flat)
        dims = enumerate(length_dims(self.flat, self.real))
        sizes = [tensors[i].shape[d] for i, where in dims if i in top for d in where]
        before = attributes(model)
        with self.watching(model, sizes), as_eager(), Deciding(tensors, self.real) as deciding:
            try:
                out = model(*args, **kwargs)
            finally:
                self.decisions = tuple(deciding.decisions)
            after = attributes(model)
            changed = assigned(before, after)
            self.memoised = frozenset(p for p in changed if _of_weights(deciding, after[p]))
            self.kept = changed - self.memoised
        self.result = flatten(out)
        renew(model)
        return self.result.tensors


def _of_weights(deciding: Deciding, held: Any) -> bool:
    return all(isinstance(part, Tensor) and deciding.of_weights(part) for part in parts(held))


def prepare(model: nn.Module, opaque: Sequence[str], distrusted: Collection[str] = ()) -> nn.Module:
    """A shadow of ``model`` with its experts and the named submodules as leaves; without what earlier calls
    left in the ``distrusted`` attributes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying an exported module's tree specs
        traced = shadow(model)
    forget(traced, distrusted)
    for path in opaque:  # first: their copies keep the model's own experts
        if not any(path.startswith(f"{other}.") for other in opaque):
            install(traced.get_submodule(path), _kind(path))
    for module in traced.modules():
        config = getattr(module, "config", None)
        if hasattr(type(module).forward, "__wrapped__") and hasattr(module, "_is_expert_parallel"):
            own = getattr(config, "_experts_implementation_internal", None)
            module._fpcompile_experts = own or "eager"  # type: ignore[assignment]
            config._fpcompile_leaf_experts = True  # type: ignore[union-attr]
    for module in traced.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_fpcompile_leaf_experts", False):
            config._experts_implementation_internal = _PACKED  # type: ignore[union-attr]
    return traced


def _kind(path: str) -> str:
    """``model.layers.3.mamba`` -> ``mamba``."""
    return next((p for p in reversed(path.split(".")) if not p.isdigit()), path)


def export(
    wrapper: nn.Module, tensors: tuple[Tensor, ...], dims: list[dict[int, Any] | None] | None
) -> torch.export.ExportedProgram:
    shapes = None if dims is None else {"tensors": tuple(dims)}
    quiet = logging.getLogger("torch._export.non_strict_utils"), logging.getLogger("torch.export")
    levels = [q.level for q in quiet]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for q in quiet:
                q.setLevel(logging.CRITICAL)
            unmarked = tuple(t.detach() for t in tensors)  # export leaves its marks on what it is given
            return torch.export.export(wrapper, unmarked, dynamic_shapes=shapes, strict=False)
        finally:
            for q, level in zip(quiet, levels, strict=True):
                q.setLevel(level)

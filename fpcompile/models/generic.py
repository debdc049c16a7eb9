"""Data of the generic route: one trace of a model between flat inputs and flat outputs, and when it holds.

What the caller passes (ids, masks, pixels, a cache) is flattened (:mod:`fpcompile.models.generic_tree`), and
what the model returns is flattened again, so that every state is an explicit input and output. Lengths are
symbols where the trace allows; a *variant* is one trace with the conditions under which it holds: the spec of
the inputs, the sizes that became constants, the guards on the symbols, the decisions on values
(:mod:`fpcompile.models.generic_decisions`). Tracing is :mod:`fpcompile.models.generic_trace`'s part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from fpcompile.errors import InvalidInputError
from fpcompile.models import leaves
from fpcompile.models.generic_decisions import Decision
from fpcompile.models.generic_shapes import Promises
from fpcompile.models.generic_tree import At, Flat, Node, Plain, Spec, flatten

_AUTO = torch.export.Dim.AUTO


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Guards:
    """When a variant's graph holds for a call.

    ``shapes`` and ``strides`` are those of the flat inputs as expressions; ``conditions`` must be true;
    ``bounds`` limits each symbol. ``default_dtype`` is torch's at the trace, whose constants have it.
    """

    spec: Spec
    shapes: tuple[tuple[sympy.Expr, ...], ...]
    strides: tuple[tuple[sympy.Expr, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    conditions: tuple[sympy.Basic, ...]
    bounds: tuple[tuple[sympy.Symbol, sympy.Expr, sympy.Expr], ...]
    decisions: tuple[Decision, ...]
    default_dtype: torch.dtype

    def bind(
        self, flat: Flat, tensors: Sequence[Tensor], default_dtype: torch.dtype
    ) -> dict[sympy.Symbol, int] | None:
        """The symbols' values for a call, or None when the graph does not hold for it. ``default_dtype`` is
        torch's when the call, or the sequence that it continues, began.
        """
        if flat.spec != self.spec or tuple(t.dtype for t in tensors) != self.dtypes:
            return None
        if default_dtype is not self.default_dtype:
            return None
        values: dict[sympy.Symbol, int] = {}
        pairs: list[tuple[sympy.Expr, int]] = []
        for shape, strides, tensor in zip(self.shapes, self.strides, tensors, strict=True):
            if len(shape) != tensor.dim():
                return None
            pairs += zip(shape, tensor.shape, strict=True)
            pairs += [(e, r) for e, r, n in zip(strides, tensor.stride(), tensor.shape, strict=True) if n > 1]
            for size, real in zip((*shape, *strides), (*tensor.shape, *tensor.stride()), strict=True):
                if isinstance(size, sympy.Symbol):
                    values.setdefault(size, int(real))
        if any(size.subs(values) != real for size, real in pairs):
            return None
        for symbol, low, high in self.bounds:
            if symbol in values and not low <= values[symbol] <= high:
                return None
        if any(c.subs(values) != sympy.true for c in self.conditions):
            return None
        return values if all(d.holds(tensors) for d in self.decisions) else None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class GenericBindings:
    """What a variant is bound to: weights, leaves, guards, and how to rebuild the model's own output.

    ``inputs`` are the placeholders' names in the order of the flat inputs; ``outputs`` what the flat outputs
    are: names of nodes. ``counts`` are expressions in the symbols. ``growing`` are the inputs that a model
    replaces and does not write into: the keys and values of a cache, unless that is a static one.
    ``tables`` are the inputs that rows of a table are looked up by as they are: index, argument, rows.
    ``kept`` are the attributes that the trace assigned tensors to, ``memoised`` those that it computed from
    weights alone, ``distrusted`` those that it was not allowed to read (:mod:`fpcompile.models.kept`).
    """

    weights: dict[str, tuple[str, Tensor]]
    leaves: tuple[leaves.Leaf, ...]
    model: nn.Module
    guards: Guards
    inputs: tuple[str, ...]
    result: Spec
    counts: tuple[Any, ...]
    opaque: tuple[str, ...]
    notes: tuple[str, ...]
    length: sympy.Symbol | None
    growing: frozenset[int]
    tables: tuple[tuple[int, str, int], ...]
    kept: frozenset[str]
    memoised: frozenset[str]
    distrusted: frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class GenericCapture(GenericBindings):
    """One variant with its graph."""

    graph: fx.GraphModule
    attention: tuple[Any, ...] = ()

    @property
    def bindings(self) -> GenericBindings:
        """What stays when the graph has become segments."""
        return GenericBindings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(GenericBindings)})


def pack(tree: Any, device: torch.device) -> tuple[Flat, tuple[Tensor, ...]]:
    """A call's arguments as flat tensors; counts follow as the sizes of empty tensors."""
    flat = flatten(tree)
    tensors = tuple(t.to(device) for t in flat.tensors)
    return flat, (*tensors, *(torch.empty(int(c), 0, device=device) for c in flat.counts))


def refuse_arrays(spec: Spec, where: str = "the call") -> None:
    """Raise :class:`InvalidInputError` for an array that is no tensor: it would become a constant."""
    if isinstance(spec, Node):
        for key, part in spec.entries:
            refuse_arrays(part, where if key is None else str(key))
    elif isinstance(spec, Plain) and hasattr(spec.value, "__array__") and getattr(spec.value, "ndim", False):
        raise InvalidInputError(
            f"{where} holds an array that is no tensor",
            expected="torch tensors",
            got=type(spec.value).__name__,
            remedy="convert it with torch.as_tensor",
        )


def dynamic_dims(
    flat: Flat, tensors: Sequence[Tensor], promised: Promises = MappingProxyType({})
) -> list[dict[int, Any] | None]:
    """Which sizes to keep symbolic: what the caller promised, and where nothing is promised the batch
    everywhere and the lengths of ids, masks, features and caches.
    """
    lengths = length_dims(flat, tensors)
    shapes: list[dict[int, Any] | None] = []
    for i, tensor in enumerate(tensors):
        if i in promised:
            shapes.append(dict(promised[i].dims) or None)
            continue
        dims = {0, *lengths[i]} if i < len(flat.tensors) and tensor.dim() else set(lengths[i])
        shapes.append({d: _AUTO for d in sorted(dims) if tensor.shape[d] > 1} or None)
    return shapes


def length_dims(flat: Flat, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """The dimensions of each flat input that are lengths."""
    names, top = names_of(flat.spec), top_level(flat)
    found: list[tuple[int, ...]] = []
    for i, tensor in enumerate(tensors):
        rank = tensor.dim()
        if i >= len(flat.tensors):
            found.append((0,))
        elif i in top:
            integral = not tensor.is_floating_point()
            found.append((1,) if rank in ((2,) if integral else (2, 3)) else ())
        else:
            found.append((rank - 2,) if rank >= 3 and names.get(i) in GROWING else ())
    return found


GROWING = frozenset({"keys", "values", "key_cache", "value_cache", "indexer_keys"})


def names_of(spec: Spec, key: Any = None) -> dict[int, Any]:
    """For each tensor of a spec, the name of the attribute or entry that holds it."""
    if isinstance(spec, At):
        return {spec.index: key}
    found: dict[int, Any] = {}
    if isinstance(spec, Node):
        for name, part in spec.entries:
            found |= names_of(part, key if name is None else name)
    return found


def top_level(flat: Flat) -> set[int]:
    """Indices of the tensors that are arguments by themselves, not inside a cache or a list."""
    found: set[int] = set()
    if isinstance(flat.spec, Node):
        for _, arguments in flat.spec.entries:
            if isinstance(arguments, Node):
                found |= {s.index for _, s in arguments.entries if isinstance(s, At)}
    return found

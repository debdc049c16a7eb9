"""Opaque leaves of the generic route: a submodule as one operator (tensors, state) -> (tensors, state').

A submodule that loops over positions in Python or branches on values cannot be traced with symbolic lengths.
It is *probed* instead: run on made-up tensors of the right shapes, at its own size and at larger ones, to
learn what it returns, which caches it changes, and how the shapes of both depend on the lengths (linearly,
or it is refused). In the graph it is one ``fpcompile::leaf`` node; caches go in and come out as tensors.

Words: a *probe* is one such run. *Symbols* are the free lengths of the trace; an *affine* size is
``constant + sum(slope * symbol)`` with integer slopes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from fpcompile.models.generic_tree import Flat, Node, Plain, Spec, flatten, unflatten
from fpcompile.models.kept import assigned, attributes
from fpcompile.models.leaves import Leaf, Recipe, emit

_STEPS = (1, 16, 64)


class LeafRefusedError(Exception):
    """The submodule cannot be an opaque leaf; carries the reason."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """A size that depends on the symbols as ``constant + sum(slopes[s] * s)``."""

    constant: int
    slopes: Mapping[sympy.Symbol, int]

    def at(self, values: Mapping[sympy.Symbol, Any]) -> Any:
        """Its value, an int or a SymInt."""
        result: Any = self.constant
        for symbol, slope in self.slopes.items():
            result = result + (values[symbol] if slope == 1 else values[symbol] * slope)
        return result


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one probe gave: the tree behind it, which of its tensors are inputs that did not change, and the
    attributes of the submodule that it assigned tensors to.
    """

    flat: Flat
    inputs: dict[int, int]  # index in flat.tensors -> index of the input
    mutated: frozenset[int]
    kept: frozenset[str]

    @property
    def fresh(self) -> list[int]:
        """Indices in ``flat.tensors`` of the tensors that the submodule made."""
        return [i for i in range(len(self.flat.tensors)) if i not in self.inputs]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Signature:
    """How a leaf is called: the spec of its arguments, and what is known of its results. ``constants`` are
    the plain values among them, which the graph has from the probe.
    """

    module: nn.Module
    spec: Spec
    arguments: int
    mutated: frozenset[int]
    shapes: tuple[tuple[Affine, ...], ...]
    sizes: tuple[tuple[sympy.Expr | int, ...], ...]
    orders: tuple[tuple[int, ...], ...]
    copies: bool
    kept: frozenset[str] = frozenset()
    constants: tuple[Any, ...] = ()

    def run(self, tensors: Sequence[Tensor], lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Execute on real tensors (counts come as the sizes of empty ones); the fresh tensors."""
        values = _bind(self.sizes, tensors)
        given = [t.clone() if i in self.mutated else t for i, t in enumerate(tensors[: self.arguments])]
        counts = [int(t.shape[0]) for t in tensors[self.arguments :]]
        outcome = _execute(self.module, self.spec, given, counts, self.mutated, self.copies)
        fresh = [outcome.flat.tensors[i] for i in outcome.fresh]
        if _constants(outcome.flat) != self.constants:
            raise RuntimeError(
                f"an opaque leaf returned {_constants(outcome.flat)}, {self.constants} expected"
            )
        if len(fresh) != len(self.shapes):
            raise RuntimeError(f"an opaque leaf returned {len(fresh)} tensors, {len(self.shapes)} expected")
        for tensor, shape in zip(fresh, self.shapes, strict=True):
            expected = [int(a.at(values)) for a in shape]
            if list(tensor.shape) != expected:
                raise RuntimeError(f"an opaque leaf returned {list(tensor.shape)}, {expected} expected")
        owned = {t.untyped_storage().data_ptr() for t in tensors}
        copied = (t.clone() if t.untyped_storage().data_ptr() in owned else t for t in fresh)
        return tuple(_laid_out(t, order) for t, order in zip(copied, self.orders, strict=True))


def _order(strides: Sequence[int]) -> tuple[int, ...]:
    """Dimensions from the outermost in memory to the innermost: later kernels round accordingly."""
    return tuple(sorted(range(len(strides)), key=lambda d: (-int(strides[d]), d)))


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(d) for d in range(len(order))]


def _laid_out(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """``tensor`` dense in memory, its dimensions in ``order``."""
    return tensor.permute(list(order)).contiguous().permute(_inverse(order))


def _bind(sizes: Sequence[Sequence[sympy.Expr | int]], tensors: Sequence[Tensor]) -> dict[sympy.Symbol, int]:
    values: dict[sympy.Symbol, int] = {}
    for shape, tensor in zip(sizes, tensors, strict=True):
        for size, real in zip(shape, tensor.shape, strict=True):
            found = _shifted(size)
            if found is not None:
                values.setdefault(found[0], int(real) - found[1])
    return values


def _shifted(size: sympy.Expr | int) -> tuple[sympy.Symbol, int] | None:
    """A size of the form ``symbol + constant``, as that pair."""
    symbols = list(getattr(size, "free_symbols", ()))
    if len(symbols) != 1:
        return None
    rest = size - symbols[0]
    return (symbols[0], int(rest)) if rest.is_Integer else None


def _execute(
    module: nn.Module,
    spec: Spec,
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    mutated: frozenset[int],
    copies: bool,
) -> Outcome:
    target = copy.deepcopy(module, {id(p): p for p in module.parameters()}) if copies else module
    arguments = unflatten(spec, tensors, counts)
    known = flatten(arguments).containers
    versions = [t._version for t in tensors]
    before = attributes(target) if copies else {}
    with torch.no_grad():
        result = target(*arguments[0], **arguments[1])
    changed = frozenset(i for i, t in enumerate(tensors) if t._version != versions[i])
    flat = flatten((arguments, result), known)
    position = {id(t): i for i, t in enumerate(tensors) if i not in changed | mutated}
    inputs = {i: position[id(t)] for i, t in enumerate(flat.tensors) if id(t) in position}
    kept = assigned(before, attributes(target)) if copies else frozenset[str]()
    return Outcome(flat, inputs, changed | mutated, kept)


class _Prober:
    """Runs a submodule on made-up tensors of given sizes."""

    def __init__(self, module: nn.Module, spec: Spec, tensors: Sequence[Tensor], counts: Sequence[Any]):
        self.module, self.spec = module, spec
        self.kinds = [(t.dtype, t.device) for t in tensors]
        self.sizes = tuple(tuple(_expr(s) for s in t.shape) for t in tensors)
        self.counts = tuple(_expr(c) for c in counts)
        sizes = [s for shape in (*self.sizes, self.counts) for s in shape]
        free = {f for s in sizes for f in getattr(s, "free_symbols", ())}
        self.symbols = sorted(free, key=str)
        self.hints = _hints([*(s for t in tensors for s in (*t.shape, *t.stride())), *counts])
        strides = [[_value(_expr(s), self.hints) for s in t.stride()] for t in tensors]
        self.orders = tuple(_order(s) for s in strides)

    def probe(self, values: Mapping[sympy.Symbol, int]) -> Outcome:
        """Run on made-up tensors: small random numbers; ones for integers (ids, masks), else zeros."""
        try:
            return self._probe(values, torch.ones)
        except Exception:
            return self._probe(values, torch.zeros)

    def _probe(self, values: Mapping[sympy.Symbol, int], integers: Callable[..., Tensor]) -> Outcome:
        generator = torch.Generator().manual_seed(0)
        made: list[Tensor] = []
        with unset_fake_temporarily(), disable_proxy_modes_tracing():
            for (dtype, device), shape, order in zip(self.kinds, self.sizes, self.orders, strict=True):
                size = [_value(s, values) for s in shape]
                if dtype.is_floating_point:
                    tensor = (torch.randn(size, generator=generator) * 0.1).to(device, dtype)
                else:
                    make = torch.ones if dtype is torch.bool else integers
                    tensor = make(size, dtype=dtype, device=device)
                made.append(_laid_out(tensor, order))
            counts = [_value(c, values) for c in self.counts]
            return _execute(self.module, self.spec, made, counts, frozenset(), copies=True)

    def measure(self) -> tuple[Outcome, tuple[tuple[Affine, ...], ...], tuple[Affine, ...]]:
        """Probe at the hints and at larger sizes; the outcome, the fresh tensors' shapes, the counts."""
        base = self.probe(self.hints)
        facts = _facts(base)
        slopes: list[dict[sympy.Symbol, int]] = [{} for _ in facts]
        for symbol in self.symbols:
            for fact, slope in zip(slopes, self._slopes(symbol, base, facts), strict=True):
                if slope:
                    fact[symbol] = slope
        sizes = [
            Affine(fact - sum(k * self.hints[s] for s, k in slope.items()), slope)
            for fact, slope in zip(facts, slopes, strict=True)
        ]
        shapes: list[tuple[Affine, ...]] = []
        for i in base.fresh:
            rank = base.flat.tensors[i].dim()
            shapes.append(tuple(sizes[:rank]))
            sizes = sizes[rank:]
        return base, tuple(shapes), tuple(sizes)

    def _slopes(self, symbol: sympy.Symbol, base: Outcome, facts: list[int]) -> list[int]:
        reason = "it fails at other lengths"
        for step in _STEPS:
            try:
                one = self.probe({**self.hints, symbol: self.hints[symbol] + step})
                two = self.probe({**self.hints, symbol: self.hints[symbol] + 2 * step})
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if one.flat.spec != base.flat.spec or one.inputs != base.inputs:
                reason = "what it returns depends on the length"
                continue
            changes = [b - a for a, b in zip(facts, _facts(one), strict=True)]
            again = [b - a for a, b in zip(facts, _facts(two), strict=True)]
            if all(c % step == 0 and 2 * c == d for c, d in zip(changes, again, strict=True)):
                return [c // step for c in changes]
            reason = "its result's size is not linear in the length"
        raise LeafRefusedError(reason)


def _constants(flat: Flat) -> tuple[Any, ...]:
    """The numbers and texts in a result, as far as they are no counters."""
    assert isinstance(flat.spec, Node)
    return tuple(_plain(flat.spec.entries[1][1]))


def _plain(spec: Spec) -> list[Any]:
    if isinstance(spec, Node):
        return [value for _, part in spec.entries for value in _plain(part)]
    return [spec.value] if isinstance(spec, Plain) and isinstance(spec.value, (bool, int, float, str)) else []


def _facts(outcome: Outcome) -> list[int]:
    """Every size and count of an outcome, in one order."""
    sizes = [int(s) for i in outcome.fresh for s in outcome.flat.tensors[i].shape]
    return sizes + [int(c) for c in outcome.flat.counts]


def _expr(size: Any) -> sympy.Expr | int:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _value(size: sympy.Expr | int, values: Mapping[sympy.Symbol, int]) -> int:
    return int(size.subs(values)) if isinstance(size, sympy.Basic) else int(size)


def _hints(sizes: Sequence[Any]) -> dict[sympy.Symbol, int]:
    found: dict[sympy.Symbol, int] = {}
    for size in sizes:
        if isinstance(size, torch.SymInt):
            for symbol in size.node.expr.free_symbols:
                hint = size.node.shape_env.backed_var_to_val.get(symbol)
                if hint is None:
                    raise LeafRefusedError("a size of its arguments depends on values")
                found[symbol] = int(hint)
    return found


def install(module: nn.Module, kind: str) -> None:
    """Make ``module``, a part of a shadow, emit a leaf instead of running.

    While tracing, raises :class:`LeafRefusedError` for a submodule that cannot be one.
    """
    if hasattr(module, "_fpcompile_opaque"):
        return
    fresh = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    module._fpcompile_opaque = True  # type: ignore[assignment]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _emit(fresh, module, kind, args, kwargs)

    module.forward = forward


def opaque_leaf(signature: Signature, module: nn.Module, kind: str) -> Leaf:
    """The leaf of a signature as it is executed; ``module`` is its place in the shadow."""

    def fake(given: Sequence[Tensor]) -> list[Tensor]:
        raise NotImplementedError("the leaf is executed and not traced")

    weights = list(signature.module.parameters())
    return Leaf(
        name=kind,
        kind=kind,
        run=signature.run,
        fake=fake,
        flops_per_token=2 * sum(p.numel() for p in weights),
        weight_bytes=sum(p.numel() * p.element_size() for p in weights),
        tokenwise=False,
        recipe=Recipe(module, {"signature": signature}),
    )


def _emit(
    module: nn.Module, place: nn.Module, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    flat = flatten((args, kwargs))
    prober = _Prober(module, flat.spec, flat.tensors, flat.counts)
    outcome, shapes, counts = prober.measure()
    dtypes = [outcome.flat.tensors[i].dtype for i in outcome.fresh]
    markers = [flat.tensors[0].new_empty((c, 0)) for c in flat.counts]
    tensors = [*flat.tensors, *markers]
    symbols = _symbols(tensors)
    if any(set(a.slopes) - set(symbols) for a in (*counts, *(a for shape in shapes for a in shape))):
        raise LeafRefusedError("its sizes depend on a length that none of its arguments has")
    orders = tuple(_order(outcome.flat.tensors[i].stride()) for i in outcome.fresh)
    signature = Signature(
        module,
        flat.spec,
        len(flat.tensors),
        outcome.mutated,
        shapes,
        (*prober.sizes, *((c, 0) for c in prober.counts)),
        orders=orders,
        copies=_keeps_state(module) or bool(outcome.kept),
        kept=outcome.kept,
        constants=_constants(outcome.flat),
    )

    def fake(given: Sequence[Tensor]) -> list[Tensor]:
        known = _symbols(given)
        return [
            given[0].new_empty([shape[d].at(known) for d in order], dtype=dtype).permute(_inverse(order))
            for shape, dtype, order in zip(shapes, dtypes, orders, strict=True)
        ]

    leaf = dataclasses.replace(opaque_leaf(signature, place, kind), fake=fake)
    made = dict(zip(outcome.fresh, emit(leaf, tensors), strict=True))
    results = [
        flat.tensors[outcome.inputs[i]] if i in outcome.inputs else made[i]
        for i in range(len(outcome.flat.tensors))
    ]
    after = unflatten(outcome.flat.spec, results, [c.at(symbols) for c in counts], flat.containers)
    return after[1]


def _keeps_state(module: nn.Module) -> bool:
    """Whether a submodule may write to itself: anything beside weights that a forward could replace."""
    return any(True for _ in module.buffers())


def _symbols(tensors: Sequence[Tensor]) -> dict[sympy.Symbol, Any]:
    found: dict[sympy.Symbol, Any] = {}
    for tensor in tensors:
        sizes: list[Any] = list(tensor.shape)
        for size in sizes:
            shifted = _shifted(_expr(size))
            if shifted is not None:
                found.setdefault(shifted[0], size - shifted[1] if shifted[1] else size)
    return found

"""Capture by the generic route: any model as one graph from flat input tensors to flat output tensors.

A model is traced (:mod:`fpcompile.models.generic_trace`) and the graph examined. A submodule in which the
trace fails, which turns a length into a constant, or which draws random numbers, becomes an opaque leaf
(:mod:`fpcompile.models.opaque`) and the trace is repeated; an input that the model writes into is copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from fpcompile.errors import UnsupportedModelError
from fpcompile.models import leaves
from fpcompile.models.ambient import same_draws
from fpcompile.models.capture import weights_of
from fpcompile.models.draws import may_draw
from fpcompile.models.generic import (
    GROWING,
    GenericCapture,
    Guards,
    dynamic_dims,
    names_of,
    refuse_arrays,
    top_level,
)
from fpcompile.models.generic_shapes import Promises, argument_names
from fpcompile.models.generic_trace import Trace, Wrapper, export, prepare
from fpcompile.models.generic_tree import Flat
from fpcompile.models.kept import StaleReadError, holds_cache
from fpcompile.models.opaque import LeafRefusedError
from fpcompile.passes.aliases import mutated_arguments, storage_owners
from fpcompile.passes.context import source
from fpcompile.passes.generic_refusals import (
    breaks_promise,
    broken_promise,
    draws_random_numbers,
    given_up,
    reads_what_was_left,
)
from fpcompile.passes.tables import looked_up

_ATTEMPTS = 24


@dataclasses.dataclass(slots=True)
class _Attempt:
    """What the next trace is tried with."""

    opaque: list[str]
    refused: dict[str, str]
    for_length: set[str]
    dynamic: bool = True
    cloned: frozenset[int] = frozenset()


def capture_generic(
    model: nn.Module,
    flat: Flat,
    tensors: tuple[Tensor, ...],
    promised: Promises = MappingProxyType({}),
    opaque: Sequence[str] = (),
    kept: frozenset[str] = frozenset(),
) -> GenericCapture:
    """A variant for the call ``tensors`` (see :func:`fpcompile.models.generic.pack`); ``promised`` says which
    sizes of some inputs must stay symbolic; ``opaque`` are submodules that an earlier variant made opaque:
    the trace that fails on them is not tried again. ``kept`` are attributes that earlier variants assigned: a
    call that passes a cache must not read them. The model is left as found.

    Raises :class:`UnsupportedModelError` when neither symbolic nor constant lengths can be traced, with or
    without opaque leaves, and :class:`InvalidInputError` for arrays that are no tensors.
    """
    attempt = _Attempt(list(dict.fromkeys([*opaque, *_rewritten(model)])), {}, set(opaque))
    refuse_arrays(flat.spec)
    distrusted = kept if holds_cache(flat.spec) else frozenset[str]()
    for _ in range(_ATTEMPTS):
        default_dtype = torch.get_default_dtype()  # of the process: other threads may set it meanwhile
        traced = prepare(model, attempt.opaque, distrusted)
        wrapper = Wrapper(traced, flat, tensors, attempt.cloned).eval()
        trace = wrapper.trace
        try:
            with leaves.collecting() as collected, same_draws(tensors[0].device):
                dims = dynamic_dims(flat, tensors, promised) if attempt.dynamic else None
                exported = export(wrapper, tensors, dims)
        except StaleReadError as error:
            raise reads_what_was_left(model, str(error)) from error
        except Exception as error:
            if torch.get_default_dtype() is not default_dtype:
                continue
            if promised and breaks_promise(error):
                if _worth_a_leaf(model, attempt, trace):
                    continue
                raise broken_promise(model, error, trace, promised) from error
            if not _try_again(model, attempt, trace, error):
                raise given_up(model, flat, tensors, error) from error
            continue
        if torch.get_default_dtype() is not default_dtype:
            continue
        if attempt.dynamic and _worth_a_leaf(model, attempt, trace):
            continue
        drawing = _random_module(exported)
        if drawing is not None:
            _add_or_refuse(model, attempt, *drawing)
            continue
        written = _written_inputs(exported, len(tensors))
        if written - attempt.cloned:
            attempt.cloned |= written
            continue
        return _finish(traced, exported, trace, flat, tuple(collected), attempt, distrusted, default_dtype)
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be traced",
        reason=f"still failing after {_ATTEMPTS} attempts; opaque: {attempt.opaque[-3:]}",
    )


def _rewritten(model: nn.Module) -> list[str]:
    """Rotary modules that write their frequencies in place in every call: leaves, which run on copies."""
    return [path for path, module in model.named_modules() if "longrope" in leaves.rope_kinds(module)]


def _try_again(model: nn.Module, attempt: _Attempt, trace: Trace, error: Exception) -> bool:
    """Choose the next attempt: an opaque leaf, or constant lengths; False when there is none left."""
    path = next((p for p in reversed(trace.stack) if p), "")
    if isinstance(error, LeafRefusedError) and path in attempt.opaque:
        family = [p for p in attempt.opaque if _class(model, p) is _class(model, path)]
        attempt.opaque = [p for p in attempt.opaque if p not in family]
        attempt.refused |= dict.fromkeys(family, str(error))
        if path in attempt.for_length:
            return True  # the trace itself succeeds, with a constant length
    while path and path not in attempt.opaque:
        if path not in attempt.refused and _acceptable(model, path):
            _add(model, attempt, path)
            return True
        path = path.rpartition(".")[0]
    if not attempt.dynamic:
        return False
    attempt.dynamic, attempt.opaque, attempt.refused = False, [], {}
    attempt.for_length.clear()
    return True


def _class(model: nn.Module, path: str) -> type[nn.Module]:
    return type(model.get_submodule(path))


def _add(model: nn.Module, attempt: _Attempt, path: str) -> list[str]:
    """Make the submodule and its siblings of the same class opaque; their paths."""
    kind = _class(model, path)
    known = {*attempt.opaque, *attempt.refused}
    family = [p for p, m in model.named_modules() if type(m) is kind and p not in known]
    attempt.opaque += family
    return family


def _acceptable(model: nn.Module, path: str) -> bool:
    """Whether a submodule may be opaque: not a stack of layers that holds half of the weights."""
    module = model.get_submodule(path)
    if isinstance(module, nn.ModuleList):
        return False
    stacked = any(isinstance(m, nn.ModuleList) and len(m) > 1 for m in module.modules())
    share = sum(p.numel() for p in module.parameters()) / max(1, sum(p.numel() for p in model.parameters()))
    return not (stacked and share > 0.3) and share < 0.6


def _worth_a_leaf(model: nn.Module, attempt: _Attempt, trace: Trace) -> bool:
    """Whether the trace turned a length into a constant inside a submodule that can be opaque instead."""
    path = trace.specialised
    if path and path not in attempt.refused and path not in attempt.opaque and _acceptable(model, path):
        attempt.for_length.update(_add(model, attempt, path))
        return True
    return False


def _random_module(exported: torch.export.ExportedProgram) -> tuple[str, str, str] | None:
    """Submodule, node and line of an operator that draws random numbers, if there is one.

    A seed that the model's own code sets before it is no part of a graph.
    """
    for node in exported.graph_module.graph.nodes:
        if may_draw(node):
            return source(node).module, node.name, source(node).line
    return None


def _add_or_refuse(model: nn.Module, attempt: _Attempt, path: str, node: str, line: str) -> None:
    """Make the submodule opaque, or the nearest one around it that can be."""
    inner = path
    while inner:
        if inner not in attempt.refused and inner not in attempt.opaque and _acceptable(model, inner):
            _add(model, attempt, inner)
            return
        inner = inner.rpartition(".")[0]
    raise draws_random_numbers(model, node=node, path=path, line=line)


def _written_inputs(exported: torch.export.ExportedProgram, count: int) -> frozenset[int]:
    """Flat inputs whose memory some node writes into."""
    graph = exported.graph_module.graph
    placeholders = [n.name for n in graph.nodes if n.op == "placeholder"][-count:] if count else []
    owners = storage_owners(graph)
    written = {
        owners.get(w.name) for n in graph.nodes if n.op == "call_function" for w in mutated_arguments(n)
    }
    return frozenset(i for i, name in enumerate(placeholders) if name in written)


def _finish(
    traced: nn.Module,
    exported: torch.export.ExportedProgram,
    trace: Trace,
    flat: Flat,
    collected: tuple[leaves.Leaf, ...],
    attempt: _Attempt,
    distrusted: frozenset[str],
    default_dtype: torch.dtype,
) -> GenericCapture:
    graph = exported.graph_module.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"][-len(trace.real) :]
    env = trace.shape_env
    shapes = tuple(tuple(_expression(s) for s in n.meta["val"].shape) for n in placeholders)
    strides = tuple(tuple(_expression(s) for s in n.meta["val"].stride()) for n in placeholders)
    symbols = sorted({f for shape in (*shapes, *strides) for s in shape for f in s.free_symbols}, key=str)
    conditions = [g.expr.xreplace(env.replacements) for g in env.guards]
    bounds = tuple(
        (s, env.var_to_range[s].lower, env.var_to_range[s].upper) for s in symbols if s in env.var_to_range
    )
    assert trace.result is not None
    rows, names = looked_up(graph), argument_names(traced, flat)
    notes = [f"opaque: {p}" for p in attempt.opaque]
    if not attempt.dynamic:
        notes.append("every length is a constant of this variant")
    elif trace.specialised is not None:
        notes.append(f"a length became a constant in {trace.specialised or 'the model'}")
    return GenericCapture(
        graph=_rebuilt(exported.graph_module),
        weights=weights_of(exported),
        leaves=collected,
        model=traced,
        guards=Guards(
            flat.spec,
            shapes,
            strides,
            tuple(t.dtype for t in trace.real),
            tuple(c for c in conditions if c != sympy.true),
            bounds,
            trace.decisions,
            default_dtype,
        ),
        inputs=tuple(n.name for n in placeholders),
        result=trace.result.spec,
        counts=tuple(_expression(c) for c in trace.result.counts),
        opaque=tuple(attempt.opaque),
        notes=tuple(notes),
        length=_length(flat, shapes),
        growing=frozenset(i for i, name in names_of(flat.spec).items() if name in GROWING) - attempt.cloned,
        tables=tuple((i, names[i], rows[n.name]) for i, n in enumerate(placeholders) if n.name in rows),
        memoised=trace.memoised,
        kept=trace.kept | _kept_in_leaves(traced, collected),
        distrusted=distrusted,
    )


def _kept_in_leaves(traced: nn.Module, collected: Sequence[leaves.Leaf]) -> frozenset[str]:
    """Attributes that opaque submodules assign, by their paths in the model."""
    paths = {id(module): path for path, module in traced.named_modules()}
    found: set[str] = set()
    for leaf in collected:
        signature = leaf.recipe.arguments.get("signature") if leaf.recipe is not None else None
        if signature is not None:
            found |= {f"{paths[id(leaf.recipe.module)]}.{name}" for name in signature.kept}  # type: ignore[union-attr]
    return frozenset(found)


def _rebuilt(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph anew: export can leave nodes whose uses are not recorded."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    return fx.GraphModule(module, graph)


def _length(flat: Flat, shapes: Sequence[Sequence[sympy.Expr]]) -> sympy.Symbol | None:
    """The symbol of the main length: dimension 1 of the first argument that has one."""
    for i in sorted(top_level(flat)):
        if len(shapes[i]) >= 2 and isinstance(shapes[i][1], sympy.Symbol):
            return shapes[i][1]
    return None


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))

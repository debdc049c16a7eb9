"""Capture by the generic route: any model as one graph from flat input tensors to flat output tensors.

What the caller passes (ids, masks, pixels, a cache) is flattened (:mod:`fpcompile.models.generic_tree`),
traced by :func:`torch.export.export` on a shadow, and what the model returns is flattened again, so that
every state is an explicit input and output. Lengths are symbols where the trace allows; a *variant* is one
trace with the conditions under which it holds: the spec of the inputs, the sizes that became constants, the
guards on the symbols, the decisions on values (:mod:`fpcompile.models.generic_decisions`).

A submodule in which the trace fails, or which turns a length into a constant, becomes an opaque leaf
(:mod:`fpcompile.models.opaque`) and the trace is repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from fpcompile.errors import UnsupportedModelError
from fpcompile.models import leaves
from fpcompile.models.attention import NAME as _PACKED
from fpcompile.models.generic_decisions import Deciding, Decision, as_eager
from fpcompile.models.generic_tree import At, Flat, Node, Spec, flatten, unflatten
from fpcompile.models.opaque import LeafRefusedError, install
from fpcompile.models.shadow import shadow

_ATTEMPTS = 24
_AUTO = torch.export.Dim.AUTO


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Guards:
    """When a variant's graph holds for a call.

    ``shapes`` and ``strides`` are those of the flat inputs as expressions; ``conditions`` must be true;
    ``bounds`` limits each symbol.
    """

    spec: Spec
    shapes: tuple[tuple[sympy.Expr, ...], ...]
    strides: tuple[tuple[sympy.Expr, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    conditions: tuple[sympy.Basic, ...]
    bounds: tuple[tuple[sympy.Symbol, sympy.Expr, sympy.Expr], ...]
    decisions: tuple[Decision, ...]

    def bind(self, flat: Flat, tensors: Sequence[Tensor]) -> dict[sympy.Symbol, int] | None:
        """The symbols' values for a call, or None when the graph does not hold for it."""
        if flat.spec != self.spec or tuple(t.dtype for t in tensors) != self.dtypes:
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
class GenericCapture:
    """One variant: graph, weights, leaves, guards, and how to rebuild the model's own output.

    ``inputs`` are the placeholders' names in the order of the flat inputs; ``outputs`` what the flat outputs
    are: names of nodes. ``counts`` are expressions in the symbols. ``growing`` are the inputs that every
    model replaces and none writes into: the keys and values of a cache.
    """

    graph: fx.GraphModule
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
    attention: tuple[Any, ...] = ()


def pack(tree: Any, device: torch.device) -> tuple[Flat, tuple[Tensor, ...]]:
    """A call's arguments as flat tensors; counts follow as the sizes of empty tensors."""
    flat = flatten(tree)
    tensors = tuple(t.to(device) for t in flat.tensors)
    return flat, (*tensors, *(torch.empty(int(c), 0, device=device) for c in flat.counts))


class _Wrapper(nn.Module):
    """The model between flat inputs and flat outputs. ``note`` collects what one trace leaves behind."""

    def __init__(self, model: nn.Module, flat: Flat, real: Sequence[Tensor], cloned: frozenset[int]) -> None:
        super().__init__()
        self.model = model
        self._trace = _Trace(flat, real, cloned)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._trace.run(self.model, tensors)


class _Trace:
    """State of one trace, outside the wrapper's attributes, which export restores."""

    def __init__(self, flat: Flat, real: Sequence[Tensor], cloned: frozenset[int]) -> None:
        self.flat, self.real, self.cloned = flat, real, cloned
        self.stack: list[str] = []
        self.specialised: str | None = None
        self.result: Flat | None = None
        self.decisions: tuple[Decision, ...] = ()
        self.lengths: set[sympy.Symbol] = set()
        self.shape_env: Any = None

    def run(self, model: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        count = len(self.flat.tensors)
        given = [t.clone() if i in self.cloned else t for i, t in enumerate(tensors[:count])]
        args, kwargs = unflatten(self.flat.spec, given, [t.shape[0] for t in tensors[count:]])
        self.shape_env = tensors[0].fake_mode.shape_env  # type: ignore[attr-defined]
        top = _top_level(self.flat)
        for i, dims in enumerate(length_dims(self.flat, self.real)):
            sizes: list[Any] = [tensors[i].shape[d] for d in dims if i in top]
            self.lengths |= {s.node.expr for s in sizes if isinstance(s, torch.SymInt)}
        with self._watching(model), as_eager(), Deciding(tensors, self.real) as deciding:
            try:
                out = model(*args, **kwargs)
            finally:
                self.decisions = tuple(deciding.decisions)
        self.result = flatten(out)
        return self.result.tensors

    def _blame(self, path: str) -> None:
        """Remember the first submodule in whose own code a length became a constant."""
        gone = [s for s in self.lengths if self.shape_env.replacements.get(s, s).is_number]
        if gone:
            self.lengths.difference_update(gone)
            self.specialised = self.specialised or path

    @contextlib.contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        handles: list[RemovableHandle] = []

        def enter(path: str) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                self._blame(self.stack[-1] if self.stack else "")
                self.stack.append(path)

            return hook

        def leave(path: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                while self.stack and self.stack.pop() != path:
                    pass
                self._blame(path)

            return hook

        for path, module in model.named_modules():
            handles += [
                module.register_forward_pre_hook(enter(path)),
                module.register_forward_hook(leave(path)),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def prepare(model: nn.Module, opaque: Sequence[str]) -> nn.Module:
    """A shadow of ``model`` with its experts and the named submodules as leaves."""
    traced = shadow(model)
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


def dynamic_dims(flat: Flat, tensors: Sequence[Tensor]) -> list[dict[int, Any] | None]:
    """Which sizes to keep symbolic: the batch everywhere, the lengths of ids, masks, features and caches."""
    lengths = length_dims(flat, tensors)
    shapes: list[dict[int, Any] | None] = []
    for i, tensor in enumerate(tensors):
        dims = {0, *lengths[i]} if i < len(flat.tensors) and tensor.dim() else set(lengths[i])
        shapes.append({d: _AUTO for d in sorted(dims) if tensor.shape[d] > 1} or None)
    return shapes


def length_dims(flat: Flat, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """The dimensions of each flat input that are lengths."""
    names, top = _names(flat.spec), _top_level(flat)
    found: list[tuple[int, ...]] = []
    for i, tensor in enumerate(tensors):
        rank = tensor.dim()
        if i >= len(flat.tensors):
            found.append((0,))
        elif i in top:
            integral = not tensor.is_floating_point()
            found.append((1,) if rank in ((2,) if integral else (2, 3)) else ())
        else:
            found.append((rank - 2,) if rank >= 3 and names.get(i) in _GROWING else ())
    return found


_GROWING = frozenset({"keys", "values", "key_cache", "value_cache", "indexer_keys"})


def _names(spec: Spec, key: Any = None) -> dict[int, Any]:
    """For each tensor of a spec, the name of the attribute or entry that holds it."""
    if isinstance(spec, At):
        return {spec.index: key}
    found: dict[int, Any] = {}
    if isinstance(spec, Node):
        for name, part in spec.entries:
            found |= _names(part, key if name is None else name)
    return found


def _top_level(flat: Flat) -> set[int]:
    """Indices of the tensors that are arguments by themselves, not inside a cache or a list."""
    found: set[int] = set()
    if isinstance(flat.spec, Node):
        for _, arguments in flat.spec.entries:
            if isinstance(arguments, Node):
                found |= {s.index for _, s in arguments.entries if isinstance(s, At)}
    return found


@dataclasses.dataclass(slots=True)
class _Attempt:
    """What the next trace is tried with."""

    opaque: list[str]
    refused: dict[str, str]
    for_length: set[str]
    dynamic: bool = True
    cloned: frozenset[int] = frozenset()


def capture_generic(model: nn.Module, flat: Flat, tensors: tuple[Tensor, ...]) -> GenericCapture:
    """A variant for the call ``tensors`` (see :func:`pack`). The model is left as found.

    Raises :class:`UnsupportedModelError` when neither symbolic nor constant lengths can be traced, with or
    without opaque leaves.
    """
    attempt = _Attempt([], {}, set())
    for _ in range(_ATTEMPTS):
        traced = prepare(model, attempt.opaque)
        wrapper = _Wrapper(traced, flat, tensors, attempt.cloned).eval()
        trace = wrapper._trace
        try:
            with leaves.collecting() as collected:
                exported = _export(wrapper, tensors, dynamic_dims(flat, tensors) if attempt.dynamic else None)
        except Exception as error:
            _after_failure(model, attempt, trace, error)
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
        return _finish(traced, exported, trace, flat, tuple(collected), attempt)
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be traced",
        reason=f"still failing after {_ATTEMPTS} attempts; opaque: {attempt.opaque[-3:]}",
    )


def _export(
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


def _after_failure(model: nn.Module, attempt: _Attempt, trace: _Trace, error: Exception) -> None:
    """Choose the next attempt: an opaque leaf, constant lengths, or give up."""
    path = next((p for p in reversed(trace.stack) if p), "")
    if isinstance(error, LeafRefusedError) and path in attempt.opaque:
        family = [p for p in attempt.opaque if _class(model, p) is _class(model, path)]
        attempt.opaque = [p for p in attempt.opaque if p not in family]
        attempt.refused |= dict.fromkeys(family, str(error))
        if path in attempt.for_length:
            return  # the trace itself succeeds, with a constant length
    while path and path not in attempt.opaque:
        if path not in attempt.refused and _acceptable(model, path):
            _add(model, attempt, path)
            return
        path = path.rpartition(".")[0]
    if attempt.dynamic:
        attempt.dynamic, attempt.opaque, attempt.refused = False, [], {}
        attempt.for_length.clear()
        return
    raise explain(model, error) from error


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


def _worth_a_leaf(model: nn.Module, attempt: _Attempt, trace: _Trace) -> bool:
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
    from fpcompile.passes.context import source

    for node in exported.graph_module.graph.nodes:
        tagged = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if tagged and not _draws_nothing(node):
            return source(node).module, node.name, source(node).line
    return None


def _draws_nothing(node: fx.Node) -> bool:
    """Whether an operator that may draw random numbers is called so that it does not: an idle dropout."""
    known = {"train": False, "training": False, "dropout_p": 0.0}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name in known:
            given = node.kwargs.get(argument.name, argument.default_value)
            value = node.args[position] if position < len(node.args) else given
            return bool(value == known[argument.name])
    return False


def _add_or_refuse(model: nn.Module, attempt: _Attempt, path: str, node: str, line: str) -> None:
    """Make the submodule opaque, or the nearest one around it that can be."""
    inner = path
    while inner:
        if inner not in attempt.refused and inner not in attempt.opaque and _acceptable(model, inner):
            _add(model, attempt, inner)
            return
        inner = inner.rpartition(".")[0]
    raise UnsupportedModelError(
        f"{type(model).__name__} draws random numbers while it runs",
        reason="a graph cannot repeat them, and no submodule around them can be opaque",
        node=node,
        module_path=path,
        source_line=line or None,
    )


def _written_inputs(exported: torch.export.ExportedProgram, count: int) -> frozenset[int]:
    """Flat inputs whose memory some node writes into."""
    from fpcompile.passes.aliases import mutated_arguments, storage_owners

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
    trace: _Trace,
    flat: Flat,
    collected: tuple[leaves.Leaf, ...],
    attempt: _Attempt,
) -> GenericCapture:
    from fpcompile.models.capture import weights_of

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
        ),
        inputs=tuple(n.name for n in placeholders),
        result=trace.result.spec,
        counts=tuple(_expression(c) for c in trace.result.counts),
        opaque=tuple(attempt.opaque),
        notes=tuple(notes),
        length=_length(flat, shapes),
        growing=frozenset(i for i, name in _names(flat.spec).items() if name in _GROWING),
    )


def _rebuilt(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph anew: export can leave nodes whose uses are not recorded."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    return fx.GraphModule(module, graph)


def _length(flat: Flat, shapes: Sequence[Sequence[sympy.Expr]]) -> sympy.Symbol | None:
    """The symbol of the main length: dimension 1 of the first argument that has one."""
    for i in sorted(_top_level(flat)):
        if len(shapes[i]) >= 2 and isinstance(shapes[i][1], sympy.Symbol):
            return shapes[i][1]
    return None


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def explain(model: nn.Module, error: Exception) -> UnsupportedModelError:
    """The user's error for a failed trace: the model's line, and what was said there."""
    if isinstance(error, UnsupportedModelError):
        return error
    line = None
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "modeling_" in frame.filename:
            line = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}: {frame.line}"
            break
    reason = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be traced",
        reason=f"{type(error).__name__}: {reason[:300]}",
        source_line=line,
        remedy="see docs/adapters.md: replace the submodule, or report the model with its coverage row",
    )

"""Partition a graph into segments and parts; order is kept. See :mod:`fpcompile.passes.codegen`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import sympy
from torch import Tensor, fx

from fpcompile.ir import Cost, CutReason, Granularity, LiveSet, Part, PartKind, Plan, Route, Segment, Value
from fpcompile.passes.aliases import storage_owners, uncuttable
from fpcompile.passes.codegen import Function, Functions
from fpcompile.passes.columns import is_head
from fpcompile.passes.context import (
    ATTENTION,
    LEAF,
    Context,
    body,
    describe,
    expression,
    source,
    symbols,
    tensors_of,
)
from fpcompile.passes.costs import Names, is_projection
from fpcompile.passes.cuts import run_inputs
from fpcompile.passes.dataflow import live_after
from fpcompile.passes.prepack import PACKED

LENGTHS = ("tokens", "rows")


@dataclasses.dataclass(frozen=True, slots=True)
class Partitioned:
    """A plan and the callables that its graph parts name."""

    plan: Plan
    functions: dict[str, Function]


class Partitioner:
    """Builds the segments of one graph. ``functions`` fills as distinct parts are met."""

    def __init__(self, graph: fx.Graph, ctx: Context) -> None:
        self.graph, self.ctx = graph, ctx
        self.names: Names = symbols(graph)
        self.owners = storage_owners(graph)
        self.by_name = {n.name: n for n in graph.nodes}
        live = live_after(graph, run_inputs(graph))
        self.live = dict(zip((n.name for n in body(graph)), live, strict=True))
        self.bound = uncuttable(graph)
        self.heads = frozenset(n.name for n in body(graph) if self._stands_alone(n))
        self.functions = Functions(lambda node: _spec(node, self.names))

    def segments(self) -> tuple[Segment, ...]:
        """All segments, in order."""
        found: list[Segment] = []
        pending: list[fx.Node] = []
        for node in body(self.graph):
            pending.append(node)
            if node.name in self.ctx.cuts:
                found.append(self._segment(len(found), pending, self.ctx.cuts[node.name]))
                pending = []
        return tuple(found)

    def _segment(self, index: int, nodes: list[fx.Node], reason: CutReason) -> Segment:
        parts = tuple(self._part(group) for group in _split_at_calls(nodes, self.heads))
        live = LiveSet(tuple(self._value(n) for n in self.live[nodes[-1].name]))
        refused = tuple((n.name, self.ctx.refusals[n.name]) for n in nodes[:-1])
        main = max(parts, key=lambda p: weight(p.cost.flops))
        return Segment(index, main.name, self._kind(main, nodes), parts, live, reason, refused)

    def _kind(self, main: Part, nodes: list[fx.Node]) -> str:
        """One word for what a segment mostly does."""
        if main.kind is PartKind.LEAF:
            return self.ctx.capture.leaves[main.call].kind
        if main.kind is PartKind.ATTENTION:
            return "attention"
        return "projection" if any(is_projection(n) for n in nodes) else "pointwise"

    def _value(self, node: fx.Node) -> Value:
        owner = tensors_of(self.by_name[self.owners[node.name]])[0]
        value = tensors_of(node)[0]
        shape = tuple(expression(s, self.names) for s in value.shape)
        return Value(node.name, shape, str(value.dtype), self.owners[node.name], _bytes(owner, self.names))

    def _part(self, nodes: list[fx.Node]) -> Part:
        inside = set(nodes)
        head = nodes[0]
        outputs = [
            n for n in nodes if tensors_of(n) and any(u not in inside for u in n.users) and _is_value(n)
        ]
        cost = sum((self.ctx.costs[n.name] for n in nodes), Cost())
        values, weights, lengths = _external(nodes)
        heaviest = max(nodes, key=lambda n: weight(self.ctx.costs[n.name].flops))
        if head.target is ATTENTION:
            kind, call, key = PartKind.ATTENTION, int(head.args[3]), self._attention_key(head)  # type: ignore[arg-type]
        elif head.target is LEAF:
            kind, call, key = PartKind.LEAF, int(head.args[1]), self._leaf_key(head)  # type: ignore[arg-type]
        else:
            kind, call = PartKind.GRAPH, -1
            key = self.functions.generate(nodes, values, weights, lengths, outputs)
        over, axes = self._tiling(kind, call, values, outputs)
        return Part(
            name=source(heaviest).module or heaviest.name,
            kind=kind,
            function=key,
            inputs=tuple(n.name for n in values),
            params=tuple(self._path(n) for n in weights),
            lengths=tuple(n.name for n in lengths),
            outputs=tuple(n.name for n in outputs),
            call=call,
            cost=cost,
            nodes=describe(nodes),
            over=over,
            axes=axes,
            bound=nodes[-1].name in self.bound,
        )

    def _stands_alone(self, node: fx.Node) -> bool:
        """Whether a node is a head that may be launched by itself: nothing there is written later."""
        return is_head(node, self.ctx) and not {node.name, node.prev.name} & self.bound.keys()

    def _path(self, weight: fx.Node) -> str:
        """A weight's path in the model; packed copies are marked."""
        origin = self.ctx.prepacked.get(weight.name)
        table = self.ctx.capture.weights
        return table[weight.name][0] if origin is None else table[origin][0] + PACKED

    def _tiling(
        self, kind: PartKind, call: int, values: Sequence[fx.Node], outputs: Sequence[fx.Node]
    ) -> tuple[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """The length over which a part may be executed range by range, and where its values run over it."""
        known = self.ctx.axes
        lengths = {known[n.name][1] for n in (*values, *outputs) if n.name in known}
        proven = len(lengths) == 1 and all(n.name in known for n in outputs)
        if kind is PartKind.ATTENTION or not proven:
            return "", ((), ())
        if kind is PartKind.LEAF and not self.ctx.capture.leaves[call].tokenwise:
            return "", ((), ())
        inner, outer = (tuple(known.get(n.name, (-1, ""))[0] for n in group) for group in (values, outputs))
        return lengths.pop(), (inner, outer)

    def _attention_key(self, node: fx.Node) -> str:
        call = self.ctx.capture.attention[int(node.args[3])]  # type: ignore[arg-type]
        q, k, v = (tensors_of(n)[0] for n in node.all_input_nodes)
        dims = f"{call.heads}x{q.shape[-1]},{call.kv_heads}x{k.shape[-1]},{v.shape[-1]}"
        plain = {n: v for n, v in sorted(call.kwargs.items()) if isinstance(v, (bool, int, float, str))}
        return f"attention[{call.implementation},{call.mask},{dims},{q.dtype},{plain}]"

    def _leaf_key(self, node: fx.Node) -> str:
        leaf = self.ctx.capture.leaves[int(node.args[1])]  # type: ignore[arg-type]
        shapes = [_spec(n, self.names) for n in node.all_input_nodes]
        division = leaf.division
        ranges = "" if division is None else f",{division.experts},{division.width},{division.adding}"
        return f"leaf[{leaf.kind},{','.join(shapes)}{ranges}]"


def weight(expr: sympy.Expr) -> float:
    return float(expr.subs(dict.fromkeys(expr.free_symbols, 2048)))


def _bytes(value: Tensor, names: Names) -> sympy.Expr:
    return sympy.Mul(value.element_size(), *(expression(s, names) for s in value.shape))


def _spec(node: fx.Node, names: Names) -> str:
    value = tensors_of(node)[0]
    sizes = "x".join(str(expression(s, names)) for s in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"


def _is_value(node: fx.Node) -> bool:
    return not isinstance(node.meta["val"], (tuple, list))


def _split_at_calls(nodes: list[fx.Node], heads: Collection[str]) -> list[list[fx.Node]]:
    """Groups of nodes; attention calls, leaves, the selection of rows and ``heads`` stand alone."""
    groups: list[list[fx.Node]] = []
    call: fx.Node | None = None
    for node in nodes:
        if (
            any(a.op == "placeholder" and a.name == "logits_to_keep" for a in node.all_input_nodes)
            or node.target in (ATTENTION, LEAF)
            or node.name in heads
        ):
            call = node
            groups.append([node])
        elif (
            call is not None and call in node.all_input_nodes and isinstance(call.meta["val"], (tuple, list))
        ):
            groups[-1].append(node)
        elif not groups or call is not None:
            call = None
            groups.append([node])
        else:
            groups[-1].append(node)
    return groups


def _external(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
    """What a part reads from outside: run values, weights, lengths; each in order of first use."""
    inside = set(nodes)
    values: dict[fx.Node, None] = {}
    weights: dict[fx.Node, None] = {}
    lengths: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node in inside:
            return
        if node.op == "placeholder" and node.name in LENGTHS:
            lengths[node] = None
        elif not tensors_of(node):
            for argument in node.all_input_nodes:
                visit(argument)
        elif node.op == "placeholder" and node.name not in ("input_ids", "position_ids", "logits_to_keep"):
            weights[node] = None
        else:
            values[node] = None

    for node in nodes:
        for argument in node.all_input_nodes:
            visit(argument)
    return list(values), list(weights), list(lengths)


def partition(graph: fx.Graph, ctx: Context, *, granularity: Granularity) -> Partitioned:
    """Segments, parts and functions of a graph whose costs and cuts are known."""
    builder = Partitioner(graph, ctx)
    output = next(n for n in graph.nodes if n.op == "output").all_input_nodes[0]
    plan = Plan(
        architecture=type(ctx.capture.model).__name__,
        route=Route.PACKED,
        granularity=granularity,
        inputs=("input_ids", "position_ids", "logits_to_keep"),
        output=output.name,
        segments=builder.segments(),
        notes=ctx.refused,
    )
    return Partitioned(plan, builder.functions.found)

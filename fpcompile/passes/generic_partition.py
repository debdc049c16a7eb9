"""Partition a generic variant into segments and parts; see :mod:`fpcompile.passes.partition`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import sympy
from torch import fx

from fpcompile.errors import InternalError
from fpcompile.ir import Cost, CutReason, Granularity, LiveSet, Part, PartKind, Plan, Route, Segment, Value
from fpcompile.models.generic import GenericCapture
from fpcompile.passes import generic as passes
from fpcompile.passes.aliases import storage_owners, uncuttable
from fpcompile.passes.codegen import Function, Functions
from fpcompile.passes.context import LEAF, body, describe, source, tensors_of
from fpcompile.passes.dataflow import live_after
from fpcompile.passes.design import Design
from fpcompile.passes.generic import Generic, size_of
from fpcompile.passes.partition import weight


class GenericPartitioner:
    """Builds the segments of one variant's graph."""

    def __init__(self, graph: fx.Graph, g: Generic) -> None:
        self.graph, self.g = graph, g
        self.owners = storage_owners(graph)
        self.by_name = {n.name: n for n in graph.nodes}
        live = live_after(graph, g.inputs)
        self.live = dict(zip((n.name for n in body(graph)), live, strict=True))
        self.bound = uncuttable(graph)
        self.functions = Functions(self._spec)
        self.picks: dict[int, tuple[int, ...]] = {}  # leaf -> which of its results are read

    def segments(self) -> tuple[Segment, ...]:
        """All segments, in order."""
        found: list[Segment] = []
        pending: list[fx.Node] = []
        for node in body(self.graph):
            pending.append(node)
            if node.name in self.g.context.cuts:
                found.append(self._segment(len(found), pending))
                pending = []
        return tuple(found)

    def _segment(self, index: int, nodes: list[fx.Node]) -> Segment:
        parts = tuple(self._part(group) for group in _split_at_leaves(nodes))
        live = LiveSet(tuple(self._value(n) for n in self.live[nodes[-1].name]))
        refused = tuple((n.name, self.g.context.refusals[n.name]) for n in nodes[:-1])
        main = max(parts, key=lambda p: weight(p.cost.flops))
        reason = self.g.context.cuts[nodes[-1].name]
        return Segment(index, main.name, self._kind(main, nodes), parts, live, reason, refused)

    def _kind(self, main: Part, nodes: list[fx.Node]) -> str:
        if main.kind is PartKind.LEAF:
            return self.g.capture.leaves[main.call].kind
        if any(passes._anchor(n, self.g) is CutReason.AFTER_ATTENTION for n in nodes):
            return "attention"
        if any(n.target in passes._CONVOLUTIONS for n in nodes):
            return "convolution"
        return "projection" if any(passes.projects(n, self.g) for n in nodes) else "pointwise"

    def _value(self, node: fx.Node) -> Value:
        owner = tensors_of(self.by_name[self.owners[node.name]])[0]
        value = tensors_of(node)[0]
        shape = tuple(size_of(s, self.g) for s in value.shape)
        size = sympy.Mul(owner.element_size(), *(size_of(s, self.g) for s in owner.shape))
        return Value(node.name, shape, str(value.dtype), self.owners[node.name], size)

    def _part(self, nodes: list[fx.Node]) -> Part:
        head = nodes[0]
        later = set(self.live[nodes[-1].name])
        outputs = [n for n in nodes if n in later]
        costs = self.g.context.costs
        values, weights, lengths = self._external(nodes)
        heaviest = max(nodes, key=lambda n: weight(costs[n.name].flops))
        if head.target is LEAF:
            kind, call = PartKind.LEAF, int(head.args[1])  # type: ignore[arg-type]
            leaf = self.g.capture.leaves[call]
            self.picks[call] = tuple(int(n.args[1]) for n in outputs)  # type: ignore[arg-type]
            key = f"leaf[{leaf.kind},{','.join(self._spec(n) for n in head.all_input_nodes)}]"
        else:
            kind, call = PartKind.GRAPH, -1
            key = self.functions.generate(nodes, values, weights, lengths, outputs)
        return Part(
            name=source(heaviest).module or heaviest.name,
            kind=kind,
            function=key,
            inputs=tuple(n.name for n in values),
            params=tuple(self.g.capture.weights[n.name][0] for n in weights),
            lengths=tuple(n.name for n in lengths),
            outputs=tuple(n.name for n in outputs),
            call=call,
            cost=sum((costs[n.name] for n in nodes), Cost()),
            nodes=describe(nodes),
            bound=nodes[-1].name in self.bound,
        )

    def _external(self, nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
        inside = set(nodes)
        found: tuple[dict[fx.Node, None], ...] = ({}, {}, {})

        def visit(node: fx.Node) -> None:
            if node in inside or node.op == "get_attr":
                return
            if node.op == "placeholder" and node.name in self.g.lengths:
                found[2][node] = None
            elif node.op == "placeholder" and node not in self.g.inputs:
                found[1][node] = None
            elif not tensors_of(node):
                for argument in node.all_input_nodes:
                    visit(argument)
            else:
                found[0][node] = None

        for node in nodes:
            for argument in node.all_input_nodes:
                visit(argument)
        return list(found[0]), list(found[1]), list(found[2])

    def _spec(self, node: fx.Node) -> str:
        found = tensors_of(node)
        if not found:
            return "size"
        value = found[0]
        return f"{value.dtype}[{'x'.join(str(size_of(s, self.g)) for s in value.shape)}]"


def _split_at_leaves(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Groups of nodes: each leaf, with the picks of its results, alone."""
    groups: list[list[fx.Node]] = []
    call: fx.Node | None = None
    for node in nodes:
        if node.target is LEAF:
            call = node
            groups.append([node])
        elif call is not None and node.args[:1] == (call,):
            groups[-1].append(node)
        elif not groups or call is not None:
            call = None
            groups.append([node])
        else:
            groups[-1].append(node)
    return groups


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """A variant's plan and callables.

    ``outputs`` names the flat outputs in order; ``lengths`` maps length names of the parts to symbols;
    ``picks`` says which results of each leaf are its part's outputs.
    """

    plan: Plan
    functions: dict[str, Function]
    outputs: tuple[str, ...]
    lengths: dict[str, sympy.Symbol]
    picks: dict[int, tuple[int, ...]]


def compile_generic(
    captured: GenericCapture,
    granularity: Granularity,
    architecture: str,
    notes: tuple[str, ...] = (),
    design: Design | None = None,
) -> Compiled:
    """Run the generic pipeline over a variant; ``design`` is for granularity auto."""
    graph, g = captured.graph.graph, passes.generic_context(captured)
    for name, run in (
        ("normalise", passes.normalise),
        ("annotate costs", passes.price),
        (f"place cuts ({granularity})", lambda graph, g: passes.place_cuts(graph, g, granularity, design)),
    ):
        run(graph, g)
        try:
            graph.lint()
        except RuntimeError as error:
            raise InternalError(f"the graph does not lint after pass {name!r}", got=str(error)) from error
    builder = GenericPartitioner(graph, g)
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    names = tuple(n.name for n in result)
    own = tuple(dict.fromkeys(n for n in names if n not in captured.weights))
    plan = Plan(
        architecture=architecture,
        route=Route.GENERIC,
        granularity=granularity,
        inputs=tuple(n.name for n in g.inputs),
        output=own[0],
        more_outputs=own[1:],
        segments=builder.segments(),
        notes=(*notes, *captured.notes, *g.context.refused),
    )
    return Compiled(plan, builder.functions.found, names, g.lengths, builder.picks)

"""Placement of cuts: where segments end, and why.

``operator``: a cut before and behind each attention call, and one behind each projection and experts leaf;
between two of these any position is legal, and the one with the fewest live bytes at the design length is
taken (the earliest of equals). ``layer``: one cut where the decoder layer changes. ``model``: none. ``auto``:
the fewest that keep a budget (:mod:`fpcompile.passes.auto`).
No cut is placed where a later in-place operator would write into a value that crosses it. What is not cut has
a reason too (:mod:`fpcompile.passes.refusals`).
"""

from __future__ import annotations

import operator
import re

from torch import fx

from fpcompile.errors import InternalError
from fpcompile.ir import CutReason, Granularity
from fpcompile.passes.aliases import uncuttable
from fpcompile.passes.auto import NO_BUDGET, budget_cuts
from fpcompile.passes.context import ATTENTION, LEAF, Context, body, expression, source, symbols
from fpcompile.passes.costs import is_projection, size_hint
from fpcompile.passes.dataflow import live_bytes
from fpcompile.passes.design import DESIGN_TOKENS, Design, value_at
from fpcompile.passes.refusals import refusals


def run_inputs(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders that hold a run's own tensors, not weights or lengths."""
    return [n for n in graph.nodes if n.op == "placeholder" and n.name in _RUN_INPUTS]


_RUN_INPUTS = ("input_ids", "position_ids", "logits_to_keep")


def layer_of(node: fx.Node) -> str | None:
    """Path of the decoder layer that a node belongs to (``model.layers.3``), or None outside the layers."""
    found = re.match(r"^(.*?\.\d+)(\.|$)", source(node).module)
    return found.group(1) if found else None


def _sizes(graph: fx.Graph) -> list[float]:
    """Live bytes behind each position at the design length."""
    names = symbols(graph)
    return live_bytes(
        graph, run_inputs(graph), lambda size: size_hint(expression(size, names), DESIGN_TOKENS)
    )


def _anchor(node: fx.Node, ctx: Context) -> CutReason | None:
    """Why a cut is wanted behind a node, if it is."""
    if node.target is ATTENTION:
        return CutReason.AFTER_ATTENTION
    if node.target is LEAF and ctx.capture.leaves[int(node.args[1])].kind == "experts":  # type: ignore[arg-type]
        return CutReason.EXPERTS
    return CutReason.PROJECTION if is_projection(node) else None


def _operator_cuts(
    nodes: list[fx.Node], ctx: Context, forbidden: dict[str, str], sizes: list[float]
) -> dict[str, CutReason]:
    found = ((i, _anchor(node, ctx)) for i, node in enumerate(nodes))
    anchors = [(i, reason) for i, reason in found if reason is not None]
    cuts: dict[str, CutReason] = {}
    for (at, reason), following in zip(anchors, [*anchors[1:], None], strict=True):
        if following is None:
            break
        end = following[0]
        if nodes[end].target is ATTENTION and nodes[end - 1].name not in forbidden:
            cuts[nodes[end - 1].name] = CutReason.BEFORE_ATTENTION
        if reason is CutReason.AFTER_ATTENTION and nodes[at].name not in forbidden:
            cuts[nodes[at].name] = reason
        elif nodes[end].target is not ATTENTION:
            window = [j for j in range(at, end) if nodes[j].name not in forbidden]
            if window:
                best = min(window, key=lambda j: (sizes[j], j))
                cuts[nodes[best].name] = reason
    return cuts


def _layer_cuts(graph: fx.Graph, forbidden: dict[str, str]) -> dict[str, CutReason]:
    nodes = body(graph)
    cuts: dict[str, CutReason] = {}
    order = [layer_of(n) for n in nodes]
    seen = [layer for layer in dict.fromkeys(order) if layer is not None]
    for layer in seen:
        inside = [i for i, found in enumerate(order) if found == layer]
        for boundary in (inside[0] - 1, inside[-1]):
            if 0 <= boundary < len(nodes) - 1 and nodes[boundary].name not in forbidden:
                cuts[nodes[boundary].name] = CutReason.LAYER
    return cuts


def _refused(graph: fx.Graph, forbidden: dict[str, str]) -> tuple[str, ...]:
    """One sentence for each in-place operator that forbids cuts; picks of results need none."""
    by_name = {n.name: n for n in graph.nodes}
    first: dict[str, str] = {}
    for before, because in forbidden.items():
        if by_name[because].target is not operator.getitem:
            first.setdefault(because, before)
    return tuple(
        f"no cut from {source(by_name[before])} to {source(by_name[because])}: "
        f"{by_name[because].target} writes in place"
        for because, before in first.items()
    )


def place_cuts(
    graph: fx.Graph, ctx: Context, *, granularity: Granularity, design: Design | None = None
) -> fx.Graph:
    """Fill ``ctx.cuts`` for one of the presets, or by the budget of ``design``."""
    forbidden = uncuttable(graph)
    ctx.refused = _refused(graph, forbidden)
    cuts: dict[str, CutReason] = {}
    nodes, sizes = body(graph), list[float]()
    if granularity is Granularity.AUTO and design is not None:
        names = symbols(graph)
        held = live_bytes(
            graph, run_inputs(graph), lambda size: value_at(expression(size, names), design.tokens)
        )
        cuts, ctx.refusals, note = budget_cuts(nodes, ctx.costs, held, forbidden, design)
        ctx.refused = (*ctx.refused, note)
    elif granularity in (Granularity.OPERATOR, Granularity.AUTO):
        sizes = _sizes(graph)
        cuts = _operator_cuts(nodes, ctx, forbidden, sizes)
        if granularity is Granularity.AUTO:
            ctx.refused = (*ctx.refused, NO_BUDGET)
    elif granularity is Granularity.LAYER:
        cuts = _layer_cuts(graph, forbidden)
    for name in cuts:
        if name in forbidden:
            raise InternalError("a cut was placed inside an alias class that is written later", where=name)
    cuts[nodes[-1].name] = CutReason.END
    ctx.cuts = {n.name: cuts[n.name] for n in nodes if n.name in cuts}
    if not ctx.refusals:
        heavy = [_anchor(n, ctx) is not None for n in nodes]
        ctx.refusals = refusals(nodes, cuts, forbidden, heavy, sizes)
    return graph

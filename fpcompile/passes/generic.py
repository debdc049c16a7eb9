"""Passes of the generic route: normalise, move copies to their use, price, cut, partition.

The graph has any number of inputs, outputs and length symbols. Symbols become placeholders named as they
are, so that no integer is kept alive across a cut; the main length is called ``tokens`` in the plan.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from typing import Any

import sympy
import torch
from torch import fx

from fpcompile.errors import InternalError, UnsupportedModelError
from fpcompile.ir import TOKENS, ZERO, Cost, CutReason, Granularity
from fpcompile.models.generic import GenericCapture
from fpcompile.passes import normalise as packed
from fpcompile.passes.aliases import uncuttable
from fpcompile.passes.auto import NO_BUDGET, budget_cuts
from fpcompile.passes.context import LEAF, Context, body, source, tensors_of
from fpcompile.passes.costs import is_projection, node_cost, size_hint
from fpcompile.passes.cuts import layer_of
from fpcompile.passes.dataflow import live_bytes
from fpcompile.passes.design import DESIGN_TOKENS, Design, value_at
from fpcompile.passes.refusals import refusals

aten = torch.ops.aten
_SOFTMAX: frozenset[Any] = frozenset({aten.softmax.int, aten._softmax.default})
_ATTENTION: frozenset[Any] = frozenset({aten.scaled_dot_product_attention.default})
_PRODUCTS: frozenset[Any] = frozenset(
    {aten.matmul.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
)
_CONVOLUTIONS: frozenset[Any] = frozenset(
    {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding}
)
_SEARCH = 12  # nodes between a softmax and the product that it weights


@dataclasses.dataclass(slots=True)
class Generic:
    """One variant on its way through the passes.

    ``names`` maps the trace's symbols to ``tokens`` (the main length) or to the value in the example;
    ``lengths`` are the placeholders that carry symbols.
    """

    capture: GenericCapture
    context: Context
    names: dict[sympy.Symbol, sympy.Expr]
    inputs: tuple[fx.Node, ...] = ()
    lengths: dict[str, sympy.Symbol] = dataclasses.field(default_factory=dict)


def generic_context(capture: GenericCapture) -> Generic:
    """Context of a capture."""
    names: dict[sympy.Symbol, sympy.Expr] = {}
    placeholders = [n for n in capture.graph.graph.nodes if n.op == "placeholder"]
    for node in capture.graph.graph.nodes:
        for value in (*tensors_of(node), node.meta.get("val")):
            sizes = value.shape if isinstance(value, torch.Tensor) else [value]
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    for symbol in size.node.expr.free_symbols:
                        hint = size.node.shape_env.backed_var_to_val.get(symbol, 1)
                        names[symbol] = TOKENS if symbol == capture.length else sympy.Integer(int(hint))
    inputs = tuple(n for n in placeholders if n.name in capture.inputs)
    return Generic(capture, Context(capture), names, inputs)  # type: ignore[arg-type]


def normalise(graph: fx.Graph, g: Generic) -> None:
    """Drop checks and no-ops, turn symbols into placeholders, move results' picks and copies to their use."""
    _inline_regions(graph)
    for node in body(graph):
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            where = source(node)
            raise UnsupportedModelError(
                "the model's graph contains a nested region",
                reason=f"operator {node.target}",
                node=node.name,
                module_path=where.module,
                source_line=where.line,
            )
        if node.target in packed._CHECKS:
            graph.erase_node(node)
        elif packed._is_no_op(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        graph.erase_node(node)  # the guards' check, done when a call is matched to its variant
    _name_symbols(graph, g)
    packed._gather_results(graph)
    graph.eliminate_dead_code(is_impure_node=packed._mutates)
    _sink(graph)


def _inline_regions(graph: fx.Graph) -> None:
    """Copy the body of regions that only switch gradients, or switch autocast off, into the graph."""
    changed = True
    while changed:
        changed = False
        for node in body(graph):
            skip = _REGIONS.get(getattr(node.target, "__name__", ""))
            if skip is None or (skip > 1 and node.args[2] is not False):
                continue
            region, arguments = node.args[skip], node.args[skip + 1 :]
            inner: fx.GraphModule = getattr(graph.owning_module, str(region.target))  # type: ignore[union-attr]
            copied: dict[fx.Node, Any] = {}
            given = iter(arguments)
            with graph.inserting_before(node):
                for source_ in inner.graph.nodes:
                    if source_.op == "placeholder":
                        copied[source_] = next(given)
                    elif source_.op != "output":
                        copied[source_] = graph.node_copy(source_, copied.__getitem__)
            results = fx.map_arg(next(n for n in inner.graph.nodes if n.op == "output").args[0], copied.get)
            for user in list(node.users):
                picked = results[user.args[1]] if user.target is operator.getitem else results
                user.replace_all_uses_with(picked)
                graph.erase_node(user)
            graph.erase_node(node)
            changed = True
            break


_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Region operators and the position of their body among the arguments."""


def _name_symbols(graph: fx.Graph, g: Generic) -> None:
    """Replace each ``sym_size`` that is a plain symbol by a placeholder of that name."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    made: dict[sympy.Symbol, fx.Node] = {}
    for node in body(graph):
        if node.target is not aten.sym_size.int:
            continue
        if not isinstance(node.meta["val"], torch.SymInt):
            _replace_by(node, int(node.meta["val"]))
            continue
        symbol = node.meta["val"].node.expr
        if not isinstance(symbol, sympy.Symbol) or not any(symbol in s for s in g.capture.guards.shapes):
            continue
        if symbol not in made:
            with graph.inserting_after(last):
                made[symbol] = graph.placeholder(f"length_{symbol}")
            made[symbol].meta["val"] = node.meta["val"]
            g.lengths[made[symbol].name] = symbol
        node.replace_all_uses_with(made[symbol])
        graph.erase_node(node)


def _replace_by(node: fx.Node, number: int) -> None:
    """Write a number in place of a node."""

    def swap(argument: fx.Node) -> Any:
        return number if argument is node else argument

    for user in list(node.users):
        user.args = fx.map_arg(user.args, swap)
        user.kwargs = fx.map_arg(user.kwargs, swap)
    node.graph.erase_node(node)


def _sink(graph: fx.Graph) -> None:
    """Move copies of inputs and parts of quantised weights to their first use: not alive before."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in reversed(body(graph)):
        source_ = node.args[0] if node.args else None
        if node.target in _SINKING and isinstance(source_, fx.Node) and source_.op == "placeholder":
            users = [u for u in node.users if u.op != "output"]
            if users:
                min(users, key=order.__getitem__).prepend(node)


_SINKING = (aten.clone.default, torch.ops.export.access_subclass_inner_tensor.default)


def price(graph: fx.Graph, g: Generic) -> None:
    """Fill the costs."""
    for node in body(graph):
        cost = node_cost(node, g.context, g.names)
        g.context.costs[node.name] = Cost(_known(cost.flops), _known(cost.bytes))


def _known(expr: sympy.Expr) -> sympy.Expr:
    """Only the main length stays a symbol; sizes that depend on values count as the main length."""
    others = [s for s in expr.free_symbols if s not in _PLAN_SYMBOLS]
    return expr.subs(dict.fromkeys(others, TOKENS)) if others else expr


_PLAN_SYMBOLS = (TOKENS,)


def _weights_values(node: fx.Node) -> bool:
    """Whether a product applies a softmax's weights: attention written out in the model."""
    seen: set[fx.Node] = set()
    todo = list(node.all_input_nodes[:1])
    while todo and len(seen) < _SEARCH:
        current = todo.pop()
        if current.target in _SOFTMAX:
            return True
        if current not in seen and current.op == "call_function" and current.target not in _PRODUCTS:
            seen.add(current)
            todo.extend(current.all_input_nodes[:1])
    return False


def _anchor(node: fx.Node, g: Generic) -> CutReason | None:
    """Why a cut is wanted behind a node, if it is."""
    if node.target in _ATTENTION or (node.target in _PRODUCTS and _weights_values(node)):
        return CutReason.AFTER_ATTENTION
    if node.target is LEAF:
        leaf = g.capture.leaves[int(node.args[1])]  # type: ignore[arg-type]
        return CutReason.EXPERTS if leaf.kind == "experts" else CutReason.AFTER_LEAF
    if node.target in _CONVOLUTIONS:
        return CutReason.CONVOLUTION
    return CutReason.PROJECTION if projects(node, g) else None


def projects(node: fx.Node, g: Generic) -> bool:
    """Whether a node is a matrix product with a weight, also a transposed, cast or quantised one."""
    if is_projection(node):
        return True
    if node.target not in _PRODUCTS:
        return False
    for argument in node.all_input_nodes:
        while argument.op == "call_function" and tensors_of(argument) and _carries(argument):
            argument = argument.all_input_nodes[0]
        if argument.op == "placeholder" and argument.name in g.capture.weights:
            return bool(tensors_of(argument) and tensors_of(argument)[0].dim() >= 2)
    return False


def _carries(node: fx.Node) -> bool:
    """Whether a node only shows its argument in another shape or type, or picks a part of a quantised one."""
    if node.target in (aten.to.dtype, torch.ops.export.access_subclass_inner_tensor.default):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def place_cuts(graph: fx.Graph, g: Generic, granularity: Granularity, design: Design | None = None) -> None:
    """Fill the cuts for one of the presets, or by a budget; see :mod:`fpcompile.passes.cuts`."""
    forbidden = uncuttable(graph)
    nodes = body(graph)
    if not nodes:
        raise UnsupportedModelError("the model computes nothing", reason="its graph has no operator")
    cuts: dict[str, CutReason] = {}
    sizes: list[float] = []
    context = g.context
    if granularity is Granularity.AUTO and design is not None:
        held = live_bytes(graph, g.inputs, lambda size: value_at(_known(size_of(size, g)), design.tokens))
        cuts, context.refusals, note = budget_cuts(nodes, context.costs, held, forbidden, design)
        context.refused = (note,)
    elif granularity in (Granularity.OPERATOR, Granularity.AUTO):
        sizes = live_bytes(graph, g.inputs, lambda size: size_hint(_known(size_of(size, g)), DESIGN_TOKENS))
        cuts = _operator_cuts(nodes, g, forbidden, sizes)
        if granularity is Granularity.AUTO:
            context.refused = (NO_BUDGET,)
    elif granularity is Granularity.LAYER:
        cuts = _layer_cuts(nodes, forbidden)
    for name in cuts:
        if name in forbidden:
            raise InternalError("a cut was placed inside an alias class that is written later", where=name)
    cuts[nodes[-1].name] = CutReason.END
    context.cuts = {n.name: cuts[n.name] for n in nodes if n.name in cuts}
    if not context.refusals:
        heavy = [_anchor(n, g) is not None for n in nodes]
        context.refusals = refusals(nodes, cuts, forbidden, heavy, sizes)


def _operator_cuts(
    nodes: list[fx.Node], g: Generic, forbidden: dict[str, str], sizes: list[float]
) -> dict[str, CutReason]:
    anchors = [(i, r) for i, n in enumerate(nodes) if (r := _anchor(n, g)) is not None]
    cuts: dict[str, CutReason] = {}
    for (at, reason), (end, following) in itertools.pairwise(anchors):
        window = [j for j in range(at, end) if nodes[j].name not in forbidden]
        if not window:
            continue
        if following is CutReason.AFTER_ATTENTION and window[-1] == end - 1 and end - 1 > at:
            cuts[nodes[end - 1].name] = CutReason.BEFORE_ATTENTION
        best = at if at in window and reason is CutReason.AFTER_ATTENTION else None
        chosen = best if best is not None else min(window, key=lambda j: (sizes[j], j))
        cuts.setdefault(nodes[chosen].name, reason)
    return cuts


def _layer_cuts(nodes: list[fx.Node], forbidden: dict[str, str]) -> dict[str, CutReason]:
    order = [layer_of(n) for n in nodes]
    cuts: dict[str, CutReason] = {}
    for layer in dict.fromkeys(o for o in order if o is not None):
        inside = [i for i, found in enumerate(order) if found == layer]
        for boundary in (inside[0] - 1, inside[-1]):
            if 0 <= boundary < len(nodes) - 1 and nodes[boundary].name not in forbidden:
                cuts[nodes[boundary].name] = CutReason.LAYER
    return cuts


def size_of(size: Any, g: Generic) -> sympy.Expr:
    """A size as an expression in ``tokens``."""
    if isinstance(size, torch.SymInt):
        return _known(size.node.expr.subs(g.names))
    return sympy.Integer(int(size)) if size is not None else ZERO

"""The proof that a graph is token-wise outside attention: each row depends on its own row only.

Words: the *axis* of a value is the dimension that runs over tokens (or over the kept rows, behind the
selection of ``logits_to_keep``), or None for a value that depends on no token. A rule per operator derives
the axis of the result from those of the arguments, or refuses. An operator without a rule that is given a
value with an axis is *not proven*: the packed route is then refused, since packing sequences would silently
mix them.

What would change this design: rules for merged axes ([tokens * heads, d]); none of the models that the
route serves needs them so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fpcompile.errors import UnsupportedModelError
from fpcompile.ir import ROWS, TOKENS
from fpcompile.models.draws import may_draw
from fpcompile.passes.context import Context, body, source, tensors_of
from fpcompile.passes.tokenwise_rules import POINTWISE, RULES, SIZES, Axis, AxisOrNone, Facts, NotProvenError


class Proof(Facts):
    """The proof of one graph, node by node."""

    def placeholder(self, node: fx.Node) -> AxisOrNone:
        """Axis of a graph input: tokens for ids and positions, rows for the kept rows, none for weights."""
        if node.name in ("input_ids", "position_ids"):
            return Axis(1, TOKENS)
        return Axis(0, ROWS) if node.name == "logits_to_keep" else None

    def infer(self, node: fx.Node) -> AxisOrNone:
        """Axis of a node, by its rule."""
        if not tensors_of(node):
            return None
        self._lengths_are_sizes(node)
        found = RULES.get(node.target)
        if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            found = POINTWISE
        if found is None:
            if getattr(node.target, "namespace", "") == "export":
                raise NotProvenError("its weights are tensors of a class of their own")
            if self._of_constants(node):
                return None
            raise NotProvenError(f"operator {node.target} has no token-wise rule")
        axis = found(self, node)
        shape = self.shape(node)
        over = {s for size in shape for s in size.free_symbols}
        if axis is None and over:
            raise NotProvenError(f"operator {node.target} makes a value that runs over tokens by itself")
        if axis is not None and shape[axis.dim] != axis.over:
            raise NotProvenError(f"operator {node.target} does not keep one row for each token")
        if axis is not None and any(size.free_symbols for d, size in enumerate(shape) if d != axis.dim):
            raise NotProvenError(f"operator {node.target} makes rows whose width is the number of tokens")
        return axis

    def _of_constants(self, node: fx.Node) -> bool:
        """Whether an operator without a rule is given nothing that depends on tokens: its results do not."""
        if may_draw(node):
            raise NotProvenError(f"operator {node.target} draws random numbers")
        return all(self.axis(argument) is None for argument in node.all_input_nodes)

    def _lengths_are_sizes(self, node: fx.Node) -> None:
        """Refuse a node that computes with a number of tokens; sizes of its result are all that it may be."""
        sizes = SIZES.get(node.target)
        for position, argument in enumerate(node.args):
            if position != sizes and _holds_length(argument):
                raise NotProvenError(f"operator {node.target} computes with the number of tokens")
        if any(_holds_length(argument) for argument in node.kwargs.values()):
            raise NotProvenError(f"operator {node.target} computes with the number of tokens")


def _holds_length(argument: Any) -> bool:
    """Whether an argument is an integer computed from the lengths, or a list with one."""
    if isinstance(argument, (list, tuple)):
        return any(_holds_length(a) for a in argument)
    return isinstance(argument, fx.Node) and not tensors_of(argument)


def prove_tokenwise(graph: fx.Graph, ctx: Context) -> fx.Graph:
    """Prove every node token-wise, or raise :class:`UnsupportedModelError` with node, line, reason."""
    proof = Proof(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            proof.axes[node] = proof.placeholder(node)
    for node in body(graph):
        try:
            proof.axes[node] = proof.infer(node)
        except NotProvenError as refused:
            where = source(node)
            raise UnsupportedModelError(
                f"{type(ctx.capture.model).__name__} is not proven token-wise: it cannot be packed",
                reason=str(refused),
                node=node.name,
                module_path=where.module,
                source_line=where.line or None,
                remedy="only architectures whose computation outside attention is token-wise are supported",
            ) from None
    ctx.axes = {n.name: (axis.dim, axis.over.name) for n, axis in proof.axes.items() if axis is not None}
    return graph

"""Floating-point operations and bytes of every node, as sympy expressions in tokens, rows and context.

Matrix products count two operations for each multiply-add; other computing nodes count one for each output
element; views count nothing. Bytes are those of a node's tensor inputs and outputs, each touched once.
Causal attention over n new and c visible tokens counts the visible (query, key) pairs only.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fpcompile.ir import CONTEXT, TOKENS, ZERO, Cost
from fpcompile.models.attention import AttentionCall, MaskKind
from fpcompile.passes.context import ATTENTION, LEAF, Context, body, expression, symbols, tensors_of

aten = torch.ops.aten
Names = dict[sympy.Symbol, sympy.Symbol]
MATMULS: frozenset[Any] = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        torch.ops.mkldnn._linear_pointwise.default,
    }
)


def numel(value: Tensor, names: Names) -> sympy.Expr:
    """Number of elements of a fake tensor."""
    return sympy.Mul(*(expression(s, names) for s in value.shape))


def nbytes(value: Tensor, names: Names) -> sympy.Expr:
    """Bytes of a fake tensor's elements."""
    return numel(value, names) * value.element_size()


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    aliased = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return aliased and node.target not in (aten.to.dtype, aten.to.device)


def visible_pairs(call: AttentionCall) -> sympy.Expr:
    """(query, key) pairs that the mask lets through, for ``tokens`` queries at the end of ``context``."""
    if call.mask.kind is MaskKind.BIDIRECTIONAL:
        return TOKENS * CONTEXT
    pairs = TOKENS * CONTEXT - TOKENS * (TOKENS - 1) / 2
    return sympy.Min(pairs, TOKENS * call.mask.span) if call.mask.span else pairs


def _attention_cost(node: fx.Node, call: AttentionCall, names: Names) -> Cost:
    q, k, v = (tensors_of(a)[0] for a in node.args[:3] if isinstance(a, fx.Node))
    pairs = visible_pairs(call) * call.heads
    flops = 2 * pairs * (int(q.shape[-1]) + int(v.shape[-1]))
    cached = CONTEXT * call.kv_heads * (int(k.shape[-1]) + int(v.shape[-1])) * k.element_size()
    moved = nbytes(q, names) + nbytes(tensors_of(node)[0], names) + cached
    return Cost(sympy.expand(flops), sympy.expand(moved))


def node_cost(node: fx.Node, ctx: Context, names: Names) -> Cost:
    """Cost of one node."""
    if node.target is ATTENTION:
        return _attention_cost(node, ctx.capture.attention[int(node.args[3])], names)  # type: ignore[arg-type]
    outputs = tensors_of(node)
    inputs = [t for a in node.all_input_nodes for t in tensors_of(a)]
    if node.target is LEAF:
        leaf = ctx.capture.leaves[int(node.args[1])]  # type: ignore[arg-type]
        moved = sum((nbytes(t, names) for t in (*inputs, *outputs)), ZERO) + leaf.weight_bytes
        return Cost(TOKENS * leaf.flops_per_token, moved)
    if _is_view(node) or not outputs:
        return Cost()
    moved = sum((nbytes(t, names) for t in (*inputs, *outputs)), ZERO)
    elements = numel(outputs[0], names)
    if node.target in MATMULS:
        first = tensors_of(node.args[1 if node.target is aten.addmm.default else 0])[0]  # type: ignore[arg-type]
        return Cost(2 * elements * expression(first.shape[-1], names), moved)
    return Cost(elements, moved)


def annotate_costs(graph: fx.Graph, ctx: Context) -> fx.Graph:
    """Fill ``ctx.costs``."""
    names = symbols(graph)
    ctx.costs = {node.name: node_cost(node, ctx, names) for node in body(graph)}
    return graph


def is_projection(node: fx.Node) -> bool:
    """A matrix product with a weight: an input or output projection, an MLP matrix, the LM head, a router."""
    return node.target in MATMULS and any(
        isinstance(a, fx.Node) and a.op == "placeholder" and a.meta["val"].dim() == 2 and not _is_input(a)
        for a in node.args
    )


def _is_input(node: fx.Node) -> bool:
    return any(isinstance(s, torch.SymInt) for s in node.meta["val"].shape)


def size_hint(expr: sympy.Expr, tokens: int) -> float:
    """Value of a size expression at a design length, for comparisons."""
    value = expr.subs(dict.fromkeys(expr.free_symbols, tokens))
    return math.inf if value.free_symbols else float(value)

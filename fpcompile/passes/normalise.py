"""Normalise: drop checks and no-ops, name the two lengths, forbid what later passes cannot see.

After this pass every symbolic integer is computed from two nodes, ``tokens`` and ``rows``: they are
placeholders, so that no integer has to be kept alive across a cut.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fpcompile.errors import UnsupportedModelError
from fpcompile.ir import ROWS, TOKENS
from fpcompile.passes.context import Context, body, expression, source, symbols

aten = torch.ops.aten
_CHECKS: frozenset[Any] = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
_NO_OPS: frozenset[Any] = frozenset({aten.detach.default, aten.detach_.default, aten.alias.default})
_CASTS: frozenset[Any] = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.to.other,
        aten.type_as.default,
    }
)


def _is_no_op(node: fx.Node) -> bool:
    """Whether a node returns its first argument: detach, cast to the same type, idle dropout."""
    if node.target in _NO_OPS:
        return True
    if node.target is aten.dropout.default:
        return node.args[2] is False
    if node.target in _CASTS and not _copies(node):
        given, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
        return bool(given.dtype == result.dtype and given.device == result.device)
    return False


def _copies(node: fx.Node) -> bool:
    """Whether a cast is asked for a copy, or for another layout, also where the type is the same."""
    given = (*node.args[2:], *node.kwargs.values())
    formats = [a for a in given if isinstance(a, torch.memory_format)]
    return any(a is True for a in given) or any(f is not torch.preserve_format for f in formats)


def normalise(graph: fx.Graph, ctx: Context) -> fx.Graph:
    """Remove clutter in place; the graph computes the same bits."""
    for node in body(graph):
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise UnsupportedModelError(
                "the model's graph contains a nested region",
                reason=f"operator {node.target}",
                node=node.name,
                module_path=source(node).module,
                source_line=source(node).line,
            )
        if node.target in _CHECKS:
            graph.erase_node(node)
        elif _is_no_op(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
    _name_lengths(graph)
    _gather_results(graph)
    graph.eliminate_dead_code(is_impure_node=_mutates)
    return graph


def _gather_results(graph: fx.Graph) -> None:
    """Move every ``getitem`` behind the node whose results it picks, so that no list crosses a cut."""
    for node in reversed(body(graph)):
        if node.target is operator.getitem:
            node.args[0].append(node)  # type: ignore[union-attr]


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def _name_lengths(graph: fx.Graph) -> None:
    """Replace every ``sym_size`` that equals one of the two lengths by a placeholder of that name."""
    names = symbols(graph)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    lengths: dict[Any, fx.Node] = {}
    with graph.inserting_after(last):
        for symbol in (TOKENS, ROWS):
            lengths[symbol] = graph.placeholder(symbol.name)
    for node in body(graph):
        if node.target is aten.sym_size.int:
            length = lengths.get(expression(node.meta["val"], names))
            if length is not None:
                length.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(length)
                graph.erase_node(node)

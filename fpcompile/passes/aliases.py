"""Alias classes: which values share memory, and which nodes write into it.

A value's class is named after the node that owns the storage. Two values are in one class when the
tracer gave them one storage. An in-place node makes every cut between the owner and itself illegal: the
class must lie inside one segment.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fpcompile.errors import UnsupportedModelError
from fpcompile.passes.context import body, source, tensors_of

aten = torch.ops.aten
_NUMBERS: frozenset[Any] = frozenset({aten.item.default, aten._local_scalar_dense.default})


def storage_owners(graph: fx.Graph) -> dict[str, str]:
    """Node name -> name of the node that owns its (first) storage."""
    owners: dict[int, str] = {}
    result: dict[str, str] = {}
    for node in graph.nodes:
        values = tensors_of(node)
        if values:
            result[node.name] = owners.setdefault(values[0].untyped_storage()._cdata, node.name)
    return result


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """Nodes whose memory ``node`` writes into, from its operator's schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    written: list[fx.Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, fx.Node):
                written.append(value)
    return written


def uncuttable(graph: fx.Graph) -> dict[str, str]:
    """Nodes behind which no cut may stand -> the node that forbids it: one that writes in place, that picks a
    result, or that reads a number off a tensor which is written later (numbers are read again behind a cut).

    Raises :class:`UnsupportedModelError` when a node writes into an input or a weight.
    """
    owners = storage_owners(graph)
    order = {n.name: i for i, n in enumerate(graph.nodes)}
    inputs = {n.name for n in graph.nodes if n.op == "placeholder"}
    nodes = list(graph.nodes)
    forbidden: dict[str, str] = {}
    written_at: dict[str, int] = {}
    for node in body(graph):
        if node.target is operator.getitem:
            producer = node.args[0]
            for between in nodes[order[producer.name] : order[node.name]]:  # type: ignore[union-attr]
                forbidden[between.name] = node.name
        for written in mutated_arguments(node):
            owner = owners[written.name]
            if owner in inputs:
                raise UnsupportedModelError(
                    "the model writes into its inputs or weights",
                    reason=f"in-place operator {node.target} on {owner}",
                    node=node.name,
                    module_path=source(node).module,
                    source_line=source(node).line,
                )
            for between in nodes[order[owner] : order[node.name]]:
                forbidden[between.name] = node.name
            written_at[owner] = order[node.name]
    for node in body(graph):
        if (
            node.target in _NUMBERS
            and written_at.get(owners[node.all_input_nodes[0].name], -1) > order[node.name]
        ):
            for between in nodes[order[node.name] : _last_use(node, order)]:
                forbidden[between.name] = node.name
    return forbidden


def _last_use(node: fx.Node, order: dict[str, int]) -> int:
    """Where a number, or one that is computed from it, is used last."""
    ends = (order[u.name] if tensors_of(u) else max(order[u.name], _last_use(u, order)) for u in node.users)
    return max(ends, default=order[node.name])

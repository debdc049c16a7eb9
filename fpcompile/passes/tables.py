"""Inputs of a graph that are looked up in a table as they are: what ids a call may have is known beforehand.

Only an embedding whose indices are an input itself counts, by way of views, copies and wider integers. Ids
that the model's code replaces first (padding of -1, places of images behind the vocabulary) may be anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fpcompile.passes.aliases import mutated_arguments, storage_owners

aten = torch.ops.aten
_SAME: frozenset[Any] = frozenset(
    {
        aten._to_copy.default,
        aten._unsafe_view.default,
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
"""Operators whose result has every element of their first argument, and no other."""


def looked_up(graph: fx.Graph) -> dict[str, int]:
    """Names of the placeholders whose every element is the number of a row of a table -> how many rows it has
    (of several tables the smallest one).
    """
    owners = storage_owners(graph)
    written = {owners.get(w.name) for node in graph.nodes for w in mutated_arguments(node)}
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.target is not aten.embedding.default or len(node.args) < 2:
            continue
        table, source = node.args[0], _source(node.args[1])
        rows = table.meta["val"].shape[0] if isinstance(table, fx.Node) else None
        chain = source and not {owners.get(n.name) for n in source} & written
        if chain and isinstance(rows, int):
            name = source[-1].name
            found[name] = min(rows, found.get(name, rows))
    return found


def _source(node: Any) -> list[fx.Node]:
    """From an embedding's indices back to the placeholder that they are; empty when that is none."""
    chain: list[fx.Node] = []
    wide = 8
    while isinstance(node, fx.Node):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not _integral(value.dtype) or value.dtype.itemsize > wide:
            return []
        wide = value.dtype.itemsize
        chain.append(node)
        if node.op == "placeholder":
            return chain
        if node.target not in _SAME:
            return []
        node = node.args[0]
    return []


def _integral(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)

"""The dataflow graph of a program, and what is alive at each of its positions.

Words: a *position* is the index of a body node; a value is *alive behind* a position when a later node, or
the result, reads it. Sizes and numbers are computed again where they are used, so what they are computed
from stays alive until then; weights and lengths are always at hand and never alive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import networkx as nx
from torch import fx

from fpcompile.passes.aliases import storage_owners
from fpcompile.passes.context import body, tensors_of


def dataflow(graph: fx.Graph, inputs: Collection[fx.Node]) -> nx.DiGraph:
    """Who reads whom: an edge from each run input and body node to every node that has it as an argument.

    Vertices are fx nodes; ``at`` is their position, -1 for inputs, the number of body nodes for the output.
    """
    nodes = body(graph)
    flow = nx.DiGraph()
    flow.add_nodes_from(inputs, at=-1)
    flow.add_nodes_from((node, {"at": i}) for i, node in enumerate(nodes))
    flow.add_nodes_from((n for n in graph.nodes if n.op == "output"), at=len(nodes))
    flow.add_edges_from((source, user) for source in (*inputs, *nodes) for user in source.users)
    return flow


def live_after(graph: fx.Graph, inputs: Collection[fx.Node]) -> list[list[fx.Node]]:
    """For each position, the tensor values alive behind it, oldest first."""
    flow = dataflow(graph, inputs)
    at: dict[fx.Node, int] = dict(flow.nodes(data="at"))
    last: dict[fx.Node, int] = {}
    for node in sorted(at, key=at.__getitem__, reverse=True):
        uses = (at[u] if tensors_of(u) else max(at[u], last[u]) for u in flow.successors(node))
        last[node] = max(uses, default=-1)
    ends: dict[int, list[fx.Node]] = {}
    for node, end in last.items():
        ends.setdefault(end, []).append(node)
    held = {node: None for node in inputs if last[node] >= 0}
    result: list[list[fx.Node]] = []
    for i, node in enumerate(body(graph)):
        if tensors_of(node) and not isinstance(node.meta["val"], (tuple, list)) and last[node] > i:
            held[node] = None
        for gone in ends.get(i, []):
            held.pop(gone, None)
        result.append(list(held))
    return result


def live_bytes(
    graph: fx.Graph, inputs: Collection[fx.Node], length_of: Callable[[Any], float]
) -> list[float]:
    """For each position, the bytes of the storages alive behind it, each storage counted once.

    ``length_of`` turns a size (int or SymInt) into a number.
    """
    owners = storage_owners(graph)
    by_name = {n.name: n for n in graph.nodes}
    sizes: dict[str, float] = {}
    for owner in set(owners.values()):
        value = tensors_of(by_name[owner])[0]
        sizes[owner] = float(value.element_size())
        for size in value.shape:
            sizes[owner] *= length_of(size)
    return [sum(sizes[o] for o in {owners[n.name] for n in live}) for live in live_after(graph, inputs)]

"""``backend="cudagraphs"``: which functions are replayed as CUDA graphs, and for which lengths.

A graph is captured for one length, its *bucket*. A shorter run pads its tokens to the bucket: rows are proven
independent, so the rows of the padding change no other. That holds where a part may be executed on ranges of
tokens, and only there; what is not proven, and what is longer than the largest bucket, is executed eagerly.
Launching is what a graph saves, so buckets end where the device is busy for longer than a launch takes.

Invariant: the key of such a function says so. Kernels are given the bucket's number of rows, and may round as
for that one.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from fpcompile.errors import UsageError
from fpcompile.ir import PartKind, Plan
from fpcompile.passes.aliases import mutated_arguments, storage_owners
from fpcompile.passes.codegen import Function
from fpcompile.passes.context import tensors_of

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DEVICES: tuple[str, ...] = ("cuda",)


def check_device(devices: Iterable[torch.device]) -> None:
    """Raise :class:`UsageError` for a device without CUDA graphs."""
    other = next((device for device in devices if device.type not in DEVICES), None)
    if other is not None:
        raise UsageError(
            "backend 'cudagraphs' needs a model on a CUDA device",
            expected="model.to('cuda')",
            got=f"a model on {other}",
            remedy="move the model to a GPU, or use backend='inductor' or 'eager'",
        )


def lower_to_graphs(
    plan: Plan, functions: Mapping[str, Function]
) -> tuple[dict[str, str], dict[str, Function], dict[str, str]]:
    """(new names of functions, all functions, why some stay eager)."""
    uses: dict[str, set[str]] = defaultdict(set)
    for part in (p for s in plan.segments for p in s.parts if p.kind is PartKind.GRAPH):
        uses[part.function].add(part.over)
    renamed: dict[str, str] = {}
    lowered: dict[str, Function] = {}
    refused: dict[str, str] = {}
    for key, function in functions.items():
        reason = _refusal(function, uses[key])
        if reason is None:
            renamed[key] = f"cudagraphs {key}"
            lowered[renamed[key]] = dataclasses.replace(function, buckets=BUCKETS)
        else:
            lowered[key], refused[key] = function, reason
    return renamed, lowered, refused


def _refusal(function: Function, overs: set[str]) -> str | None:
    """Why a function is not replayed as a graph, if it is not."""
    if "" in overs:
        return "its rows are not proven independent, so that a length could be padded"
    if len(overs) > 1:
        return "it runs over tokens in one place and over rows in another"
    owners = storage_owners(function.graph)
    inputs = {n.name for n in function.inputs}
    kernels = 0
    for node in function.graph.nodes:
        if any(owners.get(written.name) in inputs for written in mutated_arguments(node)):
            return "it writes in place into its input"
        kernels += _launches(node, owners)
    return None if kernels > 1 else "one kernel is launched as fast without a graph"


def _launches(node: fx.Node, owners: Mapping[str, str]) -> bool:
    """Whether a node is no view."""
    made = bool(tensors_of(node)) and not isinstance(node.meta["val"], (tuple, list))
    return node.op == "call_function" and made and owners[node.name] == node.name

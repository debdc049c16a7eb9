"""Strips: a chain of elementwise operators executed range by range of its tokens inside one launch.

A norm, a rotary embedding or a gated activation reads and writes each of its intermediate values in turn. For
many thousands of tokens these lie in main memory; for a *strip* of a few hundred they stay in the processor's
caches. Results are copied to their place, which costs less than what is saved once there are a few operators.
No launch ends between strips: they are no tiles, and part of no plan.

Who is taken: code of a CPU that is proven token-wise, writes in place nowhere, gives results in memory of
their own, and has a few elementwise operators. Its rows must not depend on how many are computed together:
elementwise operators and reductions over features do not, nor does the matrix kernel of packed bf16 weights
(tests compare bits); any other matrix product may, and is left whole.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, fx

from fpcompile.executor.rooms import room
from fpcompile.executor.stages import Executable
from fpcompile.ir import Part
from fpcompile.passes.codegen import Function
from fpcompile.passes.costs import MATMULS
from fpcompile.passes.prepack import LINEAR

if TYPE_CHECKING:
    from fpcompile.executor.run import Run

STRIP: Final = 512  # tokens
STRIPS: Final = 6  # at least: what fewer tokens need was seen to stay in the caches anyway
_FEWEST: Final = 2  # elementwise operators that are worth the copies
_WHOLE_VIEWS: Final = frozenset(
    {
        torch.ops.aten.view.default,
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten.transpose.int,
        torch.ops.aten.permute.default,
        torch.ops.aten.unsqueeze.default,
    }
)


def in_strips(step: Executable, part: Part, function: Function) -> Executable:
    """``step`` of a part of graph code on a CPU, in strips of long inputs if it may be."""
    if not suits(part, function):
        return step
    inner, outer = part.axes
    over = part.over

    def execute(run: Run, arguments: list[Tensor], lengths: Mapping[str, int]) -> Sequence[Tensor]:
        total = lengths[over]
        count = total // STRIP
        if count < STRIPS:
            return step(run, arguments, lengths)
        results: list[Tensor] = []
        for start in range(0, count * STRIP, STRIP):
            size = STRIP if start < (count - 1) * STRIP else total - start  # a remainder joins the last
            rows = [
                value if axis < 0 else value.narrow(axis, start, size)
                for value, axis in zip(arguments, inner, strict=True)
            ]
            found = step(run, rows, {**lengths, over: size})
            if not start:
                results = [room(strip, axis, total) for strip, axis in zip(found, outer, strict=True)]
            for whole, strip, axis in zip(results, found, outer, strict=True):
                whole.narrow(axis, start, size).copy_(strip)
        arguments.clear()
        return results

    return execute


def suits(part: Part, function: Function) -> bool:
    """Whether a part gives the same bits in strips, and is worth it."""
    if part.over != "tokens" or function.compiled is not None or function.buckets:
        return False
    if any(axis < 0 for axis in part.axes[1]):
        return False
    work = 0
    for node in function.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue  # arithmetic of lengths
        if schema.is_mutable or (node.target in MATMULS and node.target is not LINEAR):
            return False
        aliases = any(r.alias_info is not None for r in schema.returns)
        work += not aliases and node.target is not LINEAR
    owners = [_owner(node) for node in _results(function.graph)]
    return work >= _FEWEST and None not in owners and len(set(owners)) == len(owners)


def _results(graph: fx.Graph) -> list[fx.Node]:
    return list(next(n for n in graph.nodes if n.op == "output").all_input_nodes)


def _owner(node: fx.Node) -> fx.Node | None:
    """The operator whose whole result a value is, in another shape; None for a part of one, or an input."""
    while node.op == "call_function" and node.target in _WHOLE_VIEWS:
        node = node.all_input_nodes[0]
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    schema = getattr(node.target, "_schema", None)
    return None if schema is None or any(r.alias_info is not None for r in schema.returns) else node

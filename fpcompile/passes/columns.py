"""Columns: the output features of a head, which a launch of few rows is cut into ranges of.

A *head* is a linear layer over the rows of logits. Its weight may be the largest of a model, all of it is
read for a single row, and a row cannot be divided. Output features can: each reads its own row of the weight.

Word: a *unit* is the smallest range of columns that is launched by itself, about :data:`UNIT_BYTES` of
weights. More would be a longer bound that nobody can go below; less would cost a packed head, which is always
executed unit by unit, more calls (seen: 50 us each).

Invariants: units are about equal and begin at multiples of :data:`MULTIPLE` columns, where a matrix kernel
begins a block of its own. They follow from the weight's shape and dtype alone, so that plans, tile plans and
checkpoints are the same everywhere. A head of fewer than two units is not divided, and is nothing special.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx

from fpcompile.ir import ROWS
from fpcompile.passes.context import Context, tensors_of
from fpcompile.passes.prepack import LINEAR

UNIT_BYTES = 8 << 20
MULTIPLE: Final = 64
_LINEARS: Final[frozenset[Any]] = frozenset({torch.ops.aten.linear.default, LINEAR})


def units_of(columns: int, width: int, itemsize: int) -> tuple[int, ...]:
    """The columns at which units begin, and the end, for a weight ``[columns, width]``."""
    each = max(MULTIPLE, -(-UNIT_BYTES // max(1, width * itemsize)))
    count = max(1, columns // each)
    return (*(columns * i // count // MULTIPLE * MULTIPLE for i in range(count)), columns)


def is_linear(node: fx.Node) -> bool:
    """Whether a node is a linear layer whose weight, and bias if there is one, are inputs of its graph."""
    if node.op != "call_function" or node.target not in _LINEARS or node.kwargs:
        return False
    x, weight, *more = node.args
    bias = more[0] if more else None
    given = (weight,) if bias is None else (weight, bias)
    return isinstance(x, fx.Node) and all(isinstance(a, fx.Node) and a.op == "placeholder" for a in given)


def is_head(node: fx.Node, ctx: Context) -> bool:
    """Whether a node is a head that can be divided: it becomes a part of its own."""
    axis = ctx.axes.get(node.name)
    if axis is None or axis[1] != ROWS.name or not is_linear(node):
        return False
    (weight,) = tensors_of(node.args[1])  # type: ignore[arg-type]
    if weight.dim() != 2:
        return False
    columns, width = (int(size) for size in weight.shape)
    return len(units_of(columns, width, weight.element_size())) > 2

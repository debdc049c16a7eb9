"""Ranges of a head's columns: which parts of a program have them, and one such range.

A range of the model's own weight is a view of it, so nothing is copied and a weight that is shared with the
embedding stays shared. A packed weight has no views: it is packed unit by unit instead of whole, which takes
as much memory, and a launch of all columns goes through the units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from fpcompile.ir import ROWS, Part, PartKind
from fpcompile.passes.codegen import Function
from fpcompile.passes.columns import is_linear, units_of
from fpcompile.passes.prepack import LINEAR, PACKED, pack


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """A linear layer with a weight ``[columns, width]``; unit i has the columns ``bounds[i]`` to
    ``bounds[i + 1]``. ``packed`` holds a packed weight for each unit, and is empty where ``weight`` is read.
    """

    weight: Tensor
    bias: Tensor | None
    bounds: tuple[int, ...]
    packed: tuple[Tensor, ...] = ()

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.bounds) - 1

    def room(self, x: Tensor) -> Tensor:
        """Memory for the result of all columns of ``x [..., width]``."""
        return x.new_empty(*x.shape[:-1], self.bounds[-1])

    def write(self, out: Tensor, x: Tensor, first: int, last: int) -> None:
        """Units ``first`` to ``last`` of ``x [..., width]``, to their place in ``out [..., columns]``."""
        if self.packed:
            for unit in range(first, last):
                bias, place = self._of(out, unit, unit + 1)
                place.copy_(LINEAR(x, self.packed[unit], bias, "none", [], ""))
            return
        bias, place = self._of(out, first, last)
        weight = self.weight[self.bounds[first] : self.bounds[last]]
        place.copy_(torch.ops.aten.linear.default(x, weight, bias))

    def _of(self, out: Tensor, first: int, last: int) -> tuple[Tensor | None, Tensor]:
        start, stop = self.bounds[first], self.bounds[last]
        return None if self.bias is None else self.bias[start:stop], out[..., start:stop]


def columns_of(
    parts: Iterable[Part], functions: Mapping[str, Function], weights: Mapping[str, Tensor]
) -> dict[tuple[str, ...], Columns]:
    """The columns of all parts that are a head of two units or more, by their outputs."""
    found = {p.outputs: _columns(p, functions, weights) for p in parts if p.kind is PartKind.GRAPH}
    return {outputs: columns for outputs, columns in found.items() if columns is not None}


def _columns(part: Part, functions: Mapping[str, Function], weights: Mapping[str, Tensor]) -> Columns | None:
    function = functions[part.function]
    nodes = [n for n in function.graph.nodes if n.op not in ("placeholder", "output")]
    if part.over != ROWS.name or len(nodes) != 1 or not is_linear(nodes[0]):
        return None
    if [n.name for n in nodes[0].all_input_nodes] != ["x0", "w0", "w1"][: 1 + len(part.params)]:
        return None
    if function.compiled is not None or function.buckets:
        return None
    own = [weights[path.removesuffix(PACKED)] for path in part.params]
    if not own or any(type(w) not in (Tensor, nn.Parameter) for w in own):
        return None  # tensors of another class (quantised ones) may not have ranges
    weight, bias = own[0], own[1] if len(own) > 1 else None
    if weight.dim() != 2 or not weight.is_floating_point():
        return None
    bounds = units_of(int(weight.shape[0]), int(weight.shape[1]), weight.element_size())
    if len(bounds) < 3:
        return None
    packed = part.params[0].endswith(PACKED)
    units = tuple(pack(weight[a:b]) for a, b in pairwise(bounds)) if packed else ()
    return Columns(weight, bias, bounds, units)

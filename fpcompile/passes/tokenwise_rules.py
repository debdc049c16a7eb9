"""Rules of the token-wise proof: for each operator, the axis of its result from those of its arguments.

An operator without a rule is not proven. A rule refuses with :class:`NotProvenError` when rows would mix.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from fpcompile.ir import ROWS, TOKENS
from fpcompile.passes.context import ATTENTION, LEAF, expression, symbols, tensors_of

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """Dimension ``dim`` of a value runs over ``over`` (tokens or rows)."""

    dim: int
    over: sympy.Symbol


class NotProvenError(Exception):
    """Raised by a rule; carries the reason."""


AxisOrNone = Axis | None
Rule = Callable[["Facts", fx.Node], AxisOrNone]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operators; a second rule for one operator is an error."""

    def register(function: Rule) -> Rule:
        for target in targets:
            if target in RULES:
                raise ValueError(f"two rules for {target}")
            RULES[target] = function
        return function

    return register


class Facts:
    """What rules may ask: the axis of every node seen so far, and symbolic shapes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.names = symbols(graph)
        self.axes: dict[fx.Node, AxisOrNone] = {}

    def axis(self, argument: object) -> AxisOrNone:
        """Axis of an argument; constants have none."""
        return self.axes.get(argument) if isinstance(argument, fx.Node) else None

    def shape(self, node: object) -> list[sympy.Expr]:
        """Symbolic shape of an argument's first tensor."""
        if not isinstance(node, fx.Node) or not tensors_of(node):
            return []
        return [expression(s, self.names) for s in tensors_of(node)[0].shape]


# Operators that may be given lengths: position of the argument that holds the sizes of the result.
SIZES: dict[Any, int] = {
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.unflatten.int: 2,
    aten.expand.default: 1,
    aten.zeros.default: 0,
    aten.ones.default: 0,
    aten.full.default: 0,
    aten.empty.memory_format: 0,
    aten.new_zeros.default: 1,
    aten.new_ones.default: 1,
    aten.new_full.default: 1,
    aten.new_empty.default: 1,
}


def _pointwise(p: Facts, node: fx.Node) -> AxisOrNone:
    rank = len(p.shape(node))
    found: set[Axis] = set()
    for argument in node.all_input_nodes:
        axis = p.axis(argument)
        if axis is not None:
            found.add(Axis(axis.dim + rank - len(p.shape(argument)), axis.over))
    if len(found) > 1:
        raise NotProvenError(f"operator {node.target} combines values whose token axes differ")
    return found.pop() if found else None


POINTWISE: Rule = _pointwise  # of every operator that torch tags so

rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.__or__.Tensor,
     aten.__and__.Tensor, aten.__xor__.Tensor, aten.__or__.Scalar, aten.__and__.Scalar, aten.polar.default,
     aten.multiply.Tensor, aten.divide.Tensor, aten.subtract.Tensor, aten.true_divide.Tensor,
     aten.copy_.default, aten.complex.default, aten.lerp.Tensor, aten.lerp.Scalar)(_pointwise)  # fmt: skip


def _dims(node: fx.Node, position: int, name: str, rank: int) -> set[int]:
    default = node.target._schema.arguments[position].default_value  # type: ignore[union-attr]
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    if value is None or value == []:
        return set(range(rank))
    values = value if isinstance(value, (list, tuple)) else [value]
    return {int(v) % rank for v in values}  # type: ignore[arg-type]


def _along(position: int, name: str) -> Rule:
    """Rule of an operator that mixes along some dimensions: those must not be the tokens."""

    def check(p: Facts, node: fx.Node) -> AxisOrNone:
        axis = p.axis(node.args[0])
        for other in node.all_input_nodes:
            if p.axis(other) not in (axis, None):
                raise NotProvenError(f"operator {node.target} combines values whose token axes differ")
        if axis is not None and axis.dim in _dims(node, position, name, len(p.shape(node.args[0]))):
            raise NotProvenError(f"operator {node.target} mixes tokens: it works along the token axis")
        return axis

    return check


for _target, _position, _name in (
    (aten.softmax.int, 1, "dim"),
    (aten._softmax.default, 1, "dim"),
    (aten.log_softmax.int, 1, "dim"),
    (aten.cumsum.default, 1, "dim"),
    (aten.slice.Tensor, 1, "dim"),
    (aten.chunk.default, 2, "dim"),
    (aten.split.Tensor, 2, "dim"),
    (aten.split_with_sizes.default, 2, "dim"),
    (aten.narrow.default, 1, "dim"),
    (aten.topk.default, 2, "dim"),
    (aten.sort.default, 1, "dim"),
    (aten.scatter.src, 1, "dim"),
    (aten.scatter.value, 1, "dim"),
    (aten.scatter_.src, 1, "dim"),
    (aten.scatter_.value, 1, "dim"),
    (aten.flip.default, 1, "dims"),
):
    rule(_target)(_along(_position, _name))


_along_dim = _along(1, "dim")


@rule(
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim,
    aten.argmax.default, aten.var.dim, aten.var.correction, aten.std.dim, aten.std.correction,
)  # fmt: skip
def _reduction(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = _along_dim(p, node)
    arguments = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    keep = arguments.index("keepdim")
    if axis is None or bool(node.args[keep] if len(node.args) > keep else node.kwargs.get("keepdim", False)):
        return axis
    gone = _dims(node, 1, "dim", len(p.shape(node.args[0])))
    return Axis(axis.dim - sum(d < axis.dim for d in gone), axis.over)


@rule(aten.layer_norm.default, aten.rms_norm.default)
def _norm(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    trailing = len(node.args[1])  # type: ignore[arg-type]
    if axis is not None and axis.dim >= len(p.shape(node.args[0])) - trailing:
        raise NotProvenError(f"operator {node.target} normalises over tokens")
    return axis


@rule(aten.linear.default)
def _linear(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    if any(p.axis(a) is not None for a in node.args[1:]):
        raise NotProvenError("a linear layer's weight depends on tokens")
    if axis is not None and axis.dim == len(p.shape(node.args[0])) - 1:
        raise NotProvenError("a linear layer contracts the token axis")
    return axis


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default)
def _matmul(p: Facts, node: fx.Node) -> AxisOrNone:
    left, right = p.axis(node.args[0]), p.axis(node.args[1])
    ranks = [len(p.shape(a)) for a in node.args[:2]]
    if min(ranks) < 2 and (left is not None or right is not None):
        return _vector_product(left, right, ranks)
    rank = len(p.shape(node))
    shift_left, shift_right = rank - ranks[0], rank - ranks[1]
    if left is not None and right is not None:
        if left.dim + shift_left == right.dim + shift_right < rank - 2 and left.over == right.over:
            return Axis(left.dim + shift_left, left.over)  # one product for each token
        raise NotProvenError("a matrix product combines two values that run over tokens")
    if left is not None and left.dim + shift_left < rank - 1:
        return Axis(left.dim + shift_left, left.over)
    if right is not None and right.dim + shift_right != rank - 2:
        return Axis(right.dim + shift_right, right.over)
    if left is None and right is None:
        return None
    raise NotProvenError("a matrix product contracts the token axis")


def _vector_product(left: AxisOrNone, right: AxisOrNone, ranks: list[int]) -> AxisOrNone:
    """Of rows with a constant vector: the last dimension is contracted and goes."""
    if left is not None and right is None and ranks[1] == 1 and left.dim < ranks[0] - 1:
        return left
    raise NotProvenError("a product with a vector contracts the token axis")


@rule(aten.addmm.default)
def _addmm(p: Facts, node: fx.Node) -> AxisOrNone:
    if p.axis(node.args[0]) is not None or p.axis(node.args[2]) is not None:
        raise NotProvenError("addmm: bias or weight depends on tokens")
    axis = p.axis(node.args[1])
    if axis is not None and axis.dim != 0:
        raise NotProvenError("addmm contracts the token axis")
    return axis


@rule(aten.embedding.default)
def _embedding(p: Facts, node: fx.Node) -> AxisOrNone:
    if p.axis(node.args[0]) is not None:
        raise NotProvenError("an embedding table depends on tokens")
    return p.axis(node.args[1])


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
      aten.unflatten.int, aten.view_as.default, aten.reshape_as.default)  # fmt: skip
def _reshape(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    if axis is None:
        return None
    before, after = p.shape(node.args[0]), p.shape(node)
    leading = sympy.Mul(*before[: axis.dim])
    for dim, size in enumerate(after):
        if size == axis.over and sympy.Mul(*after[:dim]) == leading:
            return Axis(dim, axis.over)
    raise NotProvenError(f"operator {node.target} merges the token axis with another: {before} to {after}")


@rule(aten.unsqueeze.default)
def _unsqueeze(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    at = int(node.args[1]) % len(p.shape(node))  # type: ignore[arg-type]
    return axis and Axis(axis.dim + (at <= axis.dim), axis.over)


@rule(aten.squeeze.dim)
def _squeeze(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    if axis is None or len(p.shape(node)) == len(p.shape(node.args[0])):
        return axis
    at = int(node.args[1]) % len(p.shape(node.args[0]))  # type: ignore[arg-type]
    return Axis(axis.dim - (at < axis.dim), axis.over)


@rule(aten.squeeze.default)
def _squeeze_all(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    gone = [d for d, size in enumerate(p.shape(node.args[0])) if size == 1]
    return axis and Axis(axis.dim - sum(d < axis.dim for d in gone), axis.over)


@rule(aten.transpose.int)
def _transpose(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    rank = len(p.shape(node))
    a, b = (int(x) % rank for x in node.args[1:3])  # type: ignore[arg-type]
    return axis and Axis({a: b, b: a}.get(axis.dim, axis.dim), axis.over)


@rule(aten.permute.default)
def _permute(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    rank = len(p.shape(node))
    order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    return axis and Axis(order.index(axis.dim), axis.over)


@rule(aten.t.default)
def _t(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    return axis and Axis(len(p.shape(node)) - 1 - axis.dim, axis.over)


@rule(aten.expand.default)
def _expand(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    return axis and Axis(axis.dim + len(p.shape(node)) - len(p.shape(node.args[0])), axis.over)


@rule(aten.repeat.default)
def _repeat(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    times: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    if axis is None:
        return None
    at = axis.dim + len(times) - len(p.shape(node.args[0]))
    if times[at] != 1:
        raise NotProvenError("tokens are repeated")
    return Axis(at, axis.over)


@rule(aten.select.int)
def _select(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    (at,) = _dims(node, 1, "dim", len(p.shape(node.args[0])))
    if axis is not None and axis.dim == at:
        raise NotProvenError("one token is selected out of all")
    return axis and Axis(axis.dim - (at < axis.dim), axis.over)


@rule(aten.unbind.int)
def _unbind(p: Facts, node: fx.Node) -> AxisOrNone:
    return _select(p, node)


@rule(aten.cat.default, aten.concat.default)
def _cat(p: Facts, node: fx.Node) -> AxisOrNone:
    parts = node.args[0]
    found = {p.axis(a) for a in parts}  # type: ignore[union-attr]
    axis = next(iter(found))
    if len(found) > 1:
        raise NotProvenError("cat joins values whose token axes differ")
    if axis is not None and axis.dim in _dims(node, 1, "dim", len(p.shape(node))):
        raise NotProvenError("cat joins values along the token axis")
    return axis


@rule(aten.stack.default)
def _stack(p: Facts, node: fx.Node) -> AxisOrNone:
    found = {p.axis(a) for a in node.args[0]}  # type: ignore[union-attr]
    axis = next(iter(found))
    if len(found) > 1:
        raise NotProvenError("stack joins values whose token axes differ")
    at = int(node.args[1] if len(node.args) > 1 else 0) % len(p.shape(node))  # type: ignore[arg-type]
    return axis and Axis(axis.dim + (at <= axis.dim), axis.over)


@rule(aten.one_hot.default)
def _one_hot(p: Facts, node: fx.Node) -> AxisOrNone:
    return p.axis(node.args[0])


@rule(aten.contiguous.default, aten.clone.default, aten.to.dtype, aten.to.device, aten.to.other,
      aten.type_as.default, aten._to_copy.default, aten.to.dtype_layout,
      aten.zeros_like.default, aten.ones_like.default, aten.lift_fresh_copy.default,
      aten.full_like.default, aten.empty_like.default)  # fmt: skip
def _same(p: Facts, node: fx.Node) -> AxisOrNone:
    return p.axis(node.args[0])


@rule(aten.scalar_tensor.default, aten.arange.default, aten.arange.start, aten.arange.start_step)
def _creation(p: Facts, node: fx.Node) -> AxisOrNone:
    return None  # refused by infer() when the shape runs over tokens


@rule(aten.zeros.default, aten.ones.default, aten.full.default, aten.new_zeros.default, aten.new_ones.default,
      aten.new_full.default, aten.empty.memory_format, aten.new_empty.default)  # fmt: skip
def _constant(p: Facts, node: fx.Node) -> AxisOrNone:
    """One value everywhere (or none yet): every row is the same, whatever the tokens."""
    found = [(d, s) for d, s in enumerate(p.shape(node)) if s in (TOKENS, ROWS)]
    return Axis(*found[0]) if len(found) == 1 else None


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if axis is None:
        return None
    if dim is None or int(dim) % len(p.shape(node)) == axis.dim:  # type: ignore[arg-type]
        raise NotProvenError("tokens are repeated")
    return axis


@rule(aten.gather.default)
def _gather(p: Facts, node: fx.Node) -> AxisOrNone:
    """From a constant: each place of the result depends on its own index only."""
    if p.axis(node.args[0]) is None:
        return p.axis(node.args[2])
    return _along(1, "dim")(p, node)


@rule(aten.index.Tensor)
def _index(p: Facts, node: fx.Node) -> AxisOrNone:
    axis = p.axis(node.args[0])
    indices: Any = node.args[1]
    used = [(dim, i) for dim, i in enumerate(indices) if i is not None]
    if axis is None:
        if len(used) == 1 and used[0][0] == 0:
            return p.axis(used[0][1])
        raise NotProvenError("indexing of a constant by more than one index")
    if [(dim, getattr(i, "name", "")) for dim, i in used] == [(axis.dim, "logits_to_keep")]:
        return Axis(axis.dim, ROWS)
    raise NotProvenError("tokens are indexed by something else than logits_to_keep")


@rule(operator.getitem)
def _getitem(p: Facts, node: fx.Node) -> AxisOrNone:
    return p.axis(node.args[0])


@rule(ATTENTION)
def _attention(p: Facts, node: fx.Node) -> AxisOrNone:
    if any(p.axis(a) != Axis(2, TOKENS) for a in node.args[:3]):
        raise NotProvenError("queries, keys and values do not run over tokens in dimension 2")
    return Axis(1, TOKENS)


@rule(LEAF)
def _leaf(p: Facts, node: fx.Node) -> AxisOrNone:
    found = {p.axis(a) for a in node.args[0]}  # type: ignore[union-attr]
    if len(found) != 1:
        raise NotProvenError("an opaque leaf's inputs have different token axes")
    return next(iter(found))

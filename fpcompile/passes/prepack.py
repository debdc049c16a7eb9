"""Prepack: linear layers on CPU in bf16 read their weights in the layout of the matrix kernel.

The results are the same bits (checked on this kernel for every shape in tests); rows cost less, above all
few of them, so row tiles become cheap. The price is memory: a packed copy of each weight beside the
model's own. Other dtypes and devices are left as they are: in fp32 the packed kernel rounds differently.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fpcompile.passes.context import Context, body

aten = torch.ops.aten
PACKED = " (packed)"
LINEAR = torch.ops.mkldnn._linear_pointwise.default


def can_prepack(weight: Tensor) -> bool:
    """Whether a weight of this dtype and device has a packed form with the same bits."""
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(
        weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and weight.dim() == 2 and supported
    )


def prepack(graph: fx.Graph, ctx: Context) -> fx.Graph:
    """Let linear nodes read packed weights: new placeholders, recorded in ``ctx.prepacked``."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    packed: dict[fx.Node, fx.Node] = {}
    for node in body(graph):
        if node.target is not aten.linear.default:
            continue
        x, weight, *bias = node.args
        if not isinstance(weight, fx.Node) or weight.name not in ctx.capture.weights:
            continue
        if not can_prepack(ctx.capture.weights[weight.name][1]):
            continue
        if weight not in packed:
            with graph.inserting_after(last):
                packed[weight] = graph.placeholder(f"{weight.name}_packed")
            packed[weight].meta = {"val": weight.meta["val"]}
            ctx.prepacked[packed[weight].name] = weight.name
        node.target = LINEAR
        node.args = (x, packed[weight], bias[0] if bias else None, "none", [], "")
    return graph


def pack(weight: Tensor) -> Tensor:
    """The packed form of a weight."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return result

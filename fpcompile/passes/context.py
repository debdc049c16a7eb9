"""What every pass sees besides the graph, and small helpers to read fx nodes.

A pass is ``(graph, ctx, *, options) -> graph``; options are bound when the pipeline is built. ``ctx`` is
written by analysis passes (each field has one writer) and read by later ones.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fpcompile.ir import ROWS, TOKENS, Cost, Refusal, Source
from fpcompile.models.capture import Capture

ATTENTION = torch.ops.fpcompile.attention.default
LEAF = torch.ops.fpcompile.leaf.default


@dataclasses.dataclass(slots=True)
class Context:
    """Facts about one graph on its way through the pipeline.

    Written by the token-wise proof: ``axes``, node -> (dimension, length that it runs over). By the cost
    pass: ``costs``. By the cut pass: ``cuts``, node -> reason of the cut behind it, ``refusals``, node -> why
    there is none, and ``refused``, sentences about where none may stand. By the prepack pass: ``prepacked``,
    placeholder of a packed weight -> that of the weight.
    """

    capture: Capture
    axes: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    costs: dict[str, Cost] = dataclasses.field(default_factory=dict)
    cuts: dict[str, Any] = dataclasses.field(default_factory=dict)
    refusals: dict[str, Refusal] = dataclasses.field(default_factory=dict)
    refused: tuple[str, ...] = ()
    prepacked: dict[str, str] = dataclasses.field(default_factory=dict)


def body(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that compute: neither placeholders nor the output."""
    return [n for n in graph.nodes if n.op not in ("placeholder", "output", "get_attr")]


def tensors_of(node: fx.Node) -> list[Tensor]:
    """Fake tensors that a node evaluates to, flattened."""
    val = node.meta.get("val")
    values = val if isinstance(val, (tuple, list)) else [val]
    return [v for v in values if isinstance(v, Tensor)]


def symbols(graph: fx.Graph) -> dict[sympy.Symbol, sympy.Symbol]:
    """Map from torch.export's own symbols to ``tokens`` and ``rows``, read off the placeholders."""
    found: dict[sympy.Symbol, sympy.Symbol] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in ("input_ids", "logits_to_keep"):
            size = node.meta["val"].shape[-1]
            found[size.node.expr] = TOKENS if node.name == "input_ids" else ROWS
    return found


def expression(size: Any, names: dict[sympy.Symbol, sympy.Symbol]) -> sympy.Expr:
    """A size (int or SymInt) as an expression in ``tokens`` and ``rows``."""
    if isinstance(size, torch.SymInt):
        return size.node.expr.subs(names)
    return sympy.Integer(int(size))


_TORCH = os.path.dirname(torch.__file__) + os.sep


def source(node: fx.Node) -> Source:
    """Module path and source line of a node, from the metadata that torch.export leaves.

    Of the frames, the innermost outside torch's own layers is the model's.
    """
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    module = paths[-1] if paths else ""
    module = re.sub(r"^L\['self'\]\.?", "", module)
    module = module.removeprefix("model").removeprefix(".")
    frames = re.findall(
        r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or ""
    )
    outside = [f for f in frames if not f[0].startswith(_TORCH)] or frames
    models = [f for f in outside if "modeling_" in f[0]] or outside
    line = f"{models[-1][0].rsplit('/', 1)[-1]}:{models[-1][1]}: {models[-1][2].strip()}" if models else ""
    return Source(module, line)


def describe(nodes: Iterable[fx.Node]) -> tuple[tuple[str, Source], ...]:
    """(name, source) of each node."""
    return tuple((n.name, source(n)) for n in nodes)

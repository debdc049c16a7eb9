"""Generated code: one callable for each distinct part of a plan.

A part becomes a function of (values, weights, lengths) whose names do not depend on where in the model it
stands, so the text of two identical layers is identical and they share one callable. Integers computed from
the lengths are computed again inside each part; only tensors cross cuts.

Arguments are passed in a list that the function empties: nobody else holds a value that is not read again,
so that its memory is free for the next operator, as it is in the model's own forward.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fpcompile.passes.compiled import Compiled


@dataclasses.dataclass(frozen=True, slots=True)
class Function:
    """A generated callable ``([*values, *weights, *lengths]) -> tuple of outputs``, which empties the list.

    ``names`` are its local names for the part's nodes, in their order: they locate an error. ``graph`` is
    what it was generated from, with fake tensors and symbolic lengths: what other backends compile.
    ``shapes`` are dtypes and shapes of its values and weights: with the code they make its key.
    ``compiled`` is what ``call`` runs instead of the generated code, where a backend compiled it;
    ``buckets`` are the lengths for which it is replayed as a CUDA graph.
    """

    call: Callable[[list[Any]], Sequence[Tensor]]
    names: tuple[str, ...]
    graph: fx.Graph
    shapes: str = ""
    compiled: Compiled | None = None
    buckets: tuple[int, ...] = ()

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What the list holds, in order: placeholders ``x..`` (values), ``w..`` (weights) and lengths."""
        return tuple(n for n in self.graph.nodes if n.op == "placeholder")


class _Boxed(fx.graph.CodeGen):
    """Code of a function that takes its arguments out of a list."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        names = [v.split(":")[0].strip() for v in free_vars if v != "self"]
        unpacked = f"\n    {', '.join(names)}, = box\n    box.clear()" if names else ""
        return f"def {self._func_name}(self, box){maybe_return_annotation}:{unpacked}"


class Functions:
    """The distinct functions of a plan, by key. ``spec`` describes an argument: dtype and symbolic shape."""

    def __init__(self, spec: Callable[[fx.Node], str]) -> None:
        self.spec = spec
        self.found: dict[str, Function] = {}

    def generate(
        self,
        nodes: Sequence[fx.Node],
        values: Sequence[fx.Node],
        weights: Sequence[fx.Node],
        lengths: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
    ) -> str:
        """Generate a part's function, or find the identical one; returns its key."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for prefix, group in (("x", values), ("w", weights)):
            for i, node in enumerate(group):
                env[node] = graph.placeholder(f"{prefix}{i}")
        for node in lengths:
            env[node] = graph.placeholder(node.name)
        for node in nodes:
            _copy(graph, node, env)
        graph.output(tuple(env[n] for n in outputs))
        for node, copied in env.items():
            copied.meta = {"val": node.meta.get("val")}
        shapes = ";".join(self.spec(n) for n in (*values, *weights))
        key = key_of(graph, shapes)
        if key not in self.found:
            self.found[key] = function_of(graph, tuple(env[n].name for n in nodes), shapes)
        return key


def key_of(graph: fx.Graph, shapes: str) -> str:
    """The key of a function: a digest of its code and of its arguments' dtypes and shapes."""
    graph.set_codegen(_Boxed())
    text = graph.python_code("self").src
    return hashlib.sha256(f"{text}\n{shapes}".encode()).hexdigest()[:16]


def function_of(graph: fx.Graph, names: tuple[str, ...], shapes: str) -> Function:
    """The callable of a graph that :func:`key_of` has been asked for."""
    return Function(fx.GraphModule(nn.Module(), graph).forward, names, graph, shapes)


def _copy(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> None:
    """Copy ``node`` into a part's graph, with the integers it needs from outside."""
    for argument in node.all_input_nodes:
        if argument not in env:
            _copy(graph, argument, env)
    env[node] = graph.create_node(
        node.op,
        node.target,
        fx.map_arg(node.args, lambda n: env[n]),
        fx.map_arg(node.kwargs, lambda n: env[n]),
        name=_operator_name(node),
    )


def _operator_name(node: fx.Node) -> str:
    target: Any = node.target
    return str(target._schema.name.split("::")[1] if hasattr(target, "_schema") else target.__name__)

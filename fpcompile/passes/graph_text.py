"""Generated functions as data: JSON records of their operators, from which the same code is generated again.

A record holds no code. Reading one makes a graph of operators that are named in tables here, or registered
with torch in one of the listed namespaces, and arguments that are plain values; the code is then generated
from that graph as it was the first time, and its key must be the one in the plan. Names become part of that
code: none that is more than an identifier is read.

Word: a *record* is one function: names of its arguments, and for each node its name, operator, arguments.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fpcompile.errors import ProgramFileError
from fpcompile.passes.codegen import Function, function_of, key_of

NAMESPACES = ("aten", "fpcompile", "mkldnn", "onednn", "prims", "quantized_decomposed", "torchao")
_OPERATOR = (
    "add and_ eq floordiv ge getitem gt le lt mod mul ne neg not_ or_ pow sub truediv".split()  # noqa: SIM905
)
_PLAIN: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not")
    },
}
_NAMES: dict[Any, str] = {function: name for name, function in _PLAIN.items()}
_CONSTANTS: tuple[tuple[str, type[Any]], ...] = (
    ("dtype", torch.dtype),
    ("layout", torch.layout),
    ("memory_format", torch.memory_format),
)

Record = dict[str, Any]


def write_function(function: Function) -> Record:
    """The record of a generated function. Raises :class:`ProgramFileError` for one that has none."""
    nodes = [n for n in function.graph.nodes if n.op not in ("placeholder", "output")]
    (output,) = (n for n in function.graph.nodes if n.op == "output")
    return {
        "inputs": [n.name for n in function.inputs],
        "nodes": [[n.name, _name_of(n), write_value(tuple(n.args)), write_value(n.kwargs)] for n in nodes],
        "output": write_value(output.args[0]),
        "names": list(function.names),
        "shapes": function.shapes,
    }


def read_function(key: str, record: Record) -> Function:
    """The function of a record; its key must come out as ``key``.

    Raises :class:`ProgramFileError` for an operator that is not allowed, and for another key.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    try:
        for name in record["inputs"]:
            nodes[name] = graph.placeholder(_identifier(name))
        for name, target, args, kwargs in record["nodes"]:
            found, named = _resolve(target), read_value(kwargs, nodes)
            for key_word in named:
                _identifier(key_word)
            nodes[name] = graph.create_node(
                "call_function", found, read_value(args, nodes), named, name=_identifier(name)
            )
        graph.output(read_value(record["output"], nodes))
        got = key_of(graph, record["shapes"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ProgramFileError):
            raise
        raise ProgramFileError(
            "a function of the program cannot be read", got=f"{type(error).__name__}: {error}", where=key
        ) from error
    if got != key:
        raise ProgramFileError("a function is not the one that its key says", expected=key, got=got)
    return function_of(graph, tuple(record["names"]), record["shapes"])


def _identifier(name: Any) -> str:
    """``name``, if it is one; whatever else it were would be executed as code."""
    if isinstance(name, str) and name.isascii() and name.isidentifier() and not keyword.iskeyword(name):
        return name
    raise ProgramFileError(
        "a function of the program has a wrong name", expected="an identifier", got=repr(name)
    )


def write_value(value: Any) -> Any:
    """An argument as JSON data. Raises :class:`ProgramFileError` for a value of another kind."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [write_value(v) for v in value]}
    if isinstance(value, list):
        return [write_value(v) for v in value]
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {"dict": {k: write_value(v) for k, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [write_value(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for tag, kind in _CONSTANTS:
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    raise ProgramFileError(
        "the program has an argument that cannot be saved",
        expected="numbers, texts, dtypes, devices, and sequences of these",
        got=f"{type(value).__module__}.{type(value).__qualname__}",
    )


def read_value(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """Read back what :func:`write_value` gave; ``nodes`` are those that it may refer to."""
    if isinstance(data, list):
        return [read_value(v, nodes) for v in data]
    if not isinstance(data, dict):
        return data
    ((tag, value),) = data.items()
    kinds = dict(_CONSTANTS)
    if tag in kinds:
        found = getattr(torch, value)
        if not isinstance(found, kinds[tag]):
            raise ValueError(f"torch.{value} is no {tag}")
        return found
    readers: dict[str, Callable[[Any], Any]] = {
        "node": lambda v: nodes[v],
        "float": float,
        "tuple": lambda v: tuple(read_value(x, nodes) for x in v),
        "dict": lambda v: {k: read_value(x, nodes) for k, x in v.items()},
        "slice": lambda v: slice(*(read_value(x, nodes) for x in v)),
        "device": torch.device,
    }
    return readers[tag](value)


def _name_of(node: fx.Node) -> str:
    target: Any = node.target
    if node.op == "call_function":
        name = str(target) if isinstance(target, OpOverload) else _NAMES.get(target)
        if name is not None:
            _resolve(name)
            return name
    raise ProgramFileError(
        "the program calls what cannot be saved",
        expected=_allowed(),
        got=f"{node.op} {target}",
        where=node.name,
    )


def _resolve(name: str) -> Callable[..., Any]:
    """The operator of that name, if it is one that a saved program may call."""
    if name in _PLAIN:
        return _PLAIN[name]
    space, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    found: Any = None
    if space in NAMESPACES and packet.isidentifier() and overload.isidentifier():
        found = getattr(getattr(getattr(torch.ops, space), packet, None), overload, None)
    if not isinstance(found, OpOverload) or any(a.name == "filename" for a in found._schema.arguments):
        raise ProgramFileError("a saved program may not call this", expected=_allowed(), got=repr(name))
    return found


def _allowed() -> str:
    return f"an operator of {', '.join(NAMESPACES)}, or one of {', '.join(sorted(_PLAIN))}"

"""``dynamic_shapes`` in torch.export's conventions, carried over to flat inputs.

Words: a *promise* says which sizes of an input vary: dimension -> :class:`torch.export.Dim`, ``Dim.AUTO`` or
``Dim.DYNAMIC``; dimensions that it leaves out, maps to None, to a number or to ``Dim.STATIC`` are constants.
Without a promise for an argument, the generic route chooses by itself
(:func:`fpcompile.models.generic.dynamic_dims`).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpcompile.errors import InvalidInputError
from fpcompile.models.generic_tree import At, Flat, Node, Spec

_AUTO = torch.export.Dim.AUTO
_HINTS: tuple[Any, ...] = (_AUTO, torch.export.Dim.DYNAMIC)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Promise:
    """The sizes of one flat input that vary; ``path`` is its place in the call, as ``x`` or ``x[0]``."""

    path: str
    dims: Mapping[int, Any]

    def softened(self, tensor: Tensor) -> Promise:
        """For later variants, compiled from calls outside of the promise: whatever the trace allows."""
        return Promise(self.path, {d: _AUTO for d in self.dims if tensor.shape[d] > 1})


Promises = Mapping[int, Promise]


def readable(message: str, promised: Promises) -> str:
    """torch.export's message about sizes, with the arguments' own names."""
    for index, promise in promised.items():
        message = message.replace(f"L['tensors'][{index}]", promise.path)
    message = re.sub(r"\.size\(\)\[(\d+)\]", r".shape[\1]", message)
    facts = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()[:2] == "- "]
    return "; ".join(fact.split(". If you're")[0] for fact in facts) or message.strip().splitlines()[0]


def by_name(model: nn.Module, dynamic_shapes: Any) -> dict[str, Any]:
    """``dynamic_shapes`` as a dict of the forward's argument names.

    Raises :class:`InvalidInputError` for another type, and for names that the forward does not take.
    """
    parameters = inspect.signature(model.forward).parameters
    names = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    if isinstance(dynamic_shapes, Mapping):
        found = {str(k): v for k, v in dynamic_shapes.items()}
    elif isinstance(dynamic_shapes, (tuple, list)) and len(dynamic_shapes) <= len(names):
        found = dict(zip(names, dynamic_shapes, strict=False))
    else:
        raise InvalidInputError(
            "dynamic_shapes has a wrong form",
            expected=f"a dict by argument name, or a tuple in the order of {', '.join(names)}",
            got=f"{type(dynamic_shapes).__name__} of {len(dynamic_shapes)}"
            if isinstance(dynamic_shapes, Sequence)
            else type(dynamic_shapes).__name__,
        )
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [n for n in found if n not in names and not takes_any]
    if unknown:
        raise InvalidInputError(
            "dynamic_shapes names an argument that the model does not take",
            expected=", ".join(names),
            got=", ".join(unknown),
        )
    return found


def promises(model: nn.Module, flat: Flat, shapes: Mapping[str, Any]) -> dict[int, Promise]:
    """Index of a flat input -> promise, for the arguments of a call that ``shapes`` names."""
    found: dict[int, Promise] = {}
    for name, spec in _arguments(model, flat):
        if name in shapes:
            _descend(spec, shapes[name], name, flat.tensors, found)
    return found


def argument_names(model: nn.Module, flat: Flat) -> dict[int, str]:
    """Index of a flat input -> the name of an argument that is this tensor or holds it."""
    found: dict[int, str] = {}
    for name, spec in _arguments(model, flat):
        todo = [spec]
        while todo:
            part = todo.pop()
            if isinstance(part, At):
                found.setdefault(part.index, name)
            elif isinstance(part, Node):
                todo += [inner for _, inner in part.entries]
    return found


def _arguments(model: nn.Module, flat: Flat) -> list[tuple[str, Spec]]:
    """The arguments of a call with their names."""
    assert isinstance(flat.spec, Node)
    positional, keyword = (part for _, part in flat.spec.entries)
    assert isinstance(positional, Node)
    assert isinstance(keyword, Node)
    names = list(inspect.signature(model.forward).parameters)
    given = [(names[min(i, len(names) - 1)], s) for i, (_, s) in enumerate(positional.entries)]
    return [*given, *((str(name), spec) for name, spec in keyword.entries)]


def _descend(spec: Spec, shape: Any, path: str, tensors: Sequence[Tensor], found: dict[int, Promise]) -> None:
    """Follow an argument and its shapes down to the tensors."""
    if isinstance(spec, At):
        found[spec.index] = Promise(path, _dims(shape, path, tensors[spec.index].dim()))
    elif isinstance(spec, Node) and shape is not None:
        for number, (key, part) in enumerate(spec.entries):
            place = number if key is None else key
            try:
                inner = shape[place]
            except (KeyError, IndexError, TypeError) as error:
                raise InvalidInputError(
                    f"dynamic_shapes does not fit {path}",
                    expected=f"an entry for {place!r}, as in the argument itself",
                    got=repr(shape)[:200],
                ) from error
            _descend(part, inner, f"{path}[{place!r}]", tensors, found)


def _dims(shape: Any, path: str, rank: int) -> dict[int, Any]:
    if isinstance(shape, Mapping):
        items: list[tuple[Any, Any]] = list(shape.items())
    elif isinstance(shape, (tuple, list)):
        items = list(enumerate(shape))
    elif shape is None:
        items = []
    else:
        raise InvalidInputError(
            f"dynamic_shapes does not fit {path}",
            expected="None, a dict from dimensions to torch.export.Dim, or one entry for each dimension",
            got=repr(shape)[:200],
        )
    dims: dict[int, Any] = {}
    for dim, size in items:
        if not isinstance(dim, int) or not -rank <= dim < rank:
            raise InvalidInputError(
                f"dynamic_shapes names dimension {dim} of {path}",
                expected=f"{-rank} to {rank - 1}",
                got=str(dim),
            )
        if isinstance(size, torch.export.Dim) or size in _HINTS:
            dims[dim % rank] = size
    return dims

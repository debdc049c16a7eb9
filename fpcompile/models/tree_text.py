"""Specs of trees (:mod:`fpcompile.models.generic_tree`) as JSON data, and back.

A spec names classes of containers, caches and outputs. Reading one makes objects of these classes when a
program runs, so only plain containers and classes of transformers, or of the model's own modules, are read
back: none is imported for it, outputs and tuples are built from their fields, caches without their
``__init__``."""

from __future__ import annotations

import collections
import enum
import sys
from collections.abc import Callable, Collection
from typing import Any

from transformers.utils.generic import ModelOutput

from fpcompile.errors import ProgramFileError
from fpcompile.models.generic_tree import Again, At, Count, Node, Plain, Spec

Write = Callable[[Any], Any]
_CONTAINERS = {"list": list, "tuple": tuple, "dict": dict, "OrderedDict": collections.OrderedDict}


def write_spec(spec: Spec, plain: Write) -> Any:
    """``spec`` as JSON data; ``plain`` writes plain values.

    Raises :class:`ProgramFileError` for what :func:`read_spec` would refuse.
    """
    match spec:
        case At(index):
            return ["at", index]
        case Count(index):
            return ["count", index]
        case Again(number):
            return ["again", number]
        case Plain(value):
            if isinstance(value, enum.Enum):
                return ["enum", _name(type(value)), value.name]
            return ["class", _name(value)] if isinstance(value, type) else ["plain", plain(value)]
        case Node(kind, form, entries, number):
            if form == "method":
                raise ProgramFileError("a call with bound methods cannot be saved", got=str(entries[0]))
            rows = [[plain(key), write_spec(part, plain)] for key, part in entries]
            return ["node", _name(kind), form, rows, number]


def read_spec(data: Any, plain: Write, modules: Collection[str]) -> Spec:
    """Read back what :func:`write_spec` gave; ``modules`` are those of the model's own classes.

    Raises :class:`ProgramFileError` for other classes.
    """
    kind, *rest = data
    if kind in ("at", "count", "again"):
        made: Any = {"at": At, "count": Count, "again": Again}[kind]
        return made(int(rest[0]))  # type: ignore[no-any-return]
    if kind == "plain":
        return Plain(plain(rest[0]))
    found = _class(rest[0], modules)
    if kind == "class":
        return Plain(found)
    if kind == "enum":
        if not issubclass(found, enum.Enum):
            raise _unknown(rest[0])
        return Plain(found[rest[1]])
    if kind != "node":
        raise ValueError(f"{kind!r} is no part of a spec")
    _, form, rows, number = rest
    fits = {
        "list": found is list,
        "tuple": found is tuple or (issubclass(found, tuple) and hasattr(found, "_fields")),
        "dict": found in (dict, collections.OrderedDict) or issubclass(found, ModelOutput),
        "object": found not in _CONTAINERS.values(),
    }
    if not fits[form]:
        raise _unknown(rest[0])
    entries = tuple((plain(key), read_spec(part, plain, modules)) for key, part in rows)
    return Node(found, form, entries, int(number))


def _name(kind: type[Any]) -> str:
    for name, container in _CONTAINERS.items():
        if kind is container:
            return name
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str, modules: Collection[str]) -> type[Any]:
    if name in _CONTAINERS:
        return _CONTAINERS[name]
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    if not (module.startswith("transformers.") or module in modules) or not path.isidentifier():
        raise _unknown(name)
    found = getattr(found, path, None)
    if not isinstance(found, type) or found.__module__ != module:
        raise _unknown(name)
    return found


def _unknown(name: str) -> ProgramFileError:
    return ProgramFileError(
        "the saved program takes or returns an unknown type",
        expected="lists, tuples, dicts, and classes of transformers or of the model's own modules",
        got=name,
    )

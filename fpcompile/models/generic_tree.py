"""Arguments and results of any model as a flat list of tensors and a description of what holds them.

Words: a *tree* is what a model takes or returns: tensors in dicts, lists, tuples, output objects, caches. Its
*spec* is the tree with every tensor replaced by its number and every counter by a *count*. Counts are the
integers that a cache keeps about itself (tokens seen so far): they change from call to call, so a graph must
take them as symbols; all other plain values are part of the spec.

Invariants: ``unflatten(*flatten(tree))`` builds an equal tree out of new containers: the caller's objects
are never changed by what is done to the copy. Specs compare by value and are never changed.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor

COUNTERS = frozenset({"cumulative_length", "_seen_tokens", "seqlen_offset", "_past_length"})
_PLAIN = (bool, int, float, str, bytes, complex, torch.dtype, torch.device, torch.layout, enum.Enum)


@dataclasses.dataclass(frozen=True, slots=True)
class At:
    """The place of tensor ``index``."""

    index: int


@dataclasses.dataclass(frozen=True, slots=True)
class Count:
    """The place of count ``index``."""

    index: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Plain:
    """A value that is part of the spec. Equal ones have one type: ``True`` is not ``1``."""

    value: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plain) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A container: ``kind`` is its class, ``entries`` its (key, spec) pairs, ``number`` its identity.

    ``form`` says how to build it: ``"list"``, ``"tuple"``, ``"dict"``, ``"object"``, ``"method"``.
    """

    kind: Any
    form: str
    entries: tuple[tuple[Any, Spec], ...]
    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class Again:
    """A container that was met before, by its number."""

    number: int


Spec = At | Count | Plain | Node | Again
_NOTHING: Mapping[int, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """A flattened tree: its tensors, its counts, its spec, its containers by number."""

    tensors: tuple[Tensor, ...]
    counts: tuple[Any, ...]
    spec: Spec
    containers: Mapping[int, Any]


class _Flattener:
    def __init__(self, known: Mapping[int, Any]) -> None:
        self.tensors: dict[int, tuple[int, Tensor]] = {}
        self.counts: list[Any] = []
        self.containers: dict[int, Any] = dict(known)
        self.numbers = {id(value): number for number, value in known.items()}
        self.met: set[int] = set()

    def visit(self, value: Any, key: Any = None) -> Spec:
        if isinstance(value, Tensor):
            return At(self.tensors.setdefault(id(value), (len(self.tensors), value))[0])
        if isinstance(value, torch.SymInt) or (key in COUNTERS and type(value) is int):
            self.counts.append(value)
            return Count(len(self.counts) - 1)
        form = form_of(value)
        if form == "plain":
            return Plain(value)
        number = self.numbers.setdefault(id(value), len(self.containers))
        self.containers[number] = value
        if number in self.met:
            return Again(number)
        self.met.add(number)
        return Node(type(value), form, tuple((k, self.visit(v, k)) for k, v in _items(value, form)), number)


def form_of(value: Any) -> str:
    """How a value is taken apart; ``"plain"`` when it is not."""
    if value is None or isinstance(value, (*_PLAIN, type)):
        return "plain"
    if isinstance(value, MethodType):
        return "method"
    if isinstance(value, Mapping):
        return "dict"
    if isinstance(value, (list, tuple)):
        return "tuple" if isinstance(value, tuple) else "list"
    stateful = hasattr(value, "__dict__") and not callable(value)
    return "object" if stateful and not type(value).__name__.endswith("Config") else "plain"


def _items(value: Any, form: str) -> list[tuple[Any, Any]]:
    if form == "method":
        return [("function", value.__func__), ("owner", value.__self__)]
    if form == "dict":
        return list(value.items())
    return list(vars(value).items()) if form == "object" else [(None, v) for v in value]


def flatten(tree: Any, known: Mapping[int, Any] = _NOTHING) -> Flat:
    """Tensors, counts and spec of ``tree``. A tensor that occurs twice has one number.

    ``known`` gives containers a number beforehand: theirs in an earlier flattening.
    """
    flattener = _Flattener(known)
    spec = flattener.visit(tree)
    tensors = tuple(t for _, t in flattener.tensors.values())
    return Flat(tensors, tuple(flattener.counts), spec, flattener.containers)


def unflatten(
    spec: Spec, tensors: Sequence[Any], counts: Sequence[Any], existing: Mapping[int, Any] = _NOTHING
) -> Any:
    """The tree that ``spec`` describes, out of new containers.

    Containers whose number is in ``existing`` are not made anew: that object is given the described state.
    """
    built: dict[int, Any] = {}

    def build(part: Spec) -> Any:
        match part:
            case At(index):
                return tensors[index]
            case Count(index):
                return counts[index]
            case Plain(value):
                return value
            case Again(number):
                return built[number]
            case Node():
                return make(part)

    def make(node: Node) -> Any:
        if node.form == "tuple":
            items = [build(s) for _, s in node.entries]
            made: Any = node.kind(*items) if hasattr(node.kind, "_fields") else node.kind(items)
        elif node.form == "method":
            owner = build(node.entries[1][1])
            made = MethodType(build(node.entries[0][1]), owner)
        elif node.form == "list":
            made = built[node.number] = existing.get(node.number, node.kind())
            made[:] = [build(s) for _, s in node.entries]
        elif node.form == "dict":
            made = _dict(node, {k: build(s) for k, s in node.entries}, existing.get(node.number))
        else:
            made = existing.get(node.number)
            made = built[node.number] = node.kind.__new__(node.kind) if made is None else made
            state = {k: build(s) for k, s in node.entries}
            made.__dict__.clear()
            made.__dict__.update(state)
        built[node.number] = made
        return made

    return build(spec)


def _dict(node: Node, items: dict[Any, Any], existing: Any) -> Any:
    """A mapping; transformers' outputs are mappings and dataclasses in one."""
    if existing is not None:
        for key in [k for k in existing if k not in items]:
            del existing[key]
        existing.update(items)
        return existing
    kind: Any = node.kind
    fields = dataclasses.is_dataclass(node.kind)
    return kind(**items) if fields else kind(items)

"""Tensors that a model keeps in its own modules from one call to the next, beside its weights.

A graph computes what one call computes. Where a forward assigns a tensor to a module (the last state of a
recurrence, the offset of multimodal positions), a later call may begin with it; a program would begin with
what was there when it was traced, every time. torch.export puts such attributes back and only warns.

Words: an attribute is *kept* when a forward assigned a tensor to it: in a trace, in a call of the model
itself since it was compiled, or before, as far as its code tells (:func:`left`). In traces of calls that
pass a cache a :class:`Stale` stands in its place: who assigns it first does not notice, who reads it fails.
An attribute is *memoised*, and not kept, when a trace computed it from weights alone.

Tensors in lists, dicts and caches that are attributes count as well, all those of one attribute together. A
list or a dict stays one that a forward may write into and read what it wrote: :class:`StaleList`, whose
earlier entries, and how many there are, nobody may read, and :class:`StaleDict`.

Left alone: rotary modules whose frequencies follow the length, which start over with each call
(:mod:`fpcompile.models.leaves`), and buffers.
"""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from operator import is_
from types import CodeType
from typing import Any, Final

from torch import Tensor, nn
from transformers import Cache

from fpcompile.models.generic_tree import Node, Spec, flatten
from fpcompile.models.leaves import needs_rotary_leaf

__all__ = ["StaleReadError", "assigned", "attributes", "forget", "holds_cache", "left", "parts", "renew"]

_OWN: Final = frozenset(vars(nn.Module()))
_DEPTH: Final = 3
"""Containers inside one another that are looked into."""

Held = Any
"""A tensor, a :class:`Stale`, or a tuple of them: those of a container."""


class StaleReadError(Exception):
    """A forward reads what an earlier call left in its modules; carries the attribute's path."""


def attributes(model: nn.Module) -> dict[str, Held]:
    """Path -> value of every plain attribute of a model's modules that is a tensor or holds some."""
    found: dict[str, Held] = {}
    for path, module in model.named_modules():
        if needs_rotary_leaf(module):
            continue
        for name, value in list(vars(module).items()):
            if name in _OWN or not isinstance(value, _HOLDERS):
                continue
            if (held := _held(value)) is not None:
                found[f"{path}.{name}".removeprefix(".")] = held
    return found


def _held(value: Any, depth: int = 0) -> Held | None:
    if isinstance(value, (Tensor, Stale)):
        return value
    if isinstance(value, Cache):
        return flatten(value).tensors or None
    if isinstance(value, (list, tuple, dict)) and depth < _DEPTH:
        found = [_held(v, depth + 1) for v in _entries(value)]
        return tuple(part for held in found for part in parts(held)) or None
    return None


def _entries(value: Any) -> list[Any]:
    """Of a list, a tuple or a dict, stale ones too."""
    if isinstance(value, dict):
        return list(dict.values(value))
    return list(list.__iter__(value) if isinstance(value, list) else value)


def parts(held: Held | None) -> tuple[Any, ...]:
    """What is held, one by one."""
    return held if isinstance(held, tuple) else () if held is None else (held,)


def assigned(before: Mapping[str, Held], after: Mapping[str, Held]) -> frozenset[str]:
    """Paths whose tensor is another one than before."""
    return frozenset(path for path, value in after.items() if not _same(before.get(path), value))


def _same(one: Held, other: Held) -> bool:
    a, b = parts(one), parts(other)
    return len(a) == len(b) and all(map(is_, a, b))


def left(model: nn.Module) -> frozenset[str]:
    """Paths of tensors that an earlier call may have left: those to whose names the code of some module
    assigns elsewhere than in ``__init__``. What it memoised is among them: nothing tells the two apart.
    """
    found = attributes(model)
    kinds = {kind for module in model.modules() for kind in type(module).__mro__} if found else set()
    names = {name for kind in kinds if kind.__module__.split(".")[0] != "torch" for name in _stores(kind)}
    return frozenset(path for path in found if path.rpartition(".")[2] in names)


def _stores(kind: type) -> Iterator[str]:
    """Names of attributes that the methods and properties of a class assign, those of ``__init__`` aside."""
    for name, member in vars(kind).items():
        parts = [member.fget] if isinstance(member, property) else [getattr(member, "__func__", member)]
        codes = [getattr(inspect.unwrap(p), "__code__", None) for p in parts if callable(p)]
        todo = [code for code in codes if code is not None and name != "__init__"]
        while todo:
            code = todo.pop()
            todo += [c for c in code.co_consts if isinstance(c, CodeType)]
            yield from (i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR")


def forget(model: nn.Module, kept: Collection[str]) -> None:
    """Put a :class:`Stale` in the place of every kept attribute, stale copies in that of lists and dicts.
    ``model`` belongs to a shadow.
    """
    for path in kept:
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        value = vars(module).get(name)
        setattr(module, name, _emptied(value, path) if type(value) in (list, dict) else Stale(path))


def _emptied(value: Any, path: str, depth: int = 0) -> Any:
    """``value`` without what an earlier call left in it."""
    if depth < _DEPTH and type(value) is list:
        return StaleList(path, [_emptied(v, path, depth + 1) for v in value])
    if depth < _DEPTH and type(value) is dict:
        return StaleDict(path, {k: _emptied(v, path, depth + 1) for k, v in value.items()})
    return value if _held(value, depth) is None else Stale(path)


def renew(model: nn.Module) -> None:
    """Take what one call wrote out of the stale lists and dicts of a model's modules."""
    for module in model.modules():
        for value in list(vars(module).values()):
            _renew(value)


def _renew(value: Any) -> None:
    if isinstance(value, (StaleList, StaleDict)):
        value.renew()


def holds_cache(spec: Spec) -> bool:
    """Whether a call passes a cache: only then may it go on from an earlier one."""
    if not isinstance(spec, Node):
        return False
    cache = isinstance(spec.kind, type) and (
        issubclass(spec.kind, Cache) or spec.kind.__name__.endswith("Cache")
    )
    return cache or any(holds_cache(part) for _, part in spec.entries)


def _refuse(self: Stale, *args: object, **kwargs: object) -> Any:
    raise StaleReadError(self.path)


class Stale:
    """What an earlier call left, which a trace must not see. Comparing it with None is no reading."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise StaleReadError(self.path)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise StaleReadError(_path_in([*args, *(kwargs or {}).values()]))

    __bool__ = __len__ = __iter__ = __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __matmul__ = __lt__ = __le__ = __gt__ = __ge__ = __neg__ = _refuse


class StaleList(list[Any]):
    """A list with entries that an earlier call left: ``known`` ones, then any number of others. What is added
    may be read from the end; whatever depends on the others fails, until all are replaced.
    """

    def __init__(self, path: str, known: list[Any]) -> None:
        self.path, self.known = path, known
        self.renew()

    def renew(self) -> None:
        """As it was made."""
        for value in self.known:
            _renew(value)
        self[:] = [*self.known, Stale(self.path)]

    def __deepcopy__(self, memo: dict[int, Any]) -> StaleList:
        return StaleList(self.path, copy.deepcopy(self.known, memo))

    def __getitem__(self, index: Any) -> Any:
        return _known(self)[index] if isinstance(index, slice) else list.__getitem__(self, index)


class StaleDict(dict[Any, Any]):
    """A dict with entries that an earlier call left: ``known`` ones, and any others. What is added may be
    read by its key; whatever depends on the others fails, until the dict is cleared.
    """

    def __init__(self, path: str, known: dict[Any, Any]) -> None:
        self.path, self.known = path, known
        self.renew()

    def renew(self) -> None:
        """As it was made."""
        for value in self.known.values():
            _renew(value)
        self.clear()
        self.update(self.known)
        self.stale = True

    def clear(self) -> None:
        dict.clear(self)
        self.stale = False

    def __deepcopy__(self, memo: dict[int, Any]) -> StaleDict:
        return StaleDict(self.path, copy.deepcopy(self.known, memo))


def _known(value: StaleList | StaleDict) -> Any:
    """A plain list or dict of the same entries, where all of them are known."""
    if isinstance(value, StaleDict):
        if value.stale:
            raise StaleReadError(value.path)
        return dict(dict.items(value))
    entries = _entries(value)
    if any(isinstance(entry, Stale) for entry in entries):
        raise StaleReadError(value.path)
    return entries


def _of_all(name: str) -> Callable[..., Any]:
    """A method that depends on every entry."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(_known(self), name)(*args, **kwargs)

    return method


def _of_one(name: str) -> Callable[..., Any]:
    """A method of a dict that depends on the entry of one key."""

    def method(self: StaleDict, key: Any, *rest: Any) -> Any:
        if self.stale and not dict.__contains__(self, key):
            raise StaleReadError(self.path)
        return getattr(dict, name)(self, key, *rest)

    return method


for _name in ("__len__", "__iter__", "__reversed__", "__eq__", "__ne__", "copy"):
    setattr(StaleList, _name, _of_all(_name))
    setattr(StaleDict, _name, _of_all(_name))
for _name in ("__contains__", "__add__", "__mul__", "__rmul__", "count", "index"):
    setattr(StaleList, _name, _of_all(_name))
for _name in ("__or__", "__ror__", "keys", "values", "items"):
    setattr(StaleDict, _name, _of_all(_name))
for _name in ("__contains__", "__getitem__", "get", "pop", "setdefault"):
    setattr(StaleDict, _name, _of_one(_name))

_HOLDERS: Final = (Tensor, Stale, Cache, list, tuple, dict)


def _path_in(arguments: Any) -> str:
    for argument in arguments:
        if isinstance(argument, Stale):
            return argument.path
        if isinstance(argument, (list, tuple)) and (path := _path_in(argument)):
            return path
    return ""

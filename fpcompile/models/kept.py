"""Tensors that a model keeps in its own modules from one call to the next, beside its weights.

A graph computes what one call computes. Where a forward assigns a tensor to a module (the last state of a
recurrence, the offset of multimodal positions), a later call may begin with it; a program would begin with
what was there when it was traced, every time. torch.export puts such attributes back and only warns.

Words: an attribute is *kept* when a forward assigned a tensor to it: in a trace, in a call of the model
itself since it was compiled, or before, as far as its code tells (:func:`left`). In traces of calls that
pass a cache a :class:`Stale` stands in its place: who assigns it first does not notice, who reads it fails.
An attribute is *memoised*, and not kept, when a trace computed it from weights alone.

Tensors in lists, dicts and caches that are attributes count as well, all those of one attribute together.

Left alone: rotary modules whose frequencies follow the length, which start over with each call
(:mod:`fpcompile.models.leaves`), and buffers.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Collection, Iterator, Mapping
from operator import is_
from types import CodeType
from typing import Any, Final

from torch import Tensor, nn
from transformers import Cache

from fpcompile.models.generic_tree import Node, Spec, flatten
from fpcompile.models.leaves import needs_rotary_leaf

__all__ = ["StaleReadError", "assigned", "attributes", "forget", "holds_cache", "left", "parts"]

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
        found = [_held(v, depth + 1) for v in list(value.values() if isinstance(value, dict) else value)]
        return tuple(part for held in found for part in parts(held)) or None
    return None


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
    """Put a :class:`Stale` in the place of every kept attribute. ``model`` belongs to a shadow."""
    for path in kept:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, Stale(path))


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


_HOLDERS: Final = (Tensor, Stale, Cache, list, tuple, dict)


def _path_in(arguments: Any) -> str:
    for argument in arguments:
        if isinstance(argument, Stale):
            return argument.path
        if isinstance(argument, (list, tuple)) and (path := _path_in(argument)):
            return path
    return ""

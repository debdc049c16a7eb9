"""Policies: in which order the device serves requests, at which grain it can be stopped, what is packed.

A policy *suggests*; the core decides, keeps the books, and refuses what is illegal. Two kinds:

``KeyedPolicy``
    gives every request a sort key, smallest first. While nothing changes, a key stays valid until
    ``key_expires``; so a heap with lazy invalidation makes every event O(log n).
``RankingPolicy``
    sees all candidates at once and returns them in order, best first. It states its own cost.
``StepPolicy``
    composes each launch from token slices of several requests (the continuous-batching servers).

Write your own in a few lines, and pass an instance (or its registered name) to ``Scheduler`` or ``Engine``::

    @register("shortest-prompt")
    class ShortestPrompt(KeyedPolicy):
        def key(self, view, now):
            return view.request.tokens

Words
    *grain*   where a run can stop: :class:`Grain`. The core does not use it; the device (or the simulator)
              is set up from it.
    *spec*    a policy's text form, ``name:argument,argument,option=value``; see :func:`make_policy`.

Invariants
    Policies read no clock and draw no random numbers: the same events give the same decisions.
    One instance serves one core: ``make_policy`` builds a fresh one on each call.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, Protocol, TypeVar, get_args

from fpcompile.errors import InvalidInputError, UnknownNameError
from fpcompile.scheduler.batching import Batching
from fpcompile.scheduler.errors import UnknownPolicyError
from fpcompile.scheduler.job import RequestView
from fpcompile.scheduler.states import State

__all__ = [
    "Grain",
    "KeyedPolicy",
    "Policy",
    "RankingPolicy",
    "StepPolicy",
    "StepView",
    "Unit",
    "make_policy",
    "policy_names",
    "register",
    "whole",
]

Unit = Literal["model", "layers", "half-layer", "operator", "tile", "tokens"]


def whole(what: str, value: object, least: int = 1) -> int:
    """``value``, a whole number >= ``least``; else :class:`InvalidInputError` about ``what``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(what, expected=f"a whole number >= {least}", got=repr(value))
    return value


@dataclass(frozen=True, slots=True)
class Grain:
    """Where a run of this policy can be stopped, and what a stop point costs.

    ``unit``: whole model; groups of ``size`` layers (0: chosen by length); half layers; operators; tiles of
    at most ``size`` microseconds; chunks of ``size`` tokens. ``synchronises``: the worker waits for the
    device at every stop point, whether or not anybody asked it to pause.
    """

    unit: Unit = "operator"
    size: int = 0
    synchronises: bool = False

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise UnknownNameError("unit of a grain", self.unit, known=get_args(Unit))
        whole(f"the size of a grain of unit {self.unit!r}", self.size, 1 if self.unit == "tile" else 0)


class Policy:
    """What every policy has. Attributes are read by the core; hooks are optional."""

    name: str = "unnamed"
    preemptive: bool = True
    grain: Grain = Grain()
    batching: Batching | None = None
    eviction: bool = True
    """Whether paused runs may be evicted for a better one; else only started runs go on then."""

    def spares(self, victims: Sequence[tuple[RequestView, float]], now: float) -> RequestView | None:
        """One of the runs that are about to be evicted, to be finished first instead; None: evict.

        Each comes with the device seconds that moving it away and back would take (option ``move_s``).
        """
        return None

    def arrived(self, view: RequestView, now: float) -> None:
        """A request has arrived; called before its first key."""

    def joined(self, view: RequestView, lead: RequestView, now: float) -> None:
        """A waiting request was packed into the run that ``lead`` is about to start."""

    def launched(self, view: RequestView, now: float) -> None:
        """A run is given to the device."""

    def stopped(self, view: RequestView, now: float) -> None:
        """The device stopped executing a run: it is paused or has ended."""

    def ended(self, view: RequestView, outcome: State, now: float) -> None:
        """A request has ended, this way."""


class KeyedPolicy(Policy, ABC):
    """Order by a sort key, smallest first; ties by arrival, then by sequence."""

    @abstractmethod
    def key(self, view: RequestView, now: float) -> Any:
        """Anything sortable. Must stay the same from ``now`` until ``key_expires`` while nothing happens."""

    def key_expires(self, view: RequestView) -> float:
        """The time from which the key must be asked for again; inf when it stays valid."""
        return inf


class RankingPolicy(Policy, ABC):
    """Order all candidates at once."""

    @abstractmethod
    def rank(self, views: Sequence[RequestView], now: float) -> Iterable[str]:
        """Request ids of the runs, best first; leaving some out means: not now.

        ``views`` holds every waiting and paused run, and the one on the device if there is one.
        """

    def retimed(self, now: float) -> None:
        """From now on all that is left of runs takes another time, beside more or fewer decode steps."""

    def last_first(self, views: Sequence[RequestView], now: float) -> list[str]:
        """Request ids of these runs, last in line first: for moving memory. Must change nothing."""
        return [view.request.id for view in sorted(views, key=lambda view: (-view.deadline, -view.sequence))]

    def rejects(self) -> list[tuple[str, str]]:
        """(request id, reason) of waiting requests that should not be served; asked after each ranking."""
        return []

    def wake(self, now: float) -> float:
        """When to be asked again although nothing happens; inf for never."""
        return inf


class StepView(RequestView, Protocol):
    """A view with the tokens that are left."""

    @property
    def tokens_left(self) -> int:
        """New tokens of the prompt not yet executed."""


class StepPolicy(Policy, ABC):
    """Compose each launch from token slices; runs are stopped only between steps."""

    preemptive = False

    @abstractmethod
    def compose(self, views: Sequence[StepView], now: float) -> Sequence[tuple[str, int]]:
        """Pairs (request id, new tokens); ``views`` in order of arrival, those already started first."""


_P = TypeVar("_P", bound="Callable[..., Policy]")
_REGISTRY: dict[str, Callable[..., Policy]] = {}


def register(name: str) -> Callable[[_P], _P]:
    """Decorator: make a policy known under ``name``; returns its item, refuses duplicates."""
    given: Any = name
    if not isinstance(given, str) or not given or set(given) & set(":,;= "):
        raise InvalidInputError(
            "a policy is registered under a wrong name",
            expected="a text without colon, comma, semicolon, equals sign and space",
            got=repr(given),
            remedy='@register("my-policy")',
        )

    def put(factory: _P) -> _P:
        if name in _REGISTRY:
            raise InvalidInputError(f"policy {name!r} is registered twice", remedy="choose another name")
        _REGISTRY[name] = factory
        return factory

    return put


def policy_names() -> tuple[str, ...]:
    """The registered names, sorted."""
    _load()
    return tuple(sorted(_REGISTRY))


def make_policy(spec: Policy | str) -> Policy:
    """A fresh policy from its text form, for example ``"s-edf"``, ``"chunked:512,edf"``, ``"vllm:2048,512"``.

    A policy that is given passes through. Hyphens in the names of options are underscores, but not where any
    name will do, such as a tenant of `wfq`. Raises :class:`UnknownPolicyError` listing the legal names, or
    :class:`fpcompile.errors.InvalidInputError` when the arguments do not fit.
    """
    if isinstance(spec, Policy):
        return spec
    given: Any = spec
    if isinstance(given, type):
        raise InvalidInputError(
            "a policy is a class",
            expected="an instance, or a registered name",
            got=given.__name__,
            remedy=f"{given.__name__}()",
        )
    _load()
    name, _, arguments = str(spec).partition(":")
    factory = _REGISTRY.get(name)
    if factory is None:
        raise UnknownPolicyError(spec, known=_REGISTRY)
    positional, named = _arguments(factory, arguments)
    try:
        policy = factory(*positional, **named)
    except TypeError as error:
        raise InvalidInputError(
            f"policy {name!r} does not take these arguments", expected=_usage(factory), got=repr(spec)
        ) from error
    policy.name = str(spec)
    return policy


_Value = int | float | str


def _arguments(factory: Callable[..., Policy], text: str) -> tuple[list[_Value], dict[str, _Value]]:
    """``512,edf,late_share=0.1``: the arguments without a name, and those with one."""
    parameters = inspect.signature(factory).parameters.values()
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    positional: list[_Value] = []
    named: dict[str, _Value] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        option, equals, value = part.partition("=")
        if not equals:
            positional.append(_value(part))
            continue
        name = option if any_name else option.replace("-", "_")
        if name in named:
            raise InvalidInputError(
                f"option {option!r} of a policy is given twice", expected="each option once", got=text
            )
        named[name] = _value(value)
    return positional, named


def _value(text: str) -> _Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _usage(factory: Callable[..., Policy]) -> str:
    """``late_share=0.05, balance=12.0``: the arguments with their defaults."""
    told = []
    for one in inspect.signature(factory).parameters.values():
        anything = one.kind is one.VAR_KEYWORD
        default = "=..." if one.default is one.empty else f"={one.default}"
        told.append(f"name=number ({one.name})" if anything else f"{one.name}{default}")
    return ", ".join(told) or "no arguments"


def _load() -> None:
    """Import the modules whose policies register themselves."""
    import fpcompile.scheduler.policies  # noqa: F401

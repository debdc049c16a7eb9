"""Typed errors of the scheduler: one class per cause, each says what, expected, got and the remedy.

Invariants
    Every class derives from :class:`fpcompile.errors.FpcompileError`, so one ``except`` catches them all.
    The *story* of a request is the list of its transitions, oldest first: ``(time, kind, state)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fpcompile.errors import FpcompileError, InternalError, InvalidInputError, UnknownNameError, UsageError

__all__ = [
    "CostFileError",
    "EventOrderError",
    "InvariantError",
    "TraceError",
    "TransitionError",
    "UnknownPolicyError",
    "UnknownRequestError",
]

Story = Sequence[tuple[float, str, str]]


class UnknownPolicyError(UnknownNameError):
    """No policy of that name is registered; ``known`` lists the legal ones."""

    def __init__(self, name: object, *, known: Iterable[str]) -> None:
        super().__init__("policy", name, known=known)


class UnknownRequestError(UsageError, KeyError):
    """An event names a request or run that this core has never seen, or ended long ago."""

    def __init__(self, request: str, *, event: str) -> None:
        self.request = request
        super().__init__(
            f"{event} names {request!r}, which is not known to this scheduler",
            expected="a request that arrived and has not ended",
            got=repr(request),
            remedy="send Arrival first; send no event for a request after its end",
        )


class EventOrderError(UsageError):
    """Events went back in time, or an id arrived twice."""


class TransitionError(FpcompileError, RuntimeError):
    """An event or command that the transition table does not allow; tells the request's story."""

    def __init__(self, request: str, state: str, kind: str, legal: Iterable[str], story: Story) -> None:
        self.request, self.state, self.kind, self.story = request, state, kind, tuple(story)
        told = "; ".join(f"t={time:.6f} {what} -> {to}" for time, what, to in self.story) or "no event yet"
        super().__init__(
            f"{kind!r} is not possible for {request!r} in state {state!r}",
            expected=f"one of {', '.join(sorted(legal)) or 'nothing: this is an end state'}",
            got=kind,
            where=f"story of {request!r}: {told}",
            remedy="the driver must answer each Launch with exactly one Yielded, Completed or Failed",
        )


class InvariantError(InternalError):
    """``Scheduler.validate()`` found a broken invariant."""


class CostFileError(InvalidInputError):
    """A costs file cannot be read: not JSON, a missing field, a negative or non-finite number."""


class TraceError(InvalidInputError):
    """A line of a trace file cannot be read; ``where`` gives file, line and field."""

    def __init__(self, what: str, *, path: object, line: int, field: str | None, expected: str, got: object):
        self.path, self.line, self.field = str(path), line, field
        place = f"{path}, line {line}" + (f", field {field!r}" if field else "")
        super().__init__(what, expected=expected, got=repr(got), where=place)

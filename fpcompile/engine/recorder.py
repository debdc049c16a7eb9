"""Collects what ran when, as cheaply as appending a tuple; made into spans and marks when somebody asks.

The newest :data:`KEPT` spans are kept, so that an engine may run for ever. On an asynchronous device segments
are recorded when they are launched, which is up to the run-ahead window before they execute.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from fpcompile.engine.metrics import Ticket
from fpcompile.engine.timeline import Mark, MarkKind, Span, SpanKind
from fpcompile.executor.loop import Guarded, Hook, Named
from fpcompile.executor.run import Run
from fpcompile.executor.together import Together

__all__ = ["KEPT", "Recorder", "Timeline", "joined"]

KEPT: Final = 100_000


@dataclass(frozen=True, slots=True)
class Timeline:
    """What an engine recorded: one lane per request, named by its id; seconds on the engine's clock.

    ``slos`` has the TTFT SLO of every lane that has one. Draw it with
    :func:`fpcompile.engine.timeline.draw_timeline` or write it with ``write_chrome_trace``.
    """

    spans: tuple[Span, ...] = ()
    marks: tuple[Mark, ...] = ()
    slos: tuple[tuple[str, float], ...] = ()


class Recorder:
    """The spans and marks of one engine. Written by its driver only."""

    __slots__ = ("_marks", "_slos", "_spans", "lanes")

    def __init__(self) -> None:
        self.lanes: tuple[str, ...] = ()
        """Whose segments are launched now."""
        self._spans: deque[tuple[str, str, float, float, SpanKind]] = deque(maxlen=KEPT)
        self._marks: deque[tuple[str, str, float, MarkKind]] = deque(maxlen=KEPT)
        self._slos: deque[tuple[str, float]] = deque(maxlen=KEPT)

    def segment(self, run: object, segment: Named, start: float, end: float) -> None:
        """A hook for the loop."""
        kind: SpanKind = "tile" if tiled(run) else "segment"
        for lane in self.lanes:
            self._spans.append((lane, segment.name, start, end, kind))

    def copied(self, ticket: Ticket, name: str, start: float, end: float) -> None:
        """Its tensors moved between device and host; ``name`` says which way."""
        self._spans.append((ticket.id, name, start, end, "copy"))

    def decoded(self, tickets: Iterable[Ticket], start: float, end: float) -> None:
        """A decode step, or a part of one, had the device."""
        for ticket in tickets:
            self._spans.append((ticket.id, "decode", start, end, "decode"))

    def first_token(self, ticket: Ticket, now: float) -> None:
        """The first token of a request that generates is there."""
        self._marks.append((ticket.id, "first token", now, "first_token"))

    def arrived(self, ticket: Ticket) -> None:
        """It was given to the scheduler."""
        request = ticket.request
        self._marks.append((request.id, "arrival", request.arrival, "arrival"))
        if math.isfinite(request.slo):
            self._slos.append((request.id, request.slo))

    def launched(self, ticket: Ticket, now: float) -> None:
        """It has the device: it waited, or was paused, until now."""
        self._idle(ticket, now)

    def preempted(self, ticket: Ticket, now: float) -> None:
        """It gave way."""
        self._marks.append((ticket.id, "preempted", now, "preempt"))

    def ended(self, ticket: Ticket, outcome: str, now: float) -> None:
        """It has ended; call before the ticket is told."""
        if ticket.state != "running":
            self._idle(ticket, now)
        if outcome == "completed" and ticket.generation is None:
            self._marks.append((ticket.id, "first token", now, "first_token"))
        self._marks.append((ticket.id, outcome, now, "end"))

    def _idle(self, ticket: Ticket, now: float) -> None:
        if ticket.paused_since is not None:
            self._spans.append((ticket.id, "preempted", ticket.paused_since, now, "preempted"))
        elif ticket.started is None:
            self._spans.append((ticket.id, "wait", ticket.request.arrival, now, "wait"))

    def timeline(self) -> Timeline:
        """Everything recorded so far; from any thread."""
        return Timeline(
            spans=tuple(Span(*raw) for raw in self._spans.copy()),
            marks=tuple(Mark(*raw) for raw in self._marks.copy()),
            slos=tuple(self._slos.copy()),
        )


def tiled(run: object) -> bool:
    """Whether the launch that ``run`` has just made was one tile of a segment, not all of it."""
    if isinstance(run, Together):
        run = run.joined
    return isinstance(run, Run) and run.at > 0 and run.schedule[run.at - 1].tiled


def joined(recorder: Recorder | None, on_segment: Hook | None) -> Hook | None:
    """One hook for the loop out of two, None out of none; the caller's own is guarded."""
    observer = Guarded(on_segment) if on_segment is not None else None
    if recorder is None:
        return observer
    record = recorder.segment
    if observer is None:
        return record

    def both(run: Any, segment: Any, start: float, end: float) -> None:
        record(run, segment, start, end)
        observer(run, segment, start, end)

    return both

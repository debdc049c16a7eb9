"""The driver's ear: what has happened is told to the scheduler, in order, and its answer is carried out.

Words
    *known*   the tickets that the scheduler has heard of and that have not ended.
    *beyond*  a live request that the scheduler knows no more: its prompt is done, and it decodes.

Invariants
    Events go to the scheduler in (time, rank, sequence) order, and never back in time. A scheduler that
    raises ends the requests that it knew, with a typed error each, and is replaced: nobody who waits is
    forgotten.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

from fpcompile.engine import journal
from fpcompile.engine.decisions import DecisionLog
from fpcompile.engine.errors import SchedulerFailedError
from fpcompile.engine.inbox import Inbox
from fpcompile.engine.metrics import Ended, Ticket
from fpcompile.engine.recorder import Recorder
from fpcompile.engine.registry import Registry
from fpcompile.engine.timeouts import Timeouts
from fpcompile.errors import InternalError
from fpcompile.scheduler.core import Scheduler
from fpcompile.scheduler.events import Arrival, Cancelled, Command, Event, Timer, event_order
from fpcompile.scheduler.states import State

__all__ = ["Hearing"]

logger = logging.getLogger(__name__)


class Hearing(abc.ABC):
    """Events in, commands out. Used by one thread at a time; ``idle_seconds`` belongs to the same."""

    def __init__(
        self,
        make_core: Callable[[], Scheduler],
        *,
        registry: Registry,
        clock: Callable[[], float],
        recorder: Recorder | None,
        record: str | Path | None,
    ) -> None:
        self.registry = registry
        self.inbox = Inbox()
        self.clock = clock
        self.recorder = recorder
        self.core = make_core()
        self.log = None if record is None else DecisionLog(record, self.core)
        self._make_core = make_core
        self._known: dict[str, Ticket] = {}
        self._timer = inf
        self._timeouts = Timeouts()
        self._last = -inf

    @abc.abstractmethod
    def _carry_out(self, command: Command, events: Sequence[Event]) -> None:
        """Do what the scheduler says because of ``events``."""

    @abc.abstractmethod
    def _cancelled(self, ticket: Ticket) -> None:
        """End a request that was withdrawn."""

    @abc.abstractmethod
    def _finish(
        self, ticket: Ticket, outcome: Ended, value: Any = None, *, error: BaseException | None = None
    ) -> None:
        """The one place where a request ends."""

    @abc.abstractmethod
    def _beyond(self, request_id: str) -> Ticket | None:
        """The live request of this id that the scheduler knows no more."""

    @abc.abstractmethod
    def _check(self, error: Exception) -> None:
        """Raise if nothing can be executed any more."""

    @abc.abstractmethod
    def _besides(self, now: float) -> Sequence[Event]:
        """What the scheduler should know when it decides, and which is no reason to decide."""

    @abc.abstractmethod
    def _news(self, now: float) -> Sequence[Event]:
        """What is a reason to decide although nobody has sent it."""

    @abc.abstractmethod
    def _forsaken(self) -> None:
        """The scheduler has failed: take back the device from what it launched."""

    def idle_seconds(self) -> float | None:
        """How long an idle device may be left alone; None until something is submitted."""
        until = min(self._timer, self._timeouts.next)
        return None if until == inf else max(until - self.clock(), 0.0)

    def close_log(self) -> None:
        """The log of decisions ends; nothing is decided any more."""
        if self.log is not None:
            self.log.close()

    def _called(self, now: float) -> bool:
        """Whether there is something to hear."""
        return self.inbox.flag or now >= self._timer or now >= self._timeouts.next

    def _now(self) -> float:
        """The clock, never earlier than what the scheduler has been told."""
        return max(self.clock(), self._last)

    def _hear(self, *extra: Event, landed: Sequence[str] = ()) -> None:
        """Tell the scheduler what has happened since it was last told, and do what it says.

        ``landed``: whom the run served that has just given the device back.
        """
        heard = self.inbox.take() if self.inbox.flag else []
        now = self._now()
        events: list[Event] = [*extra, *self._news(now)]
        if now >= self._timer:
            self._timer = inf
            events.append(Timer(now))
        if now >= self._timeouts.next:
            heard += self._timed_out(now)
        if heard:
            events += self._without_withdrawn(heard)
        if not events:
            return
        events += self._besides(now)
        if len(events) > 1:
            events.sort(key=lambda event: event_order(event, 0))  # the sort is stable: then as they came
        try:
            told = [self._in_time(event) for event in events]
            commands = self.core.handle_all(told)
            if self.log is not None:
                self.log.record(told, commands)
            for name in (*[e.request for e in heard if isinstance(e, Cancelled)], *landed):
                if name in self._known and self.core.state(name) is State.CANCELLED:
                    self._cancelled(self._known[name])  # what it held is free for what is launched now
            for command in commands:
                self._carry_out(command, events)
        except Exception as error:
            self._check(error)
            self._scheduler_failed(error)

    def _timed_out(self, now: float) -> list[Cancelled]:
        """Withdraw those whose time is over: for the scheduler that is a cancel."""
        tickets = [self.registry.get(name) for name in self._timeouts.due(now)]
        overdue = [t for t in tickets if t is not None and t.request.arrival + t.timeout <= now]  # ids return
        for ticket in overdue:
            ticket.timed_out = True
        return [Cancelled(now, ticket.id) for ticket in overdue]

    def _without_withdrawn(self, events: Sequence[Arrival | Cancelled]) -> list[Arrival | Cancelled]:
        """Note who arrives; leave out what is void: cancelled before arriving, or after the end."""
        gone = {e.request for e in events if isinstance(e, Cancelled) and e.request not in self._known}
        kept: list[Arrival | Cancelled] = []
        for event in events:
            if isinstance(event, Cancelled) and event.request in gone:
                if (member := self._beyond(event.request)) is not None:
                    self._cancelled(member)
                continue
            if isinstance(event, Arrival):
                ticket = self.registry.get(event.request.id)
                if ticket is None:
                    raise InternalError("a request arrived that was not admitted", got=event.request.id)
                if not event.again:
                    journal.arrived(ticket)
                    if self.recorder is not None:
                        self.recorder.arrived(ticket)
                if ticket.id in gone:
                    self._cancelled(ticket)
                    continue
                self._known[ticket.id] = ticket
                if not event.again:
                    self._timeouts.add(ticket.request.arrival + ticket.timeout, ticket.id)
            kept.append(event)
        return kept

    def _in_time(self, event: Event) -> Event:
        """The event, not before what the scheduler knows: submitting threads read the clock as well."""
        if event.time < self._last:
            return dataclasses.replace(event, time=self._last)
        self._last = event.time
        return event

    def _scheduler_failed(self, error: Exception) -> None:
        """Give up the requests that the scheduler knew, and go on with a fresh one."""
        policy = self.core.policy.name
        logger.error("the scheduler failed under policy %r", policy, exc_info=error)
        self._forsaken()
        self._timer = inf
        self.core = self._make_core()
        if self.log is not None:
            self.log.restarted(self.core)
        for ticket in list(self._known.values()):
            failed = SchedulerFailedError(policy, cause=error, request_id=ticket.id)
            self._finish(ticket, "failed", error=failed)

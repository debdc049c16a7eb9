"""The scheduler core: ``handle(event) -> commands``. A pure state machine; time is in the event.

There is no clock, thread, randomness, input or output here. The server and the simulator drive the same core;
only the clock and the device differ.

Yield rule (one sentence)
    After Launch the device belongs to that run until the driver answers Yielded, Completed or Failed, and a
    Pause only asks for that answer sooner.

Decisions
    are taken on events alone, once for all events handed over together: an idle device gets the best run that
    fits the memory; a busy one is paused when the policy has a challenger and the options do not protect the
    run. While a pause is on its way, nothing is decided.

Invariants (``validate``)
    at most one launch is in flight; what is in flight is not in the queue; every other live run is, or is
    joined to one; memory held never exceeds the cache; states and flags agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from math import inf, isfinite
from typing import Any

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.books import Books
from fpcompile.scheduler.decide import Decider
from fpcompile.scheduler.errors import EventOrderError, UnknownRequestError
from fpcompile.scheduler.events import (
    Arrival,
    Cancelled,
    Command,
    Completed,
    Decoding,
    Dropped,
    Event,
    Failed,
    Memory,
    Reserved,
    SetTimer,
    Timer,
    Yielded,
)
from fpcompile.scheduler.invariants import check
from fpcompile.scheduler.job import Job
from fpcompile.scheduler.options import SchedulerOptions, make_options
from fpcompile.scheduler.policy import KeyedPolicy, Policy, make_policy
from fpcompile.scheduler.predictor import TtftPredictor
from fpcompile.scheduler.states import State

__all__ = ["Scheduler"]


class Scheduler:
    """Decides what one device executes.

    ``policy``: an instance, or a spec such as ``"s-edf"``. ``predictor`` is needed by policies that pack.
    Further keyword arguments are those of :class:`SchedulerOptions`.

    >>> from fpcompile.scheduler import Arrival, Request, Scheduler
    >>> core = Scheduler("s-edf")
    >>> core.handle(Arrival(0.0, Request("a", arrival=0.0, deadline=1.0, tokens=100, cost=0.1)))
    (Launch(run='a', requests=('a',), max_segments=None, tokens=None),)
    """

    def __init__(
        self,
        policy: Policy | str,
        *,
        predictor: TtftPredictor | None = None,
        options: SchedulerOptions | None = None,
        **changes: Any,
    ) -> None:
        self.policy = make_policy(policy)
        self.options = make_options(options, changes)
        self.predictor = predictor
        self._books = books = Books(self.policy, self.options, predictor)
        if books.batching is not None and predictor is None:
            raise InvalidInputError(
                f"policy {self.policy.name!r} packs requests",
                expected="a predictor",
                got="None",
                remedy="pass predictor=CostPredictor(...)",
            )
        self._decider = Decider(books)
        self.memory, self.queue = books.memory, books.queue
        self.jobs, self.ended, self.refusals = books.jobs, books.ended, books.refusals
        self._patience: list[tuple[float, int, Job]] = []
        self._armed = inf
        self._sequence = 0
        self._apply: dict[type[Any], Callable[[Any], None]] = {
            Arrival: self._on_arrival,
            Yielded: self._on_yielded,
            Completed: self._on_completed,
            Cancelled: self._on_cancelled,
            Failed: self._on_failed,
            Memory: self._on_memory,
            Reserved: self._on_reserved,
            Dropped: self._on_dropped,
            Decoding: self._on_decoding,
            Timer: self._on_timer,
        }

    # ---- what the driver calls

    def handle(self, event: Event) -> tuple[Command, ...]:
        """Take one event; the commands are to be carried out in order, at once."""
        return self.handle_all((event,))

    def handle_all(self, events: Iterable[Event]) -> tuple[Command, ...]:
        """Take several events in order, and decide once.

        Raises :class:`InvalidInputError` for what is no event, :class:`EventOrderError` when time goes back,
        :class:`UnknownRequestError` or :class:`TransitionError` when an event does not fit. That event has
        then changed nothing, but those before it in the same call have been taken and their commands are
        lost: hand over one by one what may be wrong.
        """
        books = self._books
        out: list[Command] = []
        books.out = out
        for event in events:
            apply = self._apply.get(type(event))
            if apply is None:
                raise _no_event(event, self._apply)
            now = event.time
            try:
                forward = now >= books.now and isfinite(now)
            except TypeError:
                forward = False
            if not forward:
                raise EventOrderError(
                    f"{type(event).__name__} goes back in time",
                    expected=f"a finite time >= {books.now!r}",
                    got=repr(now),
                )
            books.now = now
            apply(event)
        self._settle(books.now)
        return tuple(out)

    def state(self, request: str) -> State:
        """Where this request is; raises :class:`UnknownRequestError` when it was never seen (or long ago)."""
        job = self._books.find(request, "state")
        return State.CANCELLED if job.withdrawn else job.state

    def story(self, request: str) -> tuple[tuple[float, str, str], ...]:
        """The transitions of this request, oldest first: (time, event or command, new state)."""
        return tuple(self._books.find(request, "story").story)

    @property
    def in_flight(self) -> str | None:
        """The run that has the device, or None."""
        return self.flight[0].id if self.flight else None

    @property
    def flight(self) -> list[Job]:
        """What is on the device: one run, or the members of a step."""
        return self._books.flight

    @property
    def waiting(self) -> int:
        """Runs that are not on the device: waiting, paused or evicted."""
        return len(self.queue)

    @property
    def paused(self) -> dict[str, Job]:
        """Runs that were stopped and have their memory on the device, by name."""
        return self._books.paused

    def last_first(self, now: float) -> list[str]:
        """The runs that are not on the device, last in line first: for moving memory. Decides nothing."""
        return [job.id for job in self.queue.last_first(now)]

    @property
    def packs(self) -> bool:
        """Whether several new requests may become one run."""
        return self._books.batching is not None

    @property
    def may_idle(self) -> bool:
        """Whether the policy may leave the device idle while runs wait."""
        return not isinstance(self.policy, KeyedPolicy)

    def validate(self) -> None:
        """Check every invariant; raises :class:`InvariantError` naming the broken one."""
        check(self)

    # ---- events

    def _on_arrival(self, event: Arrival) -> None:
        request = event.request
        if event.again:
            self.ended.pop(request.id, None)
        if request.id in self.jobs or request.id in self.ended:
            raise EventOrderError(
                f"request {request.id!r} arrived twice", expected="a new id", got=request.id
            )
        now = event.time
        job = Job(request, self._sequence)
        job.paced(self._books.pace, now)
        self._sequence += 1
        job.started = event.again
        self.jobs[request.id] = job
        if request.kv_blocks > self.memory.capacity:
            self._books.reject(
                job, f"needs {request.kv_blocks} cache blocks of {self.memory.capacity:.0f}", now
            )
            return
        job.advance("arrival", now)
        self.policy.arrived(job, now)
        self.queue.add(job, now)
        if self.options.max_queue_s < inf and not event.again:
            heappush(self._patience, (now + self.options.max_queue_s, job.sequence, job))

    def _on_yielded(self, event: Yielded) -> None:
        slices, now, pace = self._books.slices, event.time, self._books.pace
        flight = self._books.landed(event.run, "yielded")
        step = bool(slices)
        for job, tokens in zip(flight, slices or (0,) * len(flight), strict=True):
            job.tokens_left -= tokens
            if job.tokens_left <= 0 and step and job.state is not State.CANCELLING:
                self._books.stop(job, "completed", now, 0.0)
                continue
            if step:
                left: float | None = job.left * job.tokens_left / (job.tokens_left + tokens)
            else:
                left = None if event.remaining is None else pace * event.remaining
            self._books.stop(job, "yielded", now, left)

    def _on_completed(self, event: Completed) -> None:
        for job in self._books.landed(event.run, "completed"):
            self._books.stop(job, "completed", event.time, 0.0)

    def _on_failed(self, event: Failed) -> None:
        job = self.jobs.get(event.run)
        if job is not None and job not in self.flight:
            self._books.fail(job, event.time)
            return
        for member in self._books.landed(event.run, "failed"):
            self._books.stop(member, "failed", event.time, 0.0)

    def _on_cancelled(self, event: Cancelled) -> None:
        job = self.jobs.get(event.request)
        if job is None:
            if event.request not in self.ended:
                raise UnknownRequestError(event.request, event="Cancelled")
            return  # it ended a moment ago
        self._books.cancel(job, event.time)

    def _on_memory(self, event: Memory) -> None:
        self.memory.report(event.free_blocks)

    def _on_reserved(self, event: Reserved) -> None:
        self.memory.reserve(event.blocks, event.growing)

    def _on_dropped(self, event: Dropped) -> None:
        job = self._books.find(event.run, "Dropped")
        job.left = self._books.pace * event.remaining
        if event.run in self.queue.jobs:  # its place may be another one now
            self.queue.remove(job)
            self.queue.add(job, event.time)
        job.tokens_left = job.request.tokens

    def _on_decoding(self, event: Decoding) -> None:
        self._books.paced(event.share, event.time)

    def _on_timer(self, event: Timer) -> None:
        if event.time >= self._armed:
            self._armed = inf

    # ---- after the events

    def _settle(self, now: float) -> None:
        patience = self._patience
        while patience and patience[0][0] <= now:
            job = heappop(patience)[2]
            if job.state is State.WAITING:
                self._books.reject(job, f"waited {self.options.max_queue_s:g} s (max_queue_s)", now)
        self._decider.decide(now)
        while patience and patience[0][2].state is not State.WAITING:
            heappop(patience)
        wake = min(self._books.suspended.wake(), self.queue.wake(now))
        if patience and patience[0][0] < wake:
            wake = patience[0][0]
        if now < wake < inf and wake != self._armed:
            self._armed = wake
            self._books.out.append(SetTimer(wake))


def _no_event(given: object, known: Iterable[type[Any]]) -> InvalidInputError:
    names = ", ".join(sorted(kind.__name__ for kind in known))
    return InvalidInputError(
        "the core was handed something that is no event", expected=f"one of {names}", got=repr(given)
    )

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

import logging
from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from math import inf, isfinite
from typing import Any

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.errors import EventOrderError, UnknownRequestError
from fpcompile.scheduler.events import (
    Arrival,
    Cancelled,
    Command,
    Completed,
    Event,
    Evict,
    Failed,
    Launch,
    Memory,
    Pause,
    Reject,
    Restore,
    SetTimer,
    Timer,
    Yielded,
)
from fpcompile.scheduler.guard import Suspensions, may_pause
from fpcompile.scheduler.invariants import check
from fpcompile.scheduler.job import Job
from fpcompile.scheduler.memory import Blocks
from fpcompile.scheduler.options import SchedulerOptions, make_options
from fpcompile.scheduler.policy import KeyedPolicy, Policy, RankingPolicy, StepPolicy, make_policy
from fpcompile.scheduler.predictor import TtftPredictor
from fpcompile.scheduler.queue import ArrivalQueue, KeyedQueue, Queue, RankedQueue
from fpcompile.scheduler.states import State

__all__ = ["Scheduler"]

logger = logging.getLogger(__name__)

_REMEMBERED = 4096  # ended requests whose story is kept, so that a late cancel is not an error


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
        if self.policy.batching is not None and predictor is None:
            raise InvalidInputError(
                f"policy {self.policy.name!r} packs requests",
                expected="a predictor",
                got="None",
                remedy="pass predictor=CostPredictor(...)",
            )
        self.memory = Blocks(self.options.kv_blocks)
        self.jobs: dict[str, Job] = {}
        self.ended: dict[str, Job] = {}
        self.refusals: deque[tuple[float, str, str, str]] = deque(maxlen=1000)
        self.queue = self._make_queue()
        self.flight: list[Job] = []
        self._slices: tuple[int, ...] = ()
        self._suspended = Suspensions(self.options.suspension_cap_s)
        self._patience: list[tuple[float, int, Job]] = []
        self._now = -inf
        self._armed = inf
        self._sequence = 0
        self._warned = False  # about the policy's refused suggestions; all of them are in `refusals`
        self._out: list[Command] = []
        self._apply: dict[type[Any], Callable[[Any], None]] = {
            Arrival: self._on_arrival,
            Yielded: self._on_yielded,
            Completed: self._on_completed,
            Cancelled: self._on_cancelled,
            Failed: self._on_failed,
            Memory: self._on_memory,
            Timer: self._on_timer,
        }

    def _make_queue(self) -> Queue:
        policy = self.policy
        if isinstance(policy, KeyedPolicy):
            return KeyedQueue(policy)
        if isinstance(policy, RankingPolicy):
            return RankedQueue(policy, self._refuse)
        if isinstance(policy, StepPolicy):
            return ArrivalQueue()
        raise InvalidInputError(
            "a policy must be of a known kind",
            expected="KeyedPolicy, RankingPolicy or StepPolicy",
            got=type(policy).__name__,
        )

    # ---- what the driver calls

    def handle(self, event: Event) -> tuple[Command, ...]:
        """Take one event; the commands are to be carried out in order, at once."""
        return self.handle_all((event,))

    def handle_all(self, events: Iterable[Event]) -> tuple[Command, ...]:
        """Take several events in order, and decide once.

        Raises :class:`EventOrderError` when time goes back, :class:`UnknownRequestError` or
        :class:`TransitionError` when an event does not fit; the core is then as before that event.
        """
        out: list[Command] = []
        self._out = out
        for event in events:
            now = event.time
            if not now >= self._now or not isfinite(now):
                raise EventOrderError(
                    f"{type(event).__name__} goes back in time",
                    expected=f"a finite time >= {self._now!r}",
                    got=repr(now),
                )
            self._now = now
            self._apply[type(event)](event)
        self._settle(self._now)
        return tuple(out)

    def state(self, request: str) -> State:
        """Where this request is; raises :class:`UnknownRequestError` when it was never seen (or long ago)."""
        job = self.jobs.get(request) or self.ended.get(request)
        if job is None:
            raise UnknownRequestError(request, event="state")
        return State.CANCELLED if job.withdrawn else job.state

    def story(self, request: str) -> tuple[tuple[float, str, str], ...]:
        """The transitions of this request, oldest first: (time, event or command, new state)."""
        job = self.jobs.get(request) or self.ended.get(request)
        if job is None:
            raise UnknownRequestError(request, event="story")
        return tuple(job.story)

    @property
    def in_flight(self) -> str | None:
        """The run that has the device, or None."""
        return self.flight[0].id if self.flight else None

    @property
    def waiting(self) -> int:
        """Runs that are not on the device: waiting, paused or evicted."""
        return len(self.queue)

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
        if request.id in self.jobs or request.id in self.ended:
            raise EventOrderError(
                f"request {request.id!r} arrived twice", expected="a new id", got=request.id
            )
        now = event.time
        job = Job(request, self._sequence)
        self._sequence += 1
        self.jobs[request.id] = job
        if request.kv_blocks > self.memory.capacity:
            self._reject(job, f"needs {request.kv_blocks} cache blocks of {self.memory.capacity:.0f}", now)
            return
        job.advance("arrival", now)
        self.policy.arrived(job, now)
        self.queue.add(job, now)
        if self.options.max_queue_s < inf:
            heappush(self._patience, (now + self.options.max_queue_s, job.sequence, job))

    def _on_yielded(self, event: Yielded) -> None:
        flight, now = self._landed(event.run, "yielded"), event.time
        step = bool(self._slices)
        for job, tokens in zip(flight, self._slices or (0,) * len(flight), strict=True):
            job.tokens_left -= tokens
            if job.tokens_left <= 0 and step and job.state is not State.CANCELLING:
                self._stop(job, "completed", now, 0.0)
                continue
            left = job.left * job.tokens_left / (job.tokens_left + tokens) if step else event.remaining
            self._stop(job, "yielded", now, left)

    def _on_completed(self, event: Completed) -> None:
        for job in self._landed(event.run, "completed"):
            self._stop(job, "completed", event.time, 0.0)

    def _on_failed(self, event: Failed) -> None:
        job = self.jobs.get(event.run)
        if job is not None and job not in self.flight:
            job.advance("failed", event.time)
            self.queue.remove(job)
            self._end(job, event.time)
            return
        for member in self._landed(event.run, "failed"):
            self._stop(member, "failed", event.time, 0.0)

    def _on_cancelled(self, event: Cancelled) -> None:
        job = self.jobs.get(event.request)
        if job is None:
            if event.request not in self.ended:
                raise UnknownRequestError(event.request, event="Cancelled")
            return  # it ended a moment ago
        self._cancel(job, event.time)

    def _cancel(self, job: Job, now: float) -> None:
        if job.has_joined:
            job.withdrawn = True
            return
        host, was = job.host, job.state
        job.advance("cancelled", now)
        if job.state is State.CANCELLING:
            if was is State.RUNNING and len(self.flight) == 1:
                self._out.append(Pause(job.id))
            return
        if host is None:
            self.queue.remove(job)
        self._end(job, now)
        if host is not None and host.withdrawn and not host.has_joined:
            self._cancel(host, now)

    def _on_memory(self, event: Memory) -> None:
        self.memory.report(event.free_blocks)

    def _on_timer(self, event: Timer) -> None:
        if event.time >= self._armed:
            self._armed = inf

    # ---- book-keeping

    def _landed(self, run: str, kind: str) -> list[Job]:
        """The jobs of the launch that has just ended; raises when ``run`` is not in flight."""
        flight = self.flight
        if not flight or flight[0].request.id != run:
            job = self.jobs.get(run) or self.ended.get(run)
            if job is None:
                raise UnknownRequestError(run, event=kind.capitalize())
            job.advance(f"{kind} (not in flight)", self._now)
        self.flight = []
        return flight

    def _stop(self, job: Job, kind: str, now: float, left: float | None) -> None:
        job.advance(kind, now)
        job.stopped(now, left)
        self.policy.stopped(job, now)
        if job.state is State.PAUSED:
            self._suspended.paused(job, now)
            self.queue.add(job, now)
            return
        for member in job.joined:
            if member.state is State.JOINED:
                member.advance("completed" if kind == "yielded" else kind, now)
                self._end(member, now)
        self._end(job, now)

    def _end(self, job: Job, now: float) -> None:
        del self.jobs[job.id]
        self.ended[job.id] = job
        if len(self.ended) > _REMEMBERED:
            del self.ended[next(iter(self.ended))]
        if job.held:
            decodes = job.state is State.COMPLETED and job.request.decode_tokens > 0
            (self.memory.keep if decodes else self.memory.give)(job)
        self.policy.ended(job, State.CANCELLED if job.withdrawn else job.state, now)

    def _reject(self, job: Job, reason: str, now: float) -> None:
        arrived = job.state is State.WAITING
        job.advance("reject", now)
        if arrived:
            self.queue.remove(job)
            self._end(job, now)
        else:
            self.ended[job.id] = self.jobs.pop(job.id)
        self._out.append(Reject(job.id, reason))

    def _refuse(self, request: str, why: str) -> None:
        """A policy suggested something illegal: name it, and go on without it."""
        self.refusals.append((self._now, self.policy.name, request, why))
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        logger.log(level, "policy %r %s: %r (refused)", self.policy.name, why, request)

    # ---- decisions

    def _settle(self, now: float) -> None:
        patience = self._patience
        while patience and patience[0][0] <= now:
            job = heappop(patience)[2]
            if job.state is State.WAITING:
                self._reject(job, f"waited {self.options.max_queue_s:g} s (max_queue_s)", now)
        self._suspended.promote(now)
        if not self.flight:
            self._fill(now)
        elif self.policy.preemptive and self.flight[0].state is State.RUNNING:
            self._challenge(self.flight[0], now)
        for name, reason in self.queue.rejects():
            hopeless = self.queue.jobs.get(name)
            if hopeless is None or hopeless.state is not State.WAITING:
                self._refuse(name, "gave up a request that is not waiting")
            else:
                self._reject(hopeless, reason, now)
        while patience and patience[0][2].state is not State.WAITING:
            heappop(patience)
        wake = min(self._suspended.wake(), self.queue.wake(now))
        if patience and patience[0][0] < wake:
            wake = patience[0][0]
        if now < wake < inf and wake != self._armed:
            self._armed = wake
            self._out.append(SetTimer(wake))

    def _fill(self, now: float) -> None:
        """Give the idle device to somebody."""
        if isinstance(self.policy, StepPolicy):
            self._compose(self.policy, now)
            return
        job = self._suspended.first() or self.queue.best(now) or self._forgotten()
        if job is None:
            return
        if not self.memory.fits(job):
            room = self._make_room(job, now)
            if room is None:
                return
            job = room
        self._launch(job, now)

    def _forgotten(self) -> Job | None:
        """The oldest run, when the policy's suggestions were all refused: requests go on."""
        if self.refusals and self.refusals[-1][0] == self._now and len(self.queue):
            return min(self.queue.jobs.values(), key=lambda job: job.sequence)
        return None

    def _make_room(self, job: Job, now: float) -> Job | None:
        """Evict worse runs until ``job`` fits; else the best run that holds its memory already."""
        order = list(self.queue.ordered(now))
        if self.policy.eviction:
            victims = self.memory.victims(job, self._worse(job, order))
            if victims is not None:
                for victim in victims:
                    self._evict(victim, now)
                return job
        return next((other for other in order if other.state is State.PAUSED), None)

    def _worse(self, job: Job, order: list[Job]) -> list[Job]:
        """What may be evicted for ``job``, worst first: runs left out by the policy, then reverse order."""
        ranked = {other.id for other in order}
        left_out = [other for other in self.queue.jobs.values() if other.id not in ranked]
        behind = order[order.index(job) + 1 :] if job in order else []
        return [*left_out, *reversed(behind)]

    def _evict(self, job: Job, now: float) -> None:
        job.advance("evict", now)
        self.memory.give(job)
        self._out.append(Evict(job.id))

    def _challenge(self, running: Job, now: float) -> None:
        challenger = self._suspended.first() or self.queue.challenger(running, now)
        if challenger is None or not may_pause(running, challenger, self.options, now):
            return
        if not self.memory.fits(challenger) and not self._could_fit(challenger, running, now):
            return
        running.advance("pause", now)
        self._out.append(Pause(running.id))

    def _could_fit(self, challenger: Job, running: Job, now: float) -> bool:
        """Whether pausing ``running`` helps: its blocks and those of worse runs can be evicted."""
        if not self.policy.eviction:
            return False
        worse = [running, *self._worse(challenger, list(self.queue.ordered(now)))]
        return self.memory.victims(challenger, worse) is not None

    def _launch(self, job: Job, now: float) -> None:
        if self.policy.batching is not None and not job.started:
            self._pack(job, now)
        self.queue.remove(job)
        self._board(job, now)
        self.flight, self._slices = [job], ()
        self._out.append(Launch(job.id, job.members, self.options.max_segments))

    def _board(self, job: Job, now: float) -> None:
        if job.state is State.EVICTED:
            job.advance("restore", now)
            self._out.append(Restore(job.id))
        if self.memory.limited:
            self.memory.take(job)
        job.advance("launch", now)
        job.launched(now)
        self.policy.launched(job, now)

    def _pack(self, job: Job, now: float) -> None:
        batching, predictor = self.policy.batching, self.predictor
        assert batching is not None
        assert predictor is not None
        mates, cost = batching.mates(job, self.queue.ordered(now), now, self.memory.free, predictor)
        for mate in mates:
            self.queue.remove(mate)
            self.policy.joined(mate, job, now)
            mate.advance("join", now)
            mate.host = job
            mate.started = True
            if batching.every_member:
                job.deadline = min(job.deadline, mate.deadline)
        job.joined = mates
        job.cost = job.left = cost

    def _compose(self, policy: StepPolicy, now: float) -> None:
        """One step of token slices."""
        views = sorted(self.queue.jobs.values(), key=lambda job: (not job.started, job.sequence))
        chosen: dict[str, tuple[Job, int]] = {}
        for name, tokens in policy.compose(views, now) if views else ():
            job = self.queue.jobs.get(name)
            if job is None or name in chosen or not 1 <= tokens <= job.tokens_left:
                self._refuse(name, f"suggested an impossible slice of {tokens} tokens")
            elif not self.memory.fits(job):
                continue
            else:
                chosen[name] = (job, tokens)
                if self.memory.limited:
                    self.memory.take(job)
        if not chosen and (fallback := self._forgotten()) is not None and self.memory.fits(fallback):
            chosen[fallback.id] = (fallback, fallback.tokens_left)
        if not chosen:
            return
        self.flight = [job for job, _ in chosen.values()]
        self._slices = tuple(tokens for _, tokens in chosen.values())
        for job in self.flight:
            self.queue.remove(job)
            self._board(job, now)
        self._out.append(Launch(self.flight[0].id, tuple(chosen), None, self._slices))

"""The core's books: every live and ended run, what is in flight, who holds memory, which commands are due.

The only place where runs change hands: in the queue, in flight, joined to another run, ended. Decisions are
in ``decide``, events in ``core``.

Invariant: ``paused`` holds exactly the queue's runs in state PAUSED, the only ones that have blocks to give.
"""

from __future__ import annotations

import logging
from collections import deque
from math import inf

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.batching import slo_batching
from fpcompile.scheduler.errors import UnknownRequestError
from fpcompile.scheduler.events import Command, Pause, Reject
from fpcompile.scheduler.guard import Suspensions
from fpcompile.scheduler.job import Job
from fpcompile.scheduler.memory import Blocks
from fpcompile.scheduler.options import SchedulerOptions
from fpcompile.scheduler.policy import KeyedPolicy, Policy, RankingPolicy, StepPolicy, whole
from fpcompile.scheduler.predictor import TtftPredictor
from fpcompile.scheduler.queue import ArrivalQueue, KeyedQueue, Queue, RankedQueue
from fpcompile.scheduler.states import State

__all__ = ["Books"]

logger = logging.getLogger(__name__)

_REMEMBERED = 4096  # ended requests whose story is kept, so that a late cancel is not an error


class Books:
    """State shared by the core's parts; see the module's text."""

    def __init__(self, policy: Policy, options: SchedulerOptions, predictor: TtftPredictor | None) -> None:
        self.policy, self.options, self.predictor = policy, options, predictor
        self.batching = policy.batching or (slo_batching(options.pack) if options.pack else None)
        self.memory = Blocks(options.kv_blocks, options.block_tokens, lockstep=options.lockstep)
        self.jobs: dict[str, Job] = {}
        self.ended: dict[str, Job] = {}
        self.refusals: deque[tuple[float, str, str, str]] = deque(maxlen=1000)
        self.queue = self._make_queue()
        self.paused: dict[str, Job] = {}
        self.flight: list[Job] = []
        self.slices: tuple[int, ...] = ()  # of a step in flight
        self.pace = 1.0  # seconds that a second of a prefill takes beside decode steps
        self.suspended = Suspensions(options.suspension_cap_s)
        self.now = -inf
        self.out: list[Command] = []
        self._warned = False  # about the policy's refused suggestions; all of them are in `refusals`

    def _make_queue(self) -> Queue:
        policy = self.policy
        if policy.grain.unit == "tokens" and not isinstance(policy, StepPolicy):
            whole(f"policy {policy.name!r} has chunks of a wrong size", policy.grain.size)
        if isinstance(policy, KeyedPolicy):
            return KeyedQueue(policy)
        if isinstance(policy, RankingPolicy):
            return RankedQueue(policy, self.refuse)
        if isinstance(policy, StepPolicy):
            return ArrivalQueue()
        raise InvalidInputError(
            "a policy must be of a known kind",
            expected="KeyedPolicy, RankingPolicy or StepPolicy",
            got=type(policy).__name__,
        )

    def find(self, request: str, event: str) -> Job:
        """A live or lately ended request; raises :class:`UnknownRequestError`."""
        job = self.jobs.get(request) or self.ended.get(request)
        if job is None:
            raise UnknownRequestError(request, event=event)
        return job

    def paced(self, share: float, now: float) -> None:
        """Decode steps take this share of the device from now on."""
        pace = 1 / (1 - share)
        factor, self.pace = pace / self.pace, pace
        for job in self.jobs.values():
            job.paced(factor, now)
        self.queue.reorder(now)

    def landed(self, run: str, kind: str) -> list[Job]:
        """The jobs of the launch that has just ended; raises when ``run`` is not in flight."""
        flight = self.flight
        if not flight or flight[0].request.id != run:
            self.find(run, kind.capitalize()).advance(f"{kind} (not in flight)", self.now)
        self.flight = []
        return flight

    def stop(self, job: Job, kind: str, now: float, left: float | None) -> None:
        """The device has stopped executing this run, in this way."""
        job.advance(kind, now)
        job.stopped(now, left)
        self.policy.stopped(job, now)
        if job.state is State.PAUSED:
            if not self.slices:  # between two steps nobody is suspended
                self.suspended.paused(job, now)
            self.paused[job.id] = job
            self.queue.add(job, now)
            return
        self._end_run(job, kind, now)

    def fail(self, job: Job, now: float) -> None:
        """A run that is not on the device can no longer be executed: it ends, and who joined it.

        Raises :class:`TransitionError` for a request that is no run of its own, or has not started.
        """
        if job.host is not None:
            job.advance("failed (joined another run)", now)
        job.advance("failed", now)
        self.queue.remove(job)
        self._end_run(job, "failed", now)

    def _end_run(self, job: Job, kind: str, now: float) -> None:
        """The run has ended this way, for everybody who joined it and still wants it."""
        for member in job.joined:
            if member.state is State.JOINED:
                member.advance(kind, now)
                self.end(member, now)
        self.end(job, now)

    def end(self, job: Job, now: float) -> None:
        """The run is over: file it, and free what it held."""
        del self.jobs[job.id]
        self.paused.pop(job.id, None)
        self.ended[job.id] = job
        if len(self.ended) > _REMEMBERED:
            del self.ended[next(iter(self.ended))]
        if job.held:
            told = self.memory.block_tokens > 0  # the driver says what decodes
            self.memory.give(job, kept=0 if told else sum(map(_kept, (job, *job.joined))))
        self.policy.ended(job, State.CANCELLED if job.withdrawn else job.state, now)

    def reject(self, job: Job, reason: str, now: float) -> None:
        """The request ends without being served."""
        arrived = job.state is State.WAITING
        job.advance("reject", now)
        if arrived:
            self.queue.remove(job)
            self.end(job, now)
        else:
            self.ended[job.id] = self.jobs.pop(job.id)
        self.out.append(Reject(job.id, reason))

    def refuse(self, request: str, why: str) -> None:
        """A policy suggested something illegal: name it, and go on without it."""
        self.refusals.append((self.now, self.policy.name, request, why))
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        logger.log(level, "policy %r %s: %r (refused)", self.policy.name, why, request)

    def cancel(self, job: Job, now: float) -> None:
        """Nobody wants this request any more."""
        if job.has_joined:
            job.withdrawn = True
            return
        host, was = job.host, job.state
        job.advance("cancelled", now)
        if job.state is State.CANCELLING:
            if was is State.RUNNING and len(self.flight) == 1:
                self.out.append(Pause(job.id))
            return
        if host is None:
            self.queue.remove(job)
        self.end(job, now)
        if host is not None and host.withdrawn and not host.has_joined:
            self.cancel(host, now)


def _kept(job: Job) -> int:
    """Cache blocks that stay taken behind the prompt's end until the device reports them free (decode)."""
    decodes = job.state is State.COMPLETED and not job.withdrawn and job.request.decode_tokens > 0
    return job.request.kv_blocks if decodes else 0

"""Decisions: who gets an idle device, who is paused, who is evicted, who is packed.

The policy suggests an order; here it meets the memory, the options' protection of the run on the device, and
the rule that illegal suggestions are refused and requests go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from fpcompile.scheduler.books import Books
from fpcompile.scheduler.events import Evict, Launch, Pause, Restore
from fpcompile.scheduler.guard import may_pause
from fpcompile.scheduler.job import Job
from fpcompile.scheduler.policy import StepPolicy
from fpcompile.scheduler.states import State

__all__ = ["LOOKED_AT", "Decider"]

LOOKED_AT: Final = 128
"""Runs in line that are looked at for one that may pass those who wait for what decodes."""


class Decider:
    """Decides on the books of one core."""

    def __init__(self, books: Books) -> None:
        self.books = books

    def decide(self, now: float) -> None:
        """Fill the idle device, or let the run on it be challenged."""
        books = self.books
        books.suspended.promote(now)
        if books.memory.free < 0 and books.policy.eviction:
            self._give_way(now)
        if not books.flight:
            self._fill(now)
        elif books.policy.preemptive and books.flight[0].state is State.RUNNING:
            self._challenge(books.flight[0], now)
        for name, reason in books.queue.rejects():
            job = books.queue.jobs.get(name)
            if job is None or job.state is not State.WAITING:
                books.refuse(name, "gave up a request that is not waiting")
            else:
                books.reject(job, reason, now)

    def _fill(self, now: float) -> None:
        """Give the idle device to somebody."""
        if isinstance(self.books.policy, StepPolicy):
            self._compose(self.books.policy, now)
            return
        job = self.books.suspended.first() or self.books.queue.best(now) or self._forgotten()
        if job is None:
            return
        if not self.books.memory.fits(job):
            room = self._make_room(job, now)
            if room is None:
                return
            job = room
        self._launch(job, now)

    def _forgotten(self) -> Job | None:
        """The oldest run, when the policy's suggestions were all refused: requests go on."""
        if self.books.refusals and self.books.refusals[-1][0] == self.books.now and len(self.books.queue):
            return min(self.books.queue.jobs.values(), key=lambda job: job.sequence)
        return None

    def _make_room(self, job: Job, now: float) -> Job | None:
        """Evict worse runs until ``job`` fits; else the best run that holds its memory already."""
        order = self._order(job, now)
        if self.books.policy.eviction:
            victims = self.books.memory.victims(job, self._worse(job, order))
            if victims is not None:
                if (first := self._spared(victims, now)) is not None:
                    return first
                for victim in victims:
                    self._evict(victim, now)
                return job
        started = next((other for other in order if other.state is State.PAUSED), None)
        return started or self._passing(job, now)

    def _passing(self, job: Job, now: float) -> Job | None:
        """Who goes before ``job`` while what decodes holds too much: the best one that only has a prompt.

        Of the first :data:`LOOKED_AT` in line: they may all generate, and this is asked at every event.
        """
        memory = self.books.memory
        waiting = islice(self.books.queue.ordered(now), LOOKED_AT) if memory.outside else ()
        fitting = (other for other in waiting if not other.growing and memory.fits(other))
        return next((other for other in fitting if other is not job), None)

    def _give_way(self, now: float) -> None:
        """Requests that decode need blocks at once: paused runs are evicted, last in line first."""
        paused = self.books.paused
        order = [job.id for job in self.books.queue.among(list(paused.values()), now)]
        for name in [*(name for name in paused if name not in order), *reversed(order)]:
            if self.books.memory.free >= 0:
                return
            if paused[name].held:
                self._evict(paused[name], now)

    def _order(self, job: Job, now: float, running: Job | None = None) -> list[Job]:
        """``job`` and the runs that have memory to give, best first: however many others wait."""
        jobs = [job, *(other for other in self.books.paused.values() if other is not job)]
        return [other for other in self.books.queue.among(jobs, now, running) if other is not running]

    def _worse(self, job: Job, order: list[Job]) -> list[Job]:
        """What may be evicted for ``job``, worst first: runs left out by the policy, then reverse order."""
        ranked = {other.id for other in order}
        left_out = [other for other in self.books.paused.values() if other.id not in ranked]
        behind = order[order.index(job) + 1 :] if job in order else []
        if job.boosted:  # it goes first, wherever the policy has it
            behind = [other for other in order if not other.boosted]
        return [*left_out, *reversed(behind)]

    def _evict(self, job: Job, now: float) -> None:
        job.advance("evict", now)
        del self.books.paused[job.id]
        self.books.memory.give(job)
        self.books.out.append(Evict(job.id))

    def _challenge(self, running: Job, now: float) -> None:
        books = self.books
        challenger = books.suspended.first() or books.queue.challenger(running, now)
        if challenger is not None and not books.policy.eviction and not books.memory.fits(challenger):
            challenger = self._started(running, now)
        if challenger is None or not may_pause(running, challenger, books.options, now):
            return
        if not books.memory.fits(challenger) and not self._may_displace(challenger, running, now):
            return
        running.advance("pause", now)
        books.out.append(Pause(running.id))

    def _started(self, running: Job, now: float) -> Job | None:
        """Who of those that have their memory should have the device instead of ``running``."""
        first = next(iter(self.books.queue.among(self.books.paused.values(), now, running)), running)
        return None if first is running else first

    def _may_displace(self, challenger: Job, running: Job, now: float) -> bool:
        """Whether pausing ``running`` helps: its blocks and those of worse runs can and should be evicted."""
        if not self.books.policy.eviction:
            return False
        worse = [*self._worse(challenger, self._order(challenger, now, running)), running]
        victims = self.books.memory.victims(challenger, worse)
        if victims is None:
            return False
        return running not in victims or self._spared([running], now) is None

    def _spared(self, victims: list[Job], now: float) -> Job | None:
        """The run that the policy lets finish before any of ``victims`` is evicted."""
        move_s = self.books.options.move_s
        if not move_s:
            return None
        chosen = self.books.policy.spares([(job, move_s * job.held) for job in victims], now)
        if chosen is None:
            return None
        found = next((job for job in victims if job is chosen), None)
        if found is None:
            self.books.refuse(chosen.request.id, "spared a run that nobody evicts")
        return found

    def _launch(self, job: Job, now: float) -> None:
        if self.books.batching is not None and not job.started:
            self._pack(job, now)
        self.books.queue.remove(job)
        self._board(job, now)
        self.books.flight, self.books.slices = [job], ()
        self.books.out.append(Launch(job.id, job.members, self.books.options.max_segments))

    def _board(self, job: Job, now: float) -> None:
        if job.state is State.EVICTED:
            job.advance("restore", now)
            self.books.out.append(Restore(job.id))
        if self.books.memory.limited:
            self.books.memory.take(job)
        self.books.paused.pop(job.id, None)
        job.advance("launch", now)
        job.launched(now)
        self.books.policy.launched(job, now)

    def _pack(self, job: Job, now: float) -> None:
        books = self.books
        batching, predictor = books.batching, books.predictor
        assert batching is not None
        assert predictor is not None
        waiting = self._packable(job, now)
        mates, cost = batching.mates(job, waiting, now, books.memory.free, predictor, books.pace)
        for mate in mates:
            books.queue.remove(mate)
            books.policy.joined(mate, job, now)
            mate.advance("join", now)
            mate.host = job
            mate.started = True
            if batching.every_member:
                job.deadline = min(job.deadline, mate.deadline)
        job.joined = mates
        job.cost = job.left = cost

    def _packable(self, lead: Job, now: float) -> Iterator[Job]:
        """Who may join ``lead``: of those that generate, as many as there will be room for."""
        beside = lead.growing
        for job in self.books.queue.ordered(now):
            if job is not lead and self.books.memory.admits(job, beside=beside):
                yield job
                beside += job.growing

    def _compose(self, policy: StepPolicy, now: float) -> None:
        """One step of token slices."""
        views = sorted(self.books.queue.jobs.values(), key=lambda job: (not job.started, job.sequence))
        chosen: dict[str, tuple[Job, int]] = {}
        full = False  # who does not fit waits, and nobody who came later starts before
        for name, tokens in policy.compose(views, now) if views else ():
            job = self.books.queue.jobs.get(name)
            if job is None or name in chosen or not _possible(tokens, job.tokens_left):
                self.books.refuse(name, f"suggested an impossible slice of {tokens} tokens")
            elif not self.books.memory.fits(job) or (full and not job.started):
                full = True
            else:
                chosen[name] = (job, tokens)
                if self.books.memory.limited:
                    self.books.memory.take(job)
        if not chosen and (fallback := self._forgotten()) is not None and self.books.memory.fits(fallback):
            chosen[fallback.id] = (fallback, fallback.tokens_left)
        if not chosen:
            return
        self.books.flight = [job for job, _ in chosen.values()]
        self.books.slices = tuple(tokens for _, tokens in chosen.values())
        for job in self.books.flight:
            self.books.queue.remove(job)
            self._board(job, now)
        self.books.out.append(Launch(self.books.flight[0].id, tuple(chosen), None, self.books.slices))


def _possible(tokens: object, most: int) -> bool:
    """Whether that is a slice of a prompt of which ``most`` tokens are left."""
    return isinstance(tokens, int) and 1 <= tokens <= most

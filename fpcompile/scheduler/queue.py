"""The runs that are not on the device, in the policy's order.

:class:`KeyedQueue` keeps a heap of (key, arrival, sequence) whose stale entries are dropped when they come to
the top; a second heap holds the times at which keys expire. Every operation is O(log n) amortised;
``ordered`` takes that for each run it gives, and the queue must not change meanwhile.
:class:`RankedQueue` asks the policy to rank everything.

Invariant of a :class:`KeyedQueue` (``validate``): of each run in it, exactly one entry of the heap is valid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

from fpcompile.scheduler.errors import InvariantError
from fpcompile.scheduler.job import Job
from fpcompile.scheduler.policy import KeyedPolicy, RankingPolicy

__all__ = ["ArrivalQueue", "KeyedQueue", "Queue", "RankedQueue"]

_Entry = tuple[Any, float, int, int, Job]


class Queue(ABC):
    """Waiting and paused runs."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}

    def __len__(self) -> int:
        return len(self.jobs)

    def validate(self) -> None:  # noqa: B027 - most have nothing to check
        """Check the invariants; raises :class:`InvariantError`."""

    @abstractmethod
    def add(self, job: Job, now: float) -> None:
        """Put a run in."""

    @abstractmethod
    def remove(self, job: Job) -> None:
        """Take a run out."""

    @abstractmethod
    def best(self, now: float) -> Job | None:
        """The run to serve first, left in the queue."""

    @abstractmethod
    def ordered(self, now: float, running: Job | None = None) -> Iterator[Job]:
        """All runs, best first; ``running`` has the device, and is not among them."""

    @abstractmethod
    def among(self, jobs: Collection[Job], now: float, running: Job | None = None) -> list[Job]:
        """Those of ``jobs`` and of ``running`` that the policy names, best first: for k of n runs.

        An equal key is no reason to pause: ``running`` is before others of its key.
        """

    @abstractmethod
    def challenger(self, running: Job, now: float) -> Job | None:
        """The run that should have the device instead of ``running``, or None."""

    def last_first(self, now: float) -> list[Job]:
        """All runs, last in line first, without a decision of the policy."""
        return list(self.ordered(now))[::-1]

    def rejects(self) -> list[tuple[str, str]]:
        """(request id, reason) of requests that the policy gives up."""
        return []

    def reorder(self, now: float) -> None:
        """What is left of the runs is another time now."""
        return None

    @abstractmethod
    def wake(self, now: float) -> float:
        """When the order may call for a decision although nothing happens; inf for never."""


class KeyedQueue(Queue):
    """Heap with lazy invalidation over a :class:`KeyedPolicy`."""

    def __init__(self, policy: KeyedPolicy) -> None:
        super().__init__()
        self._policy = policy
        self._heap: list[_Entry] = []
        self._expiry: list[tuple[float, int, int, Job]] = []

    def add(self, job: Job, now: float) -> None:
        self.jobs[job.request.id] = job
        self._push(job, now)

    def _push(self, job: Job, now: float) -> None:
        job.entry += 1
        job.key = self._policy.key(job, now)
        heappush(self._heap, (job.key, job.request.arrival, job.sequence, job.entry, job))
        expires = self._policy.key_expires(job)
        if now < expires < inf:
            heappush(self._expiry, (expires, job.sequence, job.entry, job))

    def remove(self, job: Job) -> None:
        del self.jobs[job.request.id]
        job.entry += 1
        most = max(64, 4 * len(self.jobs))
        if len(self._heap) > most:
            self._heap = [entry for entry in self._heap if entry[3] == entry[4].entry]
            heapify(self._heap)
        if len(self._expiry) > most:
            self._expiry = [entry for entry in self._expiry if entry[2] == entry[3].entry]
            heapify(self._expiry)

    def reorder(self, now: float) -> None:
        self._heap, self._expiry = [], []
        for job in self.jobs.values():
            self._push(job, now)

    def _refresh(self, now: float) -> None:
        expiry = self._expiry
        while expiry and expiry[0][0] <= now:
            _, _, entry, job = heappop(expiry)
            if entry == job.entry:
                self._push(job, now)

    def best(self, now: float) -> Job | None:
        expiry = self._expiry
        if expiry and expiry[0][0] <= now:
            self._refresh(now)
        heap = self._heap
        while heap:
            top = heap[0]
            job = top[4]
            if top[3] == job.entry:
                return job
            heappop(heap)
        return None

    def ordered(self, now: float, running: Job | None = None) -> Iterator[Job]:
        self._refresh(now)
        heap = self._heap
        front = [(heap[0][:4], 0)] if heap else []
        while front:  # the children of a heap's entry are not before it: k steps give the first k
            _, at = heappop(front)
            entry = heap[at]
            if entry[3] == entry[4].entry:
                yield entry[4]
            for child in (2 * at + 1, 2 * at + 2):
                if child < len(heap):
                    heappush(front, (heap[child][:4], child))

    def among(self, jobs: Collection[Job], now: float, running: Job | None = None) -> list[Job]:
        self._refresh(now)
        order: list[tuple[Any, int, float, int, Job]] = [
            (job.key, 1, job.request.arrival, job.sequence, job) for job in jobs
        ]
        if running is not None:
            key = self._policy.key(running, now)
            order.append((key, 0, running.request.arrival, running.sequence, running))
        return [entry[-1] for entry in sorted(order)]

    def challenger(self, running: Job, now: float) -> Job | None:
        job = self.best(now)
        if job is None:
            return None
        key: Any = job.key
        return job if key < self._policy.key(running, now) else None

    def wake(self, now: float) -> float:
        return inf

    def validate(self) -> None:
        valid = sorted(entry[4].id for entry in self._heap if entry[3] == entry[4].entry)
        if valid != sorted(self.jobs):
            raise InvariantError(
                "the heap lost or repeats a run", expected=str(sorted(self.jobs)), got=str(valid)
            )


class RankedQueue(Queue):
    """Everything is ranked anew at each decision; ids that the policy should not name go to ``refuse``."""

    def __init__(self, policy: RankingPolicy, refuse: Callable[[str, str], None]) -> None:
        super().__init__()
        self._policy = policy
        self._refuse = refuse

    def add(self, job: Job, now: float) -> None:
        self.jobs[job.request.id] = job

    def remove(self, job: Job) -> None:
        del self.jobs[job.request.id]

    def _ranked(self, now: float, running: Job | None) -> Iterator[Job]:
        views = [*self.jobs.values(), running] if running is not None else list(self.jobs.values())
        seen: set[str] = set()
        for name in self._policy.rank(views, now):
            job = self.jobs.get(name)
            if job is None and running is not None and name == running.request.id:
                job = running
            if job is None:
                self._refuse(str(name), "suggested a run that is neither waiting nor paused nor running")
                continue
            if name in seen:
                self._refuse(str(name), "suggested a run twice")
                continue
            seen.add(name)
            yield job

    def best(self, now: float) -> Job | None:
        return next(self._ranked(now, None), None)

    def ordered(self, now: float, running: Job | None = None) -> Iterator[Job]:
        return (job for job in self._ranked(now, running) if job is not running)

    def among(self, jobs: Collection[Job], now: float, running: Job | None = None) -> list[Job]:
        wanted = {job.id for job in jobs}
        return [job for job in self._ranked(now, running) if job is running or job.id in wanted]

    def challenger(self, running: Job, now: float) -> Job | None:
        job = next(self._ranked(now, running), None)
        return None if job is running else job

    def last_first(self, now: float) -> list[Job]:
        jobs = [self.jobs.get(name) for name in self._policy.last_first(list(self.jobs.values()), now)]
        return [job for job in jobs if job is not None]

    def rejects(self) -> list[tuple[str, str]]:
        return self._policy.rejects()

    def reorder(self, now: float) -> None:
        self._policy.retimed(now)

    def wake(self, now: float) -> float:
        return self._policy.wake(now)


class ArrivalQueue(Queue):
    """No order of its own: a step policy composes from all runs."""

    def add(self, job: Job, now: float) -> None:
        self.jobs[job.request.id] = job

    def remove(self, job: Job) -> None:
        del self.jobs[job.request.id]

    def best(self, now: float) -> Job | None:
        return next(self.ordered(now), None)

    def ordered(self, now: float, running: Job | None = None) -> Iterator[Job]:
        return iter(sorted(self.jobs.values(), key=lambda job: job.sequence))

    def among(self, jobs: Collection[Job], now: float, running: Job | None = None) -> list[Job]:
        return sorted(jobs, key=lambda job: job.sequence)

    def challenger(self, running: Job, now: float) -> Job | None:
        return None

    def wake(self, now: float) -> float:
        return inf

"""Cache blocks: who holds how many, and what an eviction would set free.

Without a capacity nothing is counted and everything fits. ``Memory`` events overrule the count: the device is
the authority. Invariant: ``free >= 0`` as long as the device's reports and the core's books agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from fpcompile.scheduler.job import Job

__all__ = ["Blocks"]


class Blocks:
    """The device's cache in blocks."""

    def __init__(self, capacity: int | None) -> None:
        self.limited = capacity is not None
        self.capacity: float = inf if capacity is None else capacity
        self.free = self.capacity

    def report(self, free: int) -> None:
        """The device says how many blocks are free."""
        if not self.limited:
            self.limited, self.capacity = True, free
        self.free = free

    def fits(self, job: Job) -> bool:
        """Whether the run could be given its blocks now."""
        return not self.limited or job.blocks - job.held <= self.free

    def take(self, job: Job) -> None:
        """Reserve the blocks of the whole run."""
        need = job.blocks
        self.free -= need - job.held
        job.held = need

    def give(self, job: Job, kept: int = 0) -> None:
        """The run's blocks are free again, but for ``kept``: those until the device reports them free."""
        self.free += job.held - kept
        job.held = 0

    def victims(self, job: Job, worst_first: Iterable[Job]) -> list[Job] | None:
        """The paused runs to evict so that ``job`` fits, or None when even all of them are not enough.

        The worst ones; of those, the better ones stay that are not needed beside a larger one.
        """
        missing = job.blocks - job.held - self.free
        chosen: list[Job] = []
        for other in worst_first:
            if missing <= 0:
                break
            if other.held and other is not job:
                chosen.append(other)
                missing -= other.held
        if missing > 0:
            return None
        for other in chosen[::-1]:
            if missing + other.held <= 0:
                missing += other.held
                chosen.remove(other)
        return chosen

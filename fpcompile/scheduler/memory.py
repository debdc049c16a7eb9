"""Cache blocks: who holds how many, what an eviction would set free, and whether what generates has room.

Without a capacity nothing is counted and everything fits. ``Memory`` events overrule the count: the device is
the authority.

Words
    *outside*   blocks of requests whose prompt is done and that decode: the core knows them by report only
                (``Reserved``), with what is still to come.
    *admitted*  a run that generates is begun, or comes back after an eviction, only if the predicted peak of
                all that generate stays within the cache; see :mod:`fpcompile.scheduler.future`. Alone it is
                admitted always.

Invariant: ``free >= 0`` as long as the device's reports and the core's books agree, but for what decodes and
needs more: then paused runs give way at once, and nobody is launched who takes a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf

from fpcompile.scheduler.future import FILLED, Growing, everything, peak
from fpcompile.scheduler.job import Job

__all__ = ["Blocks"]


class Blocks:
    """The device's cache in blocks of ``block_tokens`` tokens; 0: nothing is told of what decodes.

    ``lockstep``: what decodes is stepped together, so the peak counts; else all that it may come to hold.
    """

    def __init__(self, capacity: int | None, block_tokens: int = 0, *, lockstep: bool = True) -> None:
        self.limited = capacity is not None
        self.capacity: float = inf if capacity is None else capacity
        self.free = self.capacity
        self.outside = 0
        self.block_tokens = block_tokens
        self._lockstep = lockstep
        self._growing: tuple[Growing, ...] = ()
        self._holders: dict[str, Job] = {}

    def report(self, free: int) -> None:
        """The device says how many blocks are free."""
        if not self.limited:
            self.limited, self.capacity = True, free
        self.free = free

    def reserve(self, blocks: int, growing: tuple[Growing, ...]) -> None:
        """What decodes holds ``blocks`` now."""
        self.free -= blocks - self.outside
        self.outside, self._growing = blocks, growing

    def fits(self, job: Job) -> bool:
        """Whether the run could be given its blocks now; one that needs none more, however few are free."""
        need = job.blocks - job.held
        return not self.limited or need <= 0 or (need <= self.free and self.admits(job))

    def admits(self, job: Job, without: Sequence[Job] = (), beside: Iterable[Growing] = ()) -> bool:
        """Whether there will be room for what the run generates, ``without`` some and ``beside`` others."""
        if not self.block_tokens or job.held or not job.growing:
            return True
        gone = {other.id for other in without}
        others = [*self._growing, *beside]
        for other in self._holders.values():
            if other.id not in gone:
                others += other.growing
        if not others:
            return True
        if not self._lockstep:
            return everything([*others, *job.growing], self.block_tokens) <= self.capacity
        return peak([*others, *job.growing], self.block_tokens) <= FILLED * self.capacity

    def take(self, job: Job) -> None:
        """Reserve the blocks of the whole run."""
        need = job.blocks
        self.free -= need - job.held
        job.held = need
        if job.growing:
            self._holders[job.id] = job

    def give(self, job: Job, kept: int = 0) -> None:
        """The run's blocks are free again, but for ``kept``: those until the device reports them free."""
        self.free += job.held - kept
        job.held = 0
        self._holders.pop(job.id, None)

    def victims(self, job: Job, worst_first: Iterable[Job]) -> list[Job] | None:
        """The paused runs to evict so that ``job`` fits, or None when even all of them are not enough.

        The worst ones; of those, the better ones stay that are not needed beside a larger one.
        """
        missing = job.blocks - job.held - self.free
        chosen: list[Job] = []
        for other in worst_first:
            if missing <= 0 and self.admits(job, chosen):
                break
            if other.held and other is not job and (missing > 0 or other.growing):
                chosen.append(other)
                missing -= other.held
        if missing > 0 or not self.admits(job, chosen):
            return None
        for other in chosen[::-1]:
            if missing + other.held <= 0 and self.admits(job, [one for one in chosen if one is not other]):
                missing += other.held
                chosen.remove(other)
        return chosen

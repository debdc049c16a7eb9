"""Limits on preemption, usable with every preemptive order.

``may_pause`` answers one question: does the run on the device have to give way to this challenger?
TRAIL's cap (arXiv 2410.01035) and the hysteresis both yield only to a challenger that would otherwise miss
its deadline, and would meet it when it is served now.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from math import inf

from fpcompile.scheduler.job import Job
from fpcompile.scheduler.options import SchedulerOptions
from fpcompile.scheduler.states import State

__all__ = ["Suspensions", "may_pause"]

_SUSPENDED = {State.PAUSED, State.EVICTED}


def may_pause(running: Job, challenger: Job, options: SchedulerOptions, now: float) -> bool:
    """Whether the options let ``challenger`` take the device from ``running``."""
    if running.boosted:
        return False
    if challenger.boosted:
        return True
    left = running.remaining(now)
    done = running.cost - left
    if done <= options.trail_cap * running.cost and left >= options.hysteresis_s:
        return True
    served_now = now + challenger.remaining(now)
    return served_now <= challenger.deadline < served_now + left


class Suspensions:
    """Paused runs by the time at which their suspension becomes too long; those go first from then on.

    An evicted run is paused as well: it comes back when its time has come.
    """

    def __init__(self, cap_s: float) -> None:
        self._cap = cap_s
        self._due: list[tuple[float, int, float, Job]] = []
        self._boosted: deque[Job] = deque()

    def paused(self, job: Job, now: float) -> None:
        """A run was paused just now."""
        if job.boosted:  # its quota of launches is used up: it goes on before the others
            self._boosted.appendleft(job)
        elif self._cap < inf:
            heappush(self._due, (now + self._cap, job.sequence, now, job))

    def promote(self, now: float) -> None:
        """Move runs whose suspension has reached the cap to the front, longest first."""
        while self._due and self._due[0][0] <= now:
            _, _, since, job = heappop(self._due)
            if job.state in _SUSPENDED and job.stopped_at == since and not job.boosted:
                job.boosted = True
                self._boosted.append(job)

    def first(self) -> Job | None:
        """The boosted run that has waited longest."""
        while self._boosted:
            if self._boosted[0].state in _SUSPENDED:
                return self._boosted[0]
            self._boosted.popleft()
        return None

    def wake(self) -> float:
        """When the next suspension reaches the cap."""
        while self._due:
            due, _, since, job = self._due[0]
            if job.state in _SUSPENDED and job.stopped_at == since:
                return due
            heappop(self._due)
        return inf

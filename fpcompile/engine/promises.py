"""Whether prompts may be slowed down for streams that were promised nothing: :func:`affordable`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from typing import Final

from fpcompile.scheduler.job import Job

__all__ = ["affordable"]

_MOST: Final = 64
"""Promises that are looked at one by one; where more are open, nothing is to spare."""


def affordable(jobs: Iterable[Job], now: float, stretch: float, left: Callable[[Job], float]) -> bool:
    """Whether each of ``jobs`` that can have its first token in time has it, though all take longer.

    One after the other, those that are due first before others, each ``stretch`` times its ``left`` seconds,
    which are those of a device without decode steps. Who will be late even if it has the device at once is
    not counted, nor who was promised nothing.
    """
    promised: list[Job] = []
    for job in jobs:
        if job.deadline < inf and job.host is None:
            promised.append(job)
            if len(promised) > _MOST:
                return False
    end = now
    for job in sorted(promised, key=lambda job: job.deadline):
        seconds = left(job)
        if now + seconds > job.deadline:
            continue
        end += stretch * seconds
        if end > job.deadline:
            return False
    return True

"""Counts and times of an engine since it was made: :class:`EngineStatistics`, a frozen snapshot.

*Blocking time* is from the moment a preemption is requested to the moment the device is free. The request is
the submission (or other event) that made the scheduler ask for the pause; the device is free when nothing of
the paused run is in flight.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import Final

from fpcompile.engine.memory_facts import MemoryStatistics
from fpcompile.engine.metrics import Ended
from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.predictor import PredictionError

__all__ = ["BLOCKING_KEPT", "Counts", "EngineStatistics"]

BLOCKING_KEPT: Final = 4096
"""Blocking times that are kept, the newest ones."""


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot. ``blocking`` holds the newest blocking times in seconds, oldest first.

    ``running``, ``waiting``, ``paused`` and ``decoding`` are of now, the other counts since the engine was
    made.
    ``paused_bytes`` is what paused runs hold: live values and caches. ``prediction_error`` is of the device
    seconds that were predicted for runs that completed, relative to what they took; each is judged by what
    had been learnt before it. ``decoding_bytes`` is what the sequences of decoding requests hold;
    ``tokens_generated`` counts those of requests that have ended as well. ``memory`` has the rest: what
    paused runs hold where, and the blocks of the pool.
    """

    running: int
    waiting: int
    paused: int
    paused_bytes: int
    completed: int
    cancelled: int
    failed: int
    rejected: int
    preemptions: int
    blocking: tuple[float, ...]
    prediction_error: PredictionError
    decoding: int
    decoding_bytes: int
    tokens_generated: int
    memory: MemoryStatistics

    @property
    def ended(self) -> int:
        """Requests that have ended, in whatever way."""
        return self.completed + self.cancelled + self.failed + self.rejected

    def blocking_percentile(self, percent: float) -> float:
        """Nearest-rank percentile of the blocking times in seconds; NaN when nothing was preempted."""
        if not 0 <= percent <= 100:
            raise InvalidInputError("a percentile is wrong", expected="0 to 100", got=repr(percent))
        ordered = sorted(self.blocking)
        if not ordered:
            return math.nan
        return ordered[max(math.ceil(percent / 100 * len(ordered)), 1) - 1]


class Counts:
    """The driver's counters. Written by the driver only."""

    __slots__ = ("blocking", "ended", "preemptions")

    def __init__(self) -> None:
        self.ended: Counter[Ended] = Counter()
        self.preemptions = 0
        self.blocking: deque[float] = deque(maxlen=BLOCKING_KEPT)

    def snapshot(
        self,
        *,
        running: int,
        waiting: int,
        paused: int,
        paused_bytes: int,
        decoding: int,
        decoding_bytes: int,
        tokens: int,
        error: PredictionError,
        memory: MemoryStatistics,
    ) -> EngineStatistics:
        """The counts so far."""
        return EngineStatistics(
            running=running,
            waiting=waiting,
            paused=paused,
            paused_bytes=paused_bytes,
            completed=self.ended["completed"],
            cancelled=self.ended["cancelled"],
            failed=self.ended["failed"],
            rejected=self.ended["rejected"],
            preemptions=self.preemptions,
            blocking=tuple(self.blocking.copy()),
            prediction_error=error,
            decoding=decoding,
            decoding_bytes=decoding_bytes,
            tokens_generated=tokens,
            memory=memory,
        )

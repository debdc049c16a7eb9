"""What the scheduler is told besides what happens to its runs: work that is lost, and what decoding takes.

Words
    *share*   of the device's time that decode steps take beside prompts; small changes are not told.
    *news*    a reason to decide by itself: blocks were given back that the scheduler counts as held.
"""

from __future__ import annotations

from typing import Final, final

from fpcompile.engine.decoding import Lane
from fpcompile.engine.memory import Memory
from fpcompile.engine.prices import Prices
from fpcompile.scheduler.core import Scheduler
from fpcompile.scheduler.events import Decoding, Dropped, Event, Reserved

__all__ = ["Reports"]

_NOTABLE: Final = 0.02  # of the device


@final
class Reports:
    """``share`` is the one that the scheduler was told last. Times are those that it hears."""

    def __init__(self, memory: Memory, lane: Lane, prices: Prices) -> None:
        self.share = 0.0
        self._memory, self._lane, self._prices = memory, lane, prices

    def besides(self, core: Scheduler, now: float, last: float) -> list[Event]:
        """What ``core`` should know when it decides; ``last``: the time of the newest event that it knows."""
        told: list[Event] = []
        for load, seconds in self._memory.moves.take_dropped():
            if load.name in core.jobs:
                left = self._prices.corrected(load.owner, load.tokens, seconds)
                told.append(Dropped(now, load.name, left))
        share = self._lane.share
        if share != self.share and (not share or abs(share - self.share) > _NOTABLE):
            self.share = share
            told.append(Decoding(last, share))  # in front of who arrives
        decoding = self._memory.decoding
        if decoding is not None and (reserved := decoding.reserved(now, changed=True)) is not None:
            told.append(reserved)
        return told

    def reserved(self, now: float) -> list[Reserved]:
        """The blocks of what decodes, whether they have changed or not."""
        decoding = self._memory.decoding
        reserved = None if decoding is None else decoding.reserved(now)
        return [] if reserved is None else [reserved]

    def forsaken(self) -> None:
        """The next scheduler was told nothing."""
        self.share = 0.0
        if self._memory.decoding is not None:
            self._memory.decoding.forsaken()

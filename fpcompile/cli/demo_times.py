"""When the demonstration's requests arrive and what they are promised, from this machine's speed.

Words
    *alone*  what a prompt takes with the device to itself.
    *need*   what an urgent request takes that overtakes: the longest segment, another urgent one, itself.
    *late*   what the last urgent arrival takes that does not overtake: the rest of the long one, and itself.

The SLO lies between need and late, as far from one as from the other in ratio, so that both policies have the
same margin for what a machine does meanwhile. Other processes make timings longer and never shorter: one
timing of the long prefill may be many times too long, and then nothing arrives during it. So each time is the
shortest of several, some of them taken where the requests are served: in an engine, on its own thread.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

__all__ = ["ARRIVALS", "Speed"]

ARRIVALS = (0.10, 0.25, 0.31, 0.45, 0.60)
"""Arrivals of the urgent prompts, as parts of the long prefill's time; two of them close together."""

_LONG_TIMES = 3.0
_NEED = 0.75
"""Part of *late* beyond which *need* is not respected: nothing then separates those who overtake."""


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """Seconds on this machine; ``long`` and ``urgent`` alone, by each timing there is.

    ``predicted_urgent`` is what the scheduler will believe: it gives up requests that it believes to be lost.
    ``longest_segment`` is the predicted time between two cuts of the long prefill.
    """

    long: Sequence[float]
    urgent: Sequence[float]
    predicted_urgent: float
    longest_segment: float

    def arrivals(self) -> tuple[float, ...]:
        """Seconds after the long request's arrival at which the urgent ones arrive."""
        return tuple(part * min(self.long) for part in ARRIVALS)

    def urgent_slo(self) -> float:
        """The SLO of urgent requests, when none is given."""
        urgent = min(self.urgent)
        late = (1 - ARRIVALS[-1]) * min(self.long) + urgent
        need = self.longest_segment + max(2 * urgent, self.predicted_urgent)
        return _rounded(math.sqrt(min(need, _NEED * late) * late))

    def long_slo(self) -> float:
        """The SLO of the long request: it has time for being overtaken, and for a slow machine."""
        return _rounded(_LONG_TIMES * max(self.long))


def _rounded(seconds: float) -> float:
    """Two significant digits: an SLO is a promise that somebody states."""
    return float(f"{seconds:.2g}")

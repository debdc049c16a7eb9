"""Attainment and goodput, as docs/goodput.md defines them.

Words
    *counted*       a request that could be in time alone. Others are served, and not counted.
    *attainment*    met / counted, of one class or of all. Rejected, late and unfinished requests are misses.
    *goodput*       the highest rate of a grid at which **every class** has at least 90 % attainment, there
                    and at every lower rate of the grid; 0 when not even the lowest will do.
    *paper goodput* the same over all requests together, which rewards giving up on a class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fpcompile.scheduler.simulator import Outcome

__all__ = ["TARGET", "Attainment", "attainment", "highest_rate", "percentile"]

TARGET = 0.9


@dataclass(frozen=True, slots=True)
class Attainment:
    """Attainment of each class with a counted request, and of all together."""

    by_class: Mapping[str, float]
    overall: float
    counted: int
    uncounted: int

    @property
    def worst(self) -> float:
        """Of the class that fares worst."""
        return min(self.by_class.values(), default=0.0)


def attainment(outcomes: Iterable[Outcome]) -> Attainment:
    """Attainment of a finished simulation or measurement."""
    met: dict[str, int] = {}
    seen: dict[str, int] = {}
    uncounted = 0
    for outcome in outcomes:
        request = outcome.request
        if request.arrival + request.cost > request.deadline:
            uncounted += 1
            continue
        seen[request.klass] = seen.get(request.klass, 0) + 1
        met[request.klass] = met.get(request.klass, 0) + outcome.met
    counted = sum(seen.values())
    by_class = {klass: met[klass] / seen[klass] for klass in sorted(seen)}
    return Attainment(by_class, sum(met.values()) / counted if counted else 0.0, counted, uncounted)


def highest_rate(points: Iterable[tuple[float, float]], target: float = TARGET) -> float:
    """The highest rate whose value, and that of every lower rate, is at least ``target``; else 0."""
    best = 0.0
    for rate, value in sorted(points):
        if value < target:
            break
        best = rate
    return best


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least ``percent`` % of the values do not exceed; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    rank = max(0, -(-len(ordered) * percent // 100) - 1)  # ceiling
    return ordered[int(rank)]

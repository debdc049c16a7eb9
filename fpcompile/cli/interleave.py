"""Honest comparison of the time of several callables: one run, interleaved, in random order.

Words
    *round*    every candidate once, in an order that is drawn anew; drifts of the machine hit all alike.
    *ratio*    a candidate's seconds divided by the baseline's seconds of the same round.
    *control*  the baseline under a second name (A/A): its ratio shows what noise alone does.

Typical use
    ``seconds = interleave({"model": f, "control": f, "program": g}, rounds=9, synchronize=device_sync)``
    ``spread = ratio(seconds, "program", "model")``

This module knows nothing about models or devices, so that every tool measures by the same rules.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from fpcompile.errors import InvalidInputError

__all__ = ["FEWEST", "Spread", "busy_note", "interleave", "percentile", "ratio"]

FEWEST: Final = 3
"""Rounds that are measured whatever they cost: fewer have no median worth printing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """Where the values of a sample lie; ``q1`` and ``q3`` are the quartiles, ``count`` the sample's size."""

    median: float
    q1: float
    q3: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if not values:
            raise InvalidInputError("a sample is empty", expected="at least one value", got="none")
        return cls(
            median=statistics.median(values),
            q1=percentile(values, 25),
            q3=percentile(values, 75),
            low=min(values),
            high=max(values),
            count=len(values),
        )

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.q1:.3f}, {self.q3:.3f}]"


def busy_note(load: float | None = None, cores: int | None = None) -> str | None:
    """What to tell the reader of a time when other work competes for the processor; None when it does not.

    ``load``: average number of running processes, by default that of the last minute.
    """
    load = os.getloadavg()[0] if load is None else load
    cores = (os.cpu_count() or 1) if cores is None else cores
    if load <= cores / 2:
        return None
    return (
        f"NOTE: load average {load:.1f} on {cores} cores before the start: this machine is busy, times spread"
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The ``percent``-th percentile, linear between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    budget: float = math.inf,
    seed: int = 0,
    synchronize: Callable[[], object] = lambda: None,
    on_round: Callable[[int], object] = lambda done: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, in the order of the rounds; ``warmup`` rounds are dropped.

    No round is begun after ``budget`` seconds, but :data:`FEWEST` (or ``rounds``, if fewer) are always done.
    ``on_round(done)`` is called after each round, warm-up included.
    ``synchronize`` is called before each clock reading, so that an asynchronous device is idle then. The
    garbage collector runs between the rounds and never inside one.
    """
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    try:
        begun = clock()
        for number in range(-warmup, rounds):
            if number >= FEWEST and clock() - begun >= budget:
                break
            gc.collect(1)  # the young generations: cycles of the last round, not the whole heap
            gc.disable()
            for name in order.sample(list(candidates), len(candidates)):
                synchronize()
                start = clock()
                candidates[name]()
                synchronize()
                spent = clock() - start
                if number >= 0:
                    seconds[name].append(spent)
            on_round(number + 1 + warmup)
    finally:
        if collecting:
            gc.enable()
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, baseline: str) -> Spread:
    """Spread of the per-round ratios of ``name`` to ``baseline``."""
    return Spread.of([a / b for a, b in zip(seconds[name], seconds[baseline], strict=True)])

"""Simulate policies over a grid of rates, seeds and SLO scales; one cell per combination.

A cell is independent of all others and depends on its arguments alone, so that cells may run in any order and
in several processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from math import inf
from multiprocessing import get_context
from statistics import fmean
from typing import Any

from fpcompile.scheduler.costs import CostTable
from fpcompile.scheduler.goodput import attainment, percentile
from fpcompile.scheduler.routers import simulate_replicas
from fpcompile.scheduler.simulator import Outcome, SimulationResult
from fpcompile.scheduler.workload import TraceRow, requests_at, tile

__all__ = ["Cell", "CellKey", "SweepSetup", "capacity", "run_cell", "summary", "sweep"]


@dataclass(frozen=True)
class SweepSetup:
    """What all cells of a sweep share. ``options`` go to the simulator and the scheduler."""

    rows: tuple[TraceRow, ...]
    table: CostTable
    slos: Mapping[str, float]
    count: int = 3000
    replicas: int = 1
    router: str = "least-work"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, order=True)
class CellKey:
    """Where in the grid."""

    policy: str
    rate: float
    seed: int
    slo_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Cell:
    """What one simulation showed. Times in seconds; TTFT percentiles are of served requests, by class."""

    key: CellKey
    by_class: dict[str, float]
    overall: float
    ttft_p50: dict[str, float]
    ttft_p99: dict[str, float]
    ttft: tuple[float | None, float | None, float | None]
    """Mean, median and 99th percentile over all classes."""
    blocking_p50: float | None
    blocking_p99: float | None
    blocking_max: float | None
    preemptions: int
    rejected: int
    evictions: int
    peak_paused_bytes: float
    busy: float
    decision_us: float
    peak_waiting: int

    @property
    def worst(self) -> float:
        """Attainment of the class that fares worst."""
        return min(self.by_class.values(), default=0.0)


def capacity(setup: SweepSetup) -> float:
    """Requests per second at which the devices are exactly busy, without packing or losses."""
    mean = sum(setup.table.seconds(row.tokens) for row in setup.rows) / len(setup.rows)
    return setup.replicas / mean


def run_cell(setup: SweepSetup, key: CellKey) -> Cell:
    """Simulate one cell."""
    rows = tile(setup.rows, setup.count, key.seed)
    requests = requests_at(rows, key.rate, setup.table, setup.slos, slo_scale=key.slo_scale)
    results = simulate_replicas(
        key.policy, requests, setup.table, replicas=setup.replicas, router=setup.router, **setup.options
    )
    return summary(key, results, setup.table)


def summary(key: CellKey, results: Sequence[SimulationResult], table: CostTable) -> Cell:
    """What the results of all devices of one cell show together."""
    outcomes = [outcome for result in results for outcome in result.outcomes]
    blocking = [seconds for result in results for seconds in result.blocking]
    met = attainment(outcomes)
    times = _ttft(outcomes)
    every = [seconds for values in times.values() for seconds in values]
    events = sum(result.events for result in results)
    held = table.kv_bytes_per_token + table.live_bytes_per_token
    return Cell(
        key=key,
        by_class=dict(met.by_class),
        overall=met.overall,
        ttft_p50={klass: percentile(values, 50) or 0.0 for klass, values in times.items()},
        ttft_p99={klass: percentile(values, 99) or 0.0 for klass, values in times.items()},
        ttft=(fmean(every) if every else None, percentile(every, 50), percentile(every, 99)),
        blocking_p50=percentile(blocking, 50),
        blocking_p99=percentile(blocking, 99),
        blocking_max=max(blocking, default=None),
        preemptions=sum(outcome.preemptions for outcome in outcomes),
        rejected=sum(outcome.ttft is None for outcome in outcomes),
        evictions=sum(result.evictions for result in results),
        peak_paused_bytes=held * sum(result.peak_paused_tokens for result in results),
        busy=sum(result.busy_s for result in results) / max(sum(result.end for result in results), 1e-9),
        decision_us=1e6 * sum(result.scheduler_s for result in results) / max(events, 1),
        peak_waiting=max(result.peak_waiting for result in results),
    )


def _ttft(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.ttft is not None and outcome.ttft < inf:
            times.setdefault(outcome.request.klass, []).append(outcome.ttft)
    return times


_SETUP: SweepSetup | None = None


def _begin(setup: SweepSetup) -> None:
    global _SETUP  # noqa: PLW0603 - one setup per worker process, sent once instead of with each cell
    _SETUP = setup


def _work(key: CellKey) -> Cell:
    assert _SETUP is not None
    return run_cell(_SETUP, key)


def sweep(setup: SweepSetup, keys: Sequence[CellKey], jobs: int = 1) -> Iterator[Cell]:
    """The cells of ``keys`` in their order, as they become ready; ``jobs`` processes."""
    if jobs <= 1:
        for key in keys:
            yield run_cell(setup, key)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(setup,)) as pool:
        yield from pool.map(_work, keys, chunksize=max(1, min(16, len(keys) // (8 * jobs))))

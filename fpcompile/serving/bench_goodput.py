"""Goodput of scheduling policies on a trace: a grid of rates and seeds, a report, a table, plots.

Words are those of :mod:`fpcompile.scheduler.goodput`. The report is plain JSON::

    {"policies": {NAME: {"max_goodput": 9.0, "max_goodput_by_seed": [...], "paper_goodput": 10.2, ...,
                         "points": [{"rate": 1.0, "slo_scale": 1.0, "attainment": {CLASS: ...}, ...}]}},
     "trace": ..., "costs": ..., "slos": ..., "capacity": ..., "rates": [...], ...}

``max_goodput`` is the mean over the seeds, in requests per second of the grid. ``request_goodput`` of a point
(the requests per second that were in time), ``mean_ttft_ms``, ``p50_ttft_ms`` and ``p99_ttft_ms`` are keys of
`vllm bench serve`. Simulated runs use the bundled profile and the SLO table of FlowPrefill's benchmark unless
others are given; both are named in the report.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fpcompile.errors import InvalidInputError, UnknownNameError, UsageError
from fpcompile.scheduler import DEFAULT_PROFILE, SLO_TABLE, CostTable, load_costs, make_policy, profile
from fpcompile.scheduler.bound import attainment_bound
from fpcompile.scheduler.goodput import TARGET, highest_rate
from fpcompile.scheduler.routers import simulate_replicas
from fpcompile.scheduler.sweep import Cell, CellKey, SweepSetup, capacity, sweep
from fpcompile.scheduler.synthetic import synthetic_trace
from fpcompile.scheduler.traces import read_trace
from fpcompile.scheduler.workload import TraceRow, requests_at, tile

__all__ = [
    "DEFAULT_POLICIES",
    "bound_goodput",
    "check_classes",
    "check_folder",
    "default_rates",
    "make_report",
    "run_bench_goodput",
]

DEFAULT_POLICIES = (
    "fcfs", "vllm:2048,512", "chunked:2048,edf", "chunked:2048,s-edf", "edf", "s-edf",
    "flowprefill-published", "flowprefill", "fpcompile",
)  # fmt: skip

Runner = Callable[[SweepSetup, Sequence[CellKey]], Iterable[Cell]]


def default_rates(capacity_rps: float) -> list[float]:
    """24 rates up to 1.5 times the capacity, rounded to three figures."""
    return [float(f"{capacity_rps * i / 16:.3g}") for i in range(1, 25)]


def run_bench_goodput(
    trace: str | Path | None,
    policies: Sequence[str] = DEFAULT_POLICIES,
    *,
    costs: str | Path | None = None,
    rates: Sequence[float] | None = None,
    slo_scales: Sequence[float] = (1.0,),
    slo_rate: float | None = None,
    slos: Mapping[str, float] | None = None,
    seeds: int = 5,
    num_prompts: int = 3000,
    burstiness: float = 1.0,
    replicas: int = 1,
    router: str = "least-work",
    jobs: int = 1,
    options: Mapping[str, Any] | None = None,
    check_us: float | None = None,
    sync_us: float | None = None,
    bound: bool = False,
    runner: Runner | None = None,
    progress: Callable[[int, int], None] | None = None,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure every policy at every rate, with every seed, and return the report.

    ``trace`` is a file, or None for synthetic traffic of this ``burstiness``. ``costs`` is a file (None: the
    bundled profile). ``slo_scales`` beyond 1.0 are run at ``slo_rate`` (None: 0.8 of the capacity).
    ``runner`` replaces the simulator by a real measurement. ``check_us`` and ``sync_us`` replace the table's
    cost of a stop point. ``bound``: add what no scheduler of one device can exceed (:func:`bound_goodput`,
    slow, needs scipy). Raises typed errors for a bad trace, policy, rate, scale, SLO, class, router, option
    or report's folder, before any run.
    """
    check_folder(json_path)
    table = load_costs(costs) if costs is not None else profile(DEFAULT_PROFILE)
    if trace is None:
        rows = synthetic_trace(max(num_prompts, 2), seed=1, burstiness=burstiness)
    else:
        rows = read_trace(trace)
    table = _with_stop_costs(table, check_us, sync_us)
    check_classes(slos or (), rows)
    promised = {**{klass: slo for klass, (slo, _) in SLO_TABLE.items()}, **(slos or {})}
    for name in policies:
        make_policy(name)  # fail before the long part
    if seeds < 1 or not policies:
        raise InvalidInputError("nothing to measure", expected="at least one policy and one seed")
    if bound and replicas != 1:
        raise InvalidInputError("the bound is that of one device", expected="replicas=1", got=str(replicas))
    if bound and importlib.util.find_spec("scipy") is None:
        raise UsageError(
            "the bound needs scipy", got="not installed", remedy="pip install 'fpcompile[bench]'"
        )
    setup = SweepSetup(
        tuple(rows), table, promised, num_prompts, replicas, router,
        {"time_decisions": True, **(options or {})},
    )  # fmt: skip
    limit = capacity(setup)
    grid = sorted(rates) if rates else default_rates(limit)
    at = min(grid, key=lambda rate: abs(rate - 0.8 * limit)) if slo_rate is None else slo_rate
    _check(setup, [*grid, at], slo_scales)
    places = [(rate, 1.0) for rate in grid] + [(at, scale) for scale in slo_scales if scale != 1.0]
    keys = [
        CellKey(name, rate, seed, scale)
        for name in policies
        for rate, scale in places
        for seed in range(1, seeds + 1)
    ]
    cells = (runner or (lambda s, k: sweep(s, k, jobs)))(setup, keys)
    done = list(_watched(cells, len(keys), progress))
    report = make_report(done, setup, grid, at, trace, limit)
    if bound:
        report["bound"] = bound_goodput(setup, grid, report["seeds"])
    if json_path is not None:
        Path(json_path).write_text(json.dumps(report, indent=1) + "\n")
    return report


def _check(setup: SweepSetup, rates: Sequence[float], scales: Sequence[float]) -> None:
    """Raise what a cell would raise, before any is simulated: for classes, rates, scales, router, options."""
    requests_at(tile(setup.rows, len(setup.rows)), 1.0, setup.table, setup.slos)
    two = [TraceRow(0.0, 1, klass=setup.rows[0].klass), TraceRow(1.0, 1, klass=setup.rows[0].klass)]
    for rate in rates:
        requests_at(two, rate, setup.table, setup.slos)
    for scale in scales:
        requests_at(two, 1.0, setup.table, setup.slos, slo_scale=scale)
    simulate_replicas("fcfs", [], setup.table, replicas=setup.replicas, router=setup.router, **setup.options)


def check_classes(named: Iterable[str], rows: Iterable[TraceRow]) -> None:
    """Raise :class:`UnknownNameError` for a class that is neither in the trace nor in FlowPrefill's table."""
    known = {row.klass for row in rows} | set(SLO_TABLE)
    for klass in named:
        if klass not in known:
            raise UnknownNameError("class", klass, known=known)


def check_folder(*paths: str | Path | None) -> None:
    """Raise :class:`UsageError` for a file that could not be written when all the work is done."""
    for path in paths:
        if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise UsageError("the report cannot be written", expected="a file in a folder", got=str(path))


def _with_stop_costs(table: CostTable, check_us: float | None, sync_us: float | None) -> CostTable:
    for name, micros in (("check_us", check_us), ("sync_us", sync_us)):
        if micros is not None and not 0 <= micros < inf:
            raise InvalidInputError(name, expected="microseconds >= 0", got=repr(micros))
    check = table.check if check_us is None else 1e-6 * check_us
    sync = table.sync if sync_us is None else 1e-6 * sync_us
    return replace(table, check=check, sync=sync)


def bound_goodput(setup: SweepSetup, rates: Sequence[float], seeds: Sequence[int] = (1,)) -> dict[str, Any]:
    """The goodput that no scheduler of one device exceeds, on this grid: the mean over ``seeds``, and each.

    Bisects the grid, as what can be attained falls with the rate. Costs are marginal: a launch may be shared.
    ``tried`` lists (seed, rate, bound) of the worst class and of all requests.
    """
    result: dict[str, Any] = {"seeds": list(seeds), "tried": {}}
    for label, per_class in (("max_goodput", True), ("paper_goodput", False)):
        each, tried = [], []
        for seed in seeds:
            rows = tile(setup.rows, setup.count, seed)
            low, high = -1, len(rates)
            while high - low > 1:
                middle = (low + high) // 2
                requests = requests_at(rows, rates[middle], setup.table, setup.slos)
                costs = {request.id: request.cost - setup.table.total.a for request in requests}
                bound = attainment_bound(requests, costs, per_class=per_class, enough=TARGET)
                value = bound.attainment
                tried.append([seed, rates[middle], value])
                low, high = (middle, high) if value >= TARGET else (low, middle)
            each.append(rates[low] if low >= 0 else 0.0)
        result[label], result[f"{label}_by_seed"] = fmean(each), each
        result["tried"][label] = tried
    return result


def _watched(
    cells: Iterable[Cell], total: int, progress: Callable[[int, int], None] | None
) -> Iterator[Cell]:
    for number, cell in enumerate(cells, 1):
        if progress is not None:
            progress(number, total)
        yield cell


def make_report(
    cells: Sequence[Cell],
    setup: SweepSetup,
    rates: Sequence[float],
    slo_rate: float,
    trace: str | Path | None,
    limit: float,
) -> dict[str, Any]:
    """The report of these cells; every figure in it comes from them."""
    table: CostTable = setup.table
    names = list(dict.fromkeys(cell.key.policy for cell in cells))
    return {
        "trace": str(trace) if trace is not None else "synthetic",
        "costs": {"name": table.name, "source": table.source, "check": table.check, "sync": table.sync},
        "slos": {klass: setup.slos[klass] for klass in sorted({row.klass for row in setup.rows})},
        "target": TARGET,
        "capacity": limit,
        "rates": list(rates),
        "slo_rate": slo_rate,
        "seeds": sorted({cell.key.seed for cell in cells}),
        "num_prompts": setup.count,
        "replicas": setup.replicas,
        "router": setup.router,
        "options": {key: value for key, value in setup.options.items() if key != "time_decisions"},
        "policies": {name: _policy([cell for cell in cells if cell.key.policy == name]) for name in names},
    }


def _policy(cells: Sequence[Cell]) -> dict[str, Any]:
    seeds = sorted({cell.key.seed for cell in cells})
    result: dict[str, Any] = {}
    for label, field in (("max_goodput", "worst"), ("paper_goodput", "overall")):
        each = [
            highest_rate(
                (cell.key.rate, getattr(cell, field))
                for cell in cells
                if cell.key.seed == seed and cell.key.slo_scale == 1.0
            )
            for seed in seeds
        ]
        result[label] = fmean(each)
        result[f"{label}_by_seed"] = each
        result[f"{label}_stderr"] = _stderr(each)
    places = sorted({(cell.key.slo_scale, cell.key.rate) for cell in cells})
    result["points"] = [
        _point([c for c in cells if (c.key.slo_scale, c.key.rate) == place]) for place in places
    ]
    return result


def _point(cells: Sequence[Cell]) -> dict[str, Any]:
    """One place of the grid: means over the seeds, and the standard error of the attainments."""
    classes = sorted({klass for cell in cells for klass in cell.by_class})

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    def each_class(field: str) -> dict[str, float | None]:
        return {klass: mean(getattr(cell, field).get(klass) for cell in cells) for klass in classes}

    blocking = {
        f"blocking_{name}_ms": None if value is None else 1e3 * value
        for name in ("p50", "p99", "max")
        for value in [mean(getattr(cell, f"blocking_{name}") for cell in cells)]
    }
    ttft = {
        f"{name}_ttft_ms": None if value is None else 1e3 * value
        for i, name in enumerate(("mean", "p50", "p99"))
        for value in [mean(cell.ttft[i] for cell in cells)]
    }
    return {
        "rate": cells[0].key.rate,
        "slo_scale": cells[0].key.slo_scale,
        "attainment": each_class("by_class"),
        "attainment_stderr": {k: _stderr([c.by_class.get(k, 0.0) for c in cells]) for k in classes},
        "worst": fmean(cell.worst for cell in cells),
        "worst_stderr": _stderr([cell.worst for cell in cells]),
        "overall": fmean(cell.overall for cell in cells),
        "request_goodput": cells[0].key.rate * fmean(cell.overall for cell in cells),
        "overall_stderr": _stderr([cell.overall for cell in cells]),
        "ttft_p50": each_class("ttft_p50"),
        "ttft_p99": each_class("ttft_p99"),
        **ttft,
        **blocking,
        "preemptions": fmean(cell.preemptions for cell in cells),
        "rejected": fmean(cell.rejected for cell in cells),
        "evictions": fmean(cell.evictions for cell in cells),
        "peak_paused_bytes": max(cell.peak_paused_bytes for cell in cells),
        "decision_us": fmean(cell.decision_us for cell in cells),
        "peak_waiting": max(cell.peak_waiting for cell in cells),
    }


def _stderr(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0

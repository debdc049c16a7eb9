"""``bench goodput --real``: serve a trace with a real model through Engine, and simulate the same requests.

The trace's prompts are made shorter (``length_scale``), for a small model on one core. The promises keep the
paper's proportions: SLO of a class = (FlowPrefill's SLO / the `llama3-8b-a800` profile's time for the class's
mean prompt) x the measured isolated TTFT of the class's mean scaled prompt.

The simulator gets the same requests at the same times, and for decisions and device the *occupancies* that
were measured first: how long a prompt keeps a device from the next one when prompts of all lengths come as
one backlog, first come first served (medians over a grid of lengths, linear between). The engine corrects its
predictions, so that it soon decides by what runs take. A prompt that finds the device idle takes longer: the
generator's message wakes sleeping cores, and caches have gone cold. Prompts that each come a pause after the
end of the one before are measured through the same generator (the pauses are drawn as those between requests
at load :data:`_RESTED_LOAD`), and a simulated run that starts on an idle device is later by the median above
the occupancy. A shared machine does not keep its speed: a short
backlog before and behind each loaded run says how fast the device is at that time (its *pace*: seconds now
over seconds at first), and the simulation of that run takes occupancies times the mean of both. Nothing is
fitted to what the loaded runs show. The report has the measurement, the simulation and their comparison
(:mod:`bench_compare`).

Beside it stands the run *repeated*: the same requests simulated with the device seconds that each was seen to
take. That is no prediction. It tells what is due to decisions from what is due to a device that was faster or
slower than it was before and behind the run.

A policy that slices prompts (`chunked:N`, `vllm:N,T`) has times of its own, measured in slices. The
simulator charges each slice what the measured costs say for its tokens behind its context, times measured /
charged of the whole prompt in slices of this size; a step or a pack costs the sum over its members with one
fixed part, corrected as for its first member. The tokens that a policy names are not scaled with the prompts.
Policies that stop at layers are refused: no program has their stop points and no others.
"""

from __future__ import annotations

import json
import os
import platform
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from statistics import fmean, median
from typing import Any

from fpcompile.errors import InvalidInputError, UsageError
from fpcompile.scheduler import SLO_TABLE, CostPredictor, CostTable, Request, Scheduler, make_policy, profile
from fpcompile.scheduler.options import make_options
from fpcompile.scheduler.simulator import Outcome, SimulationResult, Simulator
from fpcompile.scheduler.sweep import Cell, CellKey, SweepSetup, summary
from fpcompile.scheduler.synthetic import synthetic_trace
from fpcompile.scheduler.traces import read_trace
from fpcompile.scheduler.workload import TraceRow, requests_at, tile
from fpcompile.serving.bench_compare import Compared, compare
from fpcompile.serving.bench_device import RealDevice
from fpcompile.serving.bench_goodput import make_report
from fpcompile.serving.bench_worker import Plan, alone_policy, plan_of

__all__ = ["LOADS", "Measured", "affordable", "paper_slos", "run_bench_real", "scaled"]

LOADS = (0.5, 0.7, 0.9, 1.0, 1.1, 1.2, 1.3)
"""Default rates, in units of the capacity."""

_GRID = 14
_SHARE = 0.9  # of the time that is left, for the requests themselves; the rest is for backlogs to end
_FEWEST = 20
_RESTED, _RESTED_LOAD = 9, 0.6  # prompts of each length that find the device idle; as it is at this load
_AGAIN = 2  # prompts of each length in a backlog before and behind a loaded run
_UNMEASURED = ("decision_us", "peak_paused_bytes", "peak_waiting", "evictions")


@dataclass(frozen=True)
class Measured:
    """One way to execute prompts: the program's cost table, and seconds by length.

    ``alone``: isolated TTFT; ``busy``: occupancy in a backlog; ``rested``: TTFT of a prompt from the
    generator that finds the device idle for a while.
    """

    plan: Plan
    table: CostTable
    alone: Mapping[int, float]
    busy: Mapping[int, float]
    rested: Mapping[int, float]

    def seconds(self, tokens: float) -> float:
        """Isolated TTFT, linear between the measured lengths and beyond; of the shortest below it."""
        return _between(self.alone, tokens)

    def occupied(self, tokens: float) -> float:
        """How long the prompt keeps the device from the next one; as :meth:`seconds` between lengths."""
        return _between(self.busy, tokens)

    def wake(self, request: Request) -> float:
        """How much later than in a backlog the request's prompt ends when it finds the device idle."""
        return max(0.0, _between(self.rested, request.tokens) - self.occupied(request.tokens))

    def tabulated(self, tokens: int) -> float:
        """What the table says for such a prompt, in slices if the plan has them."""
        size = self.plan[2]
        if size is None:
            return self.table.seconds(tokens)
        return sum(self.table.seconds(min(size, tokens - at), at) for at in range(0, tokens, size))

    def at_pace(self, pace: float) -> Measured:
        """The same on a device that takes ``pace`` times as long."""

        def paced(measured: Mapping[int, float]) -> dict[int, float]:
            return {tokens: seconds * pace for tokens, seconds in measured.items()}

        return replace(self, alone=paced(self.alone), busy=paced(self.busy), rested=paced(self.rested))

    def slowdown(self, request: Request) -> float:
        """Measured occupancy over tabulated seconds of this request's prompt."""
        return self.occupied(request.tokens) / self.tabulated(request.tokens)

    def priced(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with the costs that an engine has learnt to predict on this device."""
        return [replace(request, cost=self.occupied(request.tokens)) for request in requests]

    def predictor(self) -> CostPredictor:
        """What the engine has learnt of whole prompts: a core that packs asks it."""
        learnt = CostPredictor(self.table)
        for tokens, seconds in self.busy.items():
            learnt.correct(tokens, seconds)
        return learnt


def _between(measured: Mapping[int, float], tokens: float) -> float:
    lengths = sorted(measured)
    if len(lengths) == 1 or tokens <= lengths[0]:
        return measured[lengths[0]]
    at = min(bisect_left(lengths, tokens), len(lengths) - 1)
    low, high = lengths[at - 1], lengths[at]
    share = (tokens - low) / (high - low)
    return measured[low] + share * (measured[high] - measured[low])


def scaled(rows: Sequence[TraceRow], factor: float) -> list[TraceRow]:
    """The rows with prompts of ``factor`` times the length, at least one token."""
    if not 0 < factor <= 1:
        raise InvalidInputError("length scale", expected="in (0, 1]", got=repr(factor))
    return [replace(row, tokens=max(1, round(row.tokens * factor))) for row in rows]


def paper_slos(
    rows: Sequence[TraceRow], factor: float, seconds: Callable[[float], float]
) -> tuple[dict[str, float], dict[str, float]]:
    """(SLO, multiple of the isolated TTFT) of each class of the unscaled ``rows``; see the module's text."""
    published = profile()
    slos, multiples = {}, {}
    for klass in sorted({row.klass for row in rows}):
        if klass not in SLO_TABLE:
            raise UsageError(
                f"class {klass!r} has no published SLO", expected=", ".join(SLO_TABLE), got=klass
            )
        mean = fmean(row.tokens for row in rows if row.klass == klass)
        multiples[klass] = SLO_TABLE[klass][0] / published.seconds(round(mean))
        slos[klass] = multiples[klass] * seconds(max(1.0, mean * factor))
    return slos, multiples


def run_bench_real(
    trace: str | Path | None,
    policies: Sequence[str],
    *,
    model: str | None = None,
    rates: Sequence[float] | None = None,
    length_scale: float = 1 / 16,
    minutes: float = 8.0,
    num_prompts: int | None = None,
    seeds: int = 1,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure and simulate every policy at every rate; ends within about ``minutes``.

    ``num_prompts`` per run follows from ``minutes`` when it is None. ``rates`` default to :data:`LOADS` of
    the capacity. ``model`` is a model's folder, None for the built-in one. Raises typed errors for what the
    engine cannot execute, before anything is measured.
    """
    begun = time.monotonic()
    rows = read_trace(trace) if trace is not None else synthetic_trace(345, seed=1)
    short = scaled(rows, length_scale)
    plans = {name: plan_of(make_policy(name)) for name in policies}
    if not policies or seeds < 1:
        raise InvalidInputError("nothing to measure", expected="at least one policy and one seed")
    _check(model, rates, minutes, rows, options)
    with RealDevice(model) as device:
        about = device.describe()
        known = {plan: _measure(device, plan, short) for plan in dict.fromkeys(plans.values())}
        quickest = min(known.values(), key=lambda one: _mean(one, short))
        slos, multiples = paper_slos(rows, length_scale, quickest.seconds)
        capacity = 1 / _mean(quickest, short)
        grid = sorted(rates) if rates else [float(f"{load * capacity:.3g}") for load in LOADS]
        cells = [plan for plan in plans.values() for _ in range(len(grid) * seeds)]
        pacing = sum(2 * _AGAIN * sum(known[plan].busy.values()) for plan in cells)
        left = minutes * 60 - (time.monotonic() - begun) - pacing
        count = num_prompts or affordable(left, grid, len(plans), seeds)
        keys = [CellKey(name, rate, seed) for name in plans for rate in grid for seed in range(1, seeds + 1)]
        setup = SweepSetup(tuple(short), quickest.table, slos, count, options=dict(options or {}))
        pairs = []
        for number, key in enumerate(keys, 1):
            pairs.append(_both(device, known[plans[key.policy]], setup, key))
            if progress is not None:
                progress(number, len(keys))
    places = (setup, grid, grid[0], trace, capacity)
    real = make_report([pair.real for pair in pairs], *places)
    for entry in real["policies"].values():
        for point in entry["points"]:
            for name in _UNMEASURED:
                del point[name]
    report = {
        **about,
        "machine": _machine(device.pinned),
        "length_scale": length_scale,
        "slo_multiples": multiples,
        "isolated": {_plan_name(plan): _isolated(one) for plan, one in known.items()},
        "latest_sending_s": max(pair.late for pair in pairs),
        "pace": [pair.pace for pair in pairs],
        "unserved": sum(pair.real.rejected for pair in pairs),
        "minutes": (time.monotonic() - begun) / 60,
        **real,
        "simulated": make_report([pair.simulated for pair in pairs], *places),
    }
    report["comparison"] = compare(report, [pair.compared for pair in pairs])
    if json_path is not None:
        Path(json_path).write_text(json.dumps(report, indent=1) + "\n")
    return report


def _check(
    model: str | None,
    rates: Sequence[float] | None,
    minutes: float,
    rows: Sequence[TraceRow],
    options: Mapping[str, Any] | None,
) -> None:
    """Raise what would be raised otherwise when minutes have been spent on measuring."""
    if model is not None and not Path(model).is_dir():
        raise InvalidInputError("there is no model folder", expected="what save_pretrained writes", got=model)
    for what, value in (("minutes", minutes), *(("rate", rate) for rate in rates or ())):
        if not 0 < value < inf:
            raise InvalidInputError(what, expected="a finite number > 0", got=repr(value))
    paper_slos(rows, 1.0, lambda _: 1.0)
    make_options(None, dict(options or {}))


def _plan_name(plan: Plan) -> str:
    granularity, budget, size = plan
    if size is not None:
        return f"{granularity}, slices of {size} tokens"
    return granularity if budget is None else f"{granularity}, {budget:g} ms"


def _measure(device: RealDevice, plan: Plan, rows: Sequence[TraceRow]) -> Measured:
    lengths = sorted({row.tokens for row in rows})
    table = device.prepare(plan, lengths[-1])
    low, high = max(lengths[0], 4), max(lengths[-1], 8)
    grid = sorted({round(low * (high / low) ** (i / (_GRID - 1))) for i in range(_GRID)})
    alone, busy = device.alone(plan, grid), device.busy(plan, grid)
    mean = fmean(_between(busy, row.tokens) for row in rows)
    return Measured(plan, table, alone, busy, _rested(device, plan, alone, mean / _RESTED_LOAD))


def _rested(
    device: RealDevice, plan: Plan, alone: Mapping[int, float], pause: float, repeats: int = _RESTED
) -> dict[int, float]:
    """Median TTFT by length of prompts that come through the generator, each when the device is idle.

    From when the one before should have ended (half as long again as alone) the device rests for exponential
    times with a mean of ``pause`` seconds. In random order; the first prompt warms up.
    """
    draw = random.Random(0)
    order = [tokens for tokens in alone for _ in range(repeats)]
    draw.shuffle(order)
    at, requests = 0.0, []
    for number, tokens in enumerate((order[0], *order)):
        requests.append(Request(str(number), at, at + 1e6, tokens, alone[tokens], klass="rested"))
        at += 1.5 * alone[tokens] + draw.expovariate(1 / pause)
    records, _, _ = device.serve(plan, alone_policy(plan), requests, {})
    seen = {record.id: record for record in records}
    times: dict[int, list[float]] = {tokens: [] for tokens in alone}
    for request in requests[1:]:
        record = seen[request.id]
        if record.ttft is None:
            raise UsageError("a prompt was not served", got=f"{request.tokens} tokens, alone: {record.error}")
        times[request.tokens].append(record.ttft)
    return {tokens: median(several) for tokens, several in times.items()}


def _mean(one: Measured, rows: Sequence[TraceRow]) -> float:
    return fmean(one.occupied(row.tokens) for row in rows)


def affordable(seconds: float, rates: Sequence[float], policies: int, seeds: int) -> int:
    """Requests per run so that all runs end within ``seconds``; raises :class:`UsageError` for too few."""
    count = int(_SHARE * seconds / (policies * seeds * sum(1 / rate for rate in rates)))
    if count < _FEWEST:
        raise UsageError(
            "too little time to measure",
            expected=f"time for {_FEWEST} requests at each rate",
            got=f"{count}",
            remedy="use more --minutes, fewer --policies, --rates or --seeds, or a smaller --length-scale",
        )
    return count


@dataclass(frozen=True)
class _Pair:
    """One cell, measured and simulated; ``late``: the latest sending in seconds."""

    real: Cell
    simulated: Cell
    compared: Compared
    late: float
    pace: float


def _both(device: RealDevice, first: Measured, setup: SweepSetup, key: CellKey) -> _Pair:
    """Measure and simulate one cell."""
    rows = tile(setup.rows, setup.count, key.seed)
    requests = requests_at(rows, key.rate, first.table, setup.slos, length=lambda r: first.occupied(r.tokens))
    options = dict(setup.options)
    before = _pace(device, first)
    records, blocking, late = device.serve(first.plan, key.policy, requests, options)
    pace = (before + _pace(device, first)) / 2
    one = first.at_pace(pace)

    def simulate(
        slowdown: Callable[[Request], float], wake: Callable[[Request], float] | None = None
    ) -> SimulationResult:
        core = Scheduler(key.policy, predictor=one.predictor(), **options)
        simulator = Simulator(key.policy, one.table, core=core, slowdown=slowdown, learnt=True, wake_s=wake)
        result = simulator.run(one.priced(requests))
        result.outcomes = _judged(result.outcomes, one)
        return result

    served = {record.id: record for record in records}
    outcomes = []
    for request in requests:
        record = served[request.id]
        outcomes.append(Outcome(request, record.ttft, None, record.preemptions, record.error))
    real = _judged(outcomes, one)
    simulation = simulate(one.slowdown, one.wake)
    executed = {record.id: record.executed for record in records if record.executed}
    repeated = None
    if len(executed) == len(requests):
        repeated = simulate(lambda r: executed[r.id] / one.tabulated(r.tokens)).outcomes
    return _Pair(
        summary(key, [SimulationResult(outcomes=real, blocking=blocking)], one.table),
        summary(key, [simulation], one.table),
        Compared(key, real, simulation.outcomes, repeated),
        late,
        pace,
    )


def _pace(device: RealDevice, one: Measured) -> float:
    """How many times as long as at first a short backlog takes now."""
    now = device.busy(one.plan, sorted(one.busy), _AGAIN)
    return sum(now.values()) / sum(one.busy.values())


def _judged(outcomes: Sequence[Outcome], one: Measured) -> list[Outcome]:
    """Whether a request could be in time alone is judged by what was measured, not by predictions."""
    return [
        replace(outcome, request=replace(outcome.request, cost=one.seconds(outcome.request.tokens)))
        for outcome in outcomes
    ]


def _isolated(one: Measured) -> list[dict[str, float]]:
    return [
        {
            "tokens": n,
            "measured_s": seconds,
            "occupied_s": one.busy[n],
            "rested_s": one.rested[n],
            "tabulated_s": one.tabulated(n),
        }
        for n, seconds in sorted(one.alone.items())
    ]


def _machine(pinned: bool) -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "cores": "engine and load generator on one core each" if pinned else "not pinned",
    }

"""``bench serve``: goodput of a running server on a trace, over HTTP.

The report is that of `bench goodput` (:mod:`bench_goodput`), with one "policy": the server. Each point also
has the keys of `vllm bench serve` (``request_throughput``, ``mean_ttft_ms``, ``p99_tpot_ms``, ...; of all
seeds together). A request that could not be in time alone is not counted: the time to the first token on the
idle server is measured first, for prompts of a grid of lengths. Where a class has a TBT SLO, a late token is
a miss.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

from fpcompile.errors import InvalidInputError, UsageError
from fpcompile.scheduler import SLO_TABLE, profile
from fpcompile.scheduler.events import Request
from fpcompile.scheduler.goodput import percentile
from fpcompile.scheduler.simulator import Outcome, SimulationResult
from fpcompile.scheduler.sweep import CellKey, SweepSetup, summary
from fpcompile.scheduler.synthetic import synthetic_trace
from fpcompile.scheduler.traces import read_trace
from fpcompile.scheduler.workload import TraceRow, requests_at, tile
from fpcompile.serving.bench_client import Endpoint, Sent, run_load
from fpcompile.serving.bench_goodput import check_classes, check_folder, make_report

__all__ = ["Load", "Slo", "run_bench_serve"]

_GRID = 6  # lengths of prompts on the idle server
_AGAIN = 3
_UNMEASURED = (
    "decision_us", "peak_paused_bytes", "peak_waiting", "evictions", "preemptions",
    "blocking_p50_ms", "blocking_p99_ms", "blocking_max_ms",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slo:
    """Of one class, in seconds; ``tbt`` None: the time between tokens does not count."""

    ttft: float
    tbt: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent. ``rates`` in requests per second, inf: all at once. Lengths are scaled, then cut.

    ``output_len``: tokens of every answer; None: as the trace has them.
    """

    trace: str | Path | None = None
    rates: tuple[float, ...] = (1.0,)
    num_prompts: int = 100
    seeds: int = 1
    burstiness: float = 1.0
    length_scale: float = 1.0
    max_input: int | None = None
    output_len: int | None = None
    max_concurrency: int | None = None
    slos: Mapping[str, Slo] | None = None
    slo_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.rates or not all(rate > 0 for rate in self.rates):
            raise InvalidInputError("rates", expected="requests per second > 0", got=repr(self.rates))
        if self.num_prompts < 2 or self.seeds < 1:
            raise InvalidInputError("nothing to measure", expected="2 prompts and 1 seed at least")
        for name in ("length_scale", "slo_scale"):
            if not 0 < getattr(self, name) < inf:
                raise InvalidInputError(name, expected="a finite number > 0", got=repr(getattr(self, name)))

    def rows(self) -> list[TraceRow]:
        """The trace's requests, or synthetic ones, in the lengths that are sent."""
        rows = (
            read_trace(self.trace)
            if self.trace is not None
            else synthetic_trace(max(self.num_prompts, 2), seed=1, burstiness=self.burstiness)
        )

        def sized(row: TraceRow) -> TraceRow:
            tokens = max(1, round(row.tokens * self.length_scale))
            output = row.output_tokens if self.output_len is None else self.output_len
            return replace(row, tokens=min(tokens, self.max_input or tokens), output_tokens=max(output, 1))

        return [sized(row) for row in rows]

    def promises(self, rows: Sequence[TraceRow]) -> dict[str, Slo]:
        """Of each class: its own, that of all (``""``), or FlowPrefill's; :class:`UsageError` without any."""
        given, found = dict(self.slos or {}), {}
        check_classes(filter(None, given), rows)
        for klass in sorted({row.klass for row in rows}):
            published = Slo(SLO_TABLE[klass][0]) if klass in SLO_TABLE else None
            slo = given.get(klass, given.get("", published))
            if slo is None:
                raise UsageError(f"class {klass!r} has no SLO", remedy="--slo CLASS=TTFT[:TBT]")
            tbt = None if slo.tbt is None else slo.tbt * self.slo_scale
            found[klass] = Slo(slo.ttft * self.slo_scale, tbt)
        return found


@dataclass(frozen=True, slots=True)
class _Answered(Outcome):
    """An outcome whose later tokens count as well."""

    tbt_met: bool = True

    @property
    def met(self) -> bool:
        """In time with the first token, and with every other one."""
        ttft = self.ttft
        first = ttft is not None and self.request.arrival + ttft <= self.request.deadline + 1e-9
        return first and self.tbt_met


def run_bench_serve(
    endpoint: Endpoint,
    load: Load,
    *,
    name: str = "server",
    progress: Callable[[int, int], None] | None = None,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure every rate with every seed, one after the other, and return the report.

    Raises typed errors for a bad trace, rate, SLO or report's folder, and :class:`UsageError` when the server
    does not answer.
    """
    check_folder(json_path)
    rows = load.rows()
    slos = load.promises(rows)
    alone = asyncio.run(_alone(endpoint, [row.tokens for row in rows]))
    capacity = 1 / fmean(_between(alone, row.tokens) for row in rows)
    setup = SweepSetup(
        tuple(rows), profile(), {klass: slo.ttft for klass, slo in slos.items()}, load.num_prompts
    )
    keys = [CellKey(name, rate, seed) for rate in sorted(load.rates) for seed in range(1, load.seeds + 1)]
    planned = {key: _requests(setup, key, alone) for key in keys}
    runs = _run(endpoint, load, planned, slos, progress)
    cells, seen = [], dict[float, list[_Sendings]]()
    for key, (sent, seconds) in runs.items():
        outcomes: list[Outcome] = [_outcome(one, slos[one.request.klass]) for one in sent]
        cells.append(summary(key, [SimulationResult(outcomes=outcomes)], setup.table))
        seen.setdefault(key.rate, []).append((sent, seconds))
    report = make_report(cells, setup, sorted(load.rates), min(load.rates), load.trace, capacity)
    for point in report["policies"][name]["points"]:
        for key_name in _UNMEASURED:
            point.pop(key_name, None)
        point |= _figures(seen[point["rate"]], slos)
    report |= {
        "costs": {"name": "measured", "source": f"time to first token on the idle {endpoint.url}"},
        "slos_tbt": {klass: slo.tbt for klass, slo in slos.items()},
        "isolated": [{"tokens": tokens, "ttft_s": seconds} for tokens, seconds in sorted(alone.items())],
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": "openai" if endpoint.api == "completions" else "openai-chat",
        "model_id": endpoint.model,
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        "slo_told": endpoint.slo,
        "ignore_eos": endpoint.ignore_eos,
    }
    if json_path is not None:
        Path(json_path).write_text(json.dumps(report, indent=1) + "\n")
    return report


_Sendings = tuple[list[Sent], float]
"""What became of the requests of one run, and its seconds."""


def _run(
    endpoint: Endpoint,
    load: Load,
    planned: Mapping[CellKey, list[Request]],
    slos: Mapping[str, Slo],
    progress: Callable[[int, int], None] | None,
) -> dict[CellKey, _Sendings]:
    """Send the requests of every cell, one cell after the other."""
    total = sum(map(len, planned.values()))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    tbt_slos = {klass: slo.tbt for klass, slo in slos.items()}
    return {
        key: asyncio.run(
            run_load(
                endpoint, requests, seed=key.seed, progress=step, max_concurrency=load.max_concurrency,
                tbt_slos=tbt_slos,
            )
        )
        for key, requests in planned.items()
    }  # fmt: skip


async def _alone(endpoint: Endpoint, lengths: Sequence[int]) -> dict[int, float]:
    """Median time to first token on the idle server, of a grid over these lengths."""
    low, high = max(min(lengths), 1), max(lengths)
    grid = sorted({round(low * (high / low) ** (i / (_GRID - 1))) for i in range(_GRID)})
    found = {}
    for tokens in grid:
        times = []
        for number in range(_AGAIN):
            request = Request(f"alone-{tokens}-{number}", 0.0, inf, tokens, 0.0, slo=inf, decode_tokens=1)
            sent, _ = await run_load(endpoint, [request], seed=0)
            if sent[0].ttft is None:
                raise UsageError(
                    f"the server does not answer a prompt of {tokens} tokens",
                    got=sent[0].error,
                    remedy="shorten the prompts: --max-input or --length-scale",
                )
            times.append(sent[0].ttft)
        found[tokens] = median(times)
    return found


def _between(measured: Mapping[int, float], tokens: float) -> float:
    """Linear between measured lengths."""
    lengths = sorted(measured)
    at = min(max(bisect_left(lengths, tokens), 1), len(lengths) - 1)
    if len(lengths) == 1:
        return measured[lengths[0]]
    low, high = lengths[at - 1], lengths[at]
    share = (tokens - low) / (high - low)
    return max(measured[low] + share * (measured[high] - measured[low]), 1e-6)


def _requests(setup: SweepSetup, key: CellKey, alone: Mapping[int, float]) -> list[Request]:
    rows = tile(setup.rows, setup.count, key.seed)
    rate = 1.0 if key.rate == inf else key.rate
    requests = requests_at(
        rows, rate, setup.table, setup.slos, length=lambda row: _between(alone, row.tokens)
    )
    if key.rate == inf:
        return [replace(r, arrival=0.0, deadline=r.slo) for r in requests]
    return requests


def _outcome(sent: Sent, slo: Slo) -> _Answered:
    ttft = sent.ttft if sent.completed else None
    return _Answered(sent.request, ttft, None, 0, sent.error, tbt_met=sent.tbt_met(slo.ttft, slo.tbt))


def _figures(runs: Sequence[_Sendings], slos: Mapping[str, Slo]) -> dict[str, Any]:
    """The keys of `vllm bench serve`, of all runs at one rate."""
    sent = [one for run, _ in runs for one in run]
    duration = sum(seconds for _, seconds in runs)
    good = sum(_outcome(one, slos[one.request.klass]).met for one in sent)
    whole = [one for one in sent if one.completed]
    tokens_in, tokens_out = sum(s.input_tokens for s in whole), sum(s.output_tokens for s in whole)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(whole),
        "failed": len(sent) - len(whole),
        "errors": dict(_counted(one.error for one in sent if not one.completed)),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(whole) / duration,
        "request_goodput": good / duration,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "latest_sending_s": max((one.late for one in sent), default=0.0),
    }
    series = {
        "ttft": [one.ttft for one in whole if one.ttft is not None],
        "tpot": [sum(one.gaps) / (one.output_tokens - 1) for one in whole if one.output_tokens > 1],
        "itl": [gap for one in whole for gap in one.gaps],
        "e2el": [one.latency for one in whole if one.latency is not None],
    }
    for name, values in series.items():
        result[f"mean_{name}_ms"] = 1e3 * fmean(values) if values else None
        result[f"median_{name}_ms"] = 1e3 * median(values) if values else None
        result[f"std_{name}_ms"] = 1e3 * pstdev(values) if values else None
        for percent in (50, 90, 99):
            value = percentile(values, percent)
            result[f"p{percent}_{name}_ms"] = None if value is None else 1e3 * value
    return result


def _counted(errors: Any) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for error in errors:
        counts[error] = counts.get(error, 0) + 1
    return sorted(counts.items(), key=lambda pair: -pair[1])[:10]

"""What a comparison counts, and how it looks for the goodput. Pure: nothing here measures.

Words
    *mode*     ``first``: each request makes one token; ``tokens``: 16 to 64, and the time between counts.
    *cell*     one server, one setting, one mode, one rate: a plain dict (:func:`cell_of`).
    *grid*     the rates, in units of the capacity: what the unmodified model's forward passes would allow.

The goodputs are those of :mod:`fpcompile.scheduler.goodput`: the highest rate of the grid at which every
class (paper goodput: all requests together) has 90 % of its requests in time. The rate is bisected:
attainment is taken to fall as the rate rises. The report holds all cells that were measured.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from fpcompile.scheduler import SLO_TABLE, profile
from fpcompile.scheduler.events import Request
from fpcompile.scheduler.goodput import TARGET, highest_rate, percentile
from fpcompile.scheduler.workload import TraceRow, requests_at, tile
from fpcompile.serving.bench_client import Sent

__all__ = [
    "LOADS", "MODES", "OUTPUT", "Slo", "backlog_of", "best_setting", "between_tokens", "cell_of", "in_time",
    "narrow", "requests_of", "result_of", "slos_of",
]  # fmt: skip

MODES = ("first", "tokens")
LOADS = tuple(round(0.1 * step, 1) for step in range(1, 25))
OUTPUT = (16, 64)


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds until the first token, and per token behind it."""

    ttft: float
    tbt: float


def slos_of(ttft: Mapping[str, float]) -> dict[str, Slo]:
    """The SLO of the time between tokens keeps the paper's proportion to that of the first token."""
    return {
        klass: Slo(seconds, seconds * SLO_TABLE[klass][1] / SLO_TABLE[klass][0])
        for klass, seconds in ttft.items()
    }


def requests_of(
    rows: Sequence[TraceRow], rate: float, count: int, mode: str, slos: Mapping[str, Slo], seed: int
) -> list[Request]:
    """``count`` requests at ``rate`` per second, drawn from the trace's blocks; the same for every server."""
    draw = random.Random(seed)
    chosen = [
        replace(row, output_tokens=1 if mode == MODES[0] else draw.randint(*OUTPUT))
        for row in tile(rows, count, seed)
    ]
    promised = {klass: slo.ttft for klass, slo in slos.items()}
    return requests_at(chosen, rate, profile(), promised)


def in_time(sent: Sent, slos: Mapping[str, Slo]) -> bool:
    """Whether all tokens came, with the first and the mean time between tokens within the SLOs."""
    slo = slos[sent.request.klass]
    if not sent.completed or sent.error or sent.ttft is None or sent.ttft > slo.ttft:
        return False
    mean = between_tokens(sent)
    return mean is None or mean <= slo.tbt


def between_tokens(sent: Sent) -> float | None:
    """Mean seconds per token behind the first; None where there are none."""
    return sum(sent.gaps) / (sent.output_tokens - 1) if sent.output_tokens > 1 else None


def cell_of(seen: Sequence[Sent], slos: Mapping[str, Slo], rate: float, load: float) -> dict[str, Any]:
    """The summary of one cell: attainments, percentiles in seconds, what failed and why.

    ``every_token``: the part of the requests of which each token came by the deadline of docs/design.md.
    """
    classes = sorted({one.request.klass for one in seen})
    met = [(one.request.klass, in_time(one, slos)) for one in seen]
    attained = {klass: fmean(ok for own, ok in met if own == klass) for klass in classes}
    first = {
        klass: [s.ttft for s in seen if s.request.klass == klass and s.ttft is not None] for klass in classes
    }
    firsts = [value for values in first.values() for value in values]
    gaps = [gap for one in seen if one.request.decode_tokens > 1 for gap in one.gaps]
    means = [mean for one in seen if one.completed and (mean := between_tokens(one)) is not None]
    return {
        "rate": rate,
        "load": load,
        "requests": len(seen),
        "attainment": attained,
        "worst": min(attained.values()),
        "overall": fmean(ok for _, ok in met),
        "every_token": fmean(ok and _each_in_time(one, slos) for one, (_, ok) in zip(seen, met, strict=True)),
        "ttft_mean": fmean(firsts) if firsts else None,
        "ttft_p50": percentile(firsts, 50),
        "ttft_p99": percentile(firsts, 99),
        "ttft_p99_by_class": {klass: percentile(values, 99) for klass, values in first.items()},
        "tbt_mean": fmean(means) if means else None,
        "tbt_p99": percentile(means, 99),
        "gap_p99": percentile(gaps, 99),
        "latest_sending": max(one.late for one in seen),
        "errors": dict(Counter(one.error for one in seen if one.error)),
    }


def _each_in_time(sent: Sent, slos: Mapping[str, Slo]) -> bool:
    slo = slos[sent.request.klass]
    return sent.tbt_met(slo.ttft, slo.tbt)


def backlog_of(seen: Sequence[Sent]) -> dict[str, Any]:
    """Requests that were all sent at once: what was done per second until the last of them ended."""
    whole = [one for one in seen if one.completed and not one.error]
    span = max((one.latency or 0.0 for one in whole), default=0.0)
    made = sum(one.output_tokens for one in whole)
    read = sum(one.request.tokens for one in whole)
    return {
        "requests": len(seen),
        "complete": len(whole),
        "seconds": span,
        "output_tokens_per_s": made / span if span else 0.0,
        "prompt_tokens_per_s": read / span if span else 0.0,
        "errors": dict(Counter(one.error for one in seen if one.error)),
    }


def best_setting(screened: Mapping[str, Mapping[str, Any]]) -> str:
    """The setting whose cell is best: by attainment of the worst class and of all, then by mean TTFT."""

    def merit(name: str) -> tuple[float, float]:
        cell = screened[name]
        mean = cell["ttft_mean"]
        return (cell["worst"] + cell["overall"], -(float("inf") if mean is None else mean))

    return max(screened, key=merit)


def narrow(
    rates: Sequence[float], measure: Callable[[float], Mapping[str, Any] | None]
) -> dict[float, Mapping[str, Any]]:
    """Bisect the grid for both goodputs; the cells by rate. ``measure`` gives None when time is over."""
    cells: dict[float, Mapping[str, Any]] = {}
    for key in ("worst", "overall"):
        low, high = -1, len(rates)
        while high - low > 1:
            rate = rates[(low + high) // 2]
            if rate not in cells:
                cell = measure(rate)
                if cell is None:
                    return cells
                cells[rate] = cell
            middle = rates.index(rate)
            low, high = (middle, high) if cells[rate][key] >= TARGET else (low, middle)
    return cells


def result_of(rates: Sequence[float], cells: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Both goodputs; ``..._narrowed``: whether the next higher rate of the grid was measured and failed."""
    known = {cell["rate"]: cell for cell in cells}
    found: dict[str, Any] = {}
    for name, key in (("goodput", "worst"), ("paper_goodput", "overall")):
        best = highest_rate((rate, cell[key]) for rate, cell in known.items())
        above = rates[rates.index(best) + 1 :] if best else list(rates)
        found[name] = best
        found[f"{name}_narrowed"] = bool(above) and above[0] in known
    return found

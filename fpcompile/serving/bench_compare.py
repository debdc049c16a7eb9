"""A measurement beside its simulation: attainment, mean TTFT and goodput, and whether they agree.

Words
    *crossing*  the rate at which the attainment of the worst class falls to the target, linear between two
                rates of the grid: goodput finer than the grid. None when it never falls, or starts below.

Limits: attainment within 3 points and mean TTFT within 15 % at loads up to 0.7; crossings within 5 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from fpcompile.scheduler.goodput import attainment
from fpcompile.scheduler.simulator import Outcome
from fpcompile.scheduler.sweep import CellKey

__all__ = ["Compared", "compare", "comparison_markdown", "crossing"]

ATTAINMENT, TTFT, GOODPUT, LOAD = 0.03, 0.15, 0.05, 0.7


def crossing(points: Iterable[tuple[float, float]], target: float) -> float | None:
    """Where the values of (rate, value) first fall below ``target``; see the module's text."""
    ordered = sorted(points)
    for (low, before), (high, after) in pairwise(ordered):
        if before >= target > after:
            return low + (high - low) * (before - target) / (before - after)
        if before < target:
            return None
    return None


@dataclass(frozen=True)
class Compared:
    """The outcomes of one cell. ``repeated``: simulated with the device seconds that each request took, None
    where requests shared the device.
    """

    key: CellKey
    real: Sequence[Outcome]
    simulated: Sequence[Outcome]
    repeated: Sequence[Outcome] | None = None


def compare(report: dict[str, Any], cells: Sequence[Compared]) -> dict[str, Any]:
    """Rows for each policy and rate, goodputs for each policy, and what is within the limits."""
    rows = []
    for policy, rate in dict.fromkeys((cell.key.policy, cell.key.rate) for cell in cells):
        mine = [cell for cell in cells if (cell.key.policy, cell.key.rate) == (policy, rate)]
        real = [outcome for cell in mine for outcome in cell.real]
        simulated = [outcome for cell in mine for outcome in cell.simulated]
        repeated = [outcome for cell in mine for outcome in cell.repeated or ()]
        row = _row(policy, rate, rate / report["capacity"], real, simulated)
        rows.append(row | _repeated(repeated if len(repeated) == len(real) else []))
    goodputs = {name: _goodput(report, name, rows) for name in report["policies"]}
    low = [row for row in rows if row["load"] <= LOAD + 0.005]
    ratios = [entry["ratio"] for entry in goodputs.values()]
    return {
        "rows": rows,
        "goodput": goodputs,
        "within": {
            "attainment": bool(low) and all(abs(row["overall_difference"]) <= ATTAINMENT for row in low),
            "attainment_of_every_class": bool(low)
            and all(abs(v) <= ATTAINMENT for row in low for v in row["class_difference"].values()),
            "mean_ttft": bool(low)
            and all(row["ttft_ratio"] is not None and abs(row["ttft_ratio"] - 1) <= TTFT for row in low),
            "goodput": all(ratio is not None and abs(ratio - 1) <= GOODPUT for ratio in ratios),
        },
    }


def _row(
    policy: str, rate: float, load: float, real: Sequence[Outcome], simulated: Sequence[Outcome]
) -> dict[str, Any]:
    a, b = attainment(real), attainment(simulated)
    measured, predicted = _mean_ttft(real), _mean_ttft(simulated)
    return {
        "policy": policy,
        "rate": rate,
        "load": load,
        "requests": len(real),
        "overall": a.overall,
        "overall_simulated": b.overall,
        "overall_difference": b.overall - a.overall,
        "worst": a.worst,
        "worst_simulated": b.worst,
        "by_class": dict(a.by_class),
        "by_class_simulated": dict(b.by_class),
        "class_difference": {klass: b.by_class[klass] - value for klass, value in a.by_class.items()},
        "mean_ttft": measured,
        "mean_ttft_simulated": predicted,
        "ttft_ratio": predicted / measured if measured and predicted is not None else None,
    }


def _repeated(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    seen = attainment(outcomes) if outcomes else None
    return {
        "overall_repeated": None if seen is None else seen.overall,
        "worst_repeated": None if seen is None else seen.worst,
        "mean_ttft_repeated": _mean_ttft(outcomes),
    }


def _mean_ttft(outcomes: Sequence[Outcome]) -> float | None:
    """Of those that were served; None when nobody was."""
    times = [o.ttft for o in outcomes if o.ttft is not None]
    return fmean(times) if times else None


def _goodput(report: dict[str, Any], name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label, source in (("real", report), ("simulated", report["simulated"])):
        entry = source["policies"][name]
        found[label] = entry["max_goodput"]
        points = [(point["rate"], point["worst"]) for point in entry["points"]]
        found[f"{label}_crossing"] = crossing(points, report["target"])
    real, simulated = found["real_crossing"], found["simulated_crossing"]
    found["ratio"] = simulated / real if real and simulated else None
    again = [(row["rate"], row["worst_repeated"]) for row in rows if row["policy"] == name]
    known = all(worst is not None for _, worst in again)
    found["repeated_crossing"] = crossing(again, report["target"]) if known else None
    return found


def comparison_markdown(report: dict[str, Any]) -> str:
    """The comparison as Markdown, for docs/goodput.md."""
    slos = ", ".join(
        f"{klass} {1e3 * slo:.0f} ms ({report['slo_multiples'][klass]:.1f} x)"
        for klass, slo in report["slos"].items()
    )
    head = (
        f"{report['model']}, {report['parameters'] / 1e6:.0f} million parameters, {report['dtype']}; prompts "
        f"{report['length_scale']:g} times as long as the trace's; capacity {report['capacity']:.1f} req/s; "
        f"{report['num_prompts']} requests per run; SLOs (multiples of the isolated TTFT): {slos}; pace of "
        f"the device before and behind each run {min(report['pace']):.2f} to {max(report['pace']):.2f}.\n"
    )
    lines = [
        head,
        "| policy | load | requests/s | attainment, real | simulated | worst class, real | simulated "
        "| repeated | mean TTFT, real (ms) | simulated | repeated |",
        "|---|" + "---:|" * 10,
    ]
    for row in report["comparison"]["rows"]:
        names = ("overall", "overall_simulated", "worst", "worst_simulated", "worst_repeated")
        cells = [f"`{row['policy']}`", f"{row['load']:.2f}", f"{row['rate']:.3g}"]
        cells += ["-" if row[key] is None else f"{100 * row[key]:.1f} %" for key in names]
        times = [row[key] for key in ("mean_ttft", "mean_ttft_simulated", "mean_ttft_repeated")]
        cells += ["-" if value is None else f"{1e3 * value:.1f}" for value in times]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| policy | goodput, real (req/s) | simulated | crossing of 90 %, real | simulated | ratio "
        "| repeated |",
    ]
    lines.append("|---|" + "---:|" * 6)
    for name, entry in report["comparison"]["goodput"].items():
        keys = ("real", "simulated", "real_crossing", "simulated_crossing", "ratio", "repeated_crossing")
        values = [entry[key] for key in keys]
        shown = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append("| " + " | ".join([f"`{name}`", *shown]) + " |")
    verdicts = ", ".join(
        f"{name.replace('_', ' ')} {'yes' if ok else 'NO'}"
        for name, ok in report["comparison"]["within"].items()
    )
    return "\n".join([*lines, "", f"Within the limits: {verdicts}."]) + "\n"

"""A measurement beside its simulation: attainment, mean TTFT and goodput, and whether they agree.

Words
    *crossing*  the rate at which the attainment of the worst class falls to the target, linear between two
                rates of the grid: goodput finer than the grid. None when it never falls, or starts below.

Limits: attainment within 3 points and mean TTFT within 15 % at loads up to 0.7; crossings within 5 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from fpcompile.scheduler.goodput import attainment
from fpcompile.scheduler.simulator import Outcome
from fpcompile.scheduler.sweep import CellKey

__all__ = ["compare", "comparison_markdown", "crossing"]

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


def compare(
    report: dict[str, Any], cells: Sequence[tuple[CellKey, list[Outcome], list[Outcome]]]
) -> dict[str, Any]:
    """Rows for each policy and rate, goodputs for each policy, and what is within the limits."""
    rows = []
    for policy, rate in dict.fromkeys((key.policy, key.rate) for key, _, _ in cells):
        mine = [(a, b) for key, a, b in cells if (key.policy, key.rate) == (policy, rate)]
        real = [outcome for found, _ in mine for outcome in found]
        simulated = [outcome for _, found in mine for outcome in found]
        rows.append(_row(policy, rate, rate / report["capacity"], real, simulated))
    goodputs = {name: _goodput(report, name) for name in report["policies"]}
    low = [row for row in rows if row["load"] <= LOAD + 0.005]
    ratios = [entry["ratio"] for entry in goodputs.values()]
    return {
        "rows": rows,
        "goodput": goodputs,
        "within": {
            "attainment": bool(low) and all(abs(row["overall_difference"]) <= ATTAINMENT for row in low),
            "attainment_of_every_class": bool(low)
            and all(abs(v) <= ATTAINMENT for row in low for v in row["class_difference"].values()),
            "mean_ttft": bool(low) and all(abs(row["ttft_ratio"] - 1) <= TTFT for row in low),
            "goodput": all(ratio is not None and abs(ratio - 1) <= GOODPUT for ratio in ratios),
        },
    }


def _row(
    policy: str, rate: float, load: float, real: Sequence[Outcome], simulated: Sequence[Outcome]
) -> dict[str, Any]:
    a, b = attainment(real), attainment(simulated)
    ttft = [fmean(o.ttft for o in found if o.ttft is not None) for found in (real, simulated)]
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
        "mean_ttft": ttft[0],
        "mean_ttft_simulated": ttft[1],
        "ttft_ratio": ttft[1] / ttft[0],
    }


def _goodput(report: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label, source in (("real", report), ("simulated", report["simulated"])):
        entry = source["policies"][name]
        found[label] = entry["max_goodput"]
        points = [(point["rate"], point["worst"]) for point in entry["points"]]
        found[f"{label}_crossing"] = crossing(points, report["target"])
    real, simulated = found["real_crossing"], found["simulated_crossing"]
    found["ratio"] = simulated / real if real and simulated else None
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
        f"{report['num_prompts']} requests per run; SLOs (multiples of the isolated TTFT): {slos}.\n"
    )
    lines = [
        head,
        "| policy | load | requests/s | attainment, real | simulated | worst class, real | simulated "
        "| mean TTFT, real (ms) | simulated |",
        "|---|" + "---:|" * 8,
    ]
    for row in report["comparison"]["rows"]:
        percents = [row[key] for key in ("overall", "overall_simulated", "worst", "worst_simulated")]
        cells = [f"`{row['policy']}`", f"{row['load']:.2f}", f"{row['rate']:.3g}"]
        cells += [f"{100 * value:.1f} %" for value in percents]
        cells += [f"{1e3 * row[key]:.1f}" for key in ("mean_ttft", "mean_ttft_simulated")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| policy | goodput, real (req/s) | simulated | crossing of 90 %, real | simulated | ratio |",
    ]
    lines.append("|---|" + "---:|" * 5)
    for name, entry in report["comparison"]["goodput"].items():
        values = [entry[key] for key in ("real", "simulated", "real_crossing", "simulated_crossing", "ratio")]
        shown = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append("| " + " | ".join([f"`{name}`", *shown]) + " |")
    verdicts = ", ".join(
        f"{name.replace('_', ' ')} {'yes' if ok else 'NO'}"
        for name, ok in report["comparison"]["within"].items()
    )
    return "\n".join([*lines, "", f"Within the limits: {verdicts}."]) + "\n"

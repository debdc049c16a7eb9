"""A goodput report as Markdown tables, for docs/goodput.md: every figure comes from the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fpcompile.serving.bench_report import reference_rate, slos_of

__all__ = ["markdown_of"]


def markdown_of(report: dict[str, Any]) -> str:
    """Three tables: goodputs; what happens at the reference rate; attainment and TTFT of each class there."""
    rate = reference_rate(report)
    head = (
        f"Costs `{report['costs']['name']}`, capacity {report['capacity']:.2f} req/s; "
        f"SLOs: {slos_of(report)}; "
        f"{report['num_prompts']} requests per run, {len(report['seeds'])} seeds.\n"
    )
    parts = [
        head,
        _goodputs(report),
        f"At {rate:g} req/s:\n",
        _behaviour(report, rate),
        _classes(report, rate),
    ]
    return "\n".join(parts)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    first = list(heads)
    lines = ["| " + " | ".join(first) + " |", "|---|" + "---:|" * (len(first) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _goodputs(report: dict[str, Any]) -> str:
    base = report["policies"].get("fcfs", {}).get("max_goodput")
    bound = report.get("bound")
    rows = []
    for name, entry in report["policies"].items():
        mine = entry["max_goodput"]
        rows.append(
            [
                f"`{name}`",
                f"{mine:.2f} ± {entry['max_goodput_stderr']:.2f}",
                f"{mine / base:.1f} ×" if base else "-",
                f"{entry['paper_goodput']:.2f} ± {entry['paper_goodput_stderr']:.2f}",
                f"{min(entry['max_goodput_by_seed']):g} to {max(entry['max_goodput_by_seed']):g}",
            ]
        )
    if bound:
        rows.append(
            [
                "*bound on any scheduler*",
                f"{bound['max_goodput']:.2f}",
                f"{bound['max_goodput'] / base:.1f} ×" if base else "-",
                f"{bound['paper_goodput']:.2f}",
                f"{min(bound['max_goodput_by_seed']):g} to {max(bound['max_goodput_by_seed']):g}",
            ]
        )
    return _table(["policy", "goodput (req/s)", "vs `fcfs`", "paper goodput", "over the seeds"], rows)


def _point(entry: dict[str, Any], rate: float) -> dict[str, Any]:
    found: dict[str, Any] = next(p for p in entry["points"] if p["rate"] == rate and p["slo_scale"] == 1.0)
    return found


def _behaviour(report: dict[str, Any], rate: float) -> str:
    rows = []
    for name, entry in report["policies"].items():
        point = _point(entry, rate)
        blocking = [point[f"blocking_{which}_ms"] for which in ("p50", "p99", "max")]
        rows.append(
            [
                f"`{name}`",
                f"{100 * point['worst']:.1f} ± {100 * point['worst_stderr']:.1f}",
                f"{100 * point['overall']:.1f}",
                *("-" if value is None else f"{value:.2f}" for value in blocking),
                f"{point['preemptions']:.0f}",
                f"{point['peak_paused_bytes'] / 2**30:.1f}",
                f"{point['decision_us']:.0f}",
            ]
        )
    heads = ["policy", "worst class (%)", "all (%)", "blocking p50 (ms)", "p99", "max", "pauses per run"]
    return _table([*heads, "paused at most (GiB)", "µs per event"], rows)


def _classes(report: dict[str, Any], rate: float) -> str:
    classes = list(report["slos"])
    rows = []
    for name, entry in report["policies"].items():
        point = _point(entry, rate)
        cells = []
        for klass in classes:
            p50, p99 = point["ttft_p50"].get(klass), point["ttft_p99"].get(klass)
            times = "-" if p50 is None or p99 is None else f"{p50:.2f} / {p99:.2f}"
            met = point["attainment"].get(klass)
            cells.append("-" if met is None else f"{100 * met:.1f} % ({times})")
        rows.append([f"`{name}`", *cells])
    return _table(["attainment (TTFT p50 / p99, s)", *classes], rows)

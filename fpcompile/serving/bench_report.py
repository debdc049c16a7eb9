"""The report of a goodput benchmark as a table in the terminal and as pictures.

Pictures: ``goodput.png`` (attainment of the worst class, and of all requests, against the rate),
``goodput-classes.png`` (one panel per class), and ``goodput-slo.png`` when several SLO scales were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

__all__ = ["reference_rate", "save_plots", "slos_of", "table_of"]

_COLOURS = (
    "#2b6cb0", "#d9622b", "#2f855a", "#c53030", "#805ad5", "#8c564b", "#d53f8c", "#718096", "#b7791f",
    "#0987a0",
)  # fmt: skip
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


def reference_rate(report: dict[str, Any]) -> float:
    """The rate of the grid nearest to 0.8 of the capacity: where policies are compared in the table."""
    rates: list[float] = report["rates"]
    return min(rates, key=lambda rate: abs(rate - 0.8 * report["capacity"]))


def slos_of(report: dict[str, Any]) -> str:
    """The promises of the classes in words."""
    return ", ".join(f"{klass} {slo:g} s" for klass, slo in report["slos"].items())


def _at(entry: dict[str, Any], rate: float, scale: float = 1.0) -> dict[str, Any]:
    found: dict[str, Any] = next(
        point for point in entry["points"] if point["rate"] == rate and point["slo_scale"] == scale
    )
    return found


def table_of(report: dict[str, Any]) -> Table:
    """Goodputs, and what happens at 0.8 of the capacity."""
    rate = reference_rate(report)
    table = Table(
        title=f"{Path(report['trace']).name}: costs {report['costs']['name']}, capacity "
        f"{report['capacity']:.2f} req/s. Goodput in req/s; then at {rate:g} req/s: attainment of the "
        "worst class and of all, blocking time p99, pauses per run, µs per scheduler event",
        title_justify="left",
        caption=f"TTFT SLOs: {slos_of(report)}; {report['num_prompts']} requests per run, "
        f"{len(report['seeds'])} seeds",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("policy", no_wrap=True)
    heads = ("goodput", "paper", "worst %", "all %", "block ms", "pauses", "µs")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for name, entry in report["policies"].items():
        point = _at(entry, rate)
        table.add_row(
            name,
            f"{entry['max_goodput']:.2f}±{entry['max_goodput_stderr']:.2f}",
            f"{entry['paper_goodput']:.2f}",
            f"{100 * point['worst']:.1f}",
            f"{100 * point['overall']:.1f}",
            _number(point["blocking_p99_ms"], 2),
            f"{point['preemptions']:.0f}",
            f"{point['decision_us']:.1f}",
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def save_plots(
    report: dict[str, Any], folder: str | Path, prefix: str = "goodput", only: Sequence[str] = ()
) -> list[Path]:
    """Write the pictures into ``folder``, of the policies in ``only`` (none: all); returns their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    if only:
        entries = {name: entry for name, entry in report["policies"].items() if name in only}
        report = {**report, "policies": entries}

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    classes = sorted(report["slos"])
    panels = [("worst class", ("worst",)), ("all requests", ("overall",))]
    made = [_plot(report, panels, target / f"{prefix}.png", "rate")]
    by_class = [(f"{klass}, SLO {report['slos'][klass]:g} s", ("attainment", klass)) for klass in classes]
    made.append(_plot(report, by_class, target / f"{prefix}-classes.png", "rate"))
    scales = {point["slo_scale"] for entry in report["policies"].values() for point in entry["points"]}
    if len(scales) > 1:
        made.append(_plot(report, panels, target / f"{prefix}-slo.png", "slo_scale"))
    return made


def _plot(
    report: dict[str, Any], panels: Sequence[tuple[str, tuple[str, ...]]], path: Path, axis: str
) -> Path:
    """Two panels in a row; the band around a line is its standard error over the seeds."""
    import matplotlib.pyplot as plt

    rows = ceil(len(panels) / 2)
    columns = min(len(panels), 2)
    figure, grid = plt.subplots(
        rows, columns, figsize=(5.0 * columns, 3.6 * rows + 0.9), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    axes = list(grid.flat)
    for plot, (title, keys) in zip(axes, panels, strict=False):
        for index, (name, entry) in enumerate(report["policies"].items()):
            _line(plot, name, index, _along(entry, axis, report["slo_rate"]), keys, axis)
        plot.axhline(100 * report["target"], color="0.5", linestyle=":", linewidth=1)
        plot.set_title(title, fontsize=11)
        if axis == "rate":
            plot.axvline(report["capacity"], color="0.7", linestyle="--", linewidth=1)
        plot.set_ylim(0, 101)
        plot.grid(alpha=0.25)
    for plot in axes[len(panels) :]:
        plot.set_visible(False)
    for row in grid:
        row[0].set_ylabel("attainment (%)")
    for plot in grid[-1]:
        rate = "offered rate (requests/s); dashed: capacity"
        plot.set_xlabel(rate if axis == "rate" else f"SLO scale, at {report['slo_rate']:g} requests/s")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(4, 2 * columns), frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _line(
    plot: Any, name: str, index: int, points: list[dict[str, Any]], keys: tuple[str, ...], axis: str
) -> None:
    """One policy; lines that coincide are told apart by their dashes."""
    at = [point[axis] for point in points]
    values = [100 * _dig(point, keys) for point in points]
    errors = [100 * _dig(point, (f"{keys[0]}_stderr", *keys[1:])) for point in points]
    ours = name == "fpcompile"
    colour = "black" if ours else _COLOURS[index % len(_COLOURS)]
    plot.plot(
        at, values, label=name, color=colour, linewidth=2.6 if ours else 1.5, zorder=3 if ours else 2,
        linestyle="-" if ours else _DASHES[index % len(_DASHES)],
    )  # fmt: skip
    low = [value - error for value, error in zip(values, errors, strict=True)]
    high = [value + error for value, error in zip(values, errors, strict=True)]
    plot.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def _along(entry: dict[str, Any], axis: str, slo_rate: float) -> list[dict[str, Any]]:
    if axis == "rate":
        points = [point for point in entry["points"] if point["slo_scale"] == 1.0]
    else:
        points = [point for point in entry["points"] if point["rate"] == slo_rate]
    return sorted(points, key=lambda point: float(point[axis]))


def _dig(point: dict[str, Any], keys: tuple[str, ...]) -> float:
    value: Any = point
    for key in keys:
        value = value[key]
    return float("nan") if value is None else float(value)

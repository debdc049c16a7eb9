"""What the benchmarks share: arguments, the machine's description, its speed, files and plots.

Rules
    A comparison is one interleaved run (:mod:`fpcompile.cli.interleave`), never two figures of two runs.
    Every JSON file carries the machine, the versions, the arguments, and what was measured raw.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fpcompile
from fpcompile.cli.interleave import Spread, busy_note
from fpcompile.cli.load import describe, load_model
from fpcompile.executor.device import make_device

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
INK, MUTED, RULE = "#1f2937", "#6b7280", "#e5e7eb"
COLOURS = ("#2b6cb0", "#d9622b", "#64748b", "#8b5cf6")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--model", default="qwen3-110m", help="demo model, tiny:ARCH, folder or hub id")
    made.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of weights and activations")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    made.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and PNG files")
    made.add_argument("--seed", type=int, default=0)
    return made


def load(arguments: argparse.Namespace) -> tuple[Any, str]:
    """The model that the arguments name, and its description."""
    device = make_device(arguments.device).torch_device
    model = load_model(arguments.model, device=device, dtype=DTYPES[arguments.dtype])
    return model, describe(model, arguments.model)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Waits until ``device`` is idle; nothing on CPU."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured, and how busy the machine was."""
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else processor(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "transformers": transformers.__version__,
        "fpcompile": fpcompile.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def warn_if_busy() -> None:
    """Say so when other work competes for the processor: ratios spread then, absolute times mean little."""
    if note := busy_note():
        print(note)


def report_missed(target: str) -> None:
    """Name a target that was missed, in a line that ``gpu.sh`` collects: a finding, not a failure."""
    print(f"TARGET MISSED: {target}")


def fail_if_different(differing: Sequence[str]) -> None:
    """Leave with exit code 1 when results lack the unmodified model's bits; call when all is written."""
    if differing:
        print(f"FAILED: results differ from the unmodified model's: {', '.join(differing)}")
        raise SystemExit(1)


def spread(value: Spread) -> dict[str, float]:
    """A spread as plain data."""
    return {name: getattr(value, name) for name in ("median", "q1", "q3", "low", "high", "count")}


def verdict(ratio: Mapping[str, float], control: Mapping[str, float], target: float) -> str:
    """Whether a ratio meets its target, or that the machine's noise (A/A) does not let us say."""
    margin = max(abs(target - 1), 0.02)
    if abs(control["median"] - 1) > margin / 2 or control["q3"] - control["q1"] > 2 * margin:
        return "too noisy to say (see A/A)"
    return "met" if ratio["median"] <= target else "MISSED"


def matmul_rate(rows: int, columns: int, inner: int, *, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of ``linear``, ``[rows, inner] x [inner, columns]``: best of 7."""
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype)
    wait = synchronizer(device)
    seconds = []
    for _ in range(8):
        wait()
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        wait()
        seconds.append(time.perf_counter() - start)
    return 2.0 * rows * columns * inner / min(seconds[1:])


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def canvas(title: str, subtitle: str, *, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty plot in the project's style; needs no display."""
    figure = Figure(figsize=(8.0, 4.5))
    ax = figure.subplots()
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=22)
    ax.text(0, 1.02, subtitle, transform=ax.transAxes, fontsize=8, color=MUTED, va="bottom")
    ax.set_xlabel(x, color=MUTED)
    ax.set_ylabel(y, color=MUTED)
    ax.tick_params(which="both", length=0, labelcolor=MUTED)
    ax.grid(color=RULE, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[:].set_visible(False)
    return figure, ax


def plot_ratios(
    ax: Axes, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], baseline: str, target: float
) -> None:
    """Ratio to ``baseline`` of every round as a dot, medians as bars, by length; ``names``: name -> label."""
    width = 0.6 / len(names)
    for place, row in enumerate(rows):
        for number, (name, label) in enumerate(names.items()):
            colour = COLOURS[number % len(COLOURS)]
            pairs = zip(row["seconds"][name], row["seconds"][baseline], strict=True)
            ratios = [a / b for a, b in pairs]
            x = place + (number - (len(names) - 1) / 2) * width
            ax.plot([x] * len(ratios), ratios, "o", color=colour, alpha=0.45, markersize=4, markeredgewidth=0)
            middle = statistics.median(ratios)
            ends = [x - width / 3, x + width / 3]
            ax.plot(ends, [middle, middle], color=colour, linewidth=2.5, label="" if place else label)
    ax.axhline(1.0, color=INK, linewidth=0.8)
    ax.axhline(target, color="#b91c1c", linewidth=0.8, linestyle="--")
    ax.set_xticks(range(len(rows)), [str(row["tokens"]) for row in rows])
    ax.legend(frameon=False, fontsize=8, labelcolor=MUTED)


def save_plot(figure: Figure, path: Path) -> None:
    """Write a PNG and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=160, facecolor="white")
    print(f"wrote {path}")


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns, readable without a terminal."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))

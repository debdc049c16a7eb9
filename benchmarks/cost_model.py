"""How well the cost model predicts lengths that it was not calibrated at.

    python benchmarks/cost_model.py
    python benchmarks/cost_model.py --model qwen2-0.5b --tokens 24 200 1500 6000

The program is calibrated as a user's would be (seconds, no special lengths). Then whole prefills of held-out
lengths are run in random order, each several times. *Segment*: every segment's median time, with the device
idle before and after, against its prediction; the median over all segments of a length is what counts, as
times of short segments are mostly the clock's and the interpreter's. *Whole*: a prefill without stops against
the sum of the predictions.

An *oracle* is reported beside both: the medians of the odd repetitions against those of the even ones. No
prediction can be better than that on the machine as it was.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any directory

from benchmarks import common
from fpcompile import segment
from fpcompile.cli.guard import quiet, remedied
from fpcompile.executor.device import make_device

SEGMENT_TARGET, WHOLE_TARGET = 0.10, 0.05
HELD_OUT = (24, 48, 96, 200, 384, 700, 1500, 3000, 6000, 12000, 16384)


def arguments() -> argparse.Namespace:
    """The command line."""
    made = common.parser("Predicted against measured times at lengths that were not calibrated.")
    made.add_argument("--tokens", type=int, nargs="+", default=list(HELD_OUT), help="held-out lengths")
    made.add_argument("--repeats", type=int, default=6, help="prefills of each kind and length")
    made.add_argument("--seconds", type=float, default=60.0, help="begin no further repetition, per length")
    made.add_argument("--calibration-seconds", type=float, default=None, help="None: the default")
    made.add_argument("--weights", default="shared", help="shared, or packed (CPU, bf16)")
    return made.parse_args()


def by_segment(program: Any, tokens: int) -> list[float]:
    """Seconds of every segment of one prefill."""
    wait = make_device(program.device).synchronize
    run = program.sample(tokens, rows=1)
    seconds = []
    while not run.done:
        wait()
        begun = time.perf_counter()
        run.step()
        wait()
        seconds.append(time.perf_counter() - begun)
    run.release()
    return seconds


def whole(program: Any, tokens: int) -> float:
    """Seconds of one prefill without stops."""
    wait = make_device(program.device).synchronize
    run = program.sample(tokens, rows=1)
    wait()
    begun = time.perf_counter()
    while not run.done:
        run.step()
    wait()
    seconds = time.perf_counter() - begun
    run.release()
    return seconds


def error(predicted: float, measured: float) -> float:
    """Relative error, with its sign."""
    return predicted / measured - 1


def medians(rounds: list[list[float]]) -> list[float]:
    """The median of each segment over the rounds."""
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def measure(program: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All held-out lengths: the lengths' repetitions in random order, two kinds of prefill each."""
    segments: dict[int, list[list[float]]] = {n: [] for n in options.tokens}
    prefills: dict[int, list[float]] = {n: [] for n in options.tokens}
    spent = dict.fromkeys(options.tokens, 0.0)
    order = random.Random(options.seed)
    for number in range(-1, options.repeats):
        for tokens in order.sample(options.tokens, len(options.tokens)):
            if number >= 2 and spent[tokens] > options.seconds:
                continue
            begun = time.perf_counter()
            one, many = whole(program, tokens), by_segment(program, tokens)
            if number >= 0:
                prefills[tokens].append(one)
                segments[tokens].append(many)
                spent[tokens] += time.perf_counter() - begun
    return [row(program, n, segments[n], prefills[n]) for n in options.tokens]


def row(program: Any, tokens: int, segments: list[list[float]], prefills: list[float]) -> dict[str, Any]:
    """Errors of one length."""
    measured = medians(segments)
    predicted = [program.segment_seconds(s.index, tokens=tokens) for s in program.segments]
    errors = [error(p, m) for p, m in zip(predicted, measured, strict=True)]
    odd, even = medians(segments[::2]), medians(segments[1::2])
    total = program.predict(tokens=tokens)
    return {
        "tokens": tokens,
        "repeats": len(prefills),
        "segment_error": statistics.median(map(abs, errors)),
        "segment_error_by_time": sum(abs(p - m) for p, m in zip(predicted, measured, strict=True))
        / sum(measured),
        "segment_oracle": statistics.median(abs(error(a, b)) for a, b in zip(odd, even, strict=True)),
        "whole_error": error(total, statistics.median(prefills)),
        "whole_oracle": error(statistics.median(prefills[::2]), statistics.median(prefills[1::2])),
        "predicted_seconds": total,
        "measured_seconds": statistics.median(prefills),
        "prefills": prefills,
        "segments": [
            {"name": s.name, "kind": s.kind, "predicted": p, "measured": m}
            for s, p, m in zip(program.segments, predicted, measured, strict=True)
        ],
    }


def plot(rows: list[dict[str, Any]], title: str, options: argparse.Namespace) -> None:
    """Errors over the length."""
    figure, ax = common.canvas(
        "Error of the cost model at lengths that were not calibrated", title, x="tokens", y="error (%)"
    )
    lines = {
        "segment_error": "segments, median |error|",
        "whole_error": "whole prefill, |error|",
        "segment_oracle": "segments, measurement against itself",
        "whole_oracle": "whole prefill, measurement against itself",
    }
    for number, (name, label) in enumerate(lines.items()):
        ax.plot(
            [r["tokens"] for r in rows],
            [100 * abs(r[name]) for r in rows],
            "--" if "oracle" in name else "o-",
            color=common.COLOURS[number % 2],
            linewidth=1 if "oracle" in name else 2,
            label=label,
        )
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=8, labelcolor=common.MUTED)
    common.save_plot(figure, options.output / "cost_model.png")


def main() -> None:
    """Calibrate, measure, print, write."""
    options = arguments()
    with quiet(), remedied(), torch.no_grad():
        common.warn_if_busy()
        model, title = common.load(options)
        program = segment(model, weights=options.weights)
        limit = program.max_tokens
        options.tokens = sorted({n for n in options.tokens if limit is None or n <= limit})
        begun = time.perf_counter()
        given = options.calibration_seconds
        costs = program.calibrate() if given is None else program.calibrate(seconds=given)
        took = time.perf_counter() - begun
        lengths = sorted({n for samples in costs.samples.values() for n, _ in samples})
        print(f"{title}: calibrated in {took:.1f} s at {', '.join(map(str, lengths))} tokens")
        rows = measure(program, options)
        report(rows)
        plot(rows, title, options)
        content = {"benchmark": "cost model", "model": title, "calibrated": lengths, "seconds": took}
        content["targets"] = {"segment": SEGMENT_TARGET, "whole": WHOLE_TARGET}
        where = common.machine(model.device)
        common.write_json(options.output / "cost_model.json", {**content, "machine": where, "rows": rows})


def report(rows: list[dict[str, Any]]) -> None:
    """The figures for people, and which targets were missed."""
    head = ("tokens", "measured", "predicted", "whole", "itself", "segments", "by time", "itself")
    cells = [
        (
            r["tokens"],
            f"{r['measured_seconds'] * 1e3:.1f} ms",
            f"{r['predicted_seconds'] * 1e3:.1f} ms",
            f"{100 * r['whole_error']:+.1f} %",
            f"{100 * r['whole_oracle']:+.1f} %",
            f"{100 * r['segment_error']:.1f} %",
            f"{100 * r['segment_error_by_time']:.1f} %",
            f"{100 * r['segment_oracle']:.1f} %",
        )
        for r in rows
    ]
    common.print_table(head, cells)
    for name, target in (("segment", SEGMENT_TARGET), ("whole", WHOLE_TARGET)):
        middle = statistics.median(abs(r[f"{name}_error"]) for r in rows)
        print(f"{name}: median error over the lengths {100 * middle:.1f} % (target {100 * target:g} %)")
        if middle > target:
            common.report_missed(f"median {name} error {100 * middle:.1f} %, not {100 * target:g} %")


if __name__ == "__main__":
    main()

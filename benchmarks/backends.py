"""What compiled functions gain: ``backend="inductor"`` against torch.compile and against the model itself.

    python benchmarks/backends.py                       time ratios at 16 to 4096 tokens
    python benchmarks/backends.py --compile-time        seconds of compiling, 80 layers against 8
    python benchmarks/backends.py --granularities layer --weights packed

All are called with the same arguments (``logits_to_keep=1``, ``use_cache=True``), in one interleaved run, in
random order inside each round, beside ``torch.compile(model, dynamic=True)`` under a second name as the
control (A/A). Ratios are taken per round. All is compiled before the first round that counts. Each
granularity is a program of its own: the more cuts, the more functions are called.

The compile time is that of the lowering pass alone, from an empty cache of TorchInductor, for narrow models
of two depths whose layers are alike, in alternation.

Exit code 1 when a result differs from the model's by more than rounding allows. A target that is missed is
reported, no more.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any directory

from benchmarks import common
from fpcompile import segment
from fpcompile.cli.guard import quiet, remedied
from fpcompile.cli.interleave import interleave, ratio
from fpcompile.cli.load import forward_arguments, random_ids
from fpcompile.executor.device import make_device
from fpcompile.ir import Granularity
from fpcompile.models.ambient import tracing
from fpcompile.models.capture import capture
from fpcompile.models.zoo import tiny_model
from fpcompile.passes.lower import lower
from fpcompile.passes.pipeline import compile_packed

TARGET = 1.02
COMPILE_TARGET = 1.3
DEPTHS = (8, 80)
ROUNDING = 0.1


def arguments() -> argparse.Namespace:
    """The command line."""
    made = common.parser("backend='inductor' against torch.compile and the unmodified model.")
    made.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    made.add_argument("--repeats", type=int, default=9, help="rounds per length, or compilations per depth")
    made.add_argument("--seconds", type=float, default=75.0, help="begin no round later, per length")
    made.add_argument("--granularities", nargs="+", default=["operator", "layer"], help="where it is cut")
    made.add_argument("--weights", default="shared", help="shared, or packed (CPU, bf16)")
    made.add_argument("--compile-time", action="store_true", help="time the compiler at two depths instead")
    return made.parse_args()


def difference(got: Any, expected: Any) -> float:
    """Largest difference of the logits, relative to the largest one."""
    a, b = got.logits.float(), expected.logits.float()
    return float((a - b).abs().max() / b.abs().max())


def measure(
    model: Any, compiled: Any, programs: dict[str, Any], tokens: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One length: raw seconds, ratios, and how far the results lie apart."""
    ids = random_ids(model, tokens, seed=options.seed)
    asked = forward_arguments(model)
    expected = model(input_ids=ids, **asked)
    called = {"model": model, "compiled": compiled, "control": compiled, **programs}
    differences = {name: difference(f(input_ids=ids, **asked), expected) for name, f in called.items()}
    seconds = interleave(
        {name: functools.partial(f, input_ids=ids, **asked) for name, f in called.items()},
        rounds=options.repeats,
        budget=options.seconds,
        seed=options.seed,
        synchronize=common.synchronizer(model.device),
    )
    return {
        "tokens": tokens,
        "ratio": {name: common.spread(ratio(seconds, name, "compiled")) for name in called},
        "to_model": {name: common.spread(ratio(seconds, name, "model")) for name in called},
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "relative_difference": differences,
        "seconds": seconds,
    }


def verdict(row: dict[str, Any], name: str) -> str:
    """Whether a program meets the target at one length."""
    return common.verdict(row["ratio"][name], row["ratio"]["control"], TARGET)


def report(rows: list[dict[str, Any]], names: Sequence[str]) -> None:
    """The figures for people."""
    head = ("tokens", "segments by", "model", "torch.compile", "inductor", "/ compile", "quartiles", "A/A")
    common.print_table(
        (*head, "/ model", "differs by", f"<= {TARGET}"),
        [
            (
                row["tokens"],
                name,
                *(f"{row['median_seconds'][n] * 1e3:.1f} ms" for n in ("model", "compiled", name)),
                f"{row['ratio'][name]['median']:.3f}",
                f"{row['ratio'][name]['q1']:.3f}-{row['ratio'][name]['q3']:.3f}",
                f"{row['ratio']['control']['median']:.3f}",
                f"{row['to_model'][name]['median']:.3f}",
                f"{row['relative_difference'][name]:.2g}",
                verdict(row, name),
            )
            for row in rows
            for name in names
        ],
    )


def compare(options: argparse.Namespace) -> None:
    """Ratios at every length."""
    model, title = common.load(options)
    programs = {
        name: segment(model, backend="inductor", granularity=name, weights=options.weights)
        for name in options.granularities
    }
    print(title)
    for name, program in programs.items():
        told = [note for note in program.plan.notes if note.startswith("backend")]
        print(f"{name}: {len(program.segments)} segments; {'; '.join(told)}")
    compiled = torch.compile(model, dynamic=True)
    with torch.no_grad():
        rows = [measure(model, compiled, programs, tokens, options) for tokens in options.tokens]
    report(rows, list(programs))
    for row in rows:
        for name in programs:
            if verdict(row, name) == "MISSED":
                took = f"{row['ratio'][name]['median']:.3f} times torch.compile, not {TARGET}"
                common.report_missed(f"{row['tokens']} tokens, segments by {name}, take {took}")
    figure, ax = common.canvas(
        "Time of compiled segments / torch.compile(model, dynamic=True)",
        f"{title}; ratio of each round, bars: medians",
        x="tokens",
        y="ratio",
    )
    names = {name: f"inductor, segments by {name}" for name in programs}
    names |= {"control": "torch.compile / itself", "model": "unmodified model"}
    common.plot_ratios(ax, rows, names, "compiled", TARGET)
    common.save_plot(figure, options.output / "backends.png")
    common.write_json(
        options.output / "backends.json",
        {
            "benchmark": "backends",
            "model": title,
            "weights": options.weights,
            "target": TARGET,
            "machine": common.machine(model.device),
            "rows": rows,
        },
    )
    limit = ROUNDING if model.dtype is torch.bfloat16 else 1e-4
    common.fail_if_different(
        [
            f"{row['tokens']} tokens by {name}"
            for row in rows
            for name in programs
            if not row["relative_difference"][name] <= limit
        ]
    )


def compiling(layers: int, options: argparse.Namespace) -> tuple[float, int]:
    """Seconds of compiling a narrow model of so many layers from an empty cache, and its functions."""
    from torch._inductor.utils import fresh_cache

    device = make_device(options.device).torch_device
    shape = tiny_model("qwen3").config.to_dict()
    shape |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    config = type(tiny_model("qwen3").config).from_dict(shape)
    model = type(tiny_model("qwen3"))(config)
    nn.Module.to(model, device, common.DTYPES[options.dtype])
    model.train(False)
    with tracing(device.type):
        partitioned = compile_packed(capture(model), Granularity(options.granularities[0]))
        with fresh_cache():
            torch._dynamo.reset()
            begun = time.perf_counter()
            lower(partitioned.plan, partitioned.functions, "inductor")
            return time.perf_counter() - begun, len(partitioned.functions)


def compile_time(options: argparse.Namespace) -> None:
    """The compiler's seconds at two depths, and their ratio."""
    few, many = DEPTHS
    compiling(few, options)  # what the process pays once
    seconds: dict[int, list[float]] = {few: [], many: []}
    functions: dict[int, int] = {}
    for _ in range(min(options.repeats, 3)):
        for layers in DEPTHS:
            spent, functions[layers] = compiling(layers, options)
            seconds[layers].append(spent)
    middle = {layers: statistics.median(values) for layers, values in seconds.items()}
    for layers in DEPTHS:
        print(f"{layers:>3} layers: {middle[layers]:.1f} s for {functions[layers]} functions")
    growth = middle[many] / middle[few]
    print(f"{many} layers / {few} layers: {growth:.2f} (target {COMPILE_TARGET})")
    if growth > COMPILE_TARGET:
        common.report_missed(f"compiling {many} layers takes {growth:.2f} times {few}, not {COMPILE_TARGET}")
    common.write_json(
        options.output / "backends_compile_time.json",
        {
            "benchmark": "compile time of backend inductor",
            "seconds": seconds,
            "functions": functions,
            "ratio": growth,
            "target": COMPILE_TARGET,
            "machine": common.machine(make_device(options.device).torch_device),
        },
    )


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    with quiet(), remedied():
        common.warn_if_busy()
        compile_time(options) if options.compile_time else compare(options)


if __name__ == "__main__":
    main()

"""Blocking time against throughput: every way to make a prefill preemptible, in one engine.

    python benchmarks/preemption.py                                the paper's comparison and the targets
    python benchmarks/preemption.py --tokens 2048 --layers 2       a quick look
    python benchmarks/preemption.py --weights packed               tiles that cost less, on a CPU in bf16
    python benchmarks/preemption.py --device cuda --model Qwen/Qwen3-8B --layers 0

The schemes are described in ``schemes.py``. For each length all of them run the same prompt on the same
kernels, uninterrupted, in one interleaved run: *throughput* is the whole prefill's time over the scheme's,
per round. Then preemption requests come at Poisson times (see ``blocking.py``): *blocking time* is from a
request to the moment the device is free. The *floor* is the time of the floating-point operations at the
measured rate of a matrix product of the model's own shape.

More tables, for one prompt (``--bound-tokens``) under a budget of 1/200 of its prefill:

    launches     median over 5 runs of each segment's or tile's time; the largest over the budget. A target
                 allows for the machine: c is p99 / median of one repeated kernel in the same run.
    longer       the same budget in ms for longer prompts (``--long-tokens``): launches, blocking times.
    preemptions  100 stops in one prefill, with another request's prefill in each; its time is subtracted.

Exit code 1 when a scheme that promises the model's bits gives others. A target that is missed is reported.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any directory

from benchmarks import common
from benchmarks.blocking import drive, poisson
from benchmarks.schemes import Programs, Scheme
from fpcompile.cli.bits import compare_outputs
from fpcompile.cli.guard import quiet, remedied
from fpcompile.cli.interleave import interleave, percentile, ratio
from fpcompile.cli.load import forward_arguments, random_ids
from fpcompile.engine.prices import next_cost
from fpcompile.executor.device import Device, make_device
from fpcompile.executor.schedule import launch_seconds
from fpcompile.ir import evaluate

PART = 200
STOPS = 100
STOPS_TARGET = 1.02
RUNS, LONG_RUNS = 5, 3
LOST = {"cpu": 0.10, "cuda": 0.03}
SLACK = 0.15
URGENT_TOKENS = 16
LONGEST = 8


def arguments() -> argparse.Namespace:
    """The command line."""
    made = common.parser("Blocking time against throughput, for every way to preempt a prefill.")
    made.add_argument("--tokens", type=int, nargs="*", default=[2048, 8192, 16384], help="lengths compared")
    made.add_argument("--layers", type=int, default=4, help="keep the model's first layers only; 0: all")
    made.add_argument("--chunks", type=int, nargs="*", default=[512, 2048])
    made.add_argument("--parts", type=int, nargs="*", default=[50, PART], help="budgets: 1/n of the prefill")
    made.add_argument("--weights", default="shared", help="of every scheme: shared, or packed (CPU, bf16)")
    made.add_argument("--backend", default="eager", help="of every scheme: eager or inductor")
    made.add_argument("--repeats", type=int, default=5, help="uninterrupted rounds per length")
    made.add_argument("--requests", type=int, default=60, help="mean number of requests per prefill")
    made.add_argument("--prefills", type=int, default=3, help="interrupted prefills per scheme")
    made.add_argument("--bound-tokens", type=int, default=4096, help="prompt of the two tables; 0: none")
    made.add_argument(
        "--long-tokens",
        type=int,
        nargs="*",
        default=[16384, 32768],
        help="prompts under the same budget in ms",
    )
    return made.parse_args()


def shorten(model: Any, layers: int) -> None:
    """Keep the first ``layers`` decoder layers."""
    config = model.config.get_text_config()
    if not 0 < layers < config.num_hidden_layers:
        return
    model.get_decoder().layers = model.get_decoder().layers[:layers].train(False)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def price(scheme: Scheme) -> Any:
    """How the launches of a scheme are predicted on an asynchronous device."""
    return None if scheme.program is None else lambda run: next_cost(scheme.program, run)


def through(scheme: Scheme, device: Device) -> float:
    """Seconds of one uninterrupted prefill."""
    return drive(scheme.begin, device, (), price(scheme))[0]


def blocked(
    scheme: Scheme, device: Device, seconds: float, expected: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """Prefills with requests at Poisson times: blocking times, and whether the bits are the model's."""
    waited: list[float] = []
    compared = []
    number = 0
    while number < options.prefills or (not waited and number < 10 * options.prefills):
        times = poisson(seconds / options.requests, 4 * seconds, seed=options.seed + number)
        _, some, output = drive(scheme.begin, device, times, price(scheme))
        waited += some
        compared.append(compare_outputs(output, expected))
        number += 1
    return {
        "requests": len(waited),
        "blocking_seconds": {
            "p50": percentile(waited, 50),
            "p99": percentile(waited, 99),
            "max": max(waited),
        },
        "bits_equal": all(bits.equal for bits in compared),
        "largest_difference": max(bits.difference for bits in compared),
        "blocking": waited,
    }


def compare(
    model: Any, programs: Programs, tokens: int, device: Device, options: argparse.Namespace
) -> dict[str, Any]:
    """All schemes at one length."""
    ids = random_ids(model, tokens, seed=options.seed)
    expected = model(input_ids=ids, **forward_arguments(model))
    whole = programs.whole(ids)
    alone = min(through(whole, device) for _ in range(2))
    schemes = programs.all(ids, alone, chunks=options.chunks, parts=options.parts)
    candidates = {s.name: s for s in schemes} | {"control": whole}
    seconds = interleave(
        {name: functools.partial(through, scheme, device) for name, scheme in candidates.items()},
        rounds=options.repeats,
        seed=options.seed,
    )
    floor = evaluate(programs.operator.plan.cost.flops, tokens=tokens, rows=1) / rate(model, tokens)
    rows = []
    for scheme in schemes:
        middle = statistics.median(seconds[scheme.name])
        rows.append(
            {
                "scheme": scheme.name,
                "exact": scheme.exact,
                "prefill_seconds": middle,
                "throughput": common.spread(ratio(seconds, "whole", scheme.name)),
                "times_floor": middle / floor,
                **blocked(scheme, device, middle, expected, options),
            }
        )
    return {
        "tokens": tokens,
        "floor_seconds": floor,
        "control": common.spread(ratio(seconds, "control", "whole")),
        "rows": rows,
        "seconds": seconds,
    }


def rate(model: Any, rows: int) -> float:
    """Operations per second of a product of the model's own shape."""
    config = model.config.get_text_config()
    inner, outer = config.hidden_size, config.intermediate_size
    return common.matmul_rate(rows, outer, inner, dtype=model.dtype, device=model.device)


def unsteadiness(model: Any, seconds: float, device: Device) -> float:
    """c: p99 / median of one kernel that takes about ``seconds``, repeated."""
    config = model.config.get_text_config()
    inner, outer = config.hidden_size, config.intermediate_size
    rows = max(16, int(seconds * rate(model, 256) / (2 * inner * outer)))
    x = torch.randn(rows, inner, device=model.device).to(model.dtype)
    weight = torch.randn(outer, inner, device=model.device).to(model.dtype)
    spent = []
    for _ in range(400):
        device.synchronize()
        begun = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        device.synchronize()
        spent.append(time.perf_counter() - begun)
    return percentile(spent[20:], 99) / percentile(spent[20:], 50)


def described(program: Any, run: Any, seconds: list[float]) -> list[dict[str, Any]]:
    """Every launch of a run: where it is, which tile, what was predicted and what it took."""
    stages, heads = program.stages, program.heads()
    shape, costs = run.call.shape, program.costs
    rows: list[dict[str, Any]] = []
    for launch, spent in zip(run.schedule, seconds, strict=True):
        stage = stages[launch.first]
        what = f"stages {launch.first} to {launch.last - 1}"
        if launch.tiled:
            what = f"{stage.over} {launch.start} to {launch.stop}"
            what += f", heads {launch.head_start} to {launch.head_stop}" if launch.head_stop else ""
        rows.append(
            {
                "segment": program.segments[stage.segment].name,
                "launch": what,
                "predicted": launch_seconds(launch, stages, shape, costs, heads),
                "seconds": spent,
            }
        )
    return rows


def launch_times(scheme: Scheme, device: Device, runs: int) -> list[float]:
    """The median of each launch's seconds over some runs, one more before them."""
    found: list[list[float]] = []
    for _ in range(runs + 1):
        run, spent = scheme.begin(), []
        while not run.done:
            device.synchronize()
            begun = time.perf_counter()
            run.step()
            device.synchronize()
            spent.append(time.perf_counter() - begun)
        found.append(spent)
    return [statistics.median(times) for times in zip(*found[1:], strict=True)]


def bound(model: Any, programs: Programs, device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """The table of launches: how long each segment or tile takes, against the budget."""
    ids = random_ids(model, options.bound_tokens, seed=options.seed)
    whole = programs.whole(ids)
    alone = statistics.median(through(whole, device) for _ in range(3))
    budget = alone / PART
    tiles = programs.tiles(ids, PART, alone)
    before = unsteadiness(model, budget, device)
    middles = launch_times(tiles, device, RUNS)
    c = max(before, unsteadiness(model, budget, device))
    order = sorted(range(len(middles)), key=middles.__getitem__, reverse=True)
    launches = described(programs.operator, tiles.begin(), middles)
    seconds = interleave(
        {scheme.name: functools.partial(through, scheme, device) for scheme in (whole, tiles)},
        rounds=options.repeats,
        seed=options.seed,
    )
    expected = model(input_ids=ids, **forward_arguments(model))
    requests = blocked(tiles, device, statistics.median(seconds[tiles.name]), expected, options)
    return {
        "tokens": options.bound_tokens,
        "budget_seconds": budget,
        "launches": len(middles),
        "c": c,
        "longest": max(middles) / budget,
        "longest_launches": [launches[i] for i in order[:LONGEST]],
        "predicted": statistics.median(row["seconds"] / row["predicted"] for row in launches),
        "target": c + SLACK,
        "blocking_p99": requests["blocking_seconds"]["p99"] / budget,
        "blocking_max": requests["blocking_seconds"]["max"] / budget,
        "blocking_target": (c + SLACK) / 2,
        "throughput": common.spread(ratio(seconds, whole.name, tiles.name)),
        "lost_target": LOST["cuda" if device.asynchronous else "cpu"],
        "launch_seconds": middles,
        "requests": requests["requests"],
    }


def longer(
    model: Any, programs: Programs, device: Device, options: argparse.Namespace, budget: float
) -> list[dict[str, Any]]:
    """The same budget in seconds for longer prompts: their longest launches, and blocking times."""
    limit = programs.operator.max_tokens
    found: list[dict[str, Any]] = []
    for tokens in (n for n in options.long_tokens if limit is None or n <= limit):
        tiles = programs.tiles(random_ids(model, tokens, seed=options.seed), PART, PART * budget)
        middles = launch_times(tiles, device, LONG_RUNS)
        alone = sum(middles)
        times = poisson(alone / options.requests, 4 * alone, seed=options.seed)
        waited = drive(tiles.begin, device, times, price(tiles))[1]
        found.append(
            {
                "tokens": tokens,
                "launches": len(middles),
                "longest": max(middles) / budget,
                "requests": len(waited),
                "blocking_p99": percentile(waited, 99) / budget if waited else 0.0,
                "blocking_max": max(waited, default=0.0) / budget,
                "launch_seconds": middles,
            }
        )
    return found


def stops(model: Any, programs: Programs, device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """The table of preemptions: a prefill that is stopped often, with another one's work in between."""
    ids = random_ids(model, options.bound_tokens, seed=options.seed)
    urgent = random_ids(model, URGENT_TOKENS, seed=options.seed + 1)
    whole = programs.whole(ids)
    alone = statistics.median(through(whole, device) for _ in range(2))
    tiles = programs.tiles(ids, PART, alone)
    launches = len(tiles.begin().schedule)
    count = min(STOPS, launches - 1)
    at = {round((i + 1) * launches / (count + 1)) for i in range(count)}
    others: list[float] = []

    def stopped() -> None:
        run, spent = tiles.begin(), 0.0
        while not run.done:
            if run.at in at:
                run.suspend()
                device.synchronize()
                begun = time.perf_counter()
                programs.operator(input_ids=urgent, **programs.asked)
                device.synchronize()
                spent += time.perf_counter() - begun
            run.step()
        others.append(spent)

    def uninterrupted() -> None:
        run = tiles.begin()
        while not run.done:
            run.step()

    seconds = interleave(
        {"through": uninterrupted, "control": uninterrupted, "stopped": stopped},
        rounds=options.repeats,
        seed=options.seed,
        synchronize=device.synchronize,
    )
    own = [total - other for total, other in zip(seconds["stopped"], others[1:], strict=True)]
    seconds["own"] = own
    return {
        "tokens": options.bound_tokens,
        "stops": len(at),
        "launches": launches,
        "ratio": common.spread(ratio(seconds, "own", "through")),
        "control": common.spread(ratio(seconds, "control", "through")),
        "target": STOPS_TARGET,
        "seconds": seconds,
    }


def report(found: dict[str, Any]) -> None:
    """One length, for people."""
    control = found["control"]
    print(
        f"\n{found['tokens']} tokens; floor {found['floor_seconds'] * 1e3:.0f} ms; "
        f"A/A {control['median']:.3f} [{control['q1']:.3f}, {control['q3']:.3f}]"
    )
    common.print_table(
        ("scheme", "p50", "p99", "max", "prefill", "throughput", "quartiles", "/ floor", "requests", "bits"),
        [
            (
                row["scheme"],
                *(f"{row['blocking_seconds'][name] * 1e3:.2f} ms" for name in ("p50", "p99", "max")),
                f"{row['prefill_seconds'] * 1e3:.0f} ms",
                f"{row['throughput']['median']:.3f}",
                f"{row['throughput']['q1']:.3f}-{row['throughput']['q3']:.3f}",
                f"{row['times_floor']:.2f}",
                row["requests"],
                "equal" if row["bits_equal"] else f"differ by {row['largest_difference']:.2g}",
            )
            for row in found["rows"]
        ],
    )


def report_bound(launches: dict[str, Any], long: list[dict[str, Any]], stopped: dict[str, Any]) -> None:
    """The tables of the budget, and the targets that they miss."""
    print(
        f"\n{launches['tokens']} tokens, budget {launches['budget_seconds'] * 1e3:.2f} ms = 1/{PART} of the "
        f"prefill, {launches['launches']} launches, c = {launches['c']:.2f}"
    )
    lost = 1 - launches["throughput"]["median"]
    lines = [
        ("longest launch (median of 5) / budget", launches["longest"], launches["target"]),
        ("blocking p99 / budget", launches["blocking_p99"], launches["blocking_target"]),
        ("blocking max / budget", launches["blocking_max"], launches["blocking_target"]),
        ("throughput lost by the budget", lost, launches["lost_target"]),
        (f"{stopped['stops']} preemptions, time / uninterrupted", stopped["ratio"]["median"], STOPS_TARGET),
    ]
    for row in long:
        where = f"{row['tokens']} tokens, same budget: "
        lines += [
            (f"{where}longest launch (median of {LONG_RUNS})", row["longest"], launches["target"]),
            (f"{where}blocking p99", row["blocking_p99"], launches["blocking_target"]),
            (f"{where}blocking max", row["blocking_max"], launches["blocking_target"]),
        ]
    common.print_table(
        ("figure", "value", "target"), [(name, f"{v:.3f}", f"<= {t:.3f}") for name, v, t in lines]
    )
    common.print_table(
        ("longest launches", "stage", "/ budget", "/ predicted"),
        [
            (
                row["segment"],
                row["launch"],
                f"{row['seconds'] / launches['budget_seconds']:.3f}",
                f"{row['seconds'] / row['predicted']:.2f}",
            )
            for row in launches["longest_launches"]
        ],
    )
    print(f"all launches: median of measured / predicted {launches['predicted']:.2f}")
    told = launches["throughput"]
    print(f"throughput / whole prefill: {told['median']:.3f} [{told['q1']:.3f}, {told['q3']:.3f}]")
    print(f"A/A of the uninterrupted prefill: {stopped['control']['median']:.3f}")
    for name, value, target in lines:
        if value > target:
            common.report_missed(f"{name} is {value:.3f}, not {target:.3f}")


def plot(found: list[dict[str, Any]], title: str, options: argparse.Namespace) -> None:
    """Blocking p99 against throughput, a curve per length: down and to the right is better."""
    figure, ax = common.canvas(
        "Blocking time against throughput",
        f"{title}; lower and further right is better",
        x="throughput of the uninterrupted prefill, whole prefill = 1",
        y="blocking time, p99 (ms)",
    )
    for number, one in enumerate(found):
        _curve(ax, one, common.COLOURS[number % len(common.COLOURS)])
    ax.set_yscale("log")
    ax.margins(x=0.15)
    ax.legend(frameon=False, fontsize=8, labelcolor=common.MUTED)
    common.save_plot(figure, options.output / "preemption.png")


def _curve(ax: Axes, found: dict[str, Any], colour: str) -> None:
    points = [
        (r["throughput"]["median"], 1e3 * r["blocking_seconds"]["p99"], r["scheme"]) for r in found["rows"]
    ]
    ax.plot(*zip(*[p[:2] for p in points], strict=True), "o", color=colour, label=f"{found['tokens']} tokens")
    best = [p for p in points if not any(q[0] > p[0] and q[1] < p[1] for q in points)]
    ax.step(
        *zip(*sorted(p[:2] for p in best), strict=True), where="pre", color=colour, linewidth=1, alpha=0.6
    )
    for x, y, name in points:
        ax.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=6, color=common.MUTED)


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    with quiet(), remedied(), torch.no_grad():
        common.warn_if_busy()
        model, title = common.load(options)
        shorten(model, options.layers)
        title += f", {model.config.get_text_config().num_hidden_layers} layers"
        device = make_device(model.device)
        plan = {"weights": options.weights, "backend": options.backend}
        programs = Programs(model, forward_arguments(model), device, **plan)
        print(title)
        found = []
        for tokens in options.tokens:
            found.append(compare(model, programs, tokens, device, options))
            report(found[-1])
        content: dict[str, Any] = {
            "benchmark": "preemption",
            "model": title,
            "plan": plan,
            "lengths": found,
        }
        if options.bound_tokens:
            content["launches"] = bound(model, programs, device, options)
            budget = content["launches"]["budget_seconds"]
            content["longer"] = longer(model, programs, device, options, budget)
            content["preemptions"] = stops(model, programs, device, options)
            report_bound(content["launches"], content["longer"], content["preemptions"])
        if found:
            plot(found, title, options)
        common.write_json(
            options.output / "preemption.json", {**content, "machine": common.machine(model.device)}
        )
        common.fail_if_different(
            [
                f"{row['scheme']}, {one['tokens']} tokens"
                for one in found
                for row in one["rows"]
                if row["exact"] and not row["bits_equal"] and options.backend == "eager"
            ]
        )


if __name__ == "__main__":
    main()

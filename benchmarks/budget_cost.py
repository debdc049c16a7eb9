"""What a budget costs, and where: the same prefill stage by stage, whole and in tiles.

    python benchmarks/budget_cost.py --weights packed
    python benchmarks/budget_cost.py --weights packed --layers 0      all layers: the budget is as much larger
    python benchmarks/budget_cost.py --weights packed --threads 2     as launches take it, for an idle machine

Words
    *whole*    a launch for each stage, none of them divided.
    *tiles*    the launches of a budget of 1/``--part`` of the whole prefill.
    *control*  *whole* under a second name (A/A).
    *given*    a pair of query and key that the kernel computes: keys come in whole blocks of 512.

All three run in random order inside each round; the time of every launch is added to attention's or to that
of everything else, so that the ratio of each is one of the same round. On a CPU one thread is used and its
own processor time counts, which others on the machine hardly change; with more threads, and on another
device, it is the time that passes.

A second table has torch's attention kernel alone, one head of the model: nanoseconds for each pair that is
given to it, in blocks of queries as tiles have them, with a mask and without, and whole under a causal mask.

Exit code 1 when the whole program gives other bits than the model. A loss above the target is reported.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any directory

from benchmarks import common
from benchmarks.preemption import LOST, PART, shorten
from fpcompile import segment
from fpcompile.cli.bits import compare_outputs
from fpcompile.cli.guard import quiet, remedied
from fpcompile.cli.interleave import interleave, ratio
from fpcompile.cli.load import forward_arguments, random_ids
from fpcompile.executor.schedule import KEY_BLOCK, Launch
from fpcompile.models.attention import MaskKind, MaskSpec

QUERIES = (64, 128, 256, 512, 768, 1024)
MOST_KEYS = 3072
KINDS = ("attention", "other stages")
ALL = "all"

Spent = dict[str, float]


def arguments() -> argparse.Namespace:
    """The command line."""
    made = common.parser("What a budget costs a prefill, in attention and in everything else.")
    made.add_argument("--tokens", type=int, default=4096, help="length of the prefill")
    made.add_argument("--layers", type=int, default=4, help="keep the model's first layers only; 0: all")
    made.add_argument("--part", type=int, default=PART, help="the budget is 1/n of the prefill")
    made.add_argument("--weights", default="shared", help="shared, or packed (CPU, bf16)")
    made.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    made.add_argument("--repeats", type=int, default=7, help="rounds")
    return made.parse_args()


def clock_of(device: torch.device) -> Callable[[], float]:
    """Processor time of the only thread on a CPU, else the time that passes, with the device idle."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time
    wait = common.synchronizer(device)

    def now() -> float:
        wait()
        return time.perf_counter()

    return now


def begin(program: Any, inputs: dict[str, Any], budget: float | None) -> Any:
    """A run within a budget in seconds, stage by stage without one."""
    run = program.start(**inputs, max_blocking_ms=math.inf if budget is None else 1e3 * budget)
    if budget is None:
        run.schedule = tuple(Launch(i, i + 1) for i in range(len(program.stages)))
    return run


def prefill(
    program: Any, inputs: dict[str, Any], budget: float | None, clock: Callable[[], float]
) -> tuple[Spent, Any]:
    """Seconds of each kind of stage in one prefill, and its output."""
    run, stages = begin(program, inputs, budget), program.stages
    spent = dict.fromkeys(KINDS, 0.0)
    while not run.done:
        kind = KINDS[stages[run.next_stage].over != "attention"]
        begun = clock()
        run.step()
        spent[kind] += clock() - begun
    return {**spent, ALL: sum(spent.values())}, run.result()


def compare(program: Any, inputs: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Both ways to execute the prefill, interleaved."""
    clock = clock_of(program.device)
    alone = statistics.median(prefill(program, inputs, None, clock)[0][ALL] for _ in range(3))
    budget = alone / options.part
    candidates = {"whole": None, "control": None, "tiles": budget}
    found: dict[str, list[Spent]] = {name: [] for name in candidates}

    def once(name: str, limit: float | None) -> None:
        found[name].append(prefill(program, inputs, limit, clock)[0])

    interleave(
        {name: functools.partial(once, name, limit) for name, limit in candidates.items()},
        rounds=options.repeats,
        seed=options.seed,
    )
    seconds = {
        kind: {name: [spent[kind] for spent in rounds[1:]] for name, rounds in found.items()}
        for kind in (*KINDS, ALL)
    }
    run = begin(program, inputs, budget)
    return {
        "tokens": options.tokens,
        "budget_seconds": budget,
        "launches": len(run.schedule),
        "blocks": blocks(program, run.schedule),
        "lost": 1 - 1 / ratio(seconds[ALL], "tiles", "whole").median,
        "lost_target": LOST["cpu" if program.device.type == "cpu" else "cuda"],
        "rows": [
            {
                "kind": kind,
                "ratio": common.spread(ratio(times, "tiles", "whole")),
                "control": common.spread(ratio(times, "control", "whole")),
                "seconds": times,
            }
            for kind, times in seconds.items()
        ],
    }


def blocks(program: Any, schedule: Iterable[Launch]) -> list[str]:
    """The blocks of queries of the first attention that is divided: ``0 to 1024, 2 heads``."""
    tiles = [t for t in schedule if t.tiled and program.stages[t.first].over == "attention"]
    mine = [t for t in tiles if t.first == tiles[0].first]
    words = [f"{t.start} to {t.stop}, {t.head_stop - t.head_start} heads" for t in mine]
    return list(dict.fromkeys(words))


def kernel(program: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Nanoseconds for a pair that is given, of one head: blocks behind many keys, and whole."""
    keys = max(KEY_BLOCK, min(options.tokens, MOST_KEYS) // KEY_BLOCK * KEY_BLOCK)
    width = program.attention[0].dims[0]
    k, v = (torch.randn(1, 1, keys, width).to(program.device, program.dtype) for _ in range(2))
    sizes = [n for n in QUERIES if n <= keys]
    attend = torch.nn.functional.scaled_dot_product_attention
    candidates: dict[tuple[int, str], Callable[[], object]] = {}
    for rows in sizes:
        q = torch.randn(1, 1, rows, width).to(k)
        mask = MaskSpec(MaskKind.CAUSAL).band(rows, keys, 0, k)
        candidates[rows, "masked"] = functools.partial(attend, q, k, v, attn_mask=mask)
        candidates[rows, "unmasked"] = functools.partial(attend, q, k, v)
    candidates[keys, "causal"] = functools.partial(attend, k, k, v, is_causal=True)
    pairs = {at: float(at[0] * keys) for at in candidates}
    pairs[keys, "causal"] = keys * (keys + KEY_BLOCK) / 2
    names = {f"{rows} {how}": (rows, how) for rows, how in candidates}
    seconds = interleave(
        {name: candidates[at] for name, at in names.items()},
        rounds=max(options.repeats, 3),
        seed=options.seed,
        clock=clock_of(program.device),
    )
    return [
        {
            "queries": rows,
            "keys": keys,
            "how": how,
            "nanoseconds": 1e9 * statistics.median(seconds[name]) / pairs[rows, how],
            "seconds": seconds[name],
        }
        for name, (rows, how) in names.items()
    ]


def report(found: dict[str, Any], pairs: Sequence[dict[str, Any]]) -> None:
    """The figures for people, and whether the target was missed."""
    print(
        f"{found['tokens']} tokens, budget {found['budget_seconds'] * 1e3:.2f} ms, "
        f"{found['launches']} launches; blocks of queries: {'; '.join(found['blocks'])}"
    )
    common.print_table(
        ("stages", "whole", "tiles", "tiles / whole", "quartiles", "A/A", "quartiles"),
        [
            (
                row["kind"],
                *(f"{1e3 * statistics.median(row['seconds'][name]):.0f} ms" for name in ("whole", "tiles")),
                *told(row["ratio"]),
                *told(row["control"]),
            )
            for row in found["rows"]
        ],
    )
    print(f"\nattention of one head over {pairs[0]['keys']} keys, ns for a pair that is given")
    known = {(row["queries"], row["how"]): f"{row['nanoseconds']:.2f}" for row in pairs}
    hows = list(dict.fromkeys(row["how"] for row in pairs))
    common.print_table(
        ("queries", *hows),
        [(n, *(known.get((n, how), "") for how in hows)) for n in dict.fromkeys(n for n, _ in known)],
    )
    lost, target = found["lost"], found["lost_target"]
    print(f"throughput lost by the budget: {100 * lost:.1f} % (target {100 * target:g} %)")
    if lost > target:
        common.report_missed(f"the budget costs {100 * lost:.1f} % of throughput, not {100 * target:g} %")


def told(spread: dict[str, float]) -> tuple[str, str]:
    """Median and quartiles."""
    return f"{spread['median']:.3f}", f"{spread['q1']:.3f} to {spread['q3']:.3f}"


def plot(found: dict[str, Any], title: str, options: argparse.Namespace) -> None:
    """The ratio of every round, by kind of stage."""
    figure, ax = common.canvas(
        f"Time under a budget of 1/{options.part} of a prefill of {options.tokens} tokens",
        title,
        x="",
        y="tiles / whole",
    )
    rows = [{"tokens": row["kind"], "seconds": row["seconds"]} for row in found["rows"]]
    names = {"tiles": "under the budget", "control": "whole, again"}
    common.plot_ratios(ax, rows, names, "whole", 1 / (1 - found["lost_target"]))
    common.save_plot(figure, options.output / "budget_cost.png")


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    with quiet(), remedied(), torch.no_grad():
        common.warn_if_busy()
        model, title = common.load(options)
        shorten(model, options.layers)
        title += f", {model.config.get_text_config().num_hidden_layers} layers"
        before = torch.get_num_threads()
        torch.set_num_threads(options.threads if model.device.type == "cpu" else before)
        try:
            title += f", {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)
            print(title)
            program = segment(model, weights=options.weights)
            program.calibrate()
            ids = random_ids(model, options.tokens, seed=options.seed)
            inputs = {"input_ids": ids, **forward_arguments(model)}
            found, pairs = compare(program, inputs, options), kernel(program, options)
            whole = prefill(program, inputs, None, time.perf_counter)[1]
            tiles = prefill(program, inputs, found["budget_seconds"], time.perf_counter)[1]
            expected = model(**inputs)
            where = common.machine(model.device)
        finally:
            torch.set_num_threads(before)
        equal = {n: compare_outputs(o, expected).equal for n, o in (("whole", whole), ("tiles", tiles))}
        report(found, pairs)
        print(f"tiles have the model's bits: {'yes' if equal['tiles'] else 'no'}")
        plot(found, title, options)
        content = {"benchmark": "budget cost", "model": title, "weights": options.weights, **found}
        content |= {"kernel": pairs, "bits_equal": equal, "machine": where}
        common.write_json(options.output / "budget_cost.json", content)
        common.fail_if_different([] if equal["whole"] else ["whole"])


if __name__ == "__main__":
    main()

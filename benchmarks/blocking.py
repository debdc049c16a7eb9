"""How long the device stays taken after a preemption is requested, in the middle of a long prefill.

    python benchmarks/blocking.py
    python benchmarks/blocking.py --device cuda --model Qwen/Qwen3-8B --tokens 16384

For each plan (a granularity, or a budget for tiles) the same prefill runs under the executor's own loop.
Preemption requests come at Poisson times, from another thread, whatever the device does (open loop, so that a
long segment is met as often as its share of the time). At the next cut the loop returns, the device is
drained, every request that has come is answered, the run is suspended and goes on. *Blocking time* is from a
request to that moment; *slowdown* is the prefill's time with all these stops over its time without any.

Every result is compared with the unmodified model's. Exit code 1 when one differs (but with a budget, whose
tiles use other kernels: there the difference is reported).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any directory

from benchmarks import common
from fpcompile import segment
from fpcompile.cli.bits import Bits, compare_outputs
from fpcompile.cli.guard import quiet, remedied
from fpcompile.cli.interleave import percentile
from fpcompile.cli.load import forward_arguments, random_ids
from fpcompile.engine.outputs import tensors_in
from fpcompile.engine.prices import next_cost
from fpcompile.errors import UsageError
from fpcompile.executor.device import Device, make_device
from fpcompile.executor.loop import Outcome, advance
from fpcompile.executor.runahead import RunAhead


def arguments() -> argparse.Namespace:
    """The command line."""
    made = common.parser("Blocking time of preemption requests during a long prefill, per plan.")
    made.add_argument("--tokens", type=int, default=4096, help="length of the prefill")
    made.add_argument("--requests", type=int, default=60, help="mean number of requests per prefill")
    made.add_argument("--prefills", type=int, default=3, help="prefills per plan")
    made.add_argument("--granularities", nargs="+", default=["operator", "layer", "model"])
    made.add_argument(
        "--max-blocking-ms", type=float, nargs="*", default=[20.0], help="budgets for tiles at operator cuts"
    )
    return made.parse_args()


class Requester(threading.Thread):
    """Raises the flag at each of ``times`` (seconds after ``begun``) and notes when it really did."""

    def __init__(self, times: Sequence[float], begun: float) -> None:
        super().__init__(name="requester", daemon=True)
        self.flag = threading.Event()
        self.asked: deque[float] = deque()
        self.over = threading.Event()
        self._times, self._begun = times, begun

    def run(self) -> None:
        """One request after another, until the prefill is over."""
        for at in self._times:
            if self.over.wait(max(0.0, self._begun + at - time.perf_counter())):
                return
            self.asked.append(time.perf_counter())
            self.flag.set()

    def answer(self) -> list[float]:
        """The device is free: blocking times of all requests that have come."""
        now = time.perf_counter()
        self.flag.clear()
        waited = []
        while self.asked and self.asked[0] <= now:
            waited.append(now - self.asked.popleft())
        if self.asked:
            self.flag.set()
        return waited


def poisson(mean_gap: float, until: float, seed: int) -> list[float]:
    """Times of a Poisson process up to ``until``, in seconds."""
    draw = random.Random(seed)
    times = [draw.expovariate(1 / mean_gap)]
    while times[-1] < until:
        times.append(times[-1] + draw.expovariate(1 / mean_gap))
    return times


def prefill(
    program: Any, ids: torch.Tensor, asked: dict[str, Any], device: Device, times: Sequence[float]
) -> tuple[float, list[float], Any]:
    """Seconds of one prefill that is asked to stop at ``times``, the blocking times, and its output."""
    return drive(
        lambda: program.start(input_ids=ids, **asked), device, times, lambda run: next_cost(program, run)
    )


def drive(
    begin: Callable[[], Any],
    device: Device,
    times: Sequence[float],
    price: Callable[[Any], Callable[[], float]] | None = None,
) -> tuple[float, list[float], Any]:
    """As :func:`prefill`, for whatever ``begin`` starts: a run, or something that is driven like one.

    On an asynchronous device ``price(run)`` predicts its next launch; without it nothing runs ahead.
    """
    ahead = RunAhead(device) if device.asynchronous and price is not None else None
    waited: list[float] = []
    device.order_after(device.caller_event())  # inputs are made on the caller's stream, and stay with it
    with device.active():
        run = begin()
        cost = price(run) if ahead is not None and price is not None else None
        device.synchronize()
        begun = time.perf_counter()
        requester = Requester(times, begun)
        requester.start()
        outcome = None
        while outcome is not Outcome.DONE:
            outcome = advance(run, requester.flag.is_set, ahead=ahead, cost=cost)
            if ahead is not None:
                ahead.drain()
            waited += requester.answer()
            if outcome is Outcome.STOPPED:
                run.suspend()
        seconds = time.perf_counter() - begun
        requester.over.set()
        requester.join()
        output = run.result()
        device.hand_over(tensors_in(output))
        device.synchronize()
    return seconds, waited, output


def measure(
    model: Any, granularity: str, budget: float | None, device: Device, options: argparse.Namespace
) -> dict[str, Any]:
    """All prefills of one plan: a granularity, and a budget in milliseconds or None."""
    program = segment(model, granularity=granularity)
    ids = random_ids(model, options.tokens, seed=options.seed)
    asked = {**forward_arguments(model), "max_blocking_ms": budget}
    expected = model(input_ids=ids, **forward_arguments(model))
    if device.asynchronous or budget is not None:
        program.calibrate()
    launches = len(program.start(input_ids=ids, **asked).schedule)
    prefill(program, ids, asked, device, ())
    alone = [prefill(program, ids, asked, device, ())[0] for _ in range(2)]
    stopped: list[float] = []
    waited: list[float] = []
    compared: list[Bits] = []
    number = 0
    while number < options.prefills or not waited:
        if number > 10 * options.prefills:
            raise UsageError("no request came before a prefill's end", remedy="use more --tokens")
        times = poisson(min(alone) / options.requests, 4 * min(alone), seed=options.seed + number)
        seconds, some, output = prefill(program, ids, asked, device, times)
        compared.append(compare_outputs(output, expected))
        stopped.append(seconds)
        waited += some
        number += 1
    return {
        "granularity": granularity,
        "max_blocking_ms": budget,
        "launches": launches,
        "requests": len(waited),
        "blocking_seconds": {
            "p50": percentile(waited, 50),
            "p99": percentile(waited, 99),
            "max": max(waited),
            "mean": statistics.fmean(waited),
        },
        "prefill_seconds": statistics.median(alone),
        "slowdown": statistics.median(stopped) / statistics.median(alone),
        "bits_equal": all(bits.equal for bits in compared),
        "largest_difference": max(bits.difference for bits in compared),
        "blocking": waited,
    }


def name_of(row: dict[str, Any]) -> str:
    """``layer``, or ``operator, 20 ms``."""
    budget = row["max_blocking_ms"]
    return f"{row['granularity']}" + ("" if budget is None else f", {budget:g} ms")


def plot(rows: list[dict[str, Any]], title: str, options: argparse.Namespace) -> None:
    """The distribution of the blocking times, one curve per granularity."""
    figure, ax = common.canvas(
        f"Blocking time of a preemption request, {options.tokens}-token prefill",
        f"{title}; requests at Poisson times",
        x="blocking time (ms)",
        y="requests answered (%)",
    )
    for row, colour in zip(rows, common.COLOURS, strict=False):
        ordered = sorted(1e3 * value for value in row["blocking"])
        share = [100 * (index + 1) / len(ordered) for index in range(len(ordered))]
        label = f"{name_of(row)} ({row['launches']} launches)"
        ax.step(ordered, share, where="post", color=colour, linewidth=2, label=label)
    ax.set_xscale("log")
    ax.legend(frameon=False, fontsize=8, labelcolor=common.MUTED, loc="lower right")
    common.save_plot(figure, options.output / "blocking.png")


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    with quiet(), remedied():
        common.warn_if_busy()
        model, title = common.load(options)
        device = make_device(model.device)
        plans: list[tuple[str, float | None]] = [(name, None) for name in options.granularities]
        plans += [("operator", budget) for budget in options.max_blocking_ms]
        with torch.no_grad():
            rows = [measure(model, name, budget, device, options) for name, budget in plans]
        print(f"{title}, prefill of {options.tokens} tokens")
        head = ("plan", "launches", "requests", "p50", "p99", "max", "prefill", "slowdown", "bits")
        cells = [
            (
                name_of(row),
                row["launches"],
                row["requests"],
                *(f"{row['blocking_seconds'][name] * 1e3:.2f} ms" for name in ("p50", "p99", "max")),
                f"{row['prefill_seconds'] * 1e3:.0f} ms",
                f"{row['slowdown']:.3f}",
                "equal" if row["bits_equal"] else f"DIFFER by {row['largest_difference']:.2g}",
            )
            for row in rows
        ]
        common.print_table(head, cells)
        plot(rows, title, options)
        content = {"benchmark": "blocking", "model": title, "tokens": options.tokens}
        where = common.machine(model.device)
        common.write_json(options.output / "blocking.json", {**content, "machine": where, "rows": rows})
        exact = [row for row in rows if row["max_blocking_ms"] is None]
        common.fail_if_different([name_of(row) for row in exact if not row["bits_equal"]])


if __name__ == "__main__":
    main()

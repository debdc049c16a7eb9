"""What the executor's own code costs on the host: one launch, and one pause with its resumption.

    python benchmarks/dispatch.py                                  targets: 20 us and 50 us
    python benchmarks/dispatch.py --model tiny:qwen3 --repeats 500

*dispatch*   ``run.step()`` of one segment, less the calls of its generated functions with the same tensors.
             Both are made at every cut of a prefill of ``--tokens`` tokens, in turn; medians of ``--repeats``
             prefills, for each segment. The model may be small: nothing here depends on its size.
*pause*      a long run gives way to an urgent request of another program, whose only segment does nothing,
             and goes on: host time from the end of its launch, when the request is there, to the urgent
             launch, and from the end of that to the next launch of the long run, less the same around that
             request on an idle engine, behind a bare step of the same run. Accounting, metrics and the
             timeline are in it; nothing is evicted.
*decisions*  the scheduler's part of that, by itself: it depends on the policy and on how many wait (here
             nobody else does; `scheduler_cost.py` has the rest). The target is for the other part.
*leave*      the same without an engine: ``advance`` returns at a cut, ``suspend``, and ``advance`` again.

Times are of the host, and on an asynchronous device too: nothing waits for it here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any directory

from benchmarks import common
from fpcompile import Engine, Run, segment
from fpcompile.cli.guard import quiet, remedied
from fpcompile.cli.interleave import Spread, percentile
from fpcompile.cli.load import random_ids
from fpcompile.executor.loop import Outcome, advance
from fpcompile.executor.packed import PackedProgram
from fpcompile.ir import PartKind
from fpcompile.models.ambient import plain

DISPATCH_US = 20.0
PAUSE_US = 50.0


def arguments() -> argparse.Namespace:
    """The command line."""
    made = common.parser("Host time of a launch, and of a pause with its resumption.")
    made.add_argument("--tokens", type=int, default=16)
    made.add_argument("--repeats", type=int, default=100, help="prefills, and pauses")
    made.add_argument("--policies", default="s-edf,fpcompile", help="of the engines that pause")
    return made.parse_args()


# ---- one launch


def bare_launch(program: PackedProgram, run: Run, values: dict[str, Tensor], at: int) -> float:
    """Execute the functions of one launch on ``values``; seconds within the calls alone.

    A part's function is the generated one, which is given its inputs for good, as in a step; for attention it
    is the executor's own.
    """
    launch, lengths, spent = run.schedule[at], run.call.lengths, 0.0
    for stage in program.stages[launch.first : launch.last]:
        for step in stage.steps:
            part = step.part
            given: list[Any] = [values[name] for name in part.inputs]
            for name in step.frees:
                del values[name]
            if part.kind is PartKind.GRAPH:
                call = program.functions[part.function].call
                given += [program.weights[path] for path in part.params]
                given += [lengths[name] for name in part.lengths]
                begun = time.perf_counter()
                outputs = call(given)
            else:
                begun = time.perf_counter()
                outputs = step.function(run, given, lengths)
            spent += time.perf_counter() - begun
            values.update(zip(part.outputs, outputs, strict=True))
    return spent


def dispatch(program: PackedProgram, ids: Tensor, repeats: int) -> dict[str, Any]:
    """Medians for each segment: the step, the bare calls, and the difference, in microseconds."""
    launches = len(program.start(ids).schedule)
    steps: list[list[float]] = [[] for _ in range(launches)]
    calls: list[list[float]] = [[] for _ in range(launches)]
    with torch.no_grad(), plain(program.device.type):
        for repeat in range(repeats + 3):
            run, other = program.start(ids), program.start(ids)
            values = dict(other.values)
            for at in range(launches):
                if repeat % 2:
                    inner = bare_launch(program, other, values, at)
                begun = time.perf_counter()
                run.step()
                outer = time.perf_counter() - begun
                if not repeat % 2:
                    inner = bare_launch(program, other, values, at)
                if repeat >= 3:
                    steps[at].append(outer)
                    calls[at].append(inner)
    names = [program.segments[program.stages[n.first].segment].name for n in run.schedule]
    outer_us = [1e6 * statistics.median(times) for times in steps]
    inner_us = [1e6 * statistics.median(times) for times in calls]
    rows = [
        {"segment": name, "step_us": step, "bare_us": call}
        for name, step, call in zip(names, outer_us, inner_us, strict=True)
    ]
    over = [step - call for step, call in zip(outer_us, inner_us, strict=True)]
    return {
        "rows": rows,
        "over_us": over,
        "median_us": statistics.median(over),
        "p90_us": percentile(over, 90),
    }


# ---- pause and resume


@dataclass(frozen=True)
class Nothing:
    """A segment that does nothing."""

    index: int = 0
    name: str = "nothing"


class NothingRun:
    """One launch of nothing."""

    tokens = rows = 1
    live_bytes = kv_bytes = 0
    next_segment = Nothing()

    def __init__(self) -> None:
        self.cursor = 0

    @property
    def done(self) -> bool:
        """Whether it was launched."""
        return self.cursor == 1

    def step(self) -> None:
        """Launch it."""
        self.cursor = 1

    def result(self) -> None:
        """Nothing."""

    def suspend(self) -> None:
        """Nothing to drop."""

    def release(self) -> None:
        """Nothing to drop."""


class NothingProgram:
    """A program for an engine: requests that cost the engine's work and no other."""

    segments = (Nothing(),)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self, input_ids: Any, **_: Any) -> NothingRun:
        """A run."""
        return NothingRun()

    def predict(self, **_: Any) -> float:
        """Seconds."""
        return 1e-6

    def segment_seconds(self, index: int, **_: Any) -> float:
        """Seconds."""
        return 1e-6


class Watch:
    """Notes each launch of an engine (for ``on_segment``) and what its scheduler's decisions take.

    ``submit`` is called behind each launch of a long run that is not its last: so comes an urgent request.
    """

    def __init__(self, submit: Callable[[], object]) -> None:
        self.launches: list[tuple[Any, float, float, float]] = []
        """Of each its run, when it began, when the engine could go on, and seconds of decisions by then."""
        self.decided = 0.0
        self._submit = submit

    def launched(self, run: Any, segment: object, start: float, end: float) -> None:
        """The engine's hook."""
        if not isinstance(run, NothingRun) and not run.done:
            self._submit()
        self.launches.append((run, start, time.perf_counter(), self.decided))

    def follow(self, core: Any) -> None:
        """Time the decisions of ``core``."""
        decide = core.handle_all

        def timed(events: Any) -> Any:
            begun = time.perf_counter()
            commands = decide(events)
            self.decided += time.perf_counter() - begun
            return commands

        core.handle_all = timed

    def pauses(self) -> list[tuple[float, float]]:
        """(host seconds without decisions, seconds of decisions) of every urgent request between two launches
        of a long run: from the end of the one to the urgent one's start, and from its end to the other.
        """
        found = []
        for before, urgent, behind in zip(self.launches, self.launches[1:], self.launches[2:], strict=False):
            if isinstance(urgent[0], NothingRun) and before[0] is behind[0]:
                decided = behind[3] - before[3]
                found.append((urgent[1] - before[2] + behind[1] - urgent[2] - decided, decided))
        return found


def pauses(program: PackedProgram, ids: Tensor, repeats: int, policy: str) -> dict[str, Any]:
    """Microseconds of pauses with their resumptions, and of the same requests on an idle engine."""
    programs: dict[str, Any] = {"long": program, "urgent": NothingProgram(program.device)}
    watch = Watch(lambda: engine.submit([0], program="urgent", ttft_slo=60.0))
    engine = Engine(
        programs, device_thread=False, policy=policy, clock=time.perf_counter, on_segment=watch.launched
    )
    watch.follow(engine._driver.core)
    preempting: list[tuple[float, float]] = []
    alone: list[tuple[float, float]] = []
    try:
        with torch.no_grad():  # as in the engine's own thread
            while len(preempting) < repeats:
                watch.launches.clear()
                engine.submit(ids, program="long", ttft_slo=3600.0)
                while engine.turn(None):
                    pass
                preempting += watch.pauses()
                beside = program.start(ids)
                while not beside.done:
                    beside.step()  # the processor's caches hold the same as behind a launch of the engine
                    urgent = engine.submit([0], program="urgent", ttft_slo=60.0)
                    decided, begun = watch.decided, time.perf_counter()
                    engine.turn(None)
                    ended = time.perf_counter()
                    _, start, released, _ = watch.launches[-1]
                    decided = watch.decided - decided
                    alone.append((start - begun + ended - released - decided, decided))
                    assert urgent.done()
        stopped = engine.statistics().preemptions
    finally:
        engine.close()

    def median(part: int) -> float:
        while_long, idle = ([each[part] for each in found] for found in (preempting, alone))
        return 1e6 * (statistics.median(while_long) - statistics.median(idle))

    return {
        "host_us": median(0),
        "decisions_us": median(1),
        "preempting_us": [[1e6 * seconds for seconds in each] for each in preempting[:repeats]],
        "alone_us": [[1e6 * seconds for seconds in each] for each in alone],
        "preemptions": stopped,
    }


def leaving(program: PackedProgram, ids: Tensor, repeats: int) -> list[float]:
    """Microseconds of leaving the loop at a cut and coming back, without an engine."""
    run = program.start(ids)
    spent = []
    for _ in range(len(run.schedule) // 2):
        run.step()
    for _ in range(repeats):
        begun = time.perf_counter()
        outcome = advance(run, lambda: True)
        run.suspend()
        back = advance(run, lambda: False, 0)
        spent.append(1e6 * (time.perf_counter() - begun))
        assert (outcome, back) == (Outcome.STOPPED, Outcome.QUOTA)
    return spent


def plot(found: dict[str, Any], title: str, options: argparse.Namespace) -> None:
    """The distribution of the dispatch times over the segments."""
    figure, ax = common.canvas(
        "Host time of one launch beyond its functions' own",
        f"{title}, {options.tokens} tokens; median of {options.repeats} prefills for each segment",
        x="microseconds",
        y="segments (%)",
    )
    ordered = sorted(found["over_us"])
    share = [100 * (i + 1) / len(ordered) for i in range(len(ordered))]
    ax.step(ordered, share, where="post", color=common.COLOURS[0], linewidth=2)
    ax.axvline(DISPATCH_US, color="#b91c1c", linewidth=0.8, linestyle="--")
    common.save_plot(figure, options.output / "dispatch.png")


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    with quiet(), remedied():
        common.warn_if_busy()
        model, title = common.load(options)
        program = segment(model, route="packed")
        assert isinstance(program, PackedProgram)
        ids = random_ids(model, options.tokens, seed=options.seed)
        launch = dispatch(program, ids, options.repeats)
        policies = options.policies.split(",")
        paused = {policy: pauses(program, ids, options.repeats, policy) for policy in policies}
        leave = leaving(program, ids, options.repeats)
        print(f"{title}, {options.tokens} tokens, {len(launch['rows'])} segments")
        common.print_table(
            ("host time", "us", "target"),
            [
                ("launch beyond its functions, median", f"{launch['median_us']:.1f}", f"<= {DISPATCH_US:g}"),
                ("launch beyond its functions, p90 of the segments", f"{launch['p90_us']:.1f}", ""),
                *(
                    row
                    for policy, pause in paused.items()
                    for row in (
                        (f"pause and resume, {policy}", f"{pause['host_us']:.1f}", f"<= {PAUSE_US:g}"),
                        (f"its decisions, {policy}", f"{pause['decisions_us']:.1f}", ""),
                    )
                ),
                ("leaving the loop and coming back, median", f"{statistics.median(leave):.1f}", ""),
            ],
        )
        if launch["median_us"] > DISPATCH_US:
            common.report_missed(f"a launch costs {launch['median_us']:.1f} us, not {DISPATCH_US:g}")
        for policy, pause in paused.items():
            if pause["host_us"] > PAUSE_US:
                common.report_missed(f"{policy}: a pause costs {pause['host_us']:.1f} us, not {PAUSE_US:g}")
        plot(launch, title, options)
        content = {"benchmark": "dispatch", "model": title, "tokens": options.tokens, "launch": launch}
        content |= {"pause": paused, "leave_us": common.spread(Spread.of(leave))}
        common.write_json(
            options.output / "dispatch.json", {**content, "machine": common.machine(model.device)}
        )


if __name__ == "__main__":
    main()

"""The demonstration for people: progress while it runs, then the tables, and the timeline's two files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fpcompile.cli.demo import check_output, run_demo
from fpcompile.cli.demo_values import DemoOptions, DemoResult, Outcome, PolicyRun
from fpcompile.cli.interleave import Spread, busy_note
from fpcompile.engine.timeline import draw_timeline, write_chrome_trace

__all__ = ["demo_json", "show_demo"]

_TRACE, _PICTURE = "timeline.json", "timeline.png"
_NONE = "–"


def show_demo(options: DemoOptions) -> DemoResult:
    """Run the demonstration, print its tables and write ``timeline.json`` and ``timeline.png``."""
    check_output(options.output)
    console = Console()
    busy = busy_note()
    with _progress(console) as stages:
        result = run_demo(options, stages)
        with stages("draw", 1) as advance:
            paths = write_timeline(result, options.output)
            advance()
    heading = Text(f"\n{result.title}: {result.segments} segments", "bold")
    console.print(heading, _requests(result), _summary(result), _findings(result), sep="\n")
    if busy:
        console.print(busy, style="yellow", highlight=False)
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return result


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """A function that opens a stage: one line with a bar and the elapsed time for each."""
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description:24}"),
        BarColumn(bar_width=32),
        TimeElapsedColumn(),
    )
    # Drawn rarely: the bars must not take the processor from what is measured.
    with Progress(*columns, console=console, refresh_per_second=4) as progress:

        @contextlib.contextmanager
        def stage(title: str, steps: int) -> Iterator[Callable[[], object]]:
            task = progress.add_task(title, total=steps)
            yield lambda: progress.advance(task)
            progress.update(task, completed=steps)

        yield stage


def _requests(result: DemoResult) -> Table:
    """A line per request; TTFT under each policy against the SLO, and whether the bits are the model's."""
    table = Table()
    for name in ("request", "tokens", "arrives", "TTFT SLO"):
        table.add_column(name, justify="left" if name == "request" else "right")
    for run in result.runs:
        table.add_column(f"TTFT, {run.policy}", justify="right")
    table.add_column("bits")
    for index, prompt in enumerate(result.prompts):
        outcomes = [run.outcomes[index] for run in result.runs]
        table.add_row(
            prompt.name,
            str(prompt.ids.shape[1]),
            _seconds(prompt.offset),
            _seconds(prompt.slo),
            *(_ttft(outcome) for outcome in outcomes),
            _verdict(outcomes),
        )
    return table


def _summary(result: DemoResult) -> Table:
    """What follows from the requests, a column per policy."""
    table = Table()
    table.add_column("")
    for run in result.runs:
        table.add_column(run.policy, justify="right")

    def row(label: str, value: Callable[[PolicyRun], str]) -> None:
        table.add_row(label, *(value(run) for run in result.runs))

    row("SLO met", lambda run: f"{sum(o.met for o in run.outcomes)} of {len(run.outcomes)}")
    row("TTFT of the urgent ones, median", lambda run: _middle([o.ttft for o in run.urgent]))
    row("their wait before they start, median", lambda run: _middle([o.waited for o in run.urgent]))
    row("preemptions", lambda run: str(sum(o.preemptions for o in run.outcomes)))
    row("blocking time, median", lambda run: _middle(run.blocking))
    row("blocking time, max", lambda run: _seconds(max(run.blocking)) if run.blocking else _NONE)
    first = result.runs[0].long.ttft
    row("slowdown of the long one", lambda run: f"× {run.long.ttft / first:.2f}")
    row("the same without its pauses", lambda run: f"× {(run.long.ttft - run.long.suspended) / first:.2f}")
    return table


def _findings(result: DemoResult) -> Table:
    """What does not depend on a policy, as lines of a grid: the cost of being segmented, and the bits."""
    grid = Table.grid(padding=(0, 2))
    results = sum(len(run.outcomes) for run in result.runs)
    compared = result.runs[0].long.bits.compared
    scope = "logits, keys, values" if len(compared) > 1 else "logits"
    yes = Text(f"yes ({scope} of {results} results)", "bold green")
    grid.add_row("compiled in", _seconds(result.compile_seconds))
    grid.add_row(f"segmented / unmodified, {result.versus_tokens} tokens", _ratio(result.versus))
    grid.add_row("unmodified / itself (the noise)", _ratio(result.control))
    grid.add_row(
        Text("bits equal to the unmodified model", "bold"),
        yes if result.bits_equal else Text("NO: see the column above", "bold red"),
    )
    return grid


def _ratio(spread: Spread) -> str:
    """Median time ratio of the rounds, with the quartiles."""
    return f"× {spread.median:.3f}  ({spread.q1:.3f} to {spread.q3:.3f}, {spread.count} rounds)"


def _ttft(outcome: Outcome) -> Text:
    sign, style = ("✓", "green") if outcome.met else ("✗", "red")
    return Text(f"{_seconds(outcome.ttft)} {sign}", style)


def _verdict(outcomes: Sequence[Outcome]) -> Text:
    worst = max(outcomes, key=lambda o: (not o.bits.equal, o.bits.difference))
    if worst.bits.equal:
        return Text("equal", "green")
    return Text(f"DIFFER by {worst.bits.difference:.2g}", "bold red")


def _middle(values: Sequence[float]) -> str:
    return _seconds(statistics.median(values)) if values else _NONE


def _seconds(value: float) -> str:
    """``1.23 s`` or ``45.6 ms``."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def write_timeline(result: DemoResult, folder: Path) -> tuple[Path, Path]:
    """Write the trace for Perfetto, with the demonstration's figures as ``otherData``, and the picture."""
    trace, picture = folder / _TRACE, folder / _PICTURE
    spans = {run.policy: run.spans for run in result.runs}
    marks = {run.policy: run.marks for run in result.runs}
    write_chrome_trace(trace, spans, marks)
    content = json.loads(trace.read_text(encoding="utf-8"))
    content["otherData"] = demo_json(result)
    trace.write_text(json.dumps(content), encoding="utf-8")
    draw_timeline(picture, spans, result.slos(), marks=marks)
    return trace, picture


def demo_json(result: DemoResult) -> dict[str, Any]:
    """The figures of the tables as plain data; seconds."""
    return {
        "model": result.title,
        "segments": result.segments,
        "compile_seconds": result.compile_seconds,
        "requests": [
            {
                "name": p.name,
                "tokens": p.ids.shape[1],
                "arrival": p.offset,
                "ttft_slo": p.slo,
                "alone": p.alone,
            }
            for p in result.prompts
        ],
        "policies": [
            {
                "policy": run.policy,
                "blocking": list(run.blocking),
                "requests": [dataclasses.asdict(outcome) for outcome in run.outcomes],
            }
            for run in result.runs
        ],
        "long_slowdown": result.slowdown,
        "segmented_over_unmodified": {"tokens": result.versus_tokens, **dataclasses.asdict(result.versus)},
        "unmodified_over_itself": dataclasses.asdict(result.control),
        "bits_equal": result.bits_equal,
    }

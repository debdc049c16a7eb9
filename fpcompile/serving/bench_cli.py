"""``fpcompile bench goodput`` and ``fpcompile replay``: the command line over the benchmarks.

``app`` is mounted as ``fpcompile bench``, ``replay`` as a command of the main application. The types of the
options, with their help, are in :mod:`fpcompile.serving.bench_options`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fpcompile.errors import FpcompileError, UsageError
from fpcompile.serving import bench_options as o
from fpcompile.serving.bench_compare import comparison_markdown
from fpcompile.serving.bench_goodput import DEFAULT_POLICIES, run_bench_goodput
from fpcompile.serving.bench_markdown import markdown_of
from fpcompile.serving.bench_options import Outputs, Simulated, parse_numbers, parse_policies, parse_slos
from fpcompile.serving.bench_report import table_of

__all__ = ["app", "message_and_exit", "progress_bar", "replay"]

MEASURED_POLICIES = ("s-edf", "fpcompile")
"""What ``--real`` measures by default; it takes every policy but those that stop at layers."""

app = typer.Typer(help="Benchmarks.", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Benchmarks."""


@app.command()
def goodput(
    trace: o.Trace = None,
    policies: o.Policies = None,
    simulate: o.Simulate = True,
    costs: o.Costs = None,
    rates: o.Rates = None,
    slo_scale: o.SloScale = "1",
    slo_rate: o.SloRate = None,
    slo: o.Slos = None,
    seeds: o.Seeds = None,
    num_prompts: o.NumPrompts = None,
    burstiness: o.Burstiness = 1.0,
    replicas: o.Replicas = 1,
    router: o.Router = "least-work",
    max_queue_s: o.MaxQueue = None,
    kv_blocks: o.KvBlocks = None,
    check_us: o.CheckUs = None,
    sync_us: o.SyncUs = None,
    bound: o.Bound = False,
    jobs: o.Jobs = 1,
    json_file: o.JsonFile = None,
    markdown: o.Markdown = None,
    plots: o.Plots = None,
    plot_prefix: o.PlotPrefix = "goodput",
    plot_policies: o.PlotPolicies = "",
    model: o.Model = None,
    length_scale: o.LengthScale = 1 / 16,
    minutes: o.Minutes = 8.0,
) -> None:
    """Attainment and goodput of scheduling policies on a trace."""
    simulated = Simulated(
        costs, slo_scale, slo_rate, tuple(slo or ()), burstiness, replicas, router, check_us, sync_us, bound,
        jobs, plots, plot_policies,
    )  # fmt: skip
    with message_and_exit():
        outputs = Outputs(json_file, markdown, plots, plot_prefix, tuple(parse_policies(plot_policies)))
        common: dict[str, Any] = {
            "rates": None if rates is None else parse_numbers(rates),
            "num_prompts": num_prompts,
            "seeds": seeds,
            "options": _given(max_queue_s=max_queue_s, kv_blocks=kv_blocks),
        }
        if simulate:
            _simulate(trace, _policies(policies, DEFAULT_POLICIES), simulated, outputs, common)
        else:
            simulated.refuse()
            common |= {"model": model, "length_scale": length_scale, "minutes": minutes}
            _measure(trace, _policies(policies, MEASURED_POLICIES), outputs, common)


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _policies(text: str | None, default: tuple[str, ...]) -> list[str]:
    return list(default) if text is None else parse_policies(text)


def _simulate(
    trace: Path | None, policies: list[str], asked: Simulated, outputs: Outputs, common: dict[str, Any]
) -> None:
    """Simulate, write, show."""
    if trace is not None and asked.burstiness != 1:
        raise UsageError("a trace has its own arrivals", expected="--trace or --burstiness", got="both")
    outputs.check(policies)
    with progress_bar("simulating") as progress:
        report = run_bench_goodput(
            trace,
            policies,
            costs=asked.costs,
            slo_scales=parse_numbers(asked.slo_scale),
            slo_rate=asked.slo_rate,
            slos=parse_slos(asked.slo),
            burstiness=asked.burstiness,
            replicas=asked.replicas,
            router=asked.router,
            jobs=asked.jobs,
            check_us=asked.check_us,
            sync_us=asked.sync_us,
            bound=asked.bound,
            progress=progress,
            json_path=outputs.json,
            **_given(**common),
        )
    written = outputs.write(report, markdown_of(report))
    console = Console()
    console.print(table_of(report))
    if "bound" in report:
        limit = report["bound"]
        console.print(
            f"no scheduler exceeds {limit['max_goodput']:.2f} req/s "
            f"(paper goodput {limit['paper_goodput']:.2f}) on this grid, mean of {len(limit['seeds'])} seeds"
        )
    _tell(written)


def _measure(trace: Path | None, policies: list[str], outputs: Outputs, common: dict[str, Any]) -> None:
    """Measure on a real engine, write, show."""
    outputs.check(policies)
    from fpcompile.serving.bench_real import run_bench_real  # late, because it needs torch

    with progress_bar("measuring") as progress:
        report = run_bench_real(
            trace, policies, progress=progress, json_path=outputs.json, **_given(**common)
        )
    text = comparison_markdown(report)
    written = outputs.write(report, text)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    _tell(written)


def _tell(written: list[Path]) -> None:
    for path in written:
        Console().print(f"wrote {path}")


@contextmanager
def message_and_exit() -> Iterator[None]:
    """Typed errors become a message and exit code 2, not a traceback."""
    try:
        yield
    except FpcompileError as error:
        Console(stderr=True).print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, and the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def replay(
    log: Annotated[Path, typer.Argument(help="Log of an engine or simulator.")],
    policy: Annotated[str | None, typer.Option(help="Another policy; else check the recorded one.")] = None,
    rate_scale: Annotated[float, typer.Option(help="Gaps between arrivals are divided by this.")] = 1.0,
    costs: o.Costs = None,
    max_queue_s: Annotated[float | None, typer.Option(help="Another limit of waiting.")] = None,
    kv_blocks: Annotated[int | None, typer.Option(help="Another cache size, in blocks.")] = None,
) -> None:
    """What another policy, budget or load would have done with a recorded log.

    The blocking budget is the policy's: --policy fpcompile:budget_us=500.
    """
    from fpcompile.serving.replay import replay_table

    with message_and_exit():
        changes = _given(max_queue_s=max_queue_s, kv_blocks=kv_blocks)
        table, agrees = replay_table(log, policy, rate_scale, costs, **changes)
    Console().print(table)
    if not agrees:
        raise typer.Exit(1)

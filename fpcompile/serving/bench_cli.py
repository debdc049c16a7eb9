"""``fpcompile bench goodput`` and ``fpcompile replay``: the command line over the benchmarks.

``app`` is mounted as ``fpcompile bench``, ``replay`` as a command of the main application. Flags that
`vllm bench serve` has too have its names (``--request-rate``, ``--num-prompts``, ``--burstiness``).
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
from fpcompile.serving.bench_compare import comparison_markdown
from fpcompile.serving.bench_goodput import DEFAULT_POLICIES, check_folder, run_bench_goodput
from fpcompile.serving.bench_markdown import markdown_of
from fpcompile.serving.bench_report import save_plots, table_of

__all__ = ["app", "message_and_exit", "parse_numbers", "parse_slos", "progress_bar", "replay"]

MEASURED_POLICIES = ("s-edf", "fpcompile")
"""What ``--real`` measures by default; it takes every policy but those that stop at layers."""

app = typer.Typer(help="Benchmarks.", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Benchmarks."""


def parse_numbers(text: str) -> list[float]:
    """``1,2,4`` or ``START:STOP:STEP`` (both ends included) as numbers."""
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            if step <= 0:
                raise ValueError("step <= 0")
            return [round(start + i * step, 9) for i in range(int((stop - start) / step + 1e-9) + 1)]
        return [float(part) for part in text.split(",") if part.strip()]
    except (ValueError, OverflowError) as error:
        raise UsageError("cannot read the numbers", expected="1,2,4 or START:STOP:STEP", got=text) from error


def parse_policies(text: str) -> list[str]:
    """Policy specs separated by ``;``, or by ``,``: then numbers and ``option=value`` go with the one before.

    ``fcfs,vllm:2048,512,fpcompile`` are three; the order in ``chunked:512,edf;fcfs`` needs the ``;``.
    """
    if ";" in text:
        return [part.strip() for part in text.split(";") if part.strip()]
    found: list[str] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        if found and (part[0].isdigit() or ("=" in part and ":" not in part)):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def parse_slos(pairs: list[str]) -> dict[str, float]:
    """``CLASS=SECONDS`` pairs."""
    slos = {}
    for pair in pairs:
        klass, _, seconds = pair.partition("=")
        try:
            slos[klass] = float(seconds)
        except ValueError as error:
            raise UsageError("cannot read the SLO", expected="CLASS=SECONDS", got=pair) from error
        if not slos[klass] > 0:
            raise UsageError("an SLO must be positive", expected="seconds > 0", got=pair)
    return slos


@app.command()
def goodput(
    trace: Annotated[Path | None, typer.Option(help="Trace file; without one, synthetic traffic.")] = None,
    policies: Annotated[
        str | None, typer.Option(help="Policies, separated by ',' (or ';', needed for chunked:512,edf).")
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate/--real", help="Simulate on costs, or measure.")
    ] = True,
    costs: Annotated[Path | None, typer.Option(help="Costs file; else the profile llama3-8b-a800.")] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            "--rates", "--request-rate", help="Requests/s: 1,2,4 or START:STOP:STEP; else by capacity."
        ),
    ] = None,
    slo_scale: Annotated[str, typer.Option(help="SLO scales, measured at --slo-rate.")] = "1",
    slo_rate: Annotated[
        float | None, typer.Option(help="Rate for the SLO scales; else 0.8 x capacity.")
    ] = None,
    slo: Annotated[
        list[str] | None, typer.Option(help="CLASS=SECONDS, may be repeated; else FlowPrefill's table.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Number of seeds; else 5, or 1 with --real.")
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(min=2, help="Requests per run, the trace is tiled; else 3000, or by --minutes."),
    ] = None,
    burstiness: Annotated[float, typer.Option(help="Of synthetic arrivals; 1: Poisson.")] = 1.0,
    replicas: Annotated[int, typer.Option(min=1, help="Devices behind a router.")] = 1,
    router: Annotated[str, typer.Option(help="round-robin or least-work.")] = "least-work",
    max_queue_s: Annotated[float | None, typer.Option(help="Reject what has waited so long.")] = None,
    kv_blocks: Annotated[int | None, typer.Option(help="Cache size in blocks of 16 tokens.")] = None,
    check_us: Annotated[
        float | None, typer.Option(help="Cost of a stop point, instead of the table's.")
    ] = None,
    sync_us: Annotated[float | None, typer.Option(help="Cost of a synchronisation there.")] = None,
    bound: Annotated[bool, typer.Option("--bound", help="Add the bound on any scheduler (slow).")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write tables in Markdown here.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write pictures into this folder.")] = None,
    plot_prefix: Annotated[str, typer.Option(help="First part of the pictures' names.")] = "goodput",
    plot_policies: Annotated[str, typer.Option(help="Policies in the pictures; else all.")] = "",
    model: Annotated[
        str | None, typer.Option(help="With --real: a model's folder; else a Qwen3 of 30M.")
    ] = None,
    length_scale: Annotated[
        float, typer.Option(help="With --real: scales prompts; the tokens in policies stay.")
    ] = 1 / 16,
    minutes: Annotated[float, typer.Option(help="With --real: ends within about this.")] = 8.0,
) -> None:
    """Attainment and goodput of scheduling policies on a trace."""
    limits = {"max_queue_s": max_queue_s, "kv_blocks": kv_blocks}
    given = {name: value for name, value in limits.items() if value is not None}
    if not simulate:
        simulated_only = {
            "--costs": costs, "--slo": slo, "--check-us": check_us, "--sync-us": sync_us,
            "--bound": bound, "--slo-rate": slo_rate, "--plots": plots,
            "--slo-scale": slo_scale != "1", "--replicas": replicas > 1, "--jobs": jobs > 1,
            "--burstiness": burstiness != 1,
        }  # fmt: skip
        with message_and_exit(), progress_bar("measuring") as progress:
            if unfit := [name for name, value in simulated_only.items() if value]:
                raise UsageError("an option of simulations only", expected="--simulate", got=unfit[0])
            check_folder(json_file, markdown)
            report = _measure(
                trace,
                parse_policies(policies) if policies else list(MEASURED_POLICIES),
                model=model,
                rates=parse_numbers(rates) if rates else None,
                length_scale=length_scale,
                minutes=minutes,
                num_prompts=num_prompts,
                seeds=seeds or 1,
                options=given,
                progress=progress,
                json_path=json_file,
            )
        text = comparison_markdown(report)
        written = [json_file] if json_file is not None else []
        if markdown is not None:
            markdown.write_text(text, encoding="utf-8")
            written.append(markdown)
        Console().print(text, markup=False, highlight=False, soft_wrap=True)
        for path in written:
            Console().print(f"wrote {path}")
        return
    with message_and_exit(), progress_bar("simulating") as progress:
        if trace is not None and burstiness != 1:
            raise UsageError("a trace has its own arrivals", expected="--trace or --burstiness", got="both")
        check_folder(markdown)
        report = run_bench_goodput(
            trace,
            parse_policies(policies) if policies else list(DEFAULT_POLICIES),
            costs=costs,
            rates=parse_numbers(rates) if rates else None,
            slo_scales=parse_numbers(slo_scale),
            slo_rate=slo_rate,
            slos=parse_slos(slo or []),
            seeds=seeds or 5,
            num_prompts=num_prompts or 3000,
            burstiness=burstiness,
            replicas=replicas,
            router=router,
            jobs=jobs,
            options=given,
            check_us=check_us,
            sync_us=sync_us,
            bound=bound,
            progress=progress,
            json_path=json_file,
        )
    written = [json_file] if json_file is not None else []
    if markdown is not None:
        markdown.write_text(markdown_of(report), encoding="utf-8")
        written.append(markdown)
    if plots is not None:
        written += save_plots(report, plots, plot_prefix, parse_policies(plot_policies))
    _show(report, written)


def _measure(trace: Path | None, policies: list[str], **options: Any) -> dict[str, Any]:
    """The measurement; imported late, because it needs torch."""
    from fpcompile.serving.bench_real import run_bench_real

    return run_bench_real(trace, policies, **options)


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


def _show(report: dict[str, Any], written: list[Path]) -> None:
    console = Console()
    console.print(table_of(report))
    if "bound" in report:
        bound = report["bound"]
        console.print(
            f"no scheduler exceeds {bound['max_goodput']:.2f} req/s "
            f"(paper goodput {bound['paper_goodput']:.2f}) on this grid, mean of {len(bound['seeds'])} seeds"
        )
    for path in written:
        console.print(f"wrote {path}")


def replay(
    log: Annotated[Path, typer.Argument(help="Log of an engine or simulator.")],
    policy: Annotated[str | None, typer.Option(help="Another policy; else check the recorded one.")] = None,
    rate_scale: Annotated[float, typer.Option(help="Gaps between arrivals are divided by this.")] = 1.0,
    costs: Annotated[Path | None, typer.Option(help="Costs file; else the profile llama3-8b-a800.")] = None,
    max_queue_s: Annotated[float | None, typer.Option(help="Another limit of waiting.")] = None,
    kv_blocks: Annotated[int | None, typer.Option(help="Another cache size, in blocks.")] = None,
) -> None:
    """What another policy, budget or load would have done with a recorded log.

    The blocking budget is the policy's: --policy fpcompile:budget_us=500.
    """
    from fpcompile.serving.replay import replay_table

    with message_and_exit():
        changes = {"max_queue_s": max_queue_s, "kv_blocks": kv_blocks}
        given = {name: value for name, value in changes.items() if value is not None}
        table, agrees = replay_table(log, policy, rate_scale, costs, **given)
    Console().print(table)
    if not agrees:
        raise typer.Exit(1)

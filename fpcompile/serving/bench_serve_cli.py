"""``fpcompile bench serve``: options, and a table of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fpcompile.errors import UsageError
from fpcompile.serving.bench_cli import app, message_and_exit, progress_bar
from fpcompile.serving.bench_options import parse_numbers

__all__ = ["app", "parse_goodput", "parse_slos", "serve"]


def parse_slos(pairs: list[str]) -> dict[str, tuple[float, float | None]]:
    """``CLASS=TTFT`` or ``CLASS=TTFT:TBT`` in seconds."""
    found = {}
    for pair in pairs:
        klass, _, text = pair.partition("=")
        try:
            ttft, *tbt = (float(part) for part in text.split(":"))
            if len(tbt) > 1 or not all(value > 0 for value in (ttft, *tbt)):
                raise ValueError(pair)
        except ValueError as error:
            raise UsageError(
                "cannot read the SLO", expected="CLASS=TTFT[:TBT], seconds > 0", got=pair
            ) from error
        found[klass] = (ttft, tbt[0] if tbt else None)
    return found


def parse_goodput(pairs: list[str]) -> dict[str, tuple[float, float | None]]:
    """``ttft:200 tpot:50`` in milliseconds, as `vllm bench serve --goodput` has it, for all classes."""
    known = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        try:
            known[name] = float(text) / 1e3
            if not known[name] > 0:
                raise ValueError(text)
        except ValueError as error:
            raise UsageError(
                "cannot read the goodput", expected="ttft:MS or tpot:MS, milliseconds > 0", got=pair
            ) from error
    if unknown := set(known) - {"ttft", "tpot"}:
        raise UsageError("unknown metric of goodput", expected="ttft, tpot", got=sorted(unknown)[0])
    return {"": (known.get("ttft", float("inf")), known.get("tpot"))} if known else {}


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="Name of the model on the server.")],
    base_url: Annotated[str, typer.Option(help="Of the server, without /v1.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Key for the server.")] = "none",
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    prompts: Annotated[str, typer.Option(help="ids (exact lengths) or text.")] = "ids",
    token_range: Annotated[str, typer.Option(help="Ids are drawn from LOW:HIGH.")] = "16:256",
    trace: Annotated[Path | None, typer.Option(help="Trace file; without one, synthetic traffic.")] = None,
    rates: Annotated[
        str, typer.Option("--rates", "--request-rate", help="Requests/s: 1,2,4, START:STOP:STEP or inf.")
    ] = "1",
    num_prompts: Annotated[int, typer.Option(min=2, help="Requests per run, the trace is tiled.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Runs at each rate.")] = 1,
    burstiness: Annotated[float, typer.Option(help="Of synthetic arrivals; 1: Poisson.")] = 1.0,
    length_scale: Annotated[float, typer.Option(help="Scales prompts.")] = 1.0,
    max_input: Annotated[int | None, typer.Option(min=1, help="Cuts prompts, tokens.")] = None,
    output_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of answers; else the trace's.")
    ] = None,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Others wait in the client.")] = None,
    slo: Annotated[
        list[str] | None, typer.Option(help="CLASS=TTFT[:TBT], seconds; else FlowPrefill's table.")
    ] = None,
    goodput: Annotated[
        list[str] | None, typer.Option(help="ttft:MS or tpot:MS for all classes, may be repeated.")
    ] = None,
    slo_scale: Annotated[float, typer.Option(help="Scales all SLOs.")] = 1.0,
    tell_slo: Annotated[
        bool, typer.Option("--tell-slo", help="Send the SLOs along: x-slo-ttft-ms and tbt_slo.")
    ] = False,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Answers go on to their length, where the server knows the field."),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
) -> None:
    """Goodput, attainment and latencies of a running OpenAI-compatible server, open loop."""
    with message_and_exit(), progress_bar("measuring") as progress:
        try:
            from fpcompile.serving.bench_client import Endpoint
            from fpcompile.serving.bench_serve import Load, Slo, run_bench_serve
        except ImportError as error:
            raise UsageError(
                "the client's packages are not installed",
                got=str(error),
                remedy="pip install 'fpcompile[serve]'",
            ) from error

        if endpoint not in ("completions", "chat") or prompts not in ("ids", "text"):
            raise UsageError(
                "unknown form", expected="completions or chat, ids or text", got=f"{endpoint}, {prompts}"
            )
        low, _, high = token_range.partition(":")
        if not (low.isdecimal() and high.isdecimal() and int(low) < int(high)):
            raise UsageError("cannot read the range", expected="LOW:HIGH", got=token_range)
        given = {**parse_goodput(goodput or []), **parse_slos(slo or [])}
        report = run_bench_serve(
            Endpoint(
                base_url.rstrip("/"), model, cast(Literal["completions", "chat"], endpoint),
                cast(Literal["ids", "text"], prompts), (int(low), int(high)), tell_slo, api_key,
                ignore_eos=ignore_eos,
            ),
            Load(
                trace=trace, rates=tuple(parse_numbers(rates)), num_prompts=num_prompts, seeds=seeds,
                burstiness=burstiness, length_scale=length_scale, max_input=max_input, output_len=output_len,
                max_concurrency=max_concurrency, slo_scale=slo_scale,
                slos={klass: Slo(ttft, tbt) for klass, (ttft, tbt) in given.items()},
            ),
            progress=progress,
            json_path=json_file,
        )  # fmt: skip
    console = Console()
    console.width = max(console.width, 110)
    console.print(_table(report))
    if json_file is not None:
        console.print(f"wrote {json_file}")


def _table(report: dict[str, Any]) -> Table:
    (entry,) = report["policies"].values()
    table = Table(
        title=f"{report['model_id']}: goodput {entry['max_goodput']:.3g} req/s, paper goodput "
        f"{entry['paper_goodput']:.3g} req/s; 1 / mean time alone: {report['capacity']:.3g}. Times in ms",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    heads = (
        "req/s",
        "worst %",
        "all %",
        "good/s",
        "tok/s",
        "failed",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "late",
    )
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for point in entry["points"]:
        table.add_row(
            f"{point['rate']:g}", f"{100 * point['worst']:.1f}", f"{100 * point['overall']:.1f}",
            f"{point['request_goodput']:.2f}", f"{point['output_throughput']:.1f}", str(point["failed"]),
            *(_number(point[name]) for name in ("p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms")),
            f"{1e3 * point['latest_sending_s']:.1f}",
        )  # fmt: skip
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

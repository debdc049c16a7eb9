"""The commands and their options. What they do is in modules of their own, imported when they run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fpcompile.cli.guard import quiet, remedied
from fpcompile.serving import bench_cli, bench_serve_cli
from fpcompile.serving.coverage import coverage
from fpcompile.serving.server.command import serve

__all__ = ["app", "main"]

app = typer.Typer(
    name="fpcompile",
    help="Compile Hugging Face models into preemptible operator segments.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_MODEL_HELP = "qwen3-110m, qwen2-0.5b, qwen3-0.6b, tiny:ARCH (tiny:llama), a local folder, or a hub id."


def _version(wanted: bool) -> None:
    if wanted:
        from fpcompile import __version__

        typer.echo(f"fpcompile {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile Hugging Face models into preemptible operator segments."""


@app.command()
def demo(
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = "qwen3-110m",
    long_tokens: Annotated[int, typer.Option(min=1, help="Length of the long prompt.")] = 4096,
    urgent_tokens: Annotated[int, typer.Option(min=1, help="Length of each urgent prompt.")] = 64,
    policy: Annotated[str, typer.Option(help="Policy to compare with fcfs.")] = "s-edf",
    granularity: Annotated[str, typer.Option(help="operator, layer, model or auto.")] = "operator",
    max_blocking_ms: Annotated[
        float | None, typer.Option(help="Budget of a launch: tiles; bits may then differ from the model's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    urgent_slo: Annotated[
        float | None,
        typer.Option(help="TTFT SLO of the urgent ones in seconds; default: from the machine's speed."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for timeline.json and timeline.png.")] = Path("."),
) -> None:
    """An urgent request overtakes a long prefill, and no bit changes.

    A long prefill starts, urgent requests arrive during it: first under fcfs, then under the policy.
    """
    with quiet(), remedied():
        from fpcompile.cli.demo_values import DemoOptions
        from fpcompile.cli.report import show_demo

        result = show_demo(
            DemoOptions(
                model=model,
                long_tokens=long_tokens,
                urgent_tokens=urgent_tokens,
                policy=policy,
                granularity=granularity,
                max_blocking_ms=max_blocking_ms,
                device=device,
                output=output,
                urgent_slo=urgent_slo,
            )
        )
        if not result.bits_equal and max_blocking_ms is None:
            raise typer.Exit(1)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    tokens: Annotated[int, typer.Option(min=1, help="Length at which the formulas are evaluated.")] = 2048,
    granularity: Annotated[str, typer.Option(help="operator, layer, model or auto.")] = "operator",
    max_blocking_ms: Annotated[
        float | None, typer.Option(help="Budget of a launch, for granularity auto.")
    ] = None,
) -> None:
    """Print the plan of a model: every segment, its work, its live bytes, the reason for its cut.

    Weights are not loaded, and not downloaded.
    """
    with quiet(), remedied():
        from fpcompile.api import segment
        from fpcompile.cli.load import load_shape

        program = segment(
            load_shape(model), granularity=granularity, max_blocking_ms=max_blocking_ms, verify=False
        )
        typer.echo(program.explain(tokens=tokens))


def _mount(name: str, function: Callable[..., None]) -> None:
    """A command that the serving layer brings, with its errors in one line."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        with quiet(), remedied():
            function(*args, **kwargs)

    app.command(name)(command)


app.add_typer(bench_serve_cli.app, name="bench")  # of bench_cli, with the command that it adds
app.command("replay")(bench_cli.replay)
_mount("coverage", coverage)
_mount("serve", serve)


def main() -> None:
    """Entry point of the ``fpcompile`` command."""
    app()

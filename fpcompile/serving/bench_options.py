"""The options of ``fpcompile bench goodput`` as data: their types, how they are read, where a report goes.

Words
    *spec*     a policy with its arguments, as :func:`fpcompile.scheduler.make_policy` reads it.
    *outputs*  the files of a report. They are checked before anything is measured, for a run takes minutes.

Flags that `vllm bench serve` has too have its names (``--request-rate``, ``--num-prompts``,
``--burstiness``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fpcompile.errors import UnknownNameError, UsageError
from fpcompile.serving.bench_goodput import check_folder
from fpcompile.serving.bench_report import save_plots

__all__ = ["Outputs", "Simulated", "parse_numbers", "parse_policies", "parse_slos"]

Trace = Annotated[Path | None, typer.Option(help="Trace file; without one, synthetic traffic.")]
Policies = Annotated[
    str | None, typer.Option(help="Policies, separated by ',' (or ';', needed for chunked:512,edf).")
]
Simulate = Annotated[bool, typer.Option("--simulate/--real", help="Simulate on costs, or measure.")]
Costs = Annotated[Path | None, typer.Option(help="Costs file; else the profile llama3-8b-a800.")]
Rates = Annotated[
    str | None,
    typer.Option("--rates", "--request-rate", help="Requests/s: 1,2,4 or START:STOP:STEP; else by capacity."),
]
SloScale = Annotated[str, typer.Option(help="SLO scales, measured at --slo-rate.")]
SloRate = Annotated[float | None, typer.Option(help="Rate for the SLO scales; else 0.8 x capacity.")]
Slos = Annotated[
    list[str] | None, typer.Option(help="CLASS=SECONDS, may be repeated; else FlowPrefill's table.")
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Number of seeds; else 5, or 1 with --real.")]
NumPrompts = Annotated[
    int | None, typer.Option(min=2, help="Requests per run, the trace is tiled; else 3000, or by --minutes.")
]
Burstiness = Annotated[float, typer.Option(help="Of synthetic arrivals; 1: Poisson.")]
Replicas = Annotated[int, typer.Option(min=1, help="Devices behind a router.")]
Router = Annotated[str, typer.Option(help="round-robin or least-work.")]
MaxQueue = Annotated[float | None, typer.Option(help="Reject what has waited so long.")]
KvBlocks = Annotated[int | None, typer.Option(help="Cache size in blocks of 16 tokens.")]
CheckUs = Annotated[float | None, typer.Option(help="Cost of a stop point, instead of the table's.")]
SyncUs = Annotated[float | None, typer.Option(help="Cost of a synchronisation there.")]
Bound = Annotated[bool, typer.Option("--bound", help="Add the bound on any scheduler (slow).")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report here.")]
Markdown = Annotated[Path | None, typer.Option(help="Write tables in Markdown here.")]
Plots = Annotated[Path | None, typer.Option(help="Write pictures into this folder.")]
PlotPrefix = Annotated[str, typer.Option(help="First part of the pictures' names.")]
PlotPolicies = Annotated[str, typer.Option(help="Policies in the pictures; else all.")]
Model = Annotated[str | None, typer.Option(help="With --real: a model's folder; else a Qwen3 of 30M.")]
LengthScale = Annotated[float, typer.Option(help="With --real: scales prompts; the tokens in policies stay.")]
Minutes = Annotated[float, typer.Option(help="With --real: ends within about this.")]


def parse_numbers(text: str) -> list[float]:
    """``1,2,4`` or ``START:STOP:STEP`` (both ends included) as numbers, at least one."""
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            if step <= 0 or stop < start:
                raise ValueError("no number on the way")
            found = [round(start + i * step, 9) for i in range(int((stop - start) / step + 1e-9) + 1)]
        else:
            found = [float(part) for part in text.split(",") if part.strip()]
        if not found:
            raise ValueError("none at all")
    except (ValueError, OverflowError) as error:
        raise UsageError(
            "cannot read the numbers", expected="1,2,4 or START:STOP:STEP", got=repr(text)
        ) from error
    return found


def parse_policies(text: str) -> list[str]:
    """Policy specs separated by ``;``, or by ``,``: then numbers and ``option=value`` go with the one before.

    ``fcfs,vllm:2048,512,fpcompile`` are three; the order in ``chunked:512,edf;fcfs`` needs the ``;``.
    """
    if ";" in text:
        return list(dict.fromkeys(part.strip() for part in text.split(";") if part.strip()))
    found: list[str] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        if found and (part[0].isdigit() or ("=" in part and ":" not in part)):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return list(dict.fromkeys(found))


def parse_slos(pairs: Sequence[str]) -> dict[str, float]:
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


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a report goes; None: nowhere. ``shown``: the policies in the pictures, none for all."""

    json: Path | None = None
    markdown: Path | None = None
    plots: Path | None = None
    prefix: str = "goodput"
    shown: tuple[str, ...] = ()

    def check(self, policies: Sequence[str]) -> None:
        """Raise :class:`UsageError` for what could not be written when ``policies`` have been measured."""
        check_folder(self.json, self.markdown)
        for name in self.shown:
            if name not in policies:
                raise UnknownNameError("policy in the pictures", name, known=policies)
        if self.plots is None:
            return
        try:
            self.plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                "the pictures cannot be written", expected="a folder", got=str(error), where=str(self.plots)
            ) from error

    def write(self, report: Mapping[str, Any], markdown: str) -> list[Path]:
        """Tables and pictures; the report as JSON was written when it was made. All the paths."""
        written = [self.json] if self.json is not None else []
        if self.markdown is not None:
            self.markdown.write_text(markdown, encoding="utf-8")
            written.append(self.markdown)
        if self.plots is not None:
            written += save_plots(dict(report), self.plots, self.prefix, self.shown)
        return written


@dataclass(frozen=True, slots=True)
class Simulated:
    """What only a simulation can be asked for, pictures included; the command line has the same defaults."""

    costs: Path | None = None
    slo_scale: str = "1"
    slo_rate: float | None = None
    slo: tuple[str, ...] = ()
    burstiness: float = 1.0
    replicas: int = 1
    router: str = "least-work"
    check_us: float | None = None
    sync_us: float | None = None
    bound: bool = False
    jobs: int = 1
    plots: Path | None = None
    plot_policies: str = ""

    def refuse(self) -> None:
        """Raise :class:`UsageError` for the first one that was given: a measurement has no use for it."""
        for name in self.__slots__:
            if getattr(self, name) != getattr(type(self)(), name):
                flag = "--" + name.replace("_", "-")
                raise UsageError("an option of simulations only", expected="--simulate", got=flag)

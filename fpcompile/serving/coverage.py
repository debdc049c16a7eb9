"""``fpcompile coverage``: which architectures segment, by which route, with what equality.

:func:`coverage` is mounted by the command line. Without arguments every causal LM of transformers'
mapping and every class of the tiny zoo is compiled at tiny size and compared with the unmodified model, and
``docs/coverage.md`` is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fpcompile.errors import InvalidInputError, UnknownNameError, UsageError
from fpcompile.serving.coverage_workers import SECONDS, run_rows

__all__ = ["coverage", "markdown_of"]

_GOOD = ("bits", "close")
_HEAD = ("architecture", "class", "route", "segments", "states", "equality", "compile s", "notes")


def coverage(
    archs: Annotated[list[str] | None, typer.Argument(help="model types or classes; default: all")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Architectures at a time, each in its own process.")] = 1,
    json_out: Annotated[bool, typer.Option("--json", help="Print the rows as JSON lines.")] = False,
    rows_file: Annotated[
        Path | None,
        typer.Option(
            "--rows", help="JSON lines to go on from and to add to; what is there is not run again."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one architecture.")] = SECONDS,
    output: Annotated[
        Path | None, typer.Option(help="Markdown file; docs/coverage.md when all are checked.")
    ] = None,
) -> None:
    """Compile architectures at tiny size, compare them with the unmodified model, write the table."""
    kept = _kept(rows_file)
    names = _names(archs or [])
    todo = names if archs else [n for n in names if n not in kept]
    target = output or (None if archs else Path("docs/coverage.md"))
    for path in (target, rows_file):
        _check_writable(path)
    made: list[dict[str, Any]] = []
    for row in _with_progress(todo, jobs, timeout, json_out):
        made.append(row)
        _announce(row, json_out, rows_file)
    rows = list({**kept, **{str(r["name"]): r for r in made}}.values())
    if target is not None:
        target.write_text(markdown_of(rows), encoding="utf-8")
    if not json_out:
        typer.echo(_summary(rows))
    if any(row.get("status") not in _GOOD for row in rows):
        raise typer.Exit(1)


def _names(wanted: Sequence[str]) -> list[str]:
    """What to check: all that can be built, or what was asked for."""
    from fpcompile.models.zoo import ANY_NAMES, CAUSAL_ARCHS, UNBUILDABLE

    known = [*(a for a in CAUSAL_ARCHS if a not in UNBUILDABLE), *ANY_NAMES]
    for name in wanted:
        if name not in known:
            raise UnknownNameError("architecture", name, known=known)
    return list(wanted) or known


def _with_progress(names: Sequence[str], jobs: int, timeout: float, quiet: bool) -> Any:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task("coverage", total=len(names))
        for row in run_rows(names, jobs=jobs, seconds=timeout):
            progress.update(task, advance=1, description=f"{row['name']}: {row['status']}")
            yield row


def _kept(path: Path | None) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run by name; the last one of a name counts."""
    if path is None or not path.exists():
        return {}
    kept: dict[str, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError("cannot read the rows", got=str(error), where=str(path)) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            kept[str(row["name"])] = row
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(
                "a row of an earlier run cannot be read",
                expected="a JSON line that `fpcompile coverage --rows` wrote",
                got=line[:80],
                where=f"{path}, line {number}",
                remedy="remove that line: its architecture is then run again",
            ) from error
    return kept


def _check_writable(path: Path | None) -> None:
    """Make the folder, and raise :class:`UsageError` if that cannot be: before hours are spent, not after."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UsageError("the file cannot be written", got=str(error), where=str(path)) from error


def _announce(row: dict[str, Any], json_out: bool, path: Path | None) -> None:
    line = json.dumps(row, sort_keys=True)
    if json_out:
        typer.echo(line)
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(str(r.get("status")) for r in rows)
    routes = Counter(str(r.get("route") or "none") for r in rows)
    failed = [f"{r['name']} ({r['status']})" for r in rows if r.get("status") not in _GOOD]
    lines = [
        f"{len(rows)} architectures: " + ", ".join(f"{n} {s}" for s, n in counts.most_common()),
        "routes: " + ", ".join(f"{n} {s}" for s, n in routes.most_common()),
    ]
    return "\n".join([*lines, "not equal: " + ", ".join(failed)] if failed else lines)


def markdown_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page: totals, what the words mean, one table for causal LMs and one for other classes."""
    parts = ["# Coverage", "", "Generated by `fpcompile coverage`; do not edit.", "", _LEGEND, ""]
    for family, title in (("causal", "Causal language models"), ("other", "Other classes")):
        chosen = sorted(
            (r for r in rows if r.get("family", "causal") == family), key=lambda r: str(r["name"])
        )
        if chosen:
            parts += [f"## {title}", "", *(f"- {line}" for line in _summary(chosen).splitlines()), ""]
            parts += [f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
            parts += [f"| {' | '.join(_cells(r))} |" for r in chosen] + [""]
    return "\n".join(parts)


_LEGEND = """Every model is a real transformers class at tiny size with random weights, on CPU.
*bits*: every check is bit-equal to the unmodified model: lengths 1, 2, 3, 15, 16, 17, 40 and 200, a batch of
four, padding on either side, preempted and resumed from a checkpoint at every cut, continuation of a cache
by the program and by the model, generation from the program's cache, bf16. A number is the largest
difference of any check relative to the largest logit: sequences that are padded in the model are packed
without padding by the packed route, so that other kernels round differently (and the model is then given the
positions that its `generate` gives to left-padded tokens). *Opaque* submodules are single operators inside
the program. Notes say why a model did not take the packed route."""


def _cells(row: Mapping[str, Any]) -> list[str]:
    errors: Mapping[str, float | None] = row.get("errors") or {}
    worst = max((e for e in errors.values() if e is not None), default=0.0)
    status = str(row.get("status"))
    equality = status if status not in ("close", "differs") else f"{worst:.1e}"
    if status == "close" and all(k.startswith("padded") for k, e in errors.items() if e):
        equality = f"bits, padded {worst:.1e}"
    notes = [f"**{k}**: {v}" for k, v in (row.get("failures") or {}).items()]
    notes += [f"differs: {k} {e:.1e}" for k, e in errors.items() if e is not None and e > 2e-6]
    if row.get("opaque"):
        notes.append("opaque: " + ", ".join(f"`{p}`" for p in _brief(row["opaque"])))
    notes += [str(row[k]) for k in ("why", "note") if row.get(k)]
    skipped = [k for k, e in errors.items() if e is None]
    if skipped:
        notes.append("the model itself refuses: " + ", ".join(skipped))
    cells = (row["name"], row.get("model", ""), row.get("route", ""), row.get("segments") or "")
    more = (", ".join(row.get("states") or ()), equality, f"{row.get('seconds') or 0:.1f}", "; ".join(notes))
    return [str(c).replace("|", "\\|").replace("\n", " ") for c in (*cells, *more)]


def _brief(paths: Sequence[str]) -> list[str]:
    """Paths with layer numbers replaced, each once."""
    return list(dict.fromkeys(".".join("*" if p.isdigit() else p for p in path.split(".")) for path in paths))

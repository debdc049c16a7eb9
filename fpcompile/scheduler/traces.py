"""Readers of request traces. A line that cannot be read raises :class:`TraceError` with file, line and field.

| format    | one request                                                                               |
|-----------|-------------------------------------------------------------------------------------------|
| `qwen`    | jsonl of Alibaba's QwenTrace: `timestamp` (s), `input_length`, `output_length`, `type`    |
| `mooncake`| jsonl: `timestamp` (ms), `input_length`, `output_length`                                  |
| `azure`   | csv: `TIMESTAMP` (date and time), `ContextTokens`, `GeneratedTokens`                      |
| `csv`     | csv with `arrival_s`, `input_tokens`, `output_tokens`, `type`; or Qwen's scalar layout,   |
|           | whose `single_turn_input_tokens` is taken (what FlowPrefill's benchmark uses)             |

All may be gzipped (`.gz`). The format is found from the first line. Arrivals must not decrease. Types are
renamed by ``CLASS_OF_TYPE``; a trace without types gets ``text`` up to 1,024 tokens and ``search`` above.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.errors import TraceError
from fpcompile.scheduler.workload import TraceRow

__all__ = ["CLASS_OF_TYPE", "read_trace"]

CLASS_OF_TYPE = {"conv": "text", "code": "search"}
"""Types that are served as another class (Azure publishes no SLO)."""

SHORT = 1024
"""Tokens up to which a request without a type is ``text``."""

_Fields = Mapping[str, Any]


class _Line:
    """One record, with typed access to its fields."""

    def __init__(self, path: Path, number: int, fields: _Fields) -> None:
        self.path, self.number, self.fields = path, number, fields

    def error(self, what: str, field: str | None, expected: str, got: object) -> TraceError:
        return TraceError(what, path=self.path, line=self.number, field=field, expected=expected, got=got)

    def value(self, field: str) -> Any:
        if field not in self.fields or self.fields[field] in ("", None):
            raise self.error("a trace line lacks a field", field, f"field {field!r}", sorted(self.fields))
        return self.fields[field]

    def number_of(self, field: str) -> float:
        value = self.value(field)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self.error("a trace line cannot be read", field, "a number", value) from None
        if not 0 <= number < float("inf"):
            raise self.error("a trace line is out of range", field, "a finite number >= 0", value)
        return number

    def count(self, field: str, least: int = 0) -> int:
        number = self.number_of(field)
        if number != int(number) or number < least:
            raise self.error("a trace line is out of range", field, f"a whole number >= {least}", number)
        return int(number)

    def when(self, field: str) -> float:
        """Seconds of a date and time such as ``2023-11-16 18:17:03.9799600``; in UTC if it names no zone."""
        text = str(self.value(field))
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            raise self.error("a trace line cannot be read", field, "YYYY-MM-DD HH:MM:SS.f", text) from None
        return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()


_Parsed = tuple[float, int, int, str]


def _qwen(line: _Line) -> _Parsed:
    kind = str(line.fields.get("type") or "")
    return line.number_of("timestamp"), line.count("input_length", 1), line.count("output_length"), kind


def _mooncake(line: _Line) -> _Parsed:
    return line.number_of("timestamp") / 1000, line.count("input_length", 1), line.count("output_length"), ""


def _azure(line: _Line) -> _Parsed:
    return line.when("TIMESTAMP"), line.count("ContextTokens", 1), line.count("GeneratedTokens"), ""


def _plain(line: _Line) -> _Parsed:
    tokens = "single_turn_input_tokens" if "single_turn_input_tokens" in line.fields else "input_tokens"
    kind = str(line.fields.get("type") or "")
    return line.number_of("arrival_s"), line.count(tokens, 1), line.count("output_tokens"), kind


def read_trace(path: str | Path) -> list[TraceRow]:
    """All rows of a trace file; arrivals are shifted so that the first is 0."""
    source = Path(path)
    try:
        text = _text(source)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InvalidInputError("cannot read the trace", got=str(error), where=str(source)) from error
    records = _json_lines(source, text) if text.lstrip().startswith("{") else _csv_lines(source, text)
    rows: list[TraceRow] = []
    parse: Callable[[_Line], _Parsed] | None = None
    start = before = 0.0
    for line in records:
        parse = parse or _format(line)
        arrival, tokens, output, kind = parse(line)
        if not rows:
            start = before = arrival
        if arrival < before:
            raise line.error("arrivals go back in time", None, f">= {before}", arrival)
        before = arrival
        klass = CLASS_OF_TYPE.get(kind, kind) or ("text" if tokens <= SHORT else "search")
        rows.append(TraceRow(arrival - start, tokens, output, klass))
    if not rows:
        raise InvalidInputError("the trace is empty", expected="at least one request", where=str(source))
    return rows


def _text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")


def _json_lines(path: Path, text: str) -> Iterator[_Line]:
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip():
            continue
        try:
            fields = json.loads(raw)
        except ValueError as error:
            raise TraceError(
                "a trace line is not JSON",
                path=path,
                line=number,
                field=None,
                expected="an object",
                got=str(error),
            ) from None
        if not isinstance(fields, dict):
            raise TraceError(
                "a trace line is not an object",
                path=path,
                line=number,
                field=None,
                expected="{...}",
                got=fields,
            )
        yield _Line(path, number, fields)


def _csv_lines(path: Path, text: str) -> Iterator[_Line]:
    reader = csv.DictReader(text.splitlines())
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise TraceError(
                "a trace line is not csv",
                path=path,
                line=reader.reader.line_num,
                field=None,
                expected="fields between commas",
                got=str(error),
            ) from None
        if None in fields or None in fields.values():
            raise TraceError(
                "a trace line has a wrong number of fields",
                path=path,
                line=reader.line_num,
                field=None,
                expected=",".join(reader.fieldnames or []),
                got=list(fields.values()),
            )
        yield _Line(path, reader.line_num, fields)


def _format(line: _Line) -> Callable[[_Line], _Parsed]:
    """The reader for a file whose first record this is."""
    fields = set(line.fields)
    if {"arrival_s", "output_tokens"} <= fields:
        return _plain
    if {"TIMESTAMP", "ContextTokens"} <= fields:
        return _azure
    if {"timestamp", "input_length"} <= fields:
        return _qwen if {"chat_id", "type"} & fields else _mooncake
    expected = (
        "QwenTrace or Mooncake jsonl, Azure csv, or csv with arrival_s, input_tokens, output_tokens, type"
    )
    raise line.error("the trace has an unknown format", None, expected, sorted(fields))

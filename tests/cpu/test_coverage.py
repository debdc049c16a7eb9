"""The coverage table: rows, crashes that cost one row, the page."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fpcompile.cli import app
from fpcompile.serving import coverage as coverage_module
from fpcompile.serving import coverage_checks, coverage_workers
from fpcompile.serving.coverage import markdown_of
from fpcompile.serving.coverage_checks import Row, difference, row_of

ROW: dict[str, Any] = {
    "name": "mamba",
    "model": "MambaForCausalLM",
    "family": "causal",
    "status": "bits",
    "route": "generic",
    "why": "a loop | over positions",
    "segments": 3,
    "states": ["recurrent"],
    "opaque": ["layers.0.mixer", "layers.1.mixer"],
    "errors": {"length 1": 0.0, "generate": None},
}


def test_the_page_has_a_row_for_each_architecture() -> None:
    broken = {"name": "broken", "family": "causal", "status": "crashed", "why": "exit code -9"}
    page = markdown_of([ROW, broken])
    line = next(text for text in page.splitlines() if text.startswith("| mamba"))
    assert "| generic | 3 | recurrent | bits |" in line
    assert "`layers.*.mixer`" in line
    assert "a loop \\| over positions" in line
    assert "the model itself refuses: generate" in line
    assert "2 architectures: 1 crashed, 1 bits" in page
    assert "not equal: broken (crashed)" in page


def test_padding_alone_may_round_differently() -> None:
    row = ROW | {"status": "close", "errors": {"length 1": 0.0, "padded left": 3e-7}}
    assert "| bits, padded 3.0e-07 |" in markdown_of([row])
    row["errors"] = {"length 1": 1e-7, "padded left": 3e-7}
    assert "| 3.0e-07 |" in markdown_of([row])


def test_a_difference_is_relative_and_sees_shapes_and_holes() -> None:
    a = torch.tensor([1.0, 4.0])
    assert difference([a], [a.clone()]) == 0
    assert difference([a], [torch.tensor([1.0, 5.0])]) == 0.25
    assert difference([a], [a[:1]]) == float("inf")
    assert difference([a], []) == float("inf")
    assert difference([a], [torch.tensor([1.0, float("nan")])]) == float("inf")


def test_a_row_is_as_bad_as_its_worst_check() -> None:
    row = Row("x", errors={"a": 0.0, "b": None})
    row.settle()
    assert row.status == "bits"
    row.errors["c"] = 1e-6
    row.settle()
    assert row.status == "close"
    row.errors["d"] = 1e-3
    row.settle()
    assert row.status == "differs"
    row.failures["e"] = "it raised"
    row.settle()
    assert row.status == "failed"


def test_a_row_that_cannot_be_made_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Row:
        raise RuntimeError("no memory")

    monkeypatch.setattr(coverage_checks, "check_causal", fail)
    row = row_of("llama")
    assert (row.status, row.why) == ("crashed", "RuntimeError: no memory")


def _dies(name: str, seconds: int, memory: int, send: Any) -> None:
    os._exit(3)


def _hangs(name: str, seconds: int, memory: int, send: Any) -> None:
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.parametrize(("work", "status"), [(_dies, "crashed"), (_hangs, "timed out")])
def test_a_crash_costs_one_row(monkeypatch: pytest.MonkeyPatch, work: Any, status: str) -> None:
    monkeypatch.setattr(coverage_workers, "_work", work)
    rows = list(coverage_workers.run_rows(["a", "b"], jobs=2, seconds=20 if status == "crashed" else 0.1))
    assert sorted((r["name"], r["status"]) for r in rows) == [("a", status), ("b", status)]


@pytest.mark.slow
def test_the_command_prints_rows_and_fails_when_one_does() -> None:
    result = CliRunner().invoke(app, ["coverage", "BertModel", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert (row["name"], row["status"], row["route"]) == ("BertModel", "bits", "generic")


def test_an_unknown_architecture_is_one_line() -> None:
    result = CliRunner().invoke(app, ["coverage", "lama"])
    assert result.exit_code == 2
    assert "did you mean 'llama'" in result.output


@pytest.mark.parametrize("line", ["{", "[1]", '{"status": "bits"}', "\xff\xfe"])
def test_rows_that_cannot_be_read_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("an architecture was run")

    monkeypatch.setattr(coverage_module, "run_rows", never)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROW) + f"\n{line}\n", encoding="latin-1")
    result = CliRunner().invoke(app, ["coverage", "llama", "--rows", str(rows)])
    assert result.exit_code == 2
    assert str(rows) in result.output
    result = CliRunner().invoke(app, ["coverage", "llama", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "cannot be written" in result.output


def test_a_run_goes_on_from_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(names: list[str], **options: Any) -> Any:
        asked.append(names)
        return ({**ROW, "name": name} for name in names)

    monkeypatch.setattr(coverage_module, "run_rows", run)
    monkeypatch.setattr(coverage_module, "_names", lambda wanted: list(wanted) or ["llama", "mamba"])
    rows, page = tmp_path / "rows.jsonl", tmp_path / "coverage.md"
    options = ["--rows", str(rows), "--output", str(page)]
    for names in (["llama"], [], []):
        result = CliRunner().invoke(app, ["coverage", *names, *options])
        assert result.exit_code == 0, result.output
    assert asked == [["llama"], ["mamba"], []]
    assert "2 architectures: 2 bits" in page.read_text(encoding="utf-8")

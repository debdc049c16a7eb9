"""The embedding examples run, and show what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.slow


def _run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_threads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _run("embed_threads.py", monkeypatch, capsys)
    rows = [line for line in lines if line.startswith(("long", "client"))]
    assert len(rows) == 5
    assert all(row.endswith("yes") for row in rows)
    assert int(lines[-1].split()[0]) >= 1, "the long one was preempted"


def test_asyncio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _run("embed_asyncio.py", monkeypatch, capsys)
    assert [line[:2] for line in lines] == ["1.", "2.", "3."]
    assert "2 completed, 1 cancelled" in lines[0]
    assert lines[2].endswith("bits equal: True")


@pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning")  # of a machine that is busy
def test_generate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _run("generate.py", monkeypatch, capsys)
    assert [line.split()[0] for line in lines] == ["greedy", "sampled", "long", "120"]
    assert lines[3].endswith("equal to generate's: True")


def test_fastapi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _run("embed_fastapi.py", monkeypatch, capsys)
    assert sum(line.startswith("urgent: token") for line in lines) == 3
    assert lines[3].endswith("overtaken: True")
    assert "'completed': 4, 'cancelled': 1" in lines[4]

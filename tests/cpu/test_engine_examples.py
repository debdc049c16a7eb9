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


def test_the_ten_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _run("quickstart.py", monkeypatch, capsys)
    assert [line.split()[0] for line in lines] == ["urgent", "long", "preemptions"]


def test_a_policy_of_ones_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _run("custom_policy.py", monkeypatch, capsys)
    assert lines[0].startswith("fcfs: free 3000, free 400, free 40, gold 800; ")
    assert lines[1].startswith("gold-first: gold 800, free 40, free 400, free 3000; ")
    assert all(line.endswith("bits equal to the model's: True") for line in lines)


def test_a_model_and_an_embedder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _run("llm_and_embedder.py", monkeypatch, capsys)
    assert lines[0] == "3 vectors while a long prompt was computed: True"
    assert lines[2] == "equal to the models': vectors True, logits True, tokens True"


def test_a_checkpoint_moves_to_another_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["checkpoint_and_move.py", "--tokens", "128"])
    lines = _run("checkpoint_and_move.py", monkeypatch, capsys)
    assert lines[0].startswith("first process: stopped at segment")
    assert lines[-1] == "bits equal to the uninterrupted run: yes"

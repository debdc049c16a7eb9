"""Benchmarks of the engine and the executor, in small: what they write, and what they call a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cpu.test_benchmarks import PNG, benchmark, written

pytestmark = pytest.mark.slow


def test_checkpoints_are_compared_with_plain_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--model", "tiny:qwen3", "--tokens", "40", "--repeats", "3", "--output", str(tmp_path)]
    module = benchmark("checkpoint_rate", monkeypatch, *arguments, "--folder", str(tmp_path))
    module.main()
    content = written(tmp_path / "checkpoint_rate.json")
    assert set(content["seconds"]) == {"save", "load", "write", "read"}
    saved = [a / b for a, b in zip(content["seconds"]["write"], content["seconds"]["save"], strict=True)]
    assert content["ratio"]["save"]["median"] == pytest.approx(sorted(saved)[1])
    assert content["stopped_at"].endswith("self_attn")
    assert content["bytes"] > 0
    assert content["bits_equal"]
    assert (tmp_path / "checkpoint_rate.png").read_bytes().startswith(PNG)


def test_a_resumed_run_with_other_bits_fails_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ["--model", "tiny:qwen3", "--tokens", "40", "--repeats", "1", "--output", str(tmp_path)]
    module = benchmark("checkpoint_rate", monkeypatch, *arguments)
    real = module.Checkpoint.load

    def tampered(path: Path) -> Any:
        checkpoint = real(path)
        for storage in checkpoint.storages:
            storage.view(torch.uint8)[::7] ^= 1
        return checkpoint

    monkeypatch.setattr(module.Checkpoint, "load", tampered)
    with pytest.raises(SystemExit):
        module.main()


def test_host_times_of_launches_and_pauses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--model", "tiny:qwen3", "--repeats", "5", "--output", str(tmp_path)]
    module = benchmark("dispatch", monkeypatch, *arguments)
    module.main()
    content = written(tmp_path / "dispatch.json")
    rows = content["launch"]["rows"]
    assert len(rows) == len(content["launch"]["over_us"]) > 10
    assert all(row["step_us"] > 0 and row["bare_us"] > 0 for row in rows)
    assert set(content["pause"]) == {"s-edf", "fpcompile"}
    for pause in content["pause"].values():
        assert len(pause["preempting_us"]) == 5
        assert all(host > 0 and decisions > 0 for host, decisions in pause["preempting_us"])
        assert pause["preemptions"] >= 5
    assert content["leave_us"]["median"] > 0
    assert (tmp_path / "dispatch.png").read_bytes().startswith(PNG)


def test_three_programs_under_one_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--model", "tiny:qwen3", "--tokens", "400", "--prefills", "2", "--requests", "8"]
    more = ["--short", "8", "--max-blocking-ms", "1000", "--encoder-layers", "1", "--encoder-width", "32"]
    module = benchmark("many_programs", monkeypatch, *arguments, *more, "--output", str(tmp_path))
    module.main()
    content = written(tmp_path / "many_programs.json")
    assert content["bound_ms"] == 1000
    assert {row["kind"] for row in content["rows"]} <= {"chat", "embed", "rerank"}
    for row in content["rows"]:
        assert row["bits_equal"]
        assert 0 < row["blocked"] <= row["requests"]
        assert all(value >= 0 for value in row["blocking"])
    assert (tmp_path / "many_programs.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("policy", ["s-edf", "fpcompile"])
def test_a_short_soak_leaves_nothing(policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--seconds", "3", "--policy", policy, "--faults", "0.01", "--output", str(tmp_path)]
    module = benchmark("soak", monkeypatch, *arguments)
    module.main()
    content = written(tmp_path / "soak.json")
    assert content["problems"] == []
    assert content["ended"]["completed"] > 0


def test_a_soak_finds_wrong_bits_and_what_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--seconds", "0.5", "--faults", "0", "--growth", "-1", "--output", str(tmp_path)]
    module = benchmark("soak", monkeypatch, *arguments)
    prompt = module.prompt
    asked: list[int] = []

    def other(length: int) -> torch.Tensor:
        asked.append(length)
        ids: torch.Tensor = prompt(length)
        return ids if len(asked) <= 8 else (ids + 1) % 100  # behind what is expected

    monkeypatch.setattr(module, "prompt", other)
    with pytest.raises(SystemExit):
        module.main()
    told = " ".join(written(tmp_path / "soak.json")["problems"])
    assert "other bits than alone" in told
    assert "resident memory grew" in told

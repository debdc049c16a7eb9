"""The benchmarks on tiny models: their figures, their files, and that they can fail."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.models.zoo import tiny_model

PNG = b"\x89PNG\r\n\x1a\n"
ROOT = Path(__file__).resolve().parents[2]


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """A module of ``benchmarks/``, as if started with ``arguments``."""
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
    return module


def written(path: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(path.read_text())
    assert {"device", "torch", "load_average", "torch_threads"} <= set(content["machine"])
    return content


@pytest.mark.slow
def test_overhead_writes_its_ratios(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "tiny:qwen3", "--tokens", "16", "48", "--repeats", "3", "--output", str(tmp_path)]
    benchmark("overhead", monkeypatch, *arguments, "--device", "cpu").main()
    content = written(tmp_path / "overhead.json")
    assert [row["tokens"] for row in content["rows"]] == [16, 48]
    for row in content["rows"]:
        assert row["bits_equal"]
        assert row["floor_seconds"] > 0
        assert {name: len(values) for name, values in row["seconds"].items()} == dict.fromkeys(
            ("model", "control", "program"), 3
        )
        ratios = [a / b for a, b in zip(row["seconds"]["program"], row["seconds"]["model"], strict=True)]
        assert row["ratio"]["median"] == pytest.approx(sorted(ratios)[1])
        assert row["target"] >= 1.02, "weights are shared"
    assert (tmp_path / "overhead.png").read_bytes().startswith(PNG)
    assert f"<= {content['rows'][0]['target']:.3f}" in capsys.readouterr().out


@pytest.mark.slow
def test_compile_time_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = benchmark("overhead", monkeypatch, "--compile-time", "--repeats", "2", "--output", str(tmp_path))
    monkeypatch.setattr(module, "COMPILE_MODEL", "tiny:qwen2")
    module.main()
    content = written(tmp_path / "compile_time.json")
    assert {name: len(values) for name, values in content["seconds"].items()} == {"verify": 2, "no verify": 2}


def test_noise_is_not_called_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("overhead", monkeypatch)
    verdict = module.verdict

    def row(median: float, *control: float) -> dict[str, Any]:
        return {
            "target": 1.05,
            "ratio": {"median": median},
            "control": dict(zip(("q1", "median", "q3"), control, strict=True)),
        }

    assert verdict(row(1.049, 0.99, 1.0, 1.01)) == "met"
    assert verdict(row(1.051, 1.001, 1.002, 1.01)) == "MISSED"
    assert "noisy" in verdict(row(1.0, 0.9, 1.0, 1.1))
    assert "noisy" in verdict(row(1.0, 1.03, 1.04, 1.05))
    bf16, fp32 = torch.bfloat16, torch.float32
    kinds = ((bf16, "packed"), (bf16, "shared"), (fp32, "shared"))
    targets = [module.target_of(n, d, "cpu", 1.01, weights) for d, weights in kinds for n in (128, 512)]
    assert targets == pytest.approx([0.90, 0.98, 1.03, 1.01, 1.03, 1.01])
    assert module.target_of(512, fp32, "cpu", 0.97, "shared") == 1.0, "noise that favours us is no excuse"


@pytest.mark.slow
def test_blocking_writes_percentiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--model", "tiny:qwen3", "--tokens", "200", "--prefills", "1", "--requests", "12"]
    module = benchmark("blocking", monkeypatch, *arguments, "--max-blocking-ms", "--output", str(tmp_path))
    module.main()
    content = written(tmp_path / "blocking.json")
    assert [row["granularity"] for row in content["rows"]] == ["operator", "layer", "model"]
    for row in content["rows"]:
        times = row["blocking_seconds"]
        assert 0 <= times["p50"] <= times["p99"] <= times["max"]
        assert len(row["blocking"]) == row["requests"] > 0
    assert content["rows"][-1]["launches"] == 1
    assert (tmp_path / "blocking.png").read_bytes().startswith(PNG)


def test_poisson_times_rise_and_cover_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = benchmark("blocking", monkeypatch).poisson(0.01, 10.0, seed=1)
    assert times == sorted(times)
    assert times[-1] >= 10.0
    assert 900 < len(times) < 1100


def test_a_benchmark_explains_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        benchmark("overhead", monkeypatch, "--model", "qwen3-110").main()
    assert left.value.code == 2
    assert "did you mean" in capsys.readouterr().err


def tampered(model: Any, **plan: Any) -> fpcompile.Program:
    """A program with one weight that is another than the model's."""
    other = tiny_model(model.config.model_type, dtype=model.dtype)
    with torch.no_grad():
        next(other.parameters()).add_(2**-7)
    return fpcompile.segment(other, **plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "arguments"),
    [
        ("overhead", "overhead.json", ["--tokens", "16", "--repeats", "3"]),
        ("overhead", "compile_time.json", ["--compile-time", "--repeats", "1"]),
        (
            "blocking",
            "blocking.json",
            ["--tokens", "200", "--prefills", "1", "--granularities", "operator", "--max-blocking-ms"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_bits_fail_a_benchmark(
    name: str,
    file: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = benchmark(name, monkeypatch, "--model", "tiny:qwen3", *arguments, "--output", str(tmp_path))
    monkeypatch.setattr(module, "segment", tampered)
    monkeypatch.setattr(module, "COMPILE_MODEL", "tiny:qwen3", raising=False)
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 1
    assert "results differ from the unmodified model's" in capsys.readouterr().out
    content = written(tmp_path / file)
    assert not any(row["bits_equal"] for row in content.get("rows", [content]))


@pytest.mark.slow
def test_with_a_budget_a_difference_is_reported_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tokens", "16", "--repeats", "3", "--max-blocking-ms", "50", "--output", str(tmp_path)]
    module = benchmark("overhead", monkeypatch, "--model", "tiny:qwen3", *arguments)
    monkeypatch.setattr(module, "segment", tampered)
    monkeypatch.setattr(module, "verdict", lambda row: "MISSED")
    module.main()
    out = capsys.readouterr().out
    assert "DIFFER" in out
    assert "\nTARGET MISSED: 16 tokens take " in out


def gpu_script(tmp_path: Path, *, rc: int, missed: bool) -> subprocess.CompletedProcess[str]:
    """``gpu.sh`` with an interpreter that only pretends: its overhead benchmark answers as told."""
    python = tmp_path / "python"
    line = "echo 'TARGET MISSED: 512 tokens take 1.200 times as long, not 1.05'" if missed else "true"
    python.write_text(
        '#!/bin/bash\ncase "$*" in\n'
        f"*overhead.py*--repeats*) echo measured; {line}; exit {rc} ;;\n"
        "*) exit 0 ;;\nesac\n"
    )
    python.chmod(0o755)
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_benchmarks_run_whatever_one_of_them_does(tmp_path: Path) -> None:
    python = tmp_path / "python"
    missed = "echo 'TARGET MISSED: 16 tokens'"
    python.write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/called\ncase "$*" in\n'
        f"*backends.py*--compile-time*) {missed} ;;\n*blocking.py*) exit 1 ;;\nesac\n"
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "all.sh"), "--model", "tiny:qwen3"],
        env={**os.environ, "PYTHON": str(python), "OUTPUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        check=False,
    )
    called = [line.split() for line in (tmp_path / "called").read_text().splitlines()]
    started = {Path(words[0]).name for words in called}
    own = {path.name for path in (ROOT / "benchmarks").glob("*.py") if not path.name.startswith("compare_")}
    assert started == own - {"common.py", "schemes.py"}
    fixed = ("scheduler_cost.py", "serve_mixed.py", "serve_stalls.py", "serve_disconnects.py")
    assert all("tiny:qwen3" in words for words in called if Path(words[0]).name not in fixed)
    assert done.returncode == 1
    told = ["target missed: backends-compile-time: 16 tokens", "FAILED: blocking"]
    assert done.stdout.splitlines()[-2:] == told


def test_the_gpu_script_fails_when_a_step_fails(tmp_path: Path) -> None:
    done = gpu_script(tmp_path, rc=1, missed=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "FAILED: overhead"
    assert "all passed" not in done.stdout


def test_the_gpu_script_names_missed_targets(tmp_path: Path) -> None:
    done = gpu_script(tmp_path, rc=0, missed=True)
    assert done.returncode == 0
    told = ["target missed: overhead: 512 tokens take 1.200 times as long, not 1.05", "all passed"]
    assert done.stdout.splitlines()[-2:] == told


def test_the_gpu_script_passes_when_all_do(tmp_path: Path) -> None:
    done = gpu_script(tmp_path, rc=0, missed=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all passed")
    assert "target missed" not in done.stdout


@pytest.mark.slow
def test_backends_writes_ratios_to_torch_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--model", "tiny:qwen3", "--tokens", "16", "--repeats", "3", "--output", str(tmp_path)]
    module = benchmark("backends", monkeypatch, *arguments, "--granularities", "layer", "--device", "cpu")
    module.main()
    (row,) = written(tmp_path / "backends.json")["rows"]
    assert set(row["seconds"]) == {"model", "compiled", "control", "layer"}
    ratios = [a / b for a, b in zip(row["seconds"]["layer"], row["seconds"]["compiled"], strict=True)]
    assert row["ratio"]["layer"]["median"] == pytest.approx(sorted(ratios)[1])
    assert 0 < row["relative_difference"]["layer"] < 0.1
    assert (tmp_path / "backends.png").read_bytes().startswith(PNG)


def test_the_compilers_time_is_compared_at_two_depths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark("backends", monkeypatch, "--compile-time", "--repeats", "2", "--output", str(tmp_path))
    spent = iter([9.0, 2.0, 3.0, 2.0, 5.0])
    monkeypatch.setattr(module, "compiling", lambda layers, options: (next(spent), 11))
    module.main()
    content = written(tmp_path / "backends_compile_time.json")
    assert content["seconds"] == {"8": [2.0, 2.0], "80": [3.0, 5.0]}
    assert content["ratio"] == pytest.approx(2.0)
    assert "TARGET MISSED" in capsys.readouterr().out


@pytest.mark.slow
def test_preemption_writes_the_frontier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--model", "tiny:qwen3", "--layers", "1", "--tokens", "300", "--chunks", "100", "4096"]
    more = ["--parts", "3", "--repeats", "3", "--prefills", "1", "--requests", "20", "--bound-tokens", "300"]
    more += ["--long-tokens", "400", "100000"]
    module = benchmark("preemption", monkeypatch, *arguments, *more, "--output", str(tmp_path))
    module.main()
    content = written(tmp_path / "preemption.json")
    (found,) = content["lengths"]
    schemes = ["whole", "chunked 100", "layer", "half-layer, synchronised", "operator", "tiles 1/3"]
    assert [row["scheme"] for row in found["rows"]] == schemes
    for row in found["rows"]:
        times = row["blocking_seconds"]
        assert 0 <= times["p50"] <= times["p99"] <= times["max"]
        assert row["bits_equal"] or not row["exact"]
        assert row["times_floor"] > 0
    assert content["launches"]["launches"] == len(content["launches"]["launch_seconds"])
    assert content["launches"]["longest"] > 0
    (longer,) = content["longer"]
    assert longer["tokens"] == 400, "no position for 100,000"
    assert longer["launches"] == len(longer["launch_seconds"]) > 0
    assert 0 < content["preemptions"]["stops"] <= 100
    rounds = content["preemptions"]["seconds"]
    assert all(own < total for own, total in zip(rounds["own"], rounds["stopped"], strict=True))
    assert (tmp_path / "preemption.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_wrong_bits_fail_the_comparison_of_schemes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "tiny:qwen3", "--layers", "0", "--tokens", "200", "--chunks", "--parts"]
    more = ["--repeats", "1", "--prefills", "1", "--bound-tokens", "0", "--output", str(tmp_path)]
    module = benchmark("preemption", monkeypatch, *arguments, *more)
    monkeypatch.setattr("benchmarks.schemes.segment", tampered)
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 1
    assert "FAILED: results differ from the unmodified model's: whole, 200 tokens" in capsys.readouterr().out


def budget_cost(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    arguments = ["--model", "tiny:qwen3", "--layers", "1", "--tokens", "300", "--part", "3", "--repeats", "3"]
    return benchmark("budget_cost", monkeypatch, *arguments, "--output", str(folder))


@pytest.mark.slow
def test_budget_cost_says_where_it_is_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    budget_cost(monkeypatch, tmp_path).main()
    assert torch.get_num_threads() == threads
    content = written(tmp_path / "budget_cost.json")
    attention, others, everything = content["rows"]
    assert [row["kind"] for row in content["rows"]] == ["attention", "other stages", "all"]
    for name, seconds in everything["seconds"].items():
        parts = zip(attention["seconds"][name], others["seconds"][name], strict=True)
        assert seconds == pytest.approx([a + b for a, b in parts])
        assert len(seconds) == 3
    ratios = [a / b for a, b in zip(*(everything["seconds"][n] for n in ("tiles", "whole")), strict=True)]
    assert content["lost"] == pytest.approx(1 - 1 / sorted(ratios)[1])
    assert content["launches"] > 1
    assert content["bits_equal"]["whole"]
    pairs = {(row["queries"], row["how"]): row["nanoseconds"] for row in content["kernel"]}
    blocks = {(n, how) for n in (64, 128, 256, 512) for how in ("masked", "unmasked")}
    assert set(pairs) == blocks | {(512, "causal")}
    assert min(pairs.values()) > 0
    assert (tmp_path / "budget_cost.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_wrong_bits_fail_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = budget_cost(monkeypatch, tmp_path)
    monkeypatch.setattr(module, "segment", tampered)
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 1
    assert "FAILED: results differ from the unmodified model's: whole" in capsys.readouterr().out


def test_half_layers_end_behind_attention_and_at_cuts() -> None:
    stages = fpcompile.segment(tiny_model("qwen3"), granularity="layer", verify=False).stages
    launches = importlib.import_module("benchmarks.schemes").half_layers(stages)
    assert [i for launch in launches for i in range(launch.first, launch.last)] == list(range(len(stages)))
    ends = {launch.last - 1 for launch in launches}
    cuts = {
        i for i in range(len(stages)) if i + 1 == len(stages) or stages[i + 1].segment != stages[i].segment
    }
    attention = {i for i, stage in enumerate(stages) if stage.over == "attention"}
    assert ends == cuts | attention
    assert len(attention) == 2


def test_chunks_are_one_prefill() -> None:
    model = tiny_model("qwen3")
    program = fpcompile.segment(model, granularity="model", verify=False)
    ids = torch.arange(50)[None] % 90
    chunks = importlib.import_module("benchmarks.schemes").Chunks(program, ids, 20, {"logits_to_keep": 1})
    steps = 0
    while not chunks.done:
        chunks.step()
        steps += 1
    assert steps == 3
    with torch.no_grad():
        expected = model(input_ids=ids, logits_to_keep=1)
    torch.testing.assert_close(chunks.result().logits, expected.logits)
    assert chunks.result().past_key_values.get_seq_length() == 50

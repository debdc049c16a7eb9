"""The goodput benchmark and its command line, on a small trace of the test's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from typer.testing import CliRunner

from fpcompile.errors import FpcompileError, InvalidInputError, UsageError
from fpcompile.scheduler import (
    CostPredictor,
    Request,
    Scheduler,
    UnknownPolicyError,
    load_costs,
    profile,
)
from fpcompile.scheduler.record import Recorder
from fpcompile.scheduler.simulator import Simulator
from fpcompile.scheduler.sweep import Cell, CellKey, SweepSetup, run_cell
from fpcompile.scheduler.synthetic import synthetic_trace
from fpcompile.scheduler.workload import requests_at
from fpcompile.serving.bench_cli import app
from fpcompile.serving.bench_goodput import default_rates, run_bench_goodput
from fpcompile.serving.bench_options import parse_numbers, parse_policies
from fpcompile.serving.replay import replay_table


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "small.csv"
    rows = synthetic_trace(60, seed=4, rate=5.0)
    lines = [f"{row.arrival:.6f},{row.tokens},{row.output_tokens},{row.klass}" for row in rows]
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens,type", *lines]) + "\n")
    return path


@pytest.mark.slow
def test_the_report_has_both_goodputs_and_agrees_with_its_points(trace: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    report = run_bench_goodput(
        trace, ["fcfs", "fpcompile"], rates=[1.0, 4.0, 7.0], slo_scales=[0.5, 1.0], seeds=2, num_prompts=200,
        json_path=target, bound=True,
    )  # fmt: skip
    assert json.loads(target.read_text()) == report
    assert report["costs"]["name"] == "llama3-8b-a800"
    assert report["slos"] == {"text": 0.25, "image": 0.5, "search": 4.0, "file": 6.0}
    for entry in report["policies"].values():
        assert entry["max_goodput"] == sum(entry["max_goodput_by_seed"]) / 2
        assert entry["paper_goodput"] >= entry["max_goodput"]
        assert len(entry["points"]) == 4
        for point in entry["points"]:
            assert min(point["attainment"].values()) + 1e-9 >= point["worst"]
            assert 0 < point["p50_ttft_ms"] <= point["p99_ttft_ms"]
            assert 0 < point["mean_ttft_ms"] <= point["p99_ttft_ms"]
    assert report["policies"]["fpcompile"]["max_goodput"] > report["policies"]["fcfs"]["max_goodput"]
    best = report["bound"]["max_goodput"]
    assert (
        report["policies"]["fpcompile"]["max_goodput_by_seed"][0] <= best <= report["bound"]["paper_goodput"]
    )
    halved = [p for p in report["policies"]["fcfs"]["points"] if p["slo_scale"] == 0.5]
    assert [p["rate"] for p in halved] == [report["slo_rate"]]


@pytest.mark.slow
def test_the_command_writes_table_pictures_and_json(trace: Path, tmp_path: Path) -> None:
    arguments = [
        "goodput",
        "--trace",
        str(trace),
        "--policies",
        "fcfs,s-edf",
        "--rates",
        "2:6:4",
        "--seeds",
        "1",
    ]
    arguments += ["--num-prompts", "100", "--json", str(tmp_path / "r.json"), "--plots", str(tmp_path / "p")]
    arguments += ["--markdown", str(tmp_path / "r.md")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "s-edf" in result.output
    assert "text 0.25 s" in " ".join(result.output.split()), "the promises are named"
    assert (tmp_path / "r.json").exists()
    page = (tmp_path / "r.md").read_text()
    assert page.count("| `s-edf` |") == 3
    assert "text 0.25 s" in page
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"goodput.png", "goodput-classes.png"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--policies", "s-edff"],
        ["--rates", "1:x:2"],
        ["--rates", "-1"],
        ["--slo", "text=0"],
        ["--costs", "missing.json"],
        ["--router", "random", "--num-prompts", "10", "--rates", "1", "--policies", "fcfs"],
        ["--real", "--bound"],
        ["--rates", "1:inf:1"],
        ["--burstiness", "0.5"],
        ["--json", "missing/report.json"],
        ["--markdown", "missing/report.md"],
        ["--kv-blocks", "0"],
        ["--rates", "5:1:1"],
        ["--rates", ","],
        ["--slo-scale", ""],
        ["--policies", ";"],
        ["--slo", "txt=0.1"],
        ["--costs", "."],
        ["--plot-policies", "nope"],
        ["--plots", __file__],
        ["--real", "--slo-scale", "0.5"],
        ["--real", "--plot-policies", "fpcompile"],
        ["--real", "--json", "missing/report.json"],
    ],
)
def test_bad_arguments_end_with_a_message_and_code_2(trace: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["goodput", "--trace", str(trace), *arguments])
    assert result.exit_code == 2
    assert not isinstance(result.exception, FpcompileError), "a message, not a traceback"


def test_errors_come_before_any_simulation(trace: Path) -> None:
    def never(*_: object) -> list[object]:
        raise AssertionError("simulated")

    with pytest.raises(UnknownPolicyError):
        run_bench_goodput(trace, ["fcfs", "nope"], runner=never)  # type: ignore[arg-type]
    wrong: list[dict[str, Any]] = [
        {"slo_scales": [1.0, -1.0]},
        {"slo_scales": [0.5], "slo_rate": 0.0},
        {"rates": [1.0, -2.0]},
        {"router": "random"},
        {"replicas": 0},
        {"replicas": 2, "bound": True},
        {"options": {"kv_blocks": -1}},
        {"options": {"patience": 1}},
        {"slos": {"txt": 0.1}},
        {"json_path": trace.parent / "missing" / "out.json"},
    ]
    for more in wrong:
        with pytest.raises(FpcompileError):
            run_bench_goodput(trace, ["fcfs"], runner=never, **more)  # type: ignore[arg-type]
    text = trace.read_text()
    trace.write_text(text.replace(",text\n", ",speech\n", 1))
    with pytest.raises(InvalidInputError, match="'speech' has no SLO"):
        run_bench_goodput(trace, ["fcfs"], runner=never)  # type: ignore[arg-type]
    trace.write_text("arrival_s,input_tokens,output_tokens,type\n" + "1.0,5,1,text\n" * 3)
    with pytest.raises(InvalidInputError, match="arrive at once"):
        run_bench_goodput(trace, ["fcfs"], runner=never)  # type: ignore[arg-type]


def test_numbers_and_policies_are_parsed() -> None:
    assert parse_numbers("1,2.5") == [1.0, 2.5]
    assert parse_numbers("0.25:1:0.25") == [0.25, 0.5, 0.75, 1.0]
    assert parse_policies("fcfs,s-edf") == ["fcfs", "s-edf"]
    assert parse_policies("vllm:2048,512;fcfs") == ["vllm:2048,512", "fcfs"]
    assert parse_policies("fcfs,vllm:2048,512,fpcompile:pack=0,balance=1") == [
        "fcfs",
        "vllm:2048,512",
        "fpcompile:pack=0,balance=1",
    ]
    assert parse_policies("chunked:512,edf;fcfs;") == ["chunked:512,edf", "fcfs"]
    assert parse_policies("fcfs,edf,fcfs") == ["fcfs", "edf"]
    for text in ("1:2:0", "2:1:1", "", ",", "1:2", "1:nan:1"):
        with pytest.raises(UsageError):
            parse_numbers(text)
    assert len(default_rates(8.0)) == 24
    assert default_rates(8.0)[-1] == 12.0


def test_replay_compares_policies_on_a_recorded_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    slos = {"text": 0.25, "image": 0.5, "search": 4.0, "file": 6.0}
    requests = requests_at(synthetic_trace(40, seed=5), 6.0, profile(), slos)
    core = Scheduler("fcfs", predictor=CostPredictor(profile()))
    with Recorder(path, core) as recorder:
        log = lambda event, commands: recorder.record([event], commands)  # noqa: E731
        Simulator("fcfs", profile(), core=core, log=log).run(requests)
    limited, agrees = replay_table(path, "fcfs", rate_scale=3.0, max_queue_s=0.1)
    assert agrees
    classes = len({request.klass for request in requests})
    assert limited.row_count == 2 * classes
    rejected = [int(str(cell)) for cell in limited.columns[5].cells]
    assert sum(rejected[:classes]) == 0, "as recorded"
    assert sum(rejected[classes:]) > 0
    with pytest.raises(InvalidInputError, match="unknown scheduler option"):
        replay_table(path, "fcfs", queue=1)
    table, agrees = replay_table(path, "s-edf", rate_scale=1.5)
    assert agrees
    assert list(table.columns[0].cells).count("recorded: fcfs") == len(
        {request.klass for request in requests}
    )
    assert list(table.columns[0].cells).count("simulated: s-edf") == len(
        {request.klass for request in requests}
    )


SLOW = 20.0
"""A machine that takes so many times what the cost table says."""


def rows_beside(table: Table, policy: str) -> tuple[list[list[str]], list[list[str]]]:
    """What was recorded under ``policy``, and what is simulated under it."""
    rows = [[str(cell) for cell in row] for row in zip(*(c.cells for c in table.columns), strict=True)]
    recorded, simulated = (
        [r[1:] for r in rows if r[0] == f"{k}: {policy}"] for k in ("recorded", "simulated")
    )
    return recorded, simulated


def slow_log(path: Path, policy: str) -> None:
    """A log of a slow machine whose scheduler knows it: costs, and what is left of paused runs, are real."""
    slos = {"text": 0.25 * SLOW, "image": 0.5 * SLOW, "search": 4.0 * SLOW, "file": 6.0 * SLOW}
    planned = requests_at(synthetic_trace(80, seed=5), 8.0 / SLOW, profile(), slos)
    requests = [replace(request, cost=SLOW * request.cost) for request in planned]
    core = Scheduler(policy, predictor=CostPredictor(profile()))
    with Recorder(path, core) as recorder:
        log = lambda event, commands: recorder.record([event], commands)  # noqa: E731
        Simulator(policy, profile(), core=core, slowdown=lambda _: SLOW, learnt=True, log=log).run(requests)


@pytest.mark.parametrize("policy", ["srpt", "chunked:128,srpt", "chunked:512"])
def test_replay_of_the_recorded_policy_gives_what_was_recorded(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "log.jsonl"
    slow_log(path, policy)
    assert ('"Yielded"' in path.read_text()) == ("srpt" in policy), "runs are paused"
    table, agrees = replay_table(path)
    recorded, simulated = rows_beside(table, policy)
    assert agrees
    assert recorded
    assert simulated == recorded
    assert "breaks off" not in str(table.caption)
    path.write_text(path.read_text()[:-9])
    table, agrees = replay_table(path)
    assert agrees
    assert "breaks off" in str(table.caption)


def test_replay_takes_the_chunks_and_stops_of_the_recorded_policy_out_of_its_costs(tmp_path: Path) -> None:
    costs, path = tmp_path / "costs.json", tmp_path / "log.jsonl"
    rows = [{"name": name, "a": 0.05, "b": 1e-4, "c": 0.0} for name in ("one", "two")]
    costs.write_text(json.dumps({"name": "fixed", "check": 0.02, "segments": rows}))
    for recorded, seconds in (("chunked:100", 0.1 * 3 + 2e-4 * 250 + 0.02 * 2), ("edf", 0.15 + 0.02)):
        core = Scheduler(recorded, predictor=CostPredictor(load_costs(costs)))
        with Recorder(path, core) as recorder:
            log = lambda event, commands: recorder.record([event], commands)  # noqa: E731
            request = Request("r", 0.0, 9.0, 250, 0.15)
            Simulator(recorded, load_costs(costs), core=core, log=log).run([request])
        for other, expected in ((recorded, seconds), ("fcfs", 0.15)):
            table, _ = replay_table(path, other, costs=costs)
            shown = [str(cell) for cell in table.columns[3].cells]
            assert shown[0] == f"{seconds:.3f}", "as recorded"
            assert shown[-1] == f"{expected:.3f}", other


def test_synthetic_traffic_can_be_bursty() -> None:
    seen: list[float] = []

    def runner(setup: SweepSetup, keys: Sequence[CellKey]) -> list[Cell]:
        seen.append(max(b.arrival - a.arrival for a, b in pairwise(setup.rows)))
        return [run_cell(setup, key) for key in keys]

    for burstiness in (1.0, 0.1):
        run_bench_goodput(
            None, ["fcfs"], rates=[1.0], seeds=1, num_prompts=50, burstiness=burstiness, runner=runner
        )
    assert seen[1] > 2 * seen[0]

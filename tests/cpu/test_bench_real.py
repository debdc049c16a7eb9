"""The measurement on a real engine: its plans and promises, one small run in its own process, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from typer.testing import CliRunner

from fpcompile.errors import InvalidInputError, UsageError
from fpcompile.models.zoo import tiny_model
from fpcompile.scheduler import CostTable, Request, make_policy, profile
from fpcompile.scheduler.simulator import simulate
from fpcompile.scheduler.synthetic import synthetic_trace
from fpcompile.serving import bench_device
from fpcompile.serving.bench_cli import app
from fpcompile.serving.bench_real import Measured, affordable, paper_slos, scaled
from fpcompile.serving.bench_worker import plan_of


def test_a_policys_grain_is_executed_by_a_program_that_stops_there() -> None:
    plans = {
        "fcfs": ("model", None, None),
        "s-edf": ("operator", None, None),
        "flowprefill": ("operator", None, None),
        "fpcompile": ("operator", 2.0, None),
        "chunked:512,edf": ("model", None, 512),
        "vllm:2048,256": ("model", None, 256),
        "vllm:2048": ("model", None, 2048),
        "vllm:64,512": ("model", None, 64),
    }
    assert {spec: plan_of(make_policy(spec)) for spec in plans} == plans


def test_promises_keep_the_papers_multiples_of_the_isolated_ttft() -> None:
    rows = synthetic_trace(50, seed=1)
    slos, multiples = paper_slos(rows, 0.1, lambda tokens: 1e-3 * tokens)
    mean = fmean(row.tokens for row in rows if row.klass == "text")
    assert multiples["text"] == pytest.approx(0.25 / profile().seconds(round(mean)))
    assert slos["text"] == pytest.approx(multiples["text"] * 1e-4 * mean)
    assert [row.tokens for row in scaled(rows, 0.5)] == [max(1, round(0.5 * row.tokens)) for row in rows]
    with pytest.raises(InvalidInputError):
        scaled(rows, 0.0)


def test_isolated_times_are_linear_between_what_was_measured_and_slow_the_table_down() -> None:
    table = CostTable.from_segments([("all", (0.0, 1e-3, 0.0))])
    busy, rested = {10: 0.03, 20: 0.06}, {10: 0.04, 20: 0.05}
    one = Measured(("model", None, None), table, {10: 0.02, 20: 0.04, 40: 0.05}, busy, rested)
    assert one.seconds(15) == pytest.approx(0.03)
    assert one.seconds(30) == pytest.approx(0.045)
    assert one.seconds(60) == pytest.approx(0.06), "and beyond"
    assert one.occupied(15) == pytest.approx(0.045)
    assert one.slowdown(Request("r", 0.0, 1.0, 20, 0.02)) == pytest.approx(3.0)
    assert one.predictor().predict(10) == pytest.approx(0.03, rel=0.1)
    assert one.wake(Request("r", 0.0, 1.0, 10, 0.01)) == pytest.approx(0.01), "when it finds the device idle"
    assert one.wake(Request("r", 0.0, 1.0, 20, 0.02)) == 0.0
    slower = one.at_pace(1.5)
    assert slower.wake(Request("r", 0.0, 1.0, 10, 0.01)) == pytest.approx(0.015)
    assert slower.occupied(15) == pytest.approx(1.5 * one.occupied(15)), "a machine that others use too"
    assert slower.seconds(15) == pytest.approx(1.5 * one.seconds(15))
    request = Request("r", 0.0, 1.0, 20, 0.02)
    assert slower.priced([request]) == [replace(request, cost=0.09)], "decides by what it has learnt there"


def test_a_trace_whose_prompts_all_have_one_length_is_measured_there() -> None:
    table = CostTable.from_segments([("all", (0.0, 1e-3, 0.0))])
    one = Measured(("model", None, None), table, {20: 0.05}, {20: 0.05}, {20: 0.05})
    assert [one.seconds(tokens) for tokens in (1, 20, 40)] == [0.05] * 3
    assert one.slowdown(Request("r", 0.0, 1.0, 20, 0.02)) == pytest.approx(2.5)
    assert one.predictor().predict(20) == pytest.approx(0.05)


def test_a_prompt_in_slices_is_charged_for_each_of_them() -> None:
    table = CostTable.from_segments([("all", (1e-2, 1e-3, 1e-5))])
    seconds = {20: 0.1, 40: 0.2}
    one = Measured(("model", None, 16), table, seconds, seconds, seconds)
    whole = 1e-2 + 40e-3 + 1e-5 * 40**2
    assert one.tabulated(40) == pytest.approx(whole + 2e-2), "three slices: the fixed part twice more"
    assert one.slowdown(Request("r", 0.0, 1.0, 40, 0.02)) == pytest.approx(0.2 / (whole + 2e-2))
    simulated = simulate("chunked:16", [Request("r", 0.0, 1.0, 40, 0.02)], table, slowdown=one.slowdown)
    assert simulated.outcomes[0].ttft == pytest.approx(0.2), "the simulated device takes what was measured"
    stepped = simulate("vllm:64,16", [Request("r", 0.0, 1.0, 40, 0.02)], table, slowdown=one.slowdown)
    assert stepped.outcomes[0].ttft == pytest.approx(0.2)


@pytest.mark.slow
def test_a_measurement_accounts_for_every_request_and_stands_beside_its_simulation(tmp_path: Path) -> None:
    model, trace = tmp_path / "model", tmp_path / "small.csv"
    tiny_model("qwen3").save_pretrained(model)
    rows = synthetic_trace(40, seed=4)
    lines = [f"{row.arrival:.6f},{row.tokens},{row.output_tokens},{row.klass}" for row in rows]
    trace.write_text("\n".join(["arrival_s,input_tokens,output_tokens,type", *lines]) + "\n")
    arguments = [
        "goodput",
        "--real",
        "--trace",
        str(trace),
        "--model",
        str(model),
        "--policies",
        "fcfs;s-edf;flowprefill;vllm:64,16",
    ]
    arguments += ["--rates", "20,40", "--num-prompts", "30", "--length-scale", "0.01"]
    arguments += ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["unserved"] == 0
    assert len(report["pace"]) == 8
    assert all(pace > 0 for pace in report["pace"])
    assert report["num_prompts"] == 30
    policies = ("fcfs", "s-edf", "flowprefill", "vllm:64,16")
    assert set(report["policies"]) == set(report["simulated"]["policies"]) == set(policies)
    compared = report["comparison"]["rows"]
    assert [(row["policy"], row["rate"], row["requests"]) for row in compared] == [
        (policy, rate, 30) for policy in policies for rate in (20.0, 40.0)
    ]
    for row in compared:
        assert 0 <= row["overall"] <= 1
        assert row["mean_ttft"] > 0
        assert set(row["by_class"]) == set(row["by_class_simulated"])
    assert set(report["isolated"]) == {"model", "operator", "model, slices of 16 tokens"}
    assert all(
        entry[name] > 0 for entry in report["isolated"]["operator"] for name in ("measured_s", "rested_s")
    )
    page = (tmp_path / "r.md").read_text()
    assert page.count("| `s-edf` |") == 3
    assert "Within the limits" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "flowprefil"], "flowprefill"),
        (["--policies", "vllm:0"], "token budget"),
        (["--policies", "fcfs,layered:4"], "'layered:4' cannot be measured"),
        (["--policies", "layered:0,edf"], "groups of layers"),
        (["--policies", "flowprefill-published"], "use --simulate"),
        (["--bound"], "--bound"),
        (["--costs", "x.json"], "--costs"),
        (["--length-scale", "2"], "length scale"),
        (["--minutes", "nan"], "minutes"),
        (["--rates", "0"], "rate"),
        (["--kv-blocks", "0"], "kv_blocks"),
        (["--model", "missing"], "no model folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["goodput", "--real", *options])
    assert result.exit_code == 2
    assert message in result.output


class _Child:
    """A child process that died behind its first ``answers`` answers: context, pipe and process in one."""

    def __init__(self, answers: int, death: type[Exception]) -> None:
        self.left, self.death = answers, death
        self.sent: list[str] = []

    def Pipe(self) -> tuple[_Child, _Child]:
        return self, self

    def Process(self, **_: Any) -> _Child:
        return self

    def start(self) -> None: ...

    def close(self) -> None: ...

    def send(self, message: tuple[Any, ...]) -> None:
        self.sent.append(message[0])
        if not self.left and self.death is BrokenPipeError:
            raise BrokenPipeError

    def recv(self) -> tuple[None, None]:
        if not self.left:
            raise self.death
        self.left -= 1
        return None, None


@pytest.mark.parametrize("death", [BrokenPipeError, ConnectionResetError, EOFError])
@pytest.mark.parametrize("answers", [0, 1])
def test_a_child_that_died_is_a_typed_error_wherever_it_is_noticed(
    monkeypatch: pytest.MonkeyPatch, answers: int, death: type[Exception]
) -> None:
    child = _Child(answers, death)
    monkeypatch.setattr(bench_device, "get_context", lambda _: child)
    device = bench_device.RealDevice(None)
    with pytest.raises(UsageError, match="process has ended"):
        device.serve(("model", None, None), "fcfs", [Request("r", 0.0, 1.0, 4, 0.1)], {})
    late = ["submit"] if death is BrokenPipeError else ["submit", "collect"]
    assert child.sent == ["engine", *late][: None if answers else 1], "at a submit as at a question"


def test_the_time_that_is_left_sets_the_number_of_requests() -> None:
    assert abs(affordable(400.0, [10.0, 20.0], policies=2, seeds=1) - 1200) <= 1, "0.9 * 400 / (2 * 0.15)"
    with pytest.raises(UsageError, match="too little time") as told:
        affordable(1.0, [10.0], policies=1, seeds=1)
    assert "--minutes" in str(told.value)

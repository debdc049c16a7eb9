"""The demonstration on tiny models: figures, files, that it can fail; comparison of bits and of times."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import fpcompile
from fpcompile.cli import app
from fpcompile.cli.bits import compare_outputs
from fpcompile.cli.demo import run_demo
from fpcompile.cli.demo_times import ARRIVALS, Speed
from fpcompile.cli.demo_values import DemoOptions, DemoResult
from fpcompile.cli.interleave import FEWEST, Spread, busy_note, interleave, percentile, ratio
from fpcompile.cli.report import demo_json, show_demo
from fpcompile.errors import InvalidInputError
from fpcompile.models.zoo import sample_ids, tiny_config, tiny_model

PNG = b"\x89PNG\r\n\x1a\n"
NAMES = ["long", *(f"urgent {i}" for i in range(1, len(ARRIVALS) + 1))]


@contextlib.contextmanager
def stage(title: str, steps: int) -> Iterator[Callable[[], object]]:
    """A stage that insists on its steps being taken, all of them."""
    taken: list[int] = []
    yield lambda: taken.append(1)
    assert len(taken) <= steps, title


def words(text: str) -> str:
    """The text with single spaces."""
    return " ".join(text.split())


def options(**changes: Any) -> DemoOptions:
    return DemoOptions(**{"model": "tiny:qwen3", "long_tokens": 500, "urgent_tokens": 8, **changes})


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path]:
    folder = tmp_path_factory.mktemp("demo") / "made" / "for it"
    return show_demo(options(output=folder, urgent_slo=30.0)), folder


@pytest.mark.slow
def test_every_result_has_the_models_bits(shown: tuple[DemoResult, Path]) -> None:
    result, _ = shown
    assert result.bits_equal
    for run in result.runs:
        for outcome in run.outcomes:
            assert outcome.bits.equal
            assert outcome.bits.compared[0] == "logits"
            assert len(outcome.bits.compared) > 1, "keys and values are compared, too"


@pytest.mark.slow
def test_both_policies_serve_the_same_requests(shown: tuple[DemoResult, Path]) -> None:
    result, _ = shown
    assert [run.policy for run in result.runs] == ["fcfs", "s-edf"]
    assert [p.name for p in result.prompts] == NAMES
    for run in result.runs:
        assert [o.name for o in run.outcomes] == NAMES
        assert all(o.ttft > 0 and o.waited >= 0 for o in run.outcomes)
        assert {span.lane for span in run.spans} == set(NAMES)
    assert sum(o.preemptions for o in result.runs[0].outcomes) == 0, "fcfs never preempts"
    assert result.runs[0].blocking == ()
    assert len(result.runs[1].blocking) <= len(ARRIVALS)


@pytest.mark.slow
def test_the_trace_opens_in_perfetto_and_has_the_figures(shown: tuple[DemoResult, Path]) -> None:
    result, folder = shown
    content = json.loads((folder / "timeline.json").read_text())
    assert set(content) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert {e["ph"] for e in content["traceEvents"]} >= {"M", "X", "i"}
    figures = content["otherData"]
    assert figures == json.loads(json.dumps(demo_json(result)))
    assert figures["bits_equal"] is True
    assert figures["segmented_over_unmodified"]["count"] >= FEWEST
    for policy in figures["policies"]:
        for request in policy["requests"]:
            assert set(request) == {"name", "ttft", "met", "waited", "suspended", "preemptions", "bits"}


@pytest.mark.slow
def test_the_picture_is_a_png(shown: tuple[DemoResult, Path]) -> None:
    assert (shown[1] / "timeline.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_the_command_prints_tables(tmp_path: Path) -> None:
    arguments = ["--model", "tiny:llama", "--long-tokens", "300", "--urgent-tokens", "8", "--policy", "edf"]
    done = CliRunner().invoke(app, ["demo", *arguments, "--output", str(tmp_path)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, (done.output, done.exception)
    assert "bits equal to the unmodified model yes (logits, keys, values of 12 results)" in words(done.output)
    for label in (*NAMES, "TTFT, fcfs", "TTFT, edf", "blocking time, median", "blocking time, max"):
        assert label in done.output
    for label in ("SLO met", "slowdown of the long one", "segmented / unmodified, 300 tokens"):
        assert label in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["timeline.json", "timeline.png"]


@pytest.mark.slow
def test_one_policy_runs_once() -> None:
    assert [run.policy for run in run_demo(options(policy="fcfs", long_tokens=64), stage).runs] == ["fcfs"]


@pytest.mark.slow
def test_wrong_bits_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One weight of the program is another than the model's: the demonstration must say NO."""
    from fpcompile.cli import demo

    def tampered(model: Any, **kwargs: Any) -> Any:
        other = tiny_model("qwen3")
        with torch.no_grad():
            next(other.parameters()).add_(2**-7)
        return fpcompile.segment(other, **kwargs)

    monkeypatch.setattr(demo, "segment", tampered)
    result = run_demo(options(long_tokens=64), stage)
    assert not result.bits_equal
    assert not any(outcome.bits.equal for run in result.runs for outcome in run.outcomes)
    assert all(outcome.bits.difference > 0 for run in result.runs for outcome in run.outcomes)

    monkeypatch.setattr("fpcompile.cli.report.run_demo", lambda *_: result)
    done = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)], env={"COLUMNS": "120"})
    assert "bits equal to the unmodified model NO" in words(done.output)
    assert "DIFFER" in done.output
    assert done.exit_code == 1


@given(
    long=st.floats(0.5, 600.0),
    urgent_part=st.floats(1e-4, 0.02),
    segment_part=st.floats(1e-4, 0.03),
    hiccups=st.lists(st.floats(1.0, 50.0), max_size=2),
    meanwhile=st.floats(0.8, 2.0),
)
def test_the_urgent_slo_separates_who_overtakes_from_who_waits(
    long: float, urgent_part: float, segment_part: float, hiccups: list[float], meanwhile: float
) -> None:
    """Whatever timings other processes spoil, and if the machine has another speed when it serves."""
    urgent, segment = urgent_part * long, segment_part * long
    speed = Speed(
        long=[*(h * long for h in hiccups), long],
        urgent=[*(h * urgent for h in hiccups), urgent],
        predicted_urgent=urgent,
        longest_segment=segment,
    )
    slo, last = speed.urgent_slo(), speed.arrivals()[-1]
    assert last < meanwhile * long, "it arrives during the long prefill"
    assert meanwhile * (long + urgent) - last > slo, "who waits for the end is late"
    assert meanwhile * (segment + 2 * urgent) < slo, "who overtakes is not, behind a segment and another one"


def test_a_promise_has_two_digits() -> None:
    speed = Speed(long=[8.1234], urgent=[0.01], predicted_urgent=0.02, longest_segment=0.1)
    assert speed.urgent_slo() == 0.63
    assert speed.long_slo() == 24.0


def test_an_urgent_prompt_that_is_long_itself_is_not_promised_what_fcfs_keeps() -> None:
    speed = Speed(long=[8.0], urgent=[7.0], predicted_urgent=7.0, longest_segment=0.1)
    assert speed.urgent_slo() < (1 - ARRIVALS[-1]) * 8.0 + 7.0


@pytest.mark.parametrize("which", ["long", "urgent"])
@pytest.mark.parametrize("model", ["qwen3-110m", "tiny:gpt2", "folder"])
def test_a_prompt_beyond_the_models_positions_fails_before_anything_is_loaded(
    which: str, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fpcompile.cli import demo

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model is loaded")

    if model == "folder":
        tiny_config("llama").save_pretrained(tmp_path)
        model = str(tmp_path)
    monkeypatch.setattr(demo, "load_model", loaded)
    with pytest.raises(InvalidInputError, match=f"the {which} prompt is longer than the positions") as caught:
        run_demo(options(model=model, **{f"{which}_tokens": 100_000}), stage)
    assert f"--{which}-tokens" in str(caught.value)
    with pytest.raises(AssertionError, match="a model is loaded"):
        run_demo(options(model=model, long_tokens=64), stage)


# ---- bits


def output(logits: torch.Tensor, cache: Any = None) -> Any:
    return SimpleNamespace(logits=logits, past_key_values=cache)


def test_a_single_bit_is_a_difference() -> None:
    logits = torch.tensor([1.0, 0.0, 3.0])
    assert compare_outputs(output(logits), output(logits.clone())).equal
    assert not compare_outputs(output(logits), output(torch.nextafter(logits, torch.tensor(9.0)))).equal
    assert not compare_outputs(output(logits), output(torch.tensor([1.0, -0.0, 3.0]))).equal
    assert not compare_outputs(output(logits), output(logits.double())).equal
    assert not compare_outputs(output(logits), output(logits[:2])).equal


def test_nan_equals_the_same_nan() -> None:
    logits = torch.tensor([math.nan])
    assert compare_outputs(output(logits), output(logits.clone())).equal


def test_caches_are_compared_when_both_have_one() -> None:
    model = tiny_model("llama")
    ids = sample_ids(9)
    with torch.no_grad():
        a, b = (model(ids, use_cache=True) for _ in range(2))
    assert compare_outputs(a, b).equal
    assert compare_outputs(a, output(b.logits)).equal, "nothing to compare the cache with"
    b.past_key_values.layers[1].values[0, 0, 0, 0] += 1
    compared = compare_outputs(a, b)
    assert not compared.equal
    assert compared.difference == 0.0
    assert "values 1" in compared.compared


def test_a_missing_layer_is_a_difference() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        a, b = (model(sample_ids(9), use_cache=True) for _ in range(2))
    del b.past_key_values.layers[1]
    assert not compare_outputs(a, b).equal
    assert not compare_outputs(b, a).equal


# ---- interleaved comparison


class Clock:
    """Seconds that pass only when something is called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def takes(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now += seconds

        return call

    def __call__(self) -> float:
        return self.now


def test_rounds_are_interleaved_and_warm_up_is_dropped() -> None:
    clock = Clock()
    candidates = {"a": clock.takes("a", 2.0), "b": clock.takes("b", 3.0)}
    seconds = interleave(candidates, rounds=20, warmup=2, clock=clock)
    assert seconds == {"a": [2.0] * 20, "b": [3.0] * 20}
    rounds = [tuple(clock.calls[i : i + 2]) for i in range(0, len(clock.calls), 2)]
    assert len(rounds) == 22
    assert set(rounds) == {("a", "b"), ("b", "a")}, "the order inside a round is drawn anew"
    assert ratio(seconds, "b", "a") == Spread(1.5, 1.5, 1.5, 1.5, 1.5, 20)


def test_a_budget_ends_it_but_not_before_the_fewest_rounds() -> None:
    for budget, expected in ((0.0, FEWEST), (50.0, 9), (1e9, 12)):
        clock = Clock()
        seconds = interleave({"a": clock.takes("a", 5.0)}, rounds=12, budget=budget, clock=clock)
        assert len(seconds["a"]) == expected


def test_the_device_is_idle_at_every_clock_reading() -> None:
    clock, pending = Clock(), [0.0]

    def launch() -> None:
        pending[0] = 4.0

    def synchronize() -> None:
        clock.now += pending[0]
        pending[0] = 0.0

    seconds = interleave({"a": launch}, rounds=3, clock=clock, synchronize=synchronize)
    assert seconds == {"a": [4.0] * 3}


def test_percentiles_are_linear_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 0) == 1.0
    assert percentile([1.0, 2.0], 100) == 2.0
    assert percentile([7.0], 99) == 7.0
    with pytest.raises(InvalidInputError, match="empty"):
        Spread.of([])


def test_a_busy_machine_is_named() -> None:
    assert busy_note(load=1.0, cores=2) is None
    assert "load average 1.1 on 2 cores" in (busy_note(load=1.1, cores=2) or "")

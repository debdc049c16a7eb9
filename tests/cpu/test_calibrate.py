"""Calibration: what is measured, what is fitted, and that measuring changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.executor import calibrate as calibration
from fpcompile.executor.cost_model import Coefficients, CostModel
from fpcompile.executor.tile_costs import of_tiles
from fpcompile.models.zoo import sample_ids, tiny_model
from tests.cpu.support import differences, finish, model_of, outcome, program_of, reference

LENGTHS = (8, 16, 32)


@pytest.fixture(scope="module")
def program() -> fpcompile.Program:
    """A program of its own: calibrating is the one thing that changes a program."""
    return fpcompile.segment(tiny_model("llama"), route="packed", verify=False)


@pytest.fixture(scope="module")
def costs(program: fpcompile.Program) -> CostModel:
    return program.calibrate(lengths=LENGTHS, seconds=30.0)


@pytest.mark.slow
def test_every_segment_has_a_price(program: fpcompile.Program, costs: CostModel) -> None:
    assert program.costs is costs
    assert costs.device == "cpu"
    for segment in program.segments:
        seconds = [program.segment_seconds(segment.index, tokens=n) for n in (1, 32, 4096)]
        assert all(math.isfinite(s) and s > 0 for s in seconds)
        assert seconds == sorted(seconds)
    assert all(min(c.a, c.b, c.d) >= 0 for c in costs.coefficients)


@pytest.mark.slow
def test_what_was_asked_is_what_was_measured(program: fpcompile.Program, costs: CostModel) -> None:
    of_stages = {key: found for key, found in costs.samples.items() if not of_tiles(key)}
    assert set(of_stages) == {stage.key for stage in program.stages}
    rows = {stage.key for stage in program.stages if stage.over == "rows"}
    for key, samples in of_stages.items():
        assert [n for n, _ in samples] == [1, *LENGTHS] if key in rows else list(LENGTHS)
        assert all(seconds > 0 for _, seconds in samples)


@pytest.mark.slow
def test_identical_layers_have_one_price(program: fpcompile.Program, costs: CostModel) -> None:
    """The measurements of functions that layers share are pooled."""
    assert len({key for key in costs.samples if not of_tiles(key)}) < len(program.segments)
    prices = [
        program.segment_seconds(s.index, tokens=100) for s in program.segments if s.name.endswith("o_proj")
    ]
    assert len(prices) == 2
    assert prices[0] == prices[1]


@pytest.mark.slow
def test_a_prediction_is_the_sum_of_what_is_left(program: fpcompile.Program, costs: CostModel) -> None:
    size = {"tokens": 100, "rows": 3, "context": 130}
    every = [program.segment_seconds(s.index, **size) for s in program.segments]
    for start in range(len(every) + 1):
        assert program.predict(start=start, **size) == pytest.approx(sum(every[start:]), abs=1e-12)
    assert program.predict(tokens=100) == program.predict(tokens=100, context=100, rows=1)
    far = [program.segment_seconds(s.index, tokens=1, rows=1, context=4000) for s in program.segments]
    assert program.predict(tokens=1, context=4000) == pytest.approx(sum(far), abs=1e-12)


@pytest.mark.slow
def test_only_the_head_depends_on_the_rows(program: fpcompile.Program, costs: CostModel) -> None:
    def price(index: int, tokens: int, rows: int) -> float:
        return program.segment_seconds(index, tokens=tokens, rows=rows)

    head = program.segments[-1]
    assert head.name == "lm_head"
    assert price(head.index, 8, 3) == price(head.index, 4000, 3)
    for segment in program.segments[:-2]:  # the one before the head selects the rows
        assert price(segment.index, 8, 3) == price(segment.index, 8, 300)


@pytest.mark.slow
def test_calibrating_changes_no_bit_and_no_model() -> None:
    model = tiny_model("gpt_oss")
    program = fpcompile.segment(model, route="packed", verify=False)
    ids = sample_ids(20)
    expected = reference(model, ids)
    run = program.start(ids)
    run.step()
    state = torch.get_rng_state()
    program.calibrate(lengths=(4, 8), seconds=5.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert differences(finish(run), expected) == []
    assert differences(outcome(program(ids)), expected) == []


@pytest.mark.slow
def test_a_model_with_few_positions_is_measured_within_them() -> None:
    program = fpcompile.segment(
        tiny_model("llama", overrides={"max_position_embeddings": 24}), route="packed", verify=False
    )
    costs = program.calibrate(lengths=(16, 64, 128), seconds=5.0)
    assert {n for samples in costs.samples.values() for n, _ in samples} == {1, 16, 24}


def of_stages(program: fpcompile.Program, **options: Any) -> CostModel:
    """Calibrate without tiles, which are measured by another clock."""
    return program.use_costs(calibration.measure(program, **options))


def _clock(ticks: Iterator[float]) -> object:
    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return next(ticks)

    return Clock


@pytest.mark.slow
def test_a_known_cost_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that charges 1 ms + 10 us per token + 0.1 us per attended pair, that is predicted."""
    program = fpcompile.segment(tiny_model("llama"), route="packed", verify=False)
    now = 0.0

    def perf_counter() -> float:
        return now

    class Time:
        pass

    Time.perf_counter = staticmethod(perf_counter)  # type: ignore[attr-defined]
    step = fpcompile.Run.step

    def charged(run: fpcompile.Run) -> None:
        nonlocal now
        stage = run.program.stages[run.next_stage]
        size = run.rows if stage.over == "rows" else run.tokens
        step(run)
        now += 1e-3 + 1e-5 * size + (1e-7 * size * size if stage.over == "attention" else 0.0)

    monkeypatch.setattr(calibration, "time", Time)
    monkeypatch.setattr(fpcompile.Run, "step", charged)
    costs = of_stages(program, lengths=(16, 64, 256), seconds=1e9)
    for found, stage in zip(costs.coefficients, program.stages, strict=True):
        pairs = 1e-7 if stage.over == "attention" else 0.0
        assert (found.a, found.b, found.d) == pytest.approx((1e-3, 1e-5, pairs), rel=1e-3)
    attention = next(s.index for s in program.segments if s.kind == "attention")
    assert program.segment_seconds(attention, tokens=1000) == pytest.approx(1e-3 + 1e-2 + 1e-1, rel=1e-3)
    assert program.segment_seconds(0, tokens=1000) == pytest.approx(1e-3 + 1e-2, rel=1e-3)


@pytest.mark.slow
def test_a_long_length_is_measured_on_the_layers_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that runs out of time, repeated layers are left out, and every stage has its samples."""
    model = tiny_model("llama", overrides={"num_hidden_layers": 8})
    program = fpcompile.segment(model, route="packed", verify=False)
    now, steps = 0.0, 0

    class Time:
        @staticmethod
        def perf_counter() -> float:
            return now

    step = fpcompile.Run.step

    def charged(run: fpcompile.Run) -> None:
        nonlocal now, steps
        step(run)
        now, steps = now + 1e-5 * run.tokens, steps + 1

    monkeypatch.setattr(calibration, "time", Time)
    monkeypatch.setattr(fpcompile.Run, "step", charged)
    costs = of_stages(program, lengths=(4, 8, 16, 32), seconds=0.6)
    assert {n for samples in costs.samples.values() for n, _ in samples} == {1, 4, 8, 16, 32}
    for stage in program.stages:
        assert costs.samples[stage.key][-1][0] == 32
    assert steps < 12 * len(program.stages)  # two to begin with, three of three lengths, and three short ones
    ids = sample_ids(20)
    assert differences(outcome(program(ids)), reference(model, ids)) == []


class Busy:
    """A clock that charges 1 µs per token and step, and what ``others(step)`` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: Callable[[int], float]) -> None:
        self.now, self.steps = 0.0, 0
        own = fpcompile.Run.step

        def charged(run: fpcompile.Run) -> None:
            own(run)
            self.now += 1e-6 * run.tokens + others(self.steps)
            self.steps += 1

        class Time:
            perf_counter = staticmethod(lambda: self.now)

        monkeypatch.setattr(calibration, "time", Time)
        monkeypatch.setattr(fpcompile.Run, "step", charged)


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, 5])
def test_others_on_the_machine_neither_stop_nor_spoil_it(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step in ``every`` takes 2 ms more, which is a hundred times what the shorter steps take."""
    program = fpcompile.segment(tiny_model("llama"), route="packed", verify=False)
    Busy(monkeypatch, lambda step: 2e-3 if step % every == 0 else 0.0)
    costs = of_stages(program, lengths=(4, 8, 16, 32, 64, 128, 256), seconds=2.0)
    for stage in program.stages:
        assert costs.samples[stage.key][-1][0] == 256
    spoiled = [
        found
        for stage in program.stages
        for n, found in costs.samples[stage.key]
        if found > 1.5e-6 * max(n, 256)
    ]
    assert len(spoiled) <= sum(len(costs.samples[s.key]) for s in program.stages) / 4


@pytest.mark.slow
def test_without_time_the_first_lengths_are_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = fpcompile.segment(tiny_model("llama"), route="packed", verify=False)
    Busy(monkeypatch, lambda step: 5e-3)
    costs = of_stages(program, lengths=(1, 2, 4, 8, 16, 32, 64, 128, 256), seconds=0.5)
    for stage in program.stages:
        assert len(costs.samples[stage.key]) >= 4
    assert "longer prompts are predicted from these" in caplog.text


@pytest.mark.slow
def test_a_long_length_is_run_once_where_the_time_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """17 steps of 128 µs: one run fits into what is left, three do not; then nothing is left."""
    program = fpcompile.segment(tiny_model("llama"), route="packed", verify=False)
    clock = Busy(monkeypatch, lambda step: 0.0)
    calls: list[int] = []
    own = calibration._sample

    def counted(program: fpcompile.Program, length: int, *, rows: int) -> fpcompile.Run:
        calls.append(length)
        return own(program, length, rows=rows)

    monkeypatch.setattr(calibration, "_sample", counted)
    of_stages(program, lengths=(4, 8, 16, 32, 64, 128, 256), seconds=0.012)
    assert [calls.count(n) for n in (4, 32, 64, 128, 256)] == [5, 3, 3, 1, 0]
    assert clock.now <= 0.012


def test_seconds_are_those_of_the_formula() -> None:
    costs = Coefficients(a=1.0, b=0.5, d=0.25)
    assert costs.seconds(tokens=4, context=4) == 1.0 + 0.5 * 4 + 0.25 * 16
    assert costs.seconds(tokens=4, context=10) == 1.0 + 0.5 * 4 + 0.25 * 4 * 16
    assert costs.seconds(tokens=1, context=1) == 1.75


@pytest.mark.slow
def test_prices_come_by_themselves_at_the_first_question() -> None:
    program = fpcompile.segment(
        tiny_model("llama", overrides={"max_position_embeddings": 16, "num_hidden_layers": 1}),
        route="packed",
        verify=False,
    )
    assert program.predict(tokens=8) > 0
    assert program.costs is program.costs
    assert model_of("llama") is model_of("llama")
    assert program_of("llama") is not program

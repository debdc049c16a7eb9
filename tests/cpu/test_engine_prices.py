"""Predictions: measured in the device thread, corrected by what runs took, and never part of the bits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from fpcompile.engine.engine import Engine
from fpcompile.models.zoo import sample_ids
from fpcompile.scheduler import Yielded
from fpcompile.scheduler.record import read_log
from tests.cpu.support import differences as bits
from tests.cpu.support import finish, outcome, program_of
from tests.cpu.test_engine_fakes import Clock, FakeProgram, drive, inline


class _Slower(FakeProgram):
    """Takes ``factor`` times as long as it predicts."""

    def __init__(self, factor: float, clock: Clock) -> None:
        super().__init__(4, seconds=factor, clock=clock)
        self._factor = factor

    def predict(self, **asked: Any) -> float:
        return super().predict(**asked) / self._factor


def test_predictions_follow_what_runs_take() -> None:
    engine = inline(_Slower(3.0, Clock()))
    assert engine.statistics().prediction_error.count == 0
    first = engine.submit([1] * 5)
    drive(engine)
    assert first.metrics.predicted_ttft == 20.0
    error = engine.statistics().prediction_error
    assert error.count == 1
    assert error.mean == pytest.approx(-2 / 3)
    assert error.worst == pytest.approx(2 / 3)
    for _ in range(30):
        engine.submit([1] * 5)
        drive(engine)
    later = engine.submit([1] * 5)
    assert later.metrics.predicted_ttft == pytest.approx(60.0, rel=0.05)
    far = engine.submit([1] * 500)
    assert far.metrics.predicted_ttft == pytest.approx(6000.0, rel=0.05), "lengths never seen follow"
    error = engine.statistics().prediction_error
    assert error.count == 31
    assert 0 < error.mean_absolute < 0.2 < error.worst


def test_what_is_left_of_a_paused_run_is_corrected_as_well(tmp_path: Path) -> None:
    clock = Clock()
    engine = inline(_Slower(3.0, clock), policy="edf", record=tmp_path / "log.jsonl")
    for _ in range(30):
        engine.submit([1] * 5)
        drive(engine)
    slow = engine.submit([1] * 5, ttft_slo=1e6)
    engine.turn()
    engine.submit([1], ttft_slo=10.0)
    drive(engine)
    engine.close()
    (left,) = [e.remaining for events, _ in read_log(tmp_path / "log.jsonl").steps for e in events
               if isinstance(e, Yielded)]  # fmt: skip
    assert left == pytest.approx(3 * 15.0, rel=0.05), "three of four segments, 5 s predicted for each"
    assert slow.metrics.executed == 60.0


def test_programs_are_corrected_apart() -> None:
    clock = Clock()
    engine = inline({"fast": FakeProgram(4, clock=clock), "slow": _Slower(2.0, clock)})
    for _ in range(30):
        for name in ("fast", "slow"):
            engine.submit([1] * 5, program=name)
        drive(engine)
    assert engine.submit([1], program="fast").metrics.predicted_ttft == pytest.approx(4.0)
    assert engine.submit([1], program="slow").metrics.predicted_ttft == pytest.approx(8.0, rel=0.05)


def test_failed_and_cancelled_runs_teach_nothing() -> None:
    def fail(run: object) -> None:
        raise ValueError

    engine = inline(_Slower(3.0, Clock()))
    engine.submit([1] * 5, at={2: fail})
    drive(engine)
    cancelled = engine.submit([1] * 5)
    engine.turn()
    cancelled.cancel()
    drive(engine)
    assert engine.statistics().prediction_error.count == 0


@pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning")  # the budget is short on purpose
def test_what_was_learnt_changes_neither_launches_nor_bits() -> None:
    program = program_of("qwen3")
    ids = sample_ids(96, seed=1)
    before = program.start(ids, max_blocking_ms=0.2)
    schedule = before.schedule
    with Engine(program) as engine:
        for _ in range(4):
            engine.submit(ids, max_blocking_ms=0.2).result(30)
        engine._driver.prices.learn("default", 96, 1.0, 50.0)
        after = engine.submit(ids, max_blocking_ms=0.2)
        assert after.metrics.predicted_ttft > program.predict(tokens=96, rows=96)
        learnt = after.result(30)
    assert program.start(ids, max_blocking_ms=0.2).schedule == schedule
    expected = finish(before)
    assert bits(outcome(learnt), expected) == []


class _Watched(FakeProgram):
    """Notes in which threads it is asked to predict."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(2)
        self.asked: list[str] = []
        self._error = error

    def predict(self, **asked: Any) -> float:
        self.asked.append(threading.current_thread().name)
        if self._error is not None:
            raise self._error
        return super().predict(**asked)


def test_programs_are_calibrated_where_they_will_run() -> None:
    program = _Watched()
    with Engine(program):
        assert program.asked == ["fpcompile-device"], "before the constructor returns"
    own = _Watched()
    Engine(own, device_thread=False).close()
    assert own.asked == [threading.current_thread().name]


@pytest.mark.parametrize("device_thread", [True, False])
def test_a_calibration_that_fails_is_the_callers_error(device_thread: bool, tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ArithmeticError, match="no clock"):
        Engine(_Watched(ArithmeticError("no clock")), device_thread=device_thread)
    for thread in threading.enumerate():
        if thread.name == "fpcompile-device":
            thread.join(20)
    assert threading.active_count() <= before

"""The watchdog: a launch that does not come to its cut; told by any thread, logged once, over at the cut."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.engine.engine import Engine
from fpcompile.engine.health import FLOOR, PATIENCE, Health, Launching, Watchdog
from fpcompile.models.zoo import sample_ids
from tests.cpu.support import program_of
from tests.cpu.test_engine_fakes import Clock, FakeProgram, Gate, drive, inline


def _records(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(r.levelno, r.getMessage()) for r in caplog.records if r.name.endswith("health")]


def _watchdog(clock: Clock, seconds: float = 0.5) -> Watchdog:
    return Watchdog(clock, lambda behind: Launching("r", "layer.3", seconds))


def test_a_cut_in_time_is_healthy() -> None:
    clock = Clock()
    watchdog = _watchdog(clock)
    assert watchdog.health() == Health(True, "", 0.0)
    watchdog.at_cut(clock())
    clock.advance(0.5 * PATIENCE)
    assert watchdog.health().healthy, "ten times the prediction are allowed"
    watchdog.at_cut(clock())
    watchdog.left()
    clock.advance(1e6)
    assert watchdog.health() == Health(True, "", 0.0), "nothing is executed"


def test_an_overdue_cut_is_an_incident_and_the_next_cut_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    watchdog = _watchdog(clock)
    clock.advance(3.0)
    watchdog.at_cut(clock())
    clock.advance(5.1)
    for _ in range(3):
        told = watchdog.health()
    assert not told.healthy
    assert told.since == 3.0, "since the last cut"
    assert "no cut for 5.1 s in segment layer.3 of request 'r', predicted to take 0.5 s" in told.reason
    assert [level for level, _ in _records(caplog)] == [logging.ERROR], "once for an incident"
    clock.advance(1.0)
    watchdog.at_cut(clock())
    assert watchdog.health() == Health(True, "", 9.1)
    assert [level for level, _ in _records(caplog)] == [logging.ERROR, logging.WARNING]
    assert "healthy again" in _records(caplog)[1][1]


def test_an_incident_that_nobody_asked_about_is_logged_by_its_end(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    watchdog = _watchdog(clock)
    for late in (6.0, 2.0, 7.0):
        watchdog.at_cut(clock())
        clock.advance(late)
    watchdog.left()
    assert [level for level, _ in _records(caplog)] == [logging.ERROR, logging.WARNING] * 2
    assert watchdog.health().healthy


def test_short_launches_have_a_floor() -> None:
    clock = Clock()
    watchdog = _watchdog(clock, seconds=1e-6)
    watchdog.at_cut(clock())
    clock.advance(FLOOR)
    assert watchdog.health().healthy
    clock.advance(1e-3)
    assert not watchdog.health().healthy


def test_what_cannot_be_told_is_judged_by_the_floor() -> None:
    clock = Clock()

    def gone(behind: int) -> Launching | None:
        raise IndexError("the run was dropped meanwhile")

    watchdog = Watchdog(clock, gone)
    watchdog.at_cut(clock())
    clock.advance(FLOOR + 0.1)
    assert "no cut for" in watchdog.health().reason


def test_cuts_read_no_prediction() -> None:
    def never(behind: int) -> Launching | None:
        raise AssertionError("a prediction was made for nothing")

    clock = Clock()
    watchdog = Watchdog(clock, never)
    for _ in range(100):
        watchdog.at_cut(clock())
        assert watchdog.health().healthy
        clock.advance(FLOOR)


def test_an_engine_in_a_segment_that_hangs_is_told_by_another_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    gate = Gate()
    with Engine(FakeProgram(4, seconds=1e-3), clock=clock) as engine:
        handle = engine.submit([1], request_id="stuck", at={2: gate})
        gate.wait()
        assert engine.health().healthy
        clock.advance(FLOOR + 0.5)
        told = engine.health()
        assert not told.healthy
        assert "layer.2" in told.reason
        assert "'stuck'" in told.reason
        engine.health()
        gate.open.set()
        handle.result(20)
        assert engine.health().healthy
    assert [level for level, _ in _records(caplog)] == [logging.ERROR, logging.WARNING]
    assert engine.health().healthy, "closed as asked"


def test_a_slow_segment_is_measured_by_its_own_prediction(caplog: pytest.LogCaptureFixture) -> None:
    """Virtual time passes inside the segment: nobody asks meanwhile, and the cut behind it judges."""
    program = FakeProgram(4, clock=Clock())  # a second for each segment
    engine = inline(program)

    def slower(seconds: float) -> Callable[[Any], None]:
        return lambda run: program.clock.advance(seconds) if program.clock else None

    engine.submit([1], at={1: slower(8.5), 3: slower(8.5)})
    drive(engine)
    assert _records(caplog) == [], "9.5 s for one"
    engine.submit([1], at={1: slower(9.5)})
    drive(engine)
    assert "in segment layer.1" in _records(caplog)[0][1]
    engine.submit([1], at={3: slower(9.5)})
    drive(engine)
    assert "in segment layer.3" in _records(caplog)[2][1], "the last one is judged by its own prediction, too"
    assert engine.health().healthy


def test_the_time_of_the_host_between_two_turns_is_not_counted() -> None:
    clock = Clock()
    program = FakeProgram(4, clock=clock)
    engine = inline(program)
    engine.submit([1])
    engine.turn()
    clock.advance(1e6)
    assert engine.health().healthy


def test_an_error_without_a_message_is_reported_too() -> None:
    watchdog = Watchdog(lambda: 0.0, lambda behind: None)
    watchdog.broke(SystemExit())
    assert "SystemExit: no message" in watchdog.health().reason


def test_a_broken_loop_stays_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    program = FakeProgram(clock=Clock())
    engine = inline(program)
    engine.submit([1])

    def breaks(*_: object, **__: object) -> None:
        raise MemoryError("no room for a list")

    monkeypatch.setattr(engine._driver.pilot, "fly", breaks)
    with pytest.raises(MemoryError):
        engine.turn()
    told = engine.health()
    assert not told.healthy
    assert "MemoryError: no room for a list" in told.reason


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning")
@pytest.mark.parametrize("budget", [None, 0.05])
def test_a_compiled_run_names_its_segment(budget: float | None) -> None:
    """Launches of a budget are several segments, or tiles of one."""
    program = program_of("llama")
    reasons: list[str] = []
    clock = Clock()

    def ask(run: fpcompile.Run, segment: Any, start: float, end: float) -> None:
        seen, clock.now = clock.now, clock.now + 100.0
        reasons.append(engine.health().reason)
        clock.now = seen

    engine = Engine(program, device_thread=False, clock=clock, on_segment=ask, policy="fcfs")
    engine.submit(sample_ids(130), max_blocking_ms=budget, request_id="x")
    before = threading.active_count()
    while engine.turn():
        pass
    assert threading.active_count() == before
    named = {reason.split("segment ")[1].split(" of ")[0] for reason in reasons}
    assert "model.layers.1.mlp.down_proj" in named
    assert all("no cut for 100 s" in reason for reason in reasons)
    assert torch.is_grad_enabled()

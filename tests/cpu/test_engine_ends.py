"""How requests end: cancelled, failed, rejected, given up by a broken policy, or left at close."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from fpcompile.engine.engine import Engine
from fpcompile.engine.errors import SchedulerFailedError
from fpcompile.errors import (
    EngineClosedError,
    InternalError,
    RequestCancelledError,
    RequestRejectedError,
    SegmentError,
)
from fpcompile.scheduler.job import RequestView
from fpcompile.scheduler.policy import KeyedPolicy, RankingPolicy
from tests.cpu.test_engine_fakes import Clock, FakeProgram, FakeRun, drive, inline, raises


def _program(segments: int = 4) -> FakeProgram:
    return FakeProgram(segments, clock=Clock())


def _assert_cancelled(engine: Engine, handle: Any, run: FakeRun) -> None:
    with pytest.raises(RequestCancelledError, match=f"'{handle.request_id}' was cancelled"):
        handle.result(0)
    assert handle.metrics.state == "cancelled"
    assert handle.metrics.slo_met is None
    assert run.released, "its memory is gone"
    statistics = engine.statistics()
    assert (statistics.cancelled, statistics.paused_bytes) == (1, 0)
    assert handle.cancel(), "cancelling twice is no mistake"
    assert engine.statistics().cancelled == 1


def test_cancel_before_the_scheduler_has_heard_of_it() -> None:
    program = _program()
    engine = inline(program)
    handle = engine.submit([1], ttft_slo=1.0)
    assert handle.cancel()
    drive(engine)
    _assert_cancelled(engine, handle, program.runs[0])
    assert program.log == []


def test_cancel_while_waiting() -> None:
    program = _program()
    engine = inline(program, policy="fcfs")
    first = engine.submit([1])
    waiting = engine.submit([2])
    engine.turn()
    assert waiting.cancel()
    drive(engine)
    _assert_cancelled(engine, waiting, program.runs[1])
    assert first.result(0) == 1
    assert [tag for tag, _ in program.log] == [1] * 4


def test_cancel_takes_effect_at_the_next_cut() -> None:
    program = _program()
    engine = inline(program)
    handles: list[Any] = []
    handles.append(engine.submit([1], at={1: lambda run: handles[0].cancel()}))
    other = engine.submit([2])
    drive(engine)
    _assert_cancelled(engine, handles[0], program.runs[0])
    assert program.log[:2] == [(1, 0), (1, 1)]
    assert [tag for tag, _ in program.log].count(1) == 2
    assert other.result(0) == 2
    assert engine.statistics().preemptions == 0
    assert engine.statistics().blocking == (), "nobody was waiting for the device"


def test_cancel_while_paused() -> None:
    program = _program()
    engine = inline(program)
    inner: list[Any] = []
    paused = engine.submit([1] * 9, at={0: lambda run: inner.append(engine.submit([2], ttft_slo=50.0))})
    engine.turn()
    engine.turn()
    assert paused.metrics.state == "paused"
    assert paused.cancel()
    assert engine.statistics().paused == 1, "until the next cut"
    engine.turn()
    _assert_cancelled(engine, paused, program.runs[0])
    drive(engine)
    assert inner[0].result(0) == 2
    assert paused.metrics.suspended > 0


def test_cancel_in_the_last_segment_is_kept() -> None:
    program = _program(2)
    engine = inline(program)
    handles: list[Any] = []
    handles.append(engine.submit([1], at={1: lambda run: handles[0].cancel()}))
    drive(engine)
    assert handles[0].metrics.state == "cancelled", "cancel() had answered True"
    with pytest.raises(RequestCancelledError):
        handles[0].result(0)
    assert engine.statistics().completed == 0


def test_cancel_of_what_fails_at_the_same_cut_is_kept() -> None:
    program = _program()
    engine = inline(program)
    handles: list[Any] = []

    def cancel_and_fail(run: FakeRun) -> None:
        handles[0].cancel()
        raises(run)

    handles.append(engine.submit([1], at={1: cancel_and_fail}))
    drive(engine)
    _assert_cancelled(engine, handles[0], program.runs[0])
    assert engine.statistics().failed == 0


def test_cancel_after_the_end_comes_too_late() -> None:
    engine = inline(_program())
    handle = engine.submit([1])
    drive(engine)
    assert handle.cancel() is False
    drive(engine)
    assert handle.result(0) == 1
    assert engine.statistics().cancelled == 0


def test_a_failing_segment_fails_its_own_request_only() -> None:
    program = _program()
    engine = inline(program)
    before = engine.submit([1], ttft_slo=50.0)
    failing = engine.submit([2], ttft_slo=60.0, at={2: raises})
    after = engine.submit([3], ttft_slo=70.0)
    drive(engine)
    with pytest.raises(SegmentError) as caught:
        failing.result(0)
    assert (caught.value.node, caught.value.source_line) == ("mm_3", "modeling_fake.py:7: x @ w")
    assert isinstance(caught.value.__cause__, ValueError)
    assert (before.result(0), after.result(0)) == (1, 3)
    assert program.runs[1].released
    assert failing.metrics.state == "failed"
    assert failing.metrics.slo_met is False
    assert engine.statistics().failed == 1


def test_a_run_without_a_result_fails_alone() -> None:
    program = _program()
    engine = inline(program)
    program.spoiled = True
    failing = engine.submit([1])
    drive(engine)
    program.spoiled = False
    with pytest.raises(RuntimeError, match="no result"):
        failing.result(0)
    fine = engine.submit([2])
    drive(engine)
    assert fine.result(0) == 2


def test_waiting_too_long_is_a_rejection() -> None:
    program = _program()
    engine = inline(program, policy="fcfs", max_queue_s=2.0)
    first = engine.submit([1])
    late = engine.submit([2], ttft_slo=1.0)
    while engine.turn(None):  # one turn is a whole run: the time comes between two of its segments
        engine._driver.validate()
    assert first.result(0) == 1
    with pytest.raises(RequestRejectedError, match="max_queue_s") as caught:
        late.result(0)
    assert caught.value.request_id == late.request_id
    assert late.metrics.ended == 2.0, "when the time had come, at a cut of the other run"
    assert late.metrics.slo_met is False
    assert program.runs[1].released
    assert engine.statistics().rejected == 1


class _Moody(KeyedPolicy):
    """First come, first served, until ``angry`` is set."""

    name = "moody"

    def __init__(self) -> None:
        self.angry = False

    def key(self, view: RequestView, now: float) -> float:
        if self.angry:
            raise ZeroDivisionError("policy")
        return view.request.arrival


@pytest.mark.parametrize("moment", ["idle", "running"])
def test_a_policy_that_raises_fails_what_it_knew_and_no_more(
    moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = _Moody()
    program = _program()
    engine = inline(program, policy=policy)
    late: list[Any] = []

    def get_angry(run: FakeRun) -> None:
        late.append(engine.submit([3]))
        policy.angry = True

    handles = [engine.submit([1], at={1: get_angry} if moment == "running" else {}), engine.submit([2])]
    with caplog.at_level(logging.ERROR):
        if moment == "idle":
            policy.angry = True
        for _ in range(3):
            engine.turn()
    for handle in handles + late:
        with pytest.raises(SchedulerFailedError, match="moody") as caught:
            handle.result(0)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert caught.value.request_id == handle.request_id
    assert all(run.released for run in program.runs)
    assert "moody" in caplog.text
    policy.angry = False
    fresh = engine.submit([4])
    drive(engine)
    assert fresh.result(0) == 4, "the engine goes on"


class _Refusing(RankingPolicy):
    """Never suggests anything."""

    name = "refusing"

    def rank(self, views: Sequence[RequestView], now: float) -> Iterable[str]:
        return ()


@pytest.mark.parametrize("drain", [True, False])
def test_close_leaves_nothing_live(drain: bool) -> None:
    program = _program()
    engine = inline(program, policy="fcfs")
    handles = [engine.submit([i]) for i in (1, 2)]
    engine.turn()
    engine.close(drain=drain)
    engine.close()
    if drain:
        assert [handle.result(0) for handle in handles] == [1, 2]
    else:
        for handle in handles:
            with pytest.raises(RequestCancelledError, match="the engine was closed"):
                handle.result(0)
        assert all(run.released for run in program.runs)
        assert program.log == [(1, 0)]
    with pytest.raises(EngineClosedError, match="create a new Engine"):
        engine.submit([3])
    assert engine.statistics().ended == 2


def test_a_drain_that_takes_too_long_cancels() -> None:
    program = _program()
    engine = inline(program)
    handle = engine.submit([1])
    engine.close(timeout=0.0)
    assert handle.metrics.state in ("cancelled", "completed")
    assert handle.done()


def test_close_does_not_wait_for_what_a_policy_holds_back() -> None:
    engine = inline(_program(), policy=_Refusing())
    handle = engine.submit([1])
    assert engine.turn() is False
    assert not handle.done()
    engine.close()
    assert handle.metrics.state == "cancelled"


def test_an_engine_left_with_an_error_does_not_drain() -> None:
    handles: list[Any] = []

    def host(engine: Engine, error: Exception | None) -> None:
        with engine:
            handles.append(engine.submit([1]))
            if error is not None:
                raise error

    with pytest.raises(KeyError, match="in the host"):
        host(inline(_program()), KeyError("in the host"))
    assert handles[0].metrics.state == "cancelled"
    host(inline(_program()), None)
    assert handles[1].result(0) == 1


def test_a_broken_loop_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of the driver itself: every waiter hears of it, and the engine says why it is closed."""
    program = _program()
    engine = inline(program)
    handles = [engine.submit([i]) for i in (1, 2)]

    def broken(run: object) -> None:
        raise AttributeError("defect")

    monkeypatch.setattr(engine._driver, "_fly", lambda flight, limit: broken(flight))
    with pytest.raises(AttributeError):
        engine.turn()
    for handle in handles:
        with pytest.raises(InternalError, match="AttributeError: defect"):
            handle.result(0)
    with pytest.raises(EngineClosedError, match="AttributeError: defect"):
        engine.submit([3])


def test_a_callback_that_leaves_does_not_end_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    engine = inline(FakeProgram(1, clock=Clock()))

    def leave(handle: Any) -> None:
        raise SystemExit(1)

    engine.submit([1]).add_done_callback(leave)
    after = engine.submit([2])
    drive(engine)
    assert after.result(0) == 2
    assert [record.message for record in caplog.records] == ["a callback of a handle raised"]

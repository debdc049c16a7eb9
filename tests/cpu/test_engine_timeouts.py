"""``submit(timeout=...)``: a request ends as timed out at the next cut, wherever it is by then."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fpcompile.engine.engine import Engine
from fpcompile.engine.timeouts import Timeouts
from fpcompile.errors import InvalidInputError, RequestCancelledError, RequestTimeoutError
from tests.cpu.test_engine_fakes import Clock, FakeProgram, FakeRun, Gate, drive, inline, raises


def _program(segments: int = 4) -> FakeProgram:
    return FakeProgram(segments, clock=Clock())


def _timed_out(handle: Any, run: FakeRun, timeout: float) -> None:
    with pytest.raises(RequestTimeoutError, match=repr(handle.request_id)) as caught:
        handle.result(0)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.timeout == timeout
    assert handle.metrics.state == "failed"
    assert run.released, "its memory is gone"
    assert not handle.cancel(), "it has ended otherwise"


def test_a_running_request_ends_at_the_next_cut() -> None:
    program = _program()
    engine = inline(program)
    late = engine.submit([1], timeout=1.5)  # a second for each segment
    other = engine.submit([2])
    drive(engine)
    _timed_out(late, program.runs[0], 1.5)
    assert [at for tag, at in program.log if tag == 1] == [0, 1], "the cut at 2 s is the first behind 1.5 s"
    assert other.result(0) == 2
    assert late.metrics.ended == 2.0
    assert engine.statistics().blocking == (), "nobody was waiting for the device"
    assert (engine.statistics().failed, engine.statistics().cancelled) == (1, 0)


def test_a_waiting_request_ends_while_another_one_runs() -> None:
    program = _program(6)
    engine = inline(program, policy="fcfs")
    first = engine.submit([1])
    waiting = engine.submit([2], timeout=2.5)
    while not waiting.done():
        engine.turn()
    assert program.clock is not None
    assert program.clock.now == 3.0
    _timed_out(waiting, program.runs[1], 2.5)
    drive(engine)
    assert first.result(0) == 1
    assert all(tag == 1 for tag, _ in program.log)


def test_a_paused_request_ends_and_its_bytes_with_it() -> None:
    program = _program()
    engine = inline(program)
    inner: list[Any] = []
    urgent = {0: lambda run: inner.append(engine.submit([2] * 8, ttft_slo=40.0))}
    paused = engine.submit([1] * 9, at=urgent, timeout=20.0)
    engine.turn()
    engine.turn()
    assert paused.metrics.state == "paused"
    assert engine.statistics().paused_bytes > 0
    while not paused.done():
        engine.turn()
    assert not inner[0].done()
    _timed_out(paused, program.runs[0], 20.0)
    assert engine.statistics().paused_bytes == 0
    drive(engine)
    assert inner[0].result(0) == 16


def test_what_ends_in_time_is_not_touched_and_what_is_late_by_a_segment_is_kept() -> None:
    program = _program()
    engine = inline(program)
    in_time = engine.submit([1], timeout=100.0)
    drive(engine)
    at_the_end = engine.submit([2], timeout=3.5)  # over in the middle of its last segment
    drive(engine)
    assert in_time.result(0) == 1
    assert at_the_end.result(0) == 2, "nobody gains if a finished result is thrown away"


def test_the_time_counts_from_the_arrival() -> None:
    program = _program()
    engine = inline(program)
    assert program.clock is not None
    program.clock.advance(10.0)
    late = engine.submit([1], arrival=3.0, timeout=5.0)
    drive(engine)
    _timed_out(late, program.runs[0], 5.0)
    assert program.log == [], "it was late already"


def test_cancelling_comes_first() -> None:
    program = _program()
    engine = inline(program)
    handles: list[Any] = []
    handles.append(engine.submit([1], at={0: lambda run: handles[0].cancel()}, timeout=0.5))
    drive(engine)
    with pytest.raises(RequestCancelledError):
        handles[0].result(0)
    assert handles[0].metrics.state == "cancelled", "cancel() had answered True"


def test_failing_in_the_segment_in_which_the_time_is_over_is_failing() -> None:
    program = _program()
    engine = inline(program)
    handle = engine.submit([1], at={0: raises}, timeout=0.5)
    drive(engine)
    with pytest.raises(Exception, match="inf or nan"):
        handle.result(0)


def test_a_timeout_is_no_slo() -> None:
    program = _program()
    engine = inline(program)
    handle = engine.submit([1], timeout=100.0)
    assert handle.metrics.deadline == math.inf
    promised = engine.submit([1], timeout=0.5, ttft_slo=50.0)
    drive(engine)
    assert promised.metrics.slo_met is False
    assert handle.metrics.slo_met is None


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan, "1", True])
def test_a_wrong_timeout_is_refused(timeout: Any) -> None:
    engine = inline(_program())
    with pytest.raises(InvalidInputError, match="timeout"):
        engine.submit([1], timeout=timeout)
    assert not len(engine._registry)


def test_a_device_thread_times_out_what_waits() -> None:
    program = FakeProgram(2)
    with Engine(program, policy="fcfs") as engine:
        gate = Gate()
        first = engine.submit([1], at={0: gate})
        gate.wait()
        late = engine.submit([2], arrival=engine.now() - 1.0, timeout=0.5)
        gate.open.set()
        first.result(20)
        with pytest.raises(RequestTimeoutError):
            late.result(20)


def test_due_times_come_out_in_order_and_once() -> None:
    timeouts = Timeouts()
    assert timeouts.next == math.inf
    for time, name in ((3.0, "c"), (1.0, "a"), (2.0, "b"), (math.inf, "never")):
        timeouts.add(time, name)
    assert timeouts.next == 1.0
    assert timeouts.due(0.5) == []
    assert timeouts.due(2.0) == ["a", "b"]
    assert timeouts.next == 3.0
    assert timeouts.due(9.0) == ["c"]
    assert timeouts.due(9.0) == []
    assert timeouts.next == math.inf

"""The engine on a virtual clock, turned by the test: preemption, metrics, statistics, timeline, events."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fpcompile.engine.engine import Engine
from fpcompile.errors import UnknownNameError, UsageError
from fpcompile.executor.device import CpuDevice
from tests.cpu.test_engine_fakes import Clock, FakeProgram, FakeRun, drive, inline


def test_one_request() -> None:
    program = FakeProgram(3, clock=Clock(), seconds=0.5)
    engine = inline(program)
    handle = engine.submit([1, 2], ttft_slo=10.0)
    assert handle.metrics.state == "waiting"
    drive(engine)
    assert handle.result(0) == 3
    m = handle.metrics
    assert (m.state, m.request_id, m.program, m.tokens) == ("completed", "request-1", "default", 2)
    assert (m.arrival, m.queued, m.started, m.ended, m.ttft, m.executed) == (0.0, 0.0, 0.0, 3.0, 3.0, 3.0)
    assert (m.predicted_ttft, m.ttft_slo, m.deadline, m.slo_met) == (3.0, 10.0, 10.0, True)
    assert (m.preemptions, m.preempted_by, m.suspended) == (0, (), 0.0)


def _urgent_during(engine: Engine, handles: dict[str, Any], at: float = 0.25) -> Any:
    """For ``at``: while the segment runs, an urgent request is submitted ``at`` seconds before its end."""

    def submit(run: FakeRun) -> None:
        handles["urgent"] = engine.submit([5], ttft_slo=3.0, request_id="urgent")
        assert run.program.clock is not None
        run.program.clock.advance(at)

    return submit


def _overtaking(policy: str, **options: Any) -> tuple[Engine, FakeProgram, dict[str, Any]]:
    clock = Clock()
    program = FakeProgram(4, clock=clock, seconds=0.5)
    engine = inline(program, policy=policy, **options)
    handles: dict[str, Any] = {}
    during = _urgent_during(engine, handles)
    handles["long"] = engine.submit([1] * 8, ttft_slo=100.0, request_id="long", at={1: during})
    drive(engine)
    return engine, program, handles


def test_an_urgent_request_overtakes_a_long_one_at_the_next_cut() -> None:
    engine, program, handles = _overtaking("s-edf")
    assert program.log == [(1, 0), (1, 1), (5, 0), (5, 1), (5, 2), (5, 3), (1, 2), (1, 3)]
    assert (handles["long"].result(0), handles["urgent"].result(0)) == (8, 5)
    long, urgent = handles["long"].metrics, handles["urgent"].metrics
    assert (long.preemptions, long.preempted_by, long.suspended) == (1, ("urgent",), 2.0)
    assert (long.executed, long.ttft) == (16.25, 18.25)
    assert (urgent.queued, urgent.ttft, urgent.slo_met, urgent.preemptions) == (0.25, 2.25, True, 0)
    assert program.runs[0].suspended == 1, "scratch is dropped when it is paused"
    statistics = engine.statistics()
    assert (statistics.preemptions, statistics.blocking) == (1, (0.25,))
    assert (statistics.completed, statistics.ended) == (2, 2)


def test_under_fcfs_nobody_overtakes() -> None:
    engine, program, handles = _overtaking("fcfs")
    assert [tag for tag, _ in program.log] == [1] * 4 + [5] * 4
    assert handles["urgent"].metrics.slo_met is False
    assert engine.statistics().preemptions == 0
    assert math.isnan(engine.statistics().blocking_percentile(50))


def test_a_less_urgent_arrival_does_not_interrupt() -> None:
    program = FakeProgram(3, clock=Clock())
    engine = inline(program)
    late: list[Any] = []
    engine.submit([1], ttft_slo=10.0, at={0: lambda run: late.append(engine.submit([2], ttft_slo=50.0))})
    drive(engine)
    assert [tag for tag, _ in program.log] == [1, 1, 1, 2, 2, 2]
    assert program.runs[0].suspended == 0
    assert late[0].result(0) == 2


def test_a_paused_run_is_accounted() -> None:
    program = FakeProgram(4, clock=Clock(), seconds=0.5)
    engine = inline(program)
    handles: dict[str, Any] = {}
    engine.submit([1] * 8, request_id="long", at={1: _urgent_during(engine, handles)})
    for _ in range(4):
        engine.turn()
    statistics = engine.statistics()
    assert (statistics.running, statistics.paused, statistics.waiting) == (1, 1, 0)
    assert statistics.paused_bytes == 8 * 10 + 2, "live values and cache at the cut behind segment 1"
    drive(engine)
    statistics = engine.statistics()
    assert (statistics.running, statistics.paused, statistics.paused_bytes) == (0, 0, 0)


def test_the_timeline_shows_what_ran_when() -> None:
    engine, _, _ = _overtaking("s-edf")
    timeline = engine.timeline()
    told = [(s.lane, s.kind, s.start, s.end) for s in timeline.spans]
    assert told == [
        ("long", "wait", 0.0, 0.0),
        ("long", "segment", 0.0, 4.0),
        ("long", "segment", 4.0, 8.25),
        ("urgent", "wait", 8.0, 8.25),
        ("urgent", "segment", 8.25, 8.75),
        ("urgent", "segment", 8.75, 9.25),
        ("urgent", "segment", 9.25, 9.75),
        ("urgent", "segment", 9.75, 10.25),
        ("long", "preempted", 8.25, 10.25),
        ("long", "segment", 10.25, 14.25),
        ("long", "segment", 14.25, 18.25),
    ]
    marks = [(m.lane, m.kind, m.time) for m in timeline.marks]
    assert marks == [
        ("long", "arrival", 0.0),
        ("urgent", "arrival", 8.0),
        ("long", "preempt", 8.25),
        ("urgent", "first_token", 10.25),
        ("urgent", "end", 10.25),
        ("long", "first_token", 18.25),
        ("long", "end", 18.25),
    ]
    assert timeline.slos == (("long", 100.0), ("urgent", 3.0))


def test_without_a_recording_there_is_no_timeline() -> None:
    engine, _, _ = _overtaking("s-edf", record_timeline=False)
    with pytest.raises(UsageError, match="no timeline"):
        engine.timeline()


def test_hooks_see_segments_of_all_requests() -> None:
    seen: list[tuple[int, int]] = []
    clock = Clock()
    program = FakeProgram(2, clock=clock)
    for record in (True, False):
        seen.clear()
        engine = inline(
            program,
            record_timeline=record,
            on_segment=lambda run, segment, start, end: seen.append((run.tokens, segment.index)),
        )
        engine.submit([1, 1])
        engine.submit([1, 1, 1])
        drive(engine)
        assert seen == [(2, 0), (2, 1), (3, 0), (3, 1)]


def test_a_quota_yields_without_counting_as_a_preemption() -> None:
    program = FakeProgram(5, clock=Clock())
    engine = inline(program, policy="fcfs", max_segments=2)
    handle = engine.submit([1])
    drive(engine)
    assert handle.result(0) == 1
    assert handle.metrics.preemptions == 0
    assert program.runs[0].suspended == 0
    assert engine.statistics().preemptions == 0


def test_turns_of_any_size_give_the_same_order() -> None:
    logs = []
    for size in (1, 2, 3, None):
        program = FakeProgram(5, clock=Clock())
        engine = inline(program, max_segments=3)
        handles = [engine.submit([i], ttft_slo=100.0 - i) for i in (1, 2)]
        while engine.turn(size):
            engine._driver.validate()
        logs.append((program.log, [handle.result(0) for handle in handles]))
    assert logs.count(logs[0]) == len(logs)


def test_requests_that_come_together_are_decided_on_together() -> None:
    program = FakeProgram(2, clock=Clock())
    engine = inline(program)
    for slo in (30.0, 10.0, 20.0):
        engine.submit([int(slo)], ttft_slo=slo)
    drive(engine)
    assert [tag for tag, _ in program.log] == [10, 10, 20, 20, 30, 30]
    assert engine.statistics().preemptions == 0


def test_an_earlier_arrival_counts_from_then() -> None:
    clock = Clock()
    engine = inline(FakeProgram(1, clock=clock))
    clock.advance(5.0)
    handle = engine.submit([1], arrival=3.0, ttft_slo=4.0)
    drive(engine)
    assert handle.metrics.deadline == 7.0
    assert (handle.metrics.queued, handle.metrics.ttft, handle.metrics.slo_met) == (2.0, 3.0, True)


def test_a_deadline_is_an_slo_in_other_words() -> None:
    clock = Clock()
    engine = inline(FakeProgram(1, clock=clock))
    clock.advance(5.0)
    metrics = engine.submit([1], deadline=engine.now() + 2.0).metrics
    assert (metrics.deadline, metrics.ttft_slo) == (7.0, 2.0)
    free = engine.submit([1]).metrics
    assert (free.deadline, free.ttft_slo, free.slo_met) == (math.inf, math.inf, None)


def test_programs_share_the_device() -> None:
    clock = Clock()
    chat, embed = FakeProgram(3, clock=clock), FakeProgram(2, clock=clock)
    engine = inline({"chat": chat, "embed": embed})
    handles: list[Any] = []
    engine.submit(
        [1] * 10,
        program="chat",
        at={0: lambda run: handles.append(engine.submit([7], program="embed", ttft_slo=9.0))},
    )
    drive(engine)
    assert handles[0].metrics.program == "embed"
    assert handles[0].metrics.slo_met is True
    assert engine.statistics().preemptions == 1
    with pytest.raises(UnknownNameError) as caught:
        engine.submit([1], program="caht")
    assert caught.value.known == ("chat", "embed")
    assert "did you mean 'chat'" in str(caught.value)
    with pytest.raises(UnknownNameError, match="unknown program None"):
        engine.submit([1])


def test_what_an_engine_is_called() -> None:
    engine = inline(FakeProgram(1, clock=Clock()), device=CpuDevice())
    engine.submit([1])
    assert repr(engine) == "<Engine on CpuDevice(cpu): 1 live requests>"
    assert repr(engine.submit([1])) == "<Handle 'request-2': waiting>"
    drive(engine)
    engine.close()
    assert repr(engine) == "<Engine on CpuDevice(cpu): closed>"


def _spy(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, float]]]:
    """What the scheduler is told: (event, time), batch by batch."""
    told: list[list[tuple[str, float]]] = []
    handle_all = engine._driver.core.handle_all

    def spy(events: Any) -> Any:
        batch = list(events)
        told.append([(type(event).__name__, event.time) for event in batch])
        return handle_all(batch)

    monkeypatch.setattr(engine._driver.core, "handle_all", spy)
    return told


def test_the_scheduler_hears_in_order_of_time_rank_and_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    program = FakeProgram(1, clock=Clock())
    engine = inline(program, policy="fcfs")
    told = _spy(engine, monkeypatch)
    others: list[Any] = []

    def meanwhile(run: FakeRun) -> None:
        others.append(engine.submit([2]))
        assert program.clock is not None
        program.clock.advance(1.0)
        others.append(engine.submit([3]))
        waiting.cancel()

    engine.submit([1], at={0: meanwhile})
    waiting = engine.submit([4])
    drive(engine)
    assert told[0] == [("Arrival", 0.0), ("Arrival", 0.0)]
    assert told[1] == [("Arrival", 1.0), ("Completed", 2.0), ("Cancelled", 2.0), ("Arrival", 2.0)]
    assert [handle.result(0) for handle in others] == [2, 3]


def test_events_that_were_late_to_arrive_do_not_go_back_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A submitter read the clock before the device thread did, and put its request in after it."""
    clock = Clock()
    engine = inline(FakeProgram(1, clock=clock))
    told = _spy(engine, monkeypatch)
    engine.submit([1])
    drive(engine)
    clock.now = 0.25
    late = engine.submit([2])
    drive(engine)
    assert late.result(0) == 2
    assert late.metrics.arrival == 0.25
    times = [time for batch in told for _, time in batch]
    assert times == sorted(times) == [0.0, 1.0, 1.0, 1.25]


@pytest.mark.parametrize("size", [1, 2, 3, None])
def test_a_quota_counts_over_the_turns_of_the_host(size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inline(FakeProgram(7, clock=Clock()), policy="fcfs", max_segments=3)
    told = _spy(engine, monkeypatch)
    engine.submit([1])
    while engine.turn(size):
        pass
    yields = [time for batch in told for name, time in batch if name == "Yielded"]
    assert yields == [3.0, 6.0]

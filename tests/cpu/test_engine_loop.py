"""The loop that the host owns: when it returns, what it costs, what its hooks see."""

from __future__ import annotations

import logging

import pytest

from fpcompile.errors import InternalError, SegmentError
from fpcompile.executor.loop import Guarded, Outcome, _launcher, advance, iterate
from fpcompile.executor.runahead import RunAhead
from fpcompile.testing import FakeAsyncDevice, assert_yields
from tests.cpu.test_engine_fakes import Clock, FakeProgram, FakeRun, raises


def _never() -> bool:
    return False


def test_it_runs_to_the_end() -> None:
    run = FakeProgram(3).start([1])
    assert advance(run, _never) is Outcome.DONE
    assert run.executed == [0, 1, 2]
    assert advance(run, _never) is Outcome.DONE, "a run that is done stays done"


def test_stop_is_asked_before_every_launch() -> None:
    run = FakeProgram(5).start([1])
    answers = iter([False, False, True])
    assert advance(run, lambda: next(answers)) is Outcome.STOPPED
    assert run.executed == [0, 1]
    assert advance(run, lambda: True) is Outcome.STOPPED
    assert run.executed == [0, 1], "nothing is launched after stop has answered True"


@pytest.mark.parametrize("quota", [0, 1, 4])
def test_no_more_than_the_quota_is_launched(quota: int) -> None:
    run = FakeProgram(5).start([1])
    assert advance(run, _never, quota) is Outcome.QUOTA
    assert run.cursor == quota


def test_a_quota_that_reaches_the_end_is_done() -> None:
    run = FakeProgram(2).start([1])
    assert advance(run, _never, 2) is Outcome.DONE


def test_what_a_segment_raises_passes_through() -> None:
    run = FakeProgram(3).start([1], at={1: raises})
    with pytest.raises(SegmentError) as caught:
        advance(run, _never)
    assert caught.value.node == "mm_3"
    assert run.executed == [0]


def test_a_generator_yields_at_every_cut() -> None:
    run = FakeProgram(3).start([1])
    seen = []
    for segment in iterate(run):
        seen.append((segment.name, run.cursor))
    assert seen == [("layer.0", 1), ("layer.1", 2), ("layer.2", 3)]


def test_a_closed_generator_leaves_a_run_that_goes_on() -> None:
    run = FakeProgram(3).start([1])
    first = iterate(run)
    next(first)
    del first
    assert [segment.index for segment in iterate(run)] == [1, 2]
    assert run.result() == 1


def test_two_generators_interleave() -> None:
    program = FakeProgram(2)
    one, two = program.start([1]), program.start([2])
    for _ in zip(iterate(one), iterate(two), strict=True):
        pass
    assert program.log == [(1, 0), (2, 0), (1, 1), (2, 1)]


def test_hooks_see_each_launch_with_its_times() -> None:
    clock = Clock()
    run = FakeProgram(2, clock=clock, seconds=0.5).start([1])
    seen: list[tuple[object, int, float, float]] = []
    advance(run, _never, on_segment=lambda r, s, a, b: seen.append((r, s.index, a, b)), clock=clock)
    assert seen == [(run, 0, 0.0, 0.5), (run, 1, 0.5, 1.0)]


def test_without_hooks_the_loop_calls_step_itself() -> None:
    run = FakeProgram(2).start([1])

    def clock() -> float:
        raise AssertionError("the clock is read")

    assert _launcher(run, None, None, None, clock) == run.step
    assert advance(run, _never, clock=clock) is Outcome.DONE


@pytest.mark.parametrize("error", [KeyError("observer"), SystemExit(1)])
def test_a_failing_hook_is_logged_and_switched_off(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def hook(run: FakeRun, segment: object, start: float, end: float) -> None:
        calls.append(run)
        raise error

    run = FakeProgram(3).start([1])
    with caplog.at_level(logging.ERROR):
        assert advance(run, _never, on_segment=Guarded(hook)) is Outcome.DONE
    assert len(calls) == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_an_interrupt_by_the_user_goes_through_hooks() -> None:
    def hook(run: FakeRun, segment: object, start: float, end: float) -> None:
        raise KeyboardInterrupt

    guarded = Guarded(hook)
    with pytest.raises(KeyboardInterrupt):
        advance(FakeProgram(1).start([1]), _never, on_segment=guarded)
    assert guarded.hook is hook


def test_run_ahead_is_by_predicted_cost() -> None:
    device = FakeAsyncDevice()
    ahead = RunAhead(device, max_blocking=1e-3, clock=device.clock)
    run = FakeProgram(10).start([1])
    advance(run, _never, ahead=ahead, cost=lambda: 5e-4)
    assert run.done
    assert device.now == pytest.approx(8 * 5e-4), "two of ten are still in flight"
    ahead.drain()
    assert device.now == pytest.approx(10 * 5e-4)


def test_run_ahead_needs_costs() -> None:
    device = FakeAsyncDevice()
    with pytest.raises(InternalError, match="run-ahead needs predictions"):
        advance(FakeProgram(1).start([1]), _never, ahead=RunAhead(device))


def test_assert_yields_passes_and_measures() -> None:
    clock = Clock()
    run = FakeProgram(3, clock=clock, seconds=0.25).start([1])
    assert assert_yields(run, every=0.25, clock=clock) == [(f"layer.{i}", 0.25) for i in range(3)]
    assert run.done


def test_assert_yields_names_the_slow_segment() -> None:
    clock = Clock()
    run = FakeProgram(3, clock=clock, seconds=0.25).start([1], at={1: lambda run: clock.advance(1.0)})
    with pytest.raises(AssertionError, match=r"1 of 3 cuts came later than 500 ms: layer\.1: 1\.25e\+03 ms"):
        assert_yields(run, every=0.5, clock=clock)


def test_assert_yields_finds_a_run_that_goes_back() -> None:
    class Lost(FakeRun):
        def step(self) -> None:
            super().step()
            if self.cursor == 3:
                self.cursor = 1

    with pytest.raises(AssertionError, match=r"at segment 2 \(layer\.2\) went back to 1"):
        assert_yields(Lost(FakeProgram(4), [1], {}))


def test_assert_yields_finds_a_run_that_goes_on_by_itself() -> None:
    class Restless(FakeRun):
        @property
        def done(self) -> bool:
            self.cursor += 1
            return super().done

    with pytest.raises(AssertionError, match=r"although stop\(\) answered True"):
        assert_yields(Restless(FakeProgram(4), [1], {}))

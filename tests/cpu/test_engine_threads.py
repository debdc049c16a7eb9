"""The device thread: submitting threads, gates inside segments, close, fork, forgotten engines."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest

from fpcompile.engine.engine import Engine
from fpcompile.engine.errors import WrongProcessError
from fpcompile.errors import EngineClosedError, InternalError, RequestCancelledError, SegmentError
from fpcompile.scheduler.job import RequestView
from fpcompile.scheduler.policy import KeyedPolicy
from tests.cpu.test_engine_fakes import FakeProgram, FakeRun, Gate, raises


def test_a_result_crosses_threads() -> None:
    with Engine(FakeProgram()) as engine:
        assert engine.submit([1, 2]).result(20) == 3


def test_submitting_never_waits_for_the_device() -> None:
    gate = Gate()
    with Engine(FakeProgram()) as engine:
        held = engine.submit([1], at={0: gate})
        gate.wait()
        others = [engine.submit([i]) for i in range(2, 50)]
        assert not any(handle.done() for handle in others)
        gate.open.set()
        assert held.result(20) == 1
        assert [handle.result(20) for handle in others] == list(range(2, 50))


def test_an_urgent_request_preempts_a_running_one() -> None:
    program, gate = FakeProgram(5), Gate()
    with Engine(program) as engine:
        long = engine.submit([1] * 100, ttft_slo=1e6, at={1: gate})
        gate.wait()
        urgent = engine.submit([7], ttft_slo=1e3)
        gate.open.set()
        assert (urgent.result(20), long.result(20)) == (7, 100)
        assert program.log == [(1, 0), (1, 1), *((7, i) for i in range(5)), (1, 2), (1, 3), (1, 4)]
        assert long.metrics.preempted_by == (urgent.request_id,)
        assert len(engine.statistics().blocking) == 1
        assert engine.statistics().blocking_percentile(100) > 0


def test_a_waiter_sees_the_end_in_the_statistics() -> None:
    with Engine(FakeProgram()) as engine:
        for count in range(1, 20):
            engine.submit([1]).result(20)
            assert engine.statistics().completed == count


def test_failures_and_cancellations_cross_threads() -> None:
    gate = Gate()
    with Engine(FakeProgram()) as engine:
        running = engine.submit([1], at={1: gate})
        gate.wait()
        waiting, failing = engine.submit([2]), engine.submit([3], at={0: raises})
        assert running.cancel()
        assert waiting.cancel()
        gate.open.set()
        for handle in (running, waiting):
            with pytest.raises(RequestCancelledError):
                handle.result(20)
        with pytest.raises(SegmentError):
            failing.result(20)
        statistics = engine.statistics()
        assert (statistics.cancelled, statistics.failed) == (2, 1)


def test_many_threads_submit_and_cancel() -> None:
    outcomes: list[str] = []

    def client(engine: Engine, seed: int) -> None:
        for i in range(20):
            handle = engine.submit([seed + 1] * (i % 3 + 1), ttft_slo=1.0 + seed * i)
            if (seed + i) % 4 == 0:
                handle.cancel()
            try:
                assert handle.result(20) == (seed + 1) * (i % 3 + 1)
                outcomes.append("completed")
            except RequestCancelledError:
                outcomes.append("cancelled")

    program = FakeProgram(3)
    with Engine(program) as engine:
        threads = [threading.Thread(target=client, args=(engine, seed)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statistics = engine.statistics()
        assert statistics.completed == outcomes.count("completed")
        assert statistics.cancelled == outcomes.count("cancelled")
        assert statistics.ended == len(outcomes) == 120
        assert (statistics.running, statistics.waiting, statistics.paused) == (0, 0, 0)
    assert all(run.done or run.released for run in program.runs)


def test_close_ends_the_thread() -> None:
    engine = Engine(FakeProgram())
    thread = engine._thread
    assert thread is not None
    assert thread.is_alive()
    handles = [engine.submit([i]) for i in (1, 2, 3)]
    engine.close()
    assert not thread.is_alive()
    assert [handle.result(0) for handle in handles] == [1, 2, 3]
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.submit([4])


def test_close_without_draining_cancels_at_the_next_cut() -> None:
    gate, program = Gate(), FakeProgram()
    engine = Engine(program)
    running, waiting = engine.submit([1], at={1: gate}), engine.submit([2])
    gate.wait()
    closing = threading.Thread(target=lambda: engine.close(drain=False))
    closing.start()
    gate.open.set()
    closing.join(20)
    assert not closing.is_alive()
    for handle in (running, waiting):
        with pytest.raises(RequestCancelledError, match="the engine was closed"):
            handle.result(0)
    assert program.log == [(1, 0), (1, 1)]


def test_a_segment_that_never_ends_does_not_hang_close() -> None:
    gate = Gate()
    engine = Engine(FakeProgram())
    handle = engine.submit([1], at={1: gate})
    gate.wait()
    with pytest.raises(TimeoutError, match="a segment is running"):
        engine.close(timeout=0.01)
    gate.open.set()
    with pytest.raises(RequestCancelledError):
        handle.result(20)
    engine.close()


def test_a_callback_may_close_its_engine() -> None:
    engine = Engine(FakeProgram())
    thread = engine._thread
    assert thread is not None
    handle = engine.submit([1])
    handle.add_done_callback(lambda handle: engine.close())
    assert handle.result(20) == 1
    thread.join(20)
    assert not thread.is_alive()


def test_a_callback_may_submit() -> None:
    second: list[Any] = []
    submitted = threading.Event()

    def again(handle: object) -> None:
        second.append(engine.submit([2]))
        submitted.set()

    with Engine(FakeProgram()) as engine:
        engine.submit([1]).add_done_callback(again)
        assert submitted.wait(20)
        assert second[0].result(20) == 2


@pytest.mark.slow
def test_a_forgotten_engine_ends_its_thread_but_not_before_its_requests() -> None:
    gate, program = Gate(), FakeProgram()
    engine = Engine(program)
    thread, alive = engine._thread, weakref.ref(engine)
    assert thread is not None
    handle = engine.submit([1], at={0: gate})
    gate.wait()
    del engine
    gc.collect()
    assert alive() is not None, "a live request keeps its engine"
    gate.open.set()
    assert handle.result(20) == 1
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
    assert alive() is None


def test_a_broken_device_thread_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    engine = Engine(FakeProgram())
    handle = engine.submit([1], at={0: gate})
    gate.wait()

    def broken(*_: object) -> None:
        raise AttributeError("defect")

    monkeypatch.setattr(engine._driver, "_land", broken)
    gate.open.set()
    with pytest.raises(InternalError, match="AttributeError: defect"):
        handle.result(20)
    with pytest.raises(EngineClosedError, match="AttributeError: defect"):
        engine.submit([2])
    engine.close()


class _Broken(KeyedPolicy):
    name = "broken"

    def key(self, view: RequestView, now: float) -> float:
        raise ZeroDivisionError("policy")


def test_a_policy_that_always_raises_hangs_nobody() -> None:
    with Engine(FakeProgram(), policy=_Broken()) as engine:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="ZeroDivisionError: policy"):
                engine.submit([1]).result(20)
        assert engine.statistics().failed == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_use_after_a_fork_raises_at_once() -> None:
    gate = Gate()
    with Engine(FakeProgram()) as engine:
        handle = engine.submit([1], at={0: gate})
        gate.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forking with threads
            child = os.fork()
        if child == 0:
            os._exit(_use_in_child(engine, handle))
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        gate.open.set()
        assert handle.result(20) == 1, "the parent goes on"


def _use_in_child(engine: Engine, handle: Any) -> int:
    """0 when every use raises the right error, else the number of the first that does not."""
    uses = [lambda: engine.submit([2]), engine.close, handle.result, handle.cancel, engine.turn]
    for number, use in enumerate(uses, start=1):
        try:
            use()
        except WrongProcessError:
            continue
        except BaseException:
            return 100 + number
        return number
    return 0


def test_runs_are_not_threads() -> None:
    """A thousand paused requests: no thread more."""
    before = threading.active_count()
    gate = Gate()
    with Engine(FakeProgram(2)) as engine:
        first = engine.submit([1], at={0: gate})
        gate.wait()
        handles = [engine.submit([2], ttft_slo=float(10_000 - i)) for i in range(1000)]
        assert threading.active_count() == before + 1
        gate.open.set()
        assert all(handle.result(20) == 2 for handle in handles)
        assert first.result(20) == 1


def test_hooks_run_on_the_device_thread() -> None:
    seen: set[str] = set()

    def hook(run: FakeRun, segment: object, start: float, end: float) -> None:
        seen.add(threading.current_thread().name)

    with Engine(FakeProgram(), on_segment=hook) as engine:
        engine.submit([1]).result(20)
    assert seen == {"fpcompile-device"}


LEFT_OPEN = """
import threading
from fpcompile.engine.engine import Engine
from tests.cpu.test_engine_fakes import FakeProgram, Gate
gate = Gate()
gate.open.set()
handle = Engine(FakeProgram(10**6)).submit([1], at={0: gate})
gate.wait()
print("leaving")
"""


@pytest.mark.slow
def test_an_interpreter_exits_though_an_engine_is_running() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr
    assert "Traceback" not in done.stderr

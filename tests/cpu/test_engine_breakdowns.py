"""Running out of memory, and a device that fails: at every cut in turn, on tiny programs."""

from __future__ import annotations

import dataclasses
import logging
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import fpcompile
from fpcompile.engine.engine import Engine
from fpcompile.errors import DeviceFailedError, EngineClosedError, SegmentError
from fpcompile.executor.faults import out_of_memory
from fpcompile.executor.offload import Parking
from fpcompile.models.zoo import sample_ids
from fpcompile.testing import FakeAsyncDevice
from tests.cpu.support import differences, mlp, outcome, reference, toy
from tests.cpu.test_engine_fakes import FakeProgram, FakeRun, drive

EXHAUSTED = (
    lambda: MemoryError("injected"),
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
)


class Fault:
    """Raises ``times`` times when the run of this many tokens makes launch ``at``."""

    def __init__(self, tokens: int, at: int, make: Any, times: int) -> None:
        self.tokens, self.at, self.make, self.times = tokens, at, make, times
        self.held: list[weakref.ref[Tensor]] = []

    def __call__(self, run: fpcompile.Run, inputs: list[Tensor]) -> None:
        if run.tokens == self.tokens and run.at == self.at and self.times:
            self.times -= 1
            self.held = [weakref.ref(value) for value in inputs if value.is_floating_point()]
            raise self.make()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[Fault]:
    """Faults that strike within a segment, when its inputs are out of the run's hands already."""
    planned: list[Fault] = []
    real = fpcompile.Run._call

    def call(run: fpcompile.Run, stage: Any, step: Any, arguments: list[Tensor], lengths: Any) -> Any:
        def function(run: Any, arguments: list[Tensor], lengths: Any) -> Any:
            for fault in planned:
                fault(run, arguments)
            return step.function(run, arguments, lengths)

        return real(run, stage, dataclasses.replace(step, function=function), arguments, lengths)

    monkeypatch.setattr(fpcompile.Run, "_call", call)
    return planned


@pytest.fixture(scope="module")
def program() -> fpcompile.Program:
    return fpcompile.segment(toy(mlp), route="packed")


def _engine(program: Any, **options: Any) -> Engine:
    return Engine(program, device_thread=False, policy="fcfs", **options)


def _bits(program: fpcompile.Program, handle: Any, ids: Tensor) -> bool:
    return not differences(outcome(handle.result(0)), outcome(program(ids)))


@pytest.mark.parametrize("make", EXHAUSTED, ids=["host", "device", "allocator"])
def test_out_of_memory_once_begins_the_run_again(
    make: Any, program: fpcompile.Program, faults: list[Fault], caplog: pytest.LogCaptureFixture
) -> None:
    ids, other = sample_ids(9), sample_ids(5)
    for at in range(len(program.segments)):
        faults[:] = [fault := Fault(9, at, make, 1)]
        engine = _engine(program)
        handles = [engine.submit(ids), engine.submit(other)]
        drive(engine)
        assert fault.times == 0
        assert _bits(program, handles[0], ids)
        assert _bits(program, handles[1], other)
        assert handles[0].metrics.recomputations == 1
        assert handles[0].metrics.preemptions == 0, "nobody took the device"
        assert handles[1].metrics.recomputations == 0
        assert engine.statistics().failed == 0
    restarted = [r for r in caplog.records if getattr(r, "event", "") == "restarted"]
    assert len(restarted) == len(program.segments)
    assert {r.levelno for r in restarted} == {logging.WARNING}
    assert {vars(r)["error"] for r in restarted} == {type(make()).__name__}


def test_out_of_memory_twice_fails_that_run_only(program: fpcompile.Program, faults: list[Fault]) -> None:
    ids, other = sample_ids(9), sample_ids(5)
    for at in range(len(program.segments)):
        faults[:] = [Fault(9, at, EXHAUSTED[0], 2)]
        engine = _engine(program)
        handles = [engine.submit(ids), engine.submit(other)]
        drive(engine)
        with pytest.raises(SegmentError, match="injected") as caught:
            handles[0].result(0)
        assert out_of_memory(caught.value)
        assert _bits(program, handles[1], other)
        assert (engine.statistics().failed, engine.statistics().paused_bytes) == (1, 0)


def test_the_failed_attempts_tensors_are_gone_before_the_next(
    program: fpcompile.Program, faults: list[Fault]
) -> None:
    """The exception's frames would hold them: the second attempt would meet less memory than the first."""
    fault = Fault(9, 4, EXHAUSTED[0], 1)
    faults[:] = [fault]
    seen: list[bool] = []

    def look(run: Any, segment: Any, start: float, end: float) -> None:
        if fault.held and run.at == 1:
            seen.append(all(held() is None for held in fault.held))

    engine = _engine(program, on_segment=look)
    engine.submit(sample_ids(9))
    drive(engine)
    assert seen == [True]


@pytest.mark.parametrize("options", [{}, {"memory_budget": 1 << 30}], ids=["unlimited", "budget"])
def test_paused_runs_make_room(options: Any, program: fpcompile.Program, faults: list[Fault]) -> None:
    """Their tensors go to the host first, and all results have their bits."""
    faults[:] = [Fault(7, 3, EXHAUSTED[0], 1)]
    engine = Engine(program, device_thread=False, policy="s-edf", **options)
    long = engine.submit(sample_ids(40), ttft_slo=1000.0)
    for _ in range(4):
        engine.turn(1)
    urgent = engine.submit(sample_ids(7), ttft_slo=100.0)
    drive(engine)
    assert _bits(program, long, sample_ids(40))
    assert _bits(program, urgent, sample_ids(7))
    assert long.metrics.preemptions == 1
    assert long.metrics.offloads + long.metrics.recomputations >= 1
    assert urgent.metrics.recomputations == 1
    assert (engine.statistics().paused_bytes, engine.statistics().failed) == (0, 0)


def test_a_continued_cache_is_not_begun_again(program: fpcompile.Program, faults: list[Fault]) -> None:
    """Its inputs would have to be kept beside what it makes of them."""
    past = program(sample_ids(6)).past_key_values
    faults[:] = [Fault(3, 2, EXHAUSTED[0], 1)]
    engine = _engine(program)
    handle = engine.submit(sample_ids(3), past_key_values=past)
    drive(engine)
    with pytest.raises(SegmentError):
        handle.result(0)
    assert handle.metrics.recomputations == 0


def test_other_errors_are_not_tried_again(program: fpcompile.Program, faults: list[Fault]) -> None:
    faults[:] = [fault := Fault(9, 2, lambda: RuntimeError("shapes do not match"), 2)]
    engine = _engine(program)
    handle = engine.submit(sample_ids(9))
    drive(engine)
    assert fault.times == 1
    assert handle.metrics.state == "failed"


def test_an_exception_or_a_slow_segment_at_every_cut_harms_nobody_else(
    program: fpcompile.Program, faults: list[Fault]
) -> None:
    model = toy(mlp)
    ids, other = sample_ids(9), sample_ids(5)
    for at in range(len(program.segments)):
        faults[:] = [Fault(9, at, lambda: ValueError("injected"), 1)]
        engine = Engine(program, device_thread=False, policy="s-edf")
        failing = engine.submit(ids, ttft_slo=1000.0)
        for _ in range(at):
            engine.turn(1)
        beside = engine.submit(other, ttft_slo=10.0)  # preempts it wherever it is
        drive(engine)
        with pytest.raises(SegmentError, match="injected"):
            failing.result(0)
        assert not differences(outcome(beside.result(0)), reference(model, other))
        assert engine.statistics().paused_bytes == 0


# ---- the device


def _illegal() -> Exception:
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def _closed_by_device(engine: Engine, handles: list[Any]) -> None:
    for handle in handles:
        with pytest.raises(DeviceFailedError, match="illegal memory access") as caught:
            handle.result(0)
        assert isinstance(caught.value.__cause__, torch.AcceleratorError)
        assert handle.metrics.state == "failed"
    assert len({id(handle._error) for handle in handles}) == len(handles), "an error of its own for each"
    with pytest.raises(EngineClosedError, match="illegal memory access"):
        engine.submit([1])
    assert not engine.health().healthy
    assert "DeviceFailedError" in engine.health().reason
    assert (engine.statistics().failed, engine.statistics().paused_bytes) == (len(handles), 0)


@pytest.mark.parametrize("at", range(4))
def test_a_device_error_in_a_segment_fails_every_run_and_closes_the_engine(at: int) -> None:
    def breaks(run: FakeRun) -> None:
        raise SegmentError("layer", cause=_illegal())

    device = FakeAsyncDevice()
    program = FakeProgram(4, seconds=1e-4)
    engine = Engine(program, device=device, clock=device.clock, device_thread=False)
    handles = [engine.submit([1], at={at: breaks}), engine.submit([2]), engine.submit([3])]
    with pytest.raises(DeviceFailedError):
        drive(engine)
    _closed_by_device(engine, handles)
    assert all(run.released for run in program.runs)
    engine.close()


def test_a_device_error_that_comes_out_of_an_event_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asynchronous errors arise far from their kernel: here when the device is waited for."""
    device = FakeAsyncDevice()
    program = FakeProgram(4, seconds=1e-4)
    engine = Engine(program, device=device, clock=device.clock, device_thread=False)
    handles = [engine.submit([1]), engine.submit([2])]

    def wait_until(time: float) -> None:
        raise _illegal()

    monkeypatch.setattr(device, "wait_until", wait_until)
    with pytest.raises(DeviceFailedError):
        drive(engine)
    _closed_by_device(engine, handles)


def test_a_device_error_while_a_paused_run_is_moved_is_the_devices(
    program: fpcompile.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> int:
        raise _illegal()

    engine = Engine(program, device_thread=False, policy="s-edf", memory_budget=0)
    engine._memory.moves.rate = math.inf
    long = engine.submit(sample_ids(40), ttft_slo=1000.0)
    for _ in range(4):
        engine.turn(1)
    urgent = engine.submit(sample_ids(7), ttft_slo=100.0)
    monkeypatch.setattr(Parking, "park", breaks)
    with pytest.raises(DeviceFailedError):
        drive(engine)
    _closed_by_device(engine, [long, urgent])


def test_a_device_thread_ends_with_its_device_and_another_engine_may_be_made() -> None:
    def breaks(run: FakeRun) -> None:
        raise SegmentError("layer", cause=_illegal())

    engine = Engine(FakeProgram(2))
    handle = engine.submit([1], at={1: breaks})
    with pytest.raises(DeviceFailedError):
        handle.result(20)
    engine.close(timeout=20)
    assert engine._thread is not None
    assert not engine._thread.is_alive()
    with Engine(FakeProgram(2)) as another:
        assert another.submit([4]).result(20) == 4

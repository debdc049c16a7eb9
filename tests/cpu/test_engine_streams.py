"""The engine on an asynchronous device: run-ahead, and tensors that cross between streams."""

from __future__ import annotations

import pytest

from fpcompile.engine.engine import Engine
from fpcompile.executor.runahead import DEFAULT_WINDOW
from fpcompile.testing import FakeAsyncDevice
from tests.cpu.test_engine_fakes import FakeProgram, drive


def test_an_asynchronous_device_is_driven_ahead_and_then_drained() -> None:
    device = FakeAsyncDevice()
    program = FakeProgram(10, seconds=DEFAULT_WINDOW / 4)
    engine = Engine(program, device=device, clock=device.clock, device_thread=False)
    handle = engine.submit([1], ttft_slo=1.0)
    engine.turn(3)
    assert handle.metrics.state == "running"
    assert device.waits == 0
    drive(engine)
    assert handle.metrics.ttft == pytest.approx(10 * DEFAULT_WINDOW / 4), "complete, not just launched"


def test_blocking_on_an_asynchronous_device_lasts_until_it_is_free() -> None:
    device = FakeAsyncDevice()
    program = FakeProgram(8, seconds=DEFAULT_WINDOW / 4)
    engine = Engine(program, device=device, clock=device.clock, device_thread=False)
    engine.submit([1], ttft_slo=1.0)
    engine.turn(4)
    urgent = engine.submit([2], ttft_slo=0.5)
    engine.turn(4)
    (blocking,) = engine.statistics().blocking
    assert blocking == pytest.approx(DEFAULT_WINDOW), "four units were in flight"
    drive(engine)
    assert urgent.result(0) == 2

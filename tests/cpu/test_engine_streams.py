"""The engine on an asynchronous device: run-ahead, and tensors that cross between streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.engine.engine import Engine
from fpcompile.executor.runahead import DEFAULT_WINDOW
from fpcompile.models.zoo import sample_ids
from fpcompile.testing import FakeAsyncDevice
from tests.cpu.support import differences, model_of, outcome, program_of, reference, same_bits
from tests.cpu.test_engine_fakes import FakeProgram, FakeRun, drive, raises


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


def _engine(device: FakeAsyncDevice, program: Any) -> Engine:
    return Engine(program, device=device, clock=device.clock, device_thread=False)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_a_result_is_complete_when_its_handle_is(padded: bool) -> None:
    """Making the result launches work of its own: joining cached layers, placing logits of padded batches."""
    device = FakeAsyncDevice()
    engine = _engine(device, program_of("qwen3"))
    ids = sample_ids(9, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    seen: list[bool] = []
    handle = engine.submit(ids, attention_mask=mask if padded else None)
    handle.add_done_callback(lambda handle: seen.append(device.idle))
    drive(engine)
    handle.result(0)
    assert seen == [True]


def test_a_launch_that_fails_half_way_leaves_nothing_in_flight() -> None:
    device = FakeAsyncDevice()

    def half(run: FakeRun) -> None:
        torch.ones(3).add_(1)
        raises(run)

    engine = _engine(device, FakeProgram(3, seconds=DEFAULT_WINDOW / 4))
    seen: list[bool] = []
    handle = engine.submit([1], at={1: half})
    handle.add_done_callback(lambda handle: seen.append(device.idle))
    drive(engine)
    assert handle.metrics.state == "failed"
    assert seen == [True]


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_a_callers_memory_is_not_reused_under_the_compute_stream(padded: bool) -> None:
    """Once submitted, nobody but the run refers to its inputs, cached keys and values among them."""
    model, program = model_of("qwen3"), program_of("qwen3")
    device = FakeAsyncDevice()
    engine = _engine(device, program)
    ids = [sample_ids(length, batch=2, seed=length) for length in (6, 9)]
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    inputs: dict[str, Any] = {"attention_mask": mask}
    if not padded:
        inputs = {"past_key_values": program(ids[0]).past_key_values}
    expected = None if padded else reference(model, ids[1], **inputs)
    handle = engine.submit(ids[1], **inputs)
    del inputs, ids, mask
    drive(engine)
    device.synchronize()
    assert device.violations == []
    if expected is not None:
        assert differences(outcome(handle.result(0)), expected) == []


@pytest.mark.slow
def test_generic_runs_are_taken_over_as_well() -> None:
    device = FakeAsyncDevice()
    program = fpcompile.segment(model_of("qwen3"), route="generic")
    engine = _engine(device, program)
    handle = engine.submit(sample_ids(9))
    drive(engine)
    device.synchronize()
    assert device.violations == []
    assert same_bits(handle.result(0).logits, reference(model_of("qwen3"), sample_ids(9)).logits)


def test_a_run_starts_behind_what_its_caller_has_launched() -> None:
    device = FakeAsyncDevice()
    engine = _engine(device, FakeProgram(2, seconds=0.25))
    device.caller_launches(3.0)
    handle = engine.submit([1])
    drive(engine)
    assert handle.metrics.ttft == pytest.approx(3.5)

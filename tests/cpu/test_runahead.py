"""Bounded run-ahead, on the fake asynchronous device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpcompile.errors import InvalidInputError
from fpcompile.executor.device import CpuDevice
from fpcompile.executor.runahead import DEFAULT_WINDOW, RunAhead
from fpcompile.testing import FakeAsyncDevice

COST = st.floats(min_value=1e-6, max_value=4 * DEFAULT_WINDOW)
EPSILON = 1e-12


def _nothing() -> None:
    return None


@pytest.mark.slow
@given(
    costs=st.lists(COST, max_size=40),
    factor=st.floats(min_value=0.1, max_value=10.0),
    max_blocking=st.one_of(st.none(), st.floats(min_value=1e-5, max_value=1.0)),
)
def test_no_more_than_the_window_or_one_unit_is_in_flight(
    costs: list[float], factor: float, max_blocking: float | None
) -> None:
    device = FakeAsyncDevice(actual=lambda predicted: factor * predicted)
    ahead = RunAhead(device, max_blocking=max_blocking, clock=device.clock)
    window = min(DEFAULT_WINDOW, max_blocking or DEFAULT_WINDOW)
    for cost in costs:
        ahead.launch(_nothing, cost)
        ahead.validate()
        assert ahead.in_flight <= max(window, cost) + EPSILON
    ahead.drain()
    assert ahead.in_flight == 0.0
    assert device.record().done(), "drained: the device has nothing left to do"


@given(costs=st.lists(st.floats(min_value=1e-6, max_value=DEFAULT_WINDOW / 10), max_size=9))
def test_nothing_waits_below_the_window(costs: list[float]) -> None:
    device = FakeAsyncDevice()
    ahead = RunAhead(device, clock=device.clock)
    for cost in costs:
        ahead.launch(_nothing, cost)
    assert device.waits == 0


def test_an_uninterrupted_run_waits_only_for_the_oldest_unit() -> None:
    device = FakeAsyncDevice()
    ahead = RunAhead(device, max_blocking=1e-3, clock=device.clock)
    for _ in range(4):
        ahead.launch(_nothing, 4e-4)
    # Two fit the window; the third waits until the first is complete, no longer.
    assert device.now == pytest.approx(8e-4)
    assert device.waits == 2
    assert ahead.in_flight == pytest.approx(8e-4)


def test_completed_units_make_room_without_waiting() -> None:
    device = FakeAsyncDevice()
    ahead = RunAhead(device, max_blocking=1e-3, clock=device.clock)
    for _ in range(50):
        ahead.launch(_nothing, 5e-4)
        device.advance(5e-4)
    assert device.waits == 0


def test_the_window_is_at_least_one_dispatch() -> None:
    device = FakeAsyncDevice()
    ahead = RunAhead(device, max_blocking=1e-4, clock=device.clock)
    assert ahead.window == 1e-4
    for _ in range(100):
        ahead.launch(lambda: device.advance(5e-4), 1e-5)
    assert ahead.window == pytest.approx(5e-4, rel=1e-3)


def test_a_first_call_that_compiles_does_not_open_the_window() -> None:
    device = FakeAsyncDevice()
    ahead = RunAhead(device, max_blocking=1e-3, clock=device.clock)
    ahead.launch(lambda: device.advance(5.0), 1e-5)
    assert ahead.window == 1e-3


def test_what_raises_is_not_in_flight() -> None:
    device = FakeAsyncDevice()
    ahead = RunAhead(device, clock=device.clock)
    ahead.launch(_nothing, 1e-3)

    def broken() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        ahead.launch(broken, 5e-4)
    assert ahead.in_flight == 1e-3
    ahead.validate()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_bound_is_positive(bad: float) -> None:
    with pytest.raises(InvalidInputError, match="max_blocking"):
        RunAhead(CpuDevice(), max_blocking=bad)


@given(data=st.data())
def test_nothing_poisoned_is_ever_read(data: st.DataObject) -> None:
    """Offload and restore between launches, dropping each reference as soon as RunAhead holds it."""
    device = FakeAsyncDevice(copy_bytes_per_second=1e4)
    ahead = RunAhead(device, max_blocking=1e-3, clock=device.clock)
    value = torch.zeros(8)
    launched = 0
    for step in data.draw(st.lists(st.sampled_from(["launch", "evict", "restore", "pass"]), max_size=30)):
        if step == "launch":
            value = value + 1
            launched += 1
            ahead.launch(_nothing, data.draw(COST))
        elif step == "evict":
            (copied,), event = device.copy_to_host([value])
            ahead.keep(event, value)
            del value
            event.wait()  # the host may not read it before
            value = copied
        elif step == "restore":
            (copied,), event = device.copy_to_device([value])
            ahead.keep(event, value)
            device.order_after(event)
            value = copied
        else:
            device.advance(data.draw(COST))
        assert value.eq(launched).all(), "poison was read"
        assert device.violations == []
    device.synchronize()
    ahead.drain()
    assert device.violations == []
    assert value.eq(launched).all()


def test_without_keep_the_poison_is_read() -> None:
    """The test above can fail: this is what it would see."""
    device = FakeAsyncDevice(copy_bytes_per_second=1e4)
    value = torch.ones(8)
    (copied,), event = device.copy_to_device([value])
    device.order_after(event)
    value = copied  # the source is gone too early
    device.synchronize()
    assert value.isnan().all()
    assert device.violations != []


def test_kept_buffers_are_dropped_at_their_event() -> None:
    device = FakeAsyncDevice(copy_bytes_per_second=32.0)
    ahead = RunAhead(device, clock=device.clock)
    source = torch.ones(8)
    copied, event = device.copy_to_host([source])
    ahead.keep(event, source)
    count = torch._C._storage_Use_Count(source.untyped_storage()._cdata)
    ahead.make_room(0.0)
    assert torch._C._storage_Use_Count(source.untyped_storage()._cdata) == count
    device.advance(1.0)
    ahead.make_room(0.0)
    assert copied[0].eq(1).all()
    assert ahead._kept == []

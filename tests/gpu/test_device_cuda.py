"""The CUDA device: its streams, events, copies and run-ahead."""

from __future__ import annotations

import pytest
import torch

from fpcompile.errors import InvalidInputError
from fpcompile.executor.device import CudaDevice, make_device
from fpcompile.executor.runahead import RunAhead

SIDE = 4096


def _busy(times: int = 20) -> torch.Tensor:
    """Several milliseconds of work, launched at once."""
    x_SS = torch.ones(SIDE, SIDE, device="cuda") / SIDE
    for _ in range(times):
        x_SS = x_SS @ x_SS * 0.5
    return x_SS


def test_names() -> None:
    assert isinstance(make_device("auto"), CudaDevice)
    assert make_device("cuda").torch_device == torch.device("cuda", torch.cuda.current_device())
    with pytest.raises(InvalidInputError, match="no such CUDA device"):
        make_device(f"cuda:{torch.cuda.device_count()}")


def test_work_is_launched_on_its_own_stream_and_events_follow_it() -> None:
    device = CudaDevice()
    with device.active():
        assert torch.cuda.current_stream() == device.compute
        _busy()
        event = device.record()
    assert torch.cuda.current_stream() != device.compute
    assert not event.done(), "launched, not completed"
    event.wait()
    assert event.done()


def test_copies_there_and_back_keep_bits_and_strides() -> None:
    device = CudaDevice()
    with device.active():
        source = torch.randn(300, 200, device="cuda").t()
        (host,), event = device.copy_to_host([source])
        event.wait()
        assert host.is_pinned()
        assert host.stride() == source.stride()
        (back,), event = device.copy_to_device([host])
        device.order_after(event)
        same = (back == source).all()
    device.synchronize()
    assert bool(same)


def test_copies_to_the_host_come_after_what_was_launched() -> None:
    device = CudaDevice()
    with device.active():
        result = _busy()
        (host,), event = device.copy_to_host([result])
    event.wait()
    assert torch.equal(host, result.cpu())


def test_inputs_of_a_busy_caller_are_waited_for_by_the_device_alone() -> None:
    device = CudaDevice()
    produced = _busy()
    ready = device.caller_event()
    device.order_after(ready)
    with device.active():
        seen = produced.clone()
    assert not ready.done(), "the host did not wait"
    device.synchronize()
    assert torch.equal(seen, produced)


def test_run_ahead_is_bounded_and_small_work_never_waits() -> None:
    device = CudaDevice()
    ahead = RunAhead(device, max_blocking=2e-3)
    x_SS = torch.ones(SIDE, SIDE, device="cuda")
    with device.active():
        for _ in range(50):
            ahead.launch(lambda: x_SS @ x_SS, 1e-3)
            ahead.validate()
            assert ahead.in_flight <= 2e-3 + 1e-9
        ahead.drain()
    assert ahead.in_flight == 0.0
    assert device.compute.query()

"""Devices: names, the host device, and a fake asynchronous one that makes lifetime bugs visible."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fpcompile.errors import FpcompileError, InvalidInputError, UnknownNameError
from fpcompile.executor.device import CpuDevice, CudaDevice, Device, make_device
from fpcompile.testing import FakeAsyncDevice, poison


def test_names_of_devices() -> None:
    assert isinstance(make_device("cpu"), CpuDevice)
    assert isinstance(make_device(torch.device("cpu")), CpuDevice)
    auto = make_device("auto")
    assert auto.torch_device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert make_device(auto) is auto
    assert repr(make_device("cpu")) == "CpuDevice(cpu)"


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", ""])
def test_an_unknown_device_lists_the_legal_names(name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        make_device(name)
    assert caught.value.known == ("auto", "cpu", "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_cuda_says_what_to_do(name: str) -> None:
    with pytest.raises(InvalidInputError, match="use device='cpu'") as caught:
        make_device(name)
    assert isinstance(caught.value, FpcompileError)
    with pytest.raises(InvalidInputError):
        CudaDevice(name)


def test_on_the_host_everything_is_past() -> None:
    device = CpuDevice()
    assert not device.asynchronous
    with device.active():
        event = device.record(1.0)
    assert event.done()
    event.wait()
    device.order_after(device.caller_event())
    device.hand_over([torch.ones(2)])
    device.synchronize()


@pytest.mark.parametrize("make", [CpuDevice, FakeAsyncDevice])
def test_copies_keep_sizes_strides_and_dtypes(make: Callable[[], Device]) -> None:
    device = make()
    sources = [torch.arange(12.0).reshape(3, 4).t(), torch.arange(3), torch.ones(2, dtype=torch.bfloat16)]
    there, first = device.copy_to_host(sources)
    first.wait()
    back, second = device.copy_to_device(there)
    device.order_after(second)
    for source, tensor in zip(sources, back, strict=True):
        assert tensor.stride() == source.stride()
        assert tensor.dtype == source.dtype
        assert torch.equal(tensor, source)
        assert tensor.data_ptr() != source.data_ptr()


def test_launched_work_completes_when_virtual_time_has_passed() -> None:
    device = FakeAsyncDevice(actual=lambda predicted: 2 * predicted)
    first, second = device.record(1.0), device.record(1.0)
    assert (first.done(), second.done()) == (False, False)
    device.advance(2.0)
    assert (first.done(), second.done()) == (True, False)
    second.wait()
    assert device.now == 4.0
    assert device.waits == 1
    second.wait()
    assert device.waits == 1, "waiting for what is done does not wait"
    device.advance(6.0)
    assert device.record(1.0).done() is False, "an idle device starts when work comes, not before"


def test_a_copy_is_poison_until_its_event() -> None:
    device = FakeAsyncDevice(copy_bytes_per_second=16.0)
    source = torch.ones(4)
    (copied,), event = device.copy_to_host([source])
    assert copied.isnan().all()
    device.advance(0.5)
    assert copied.isnan().all()
    assert not event.done()
    event.wait()
    assert torch.equal(copied, source)
    assert device.violations == []


def test_copies_to_the_host_come_after_what_was_launched() -> None:
    device = FakeAsyncDevice(copy_bytes_per_second=16.0)
    device.record(5.0)
    _, to_host = device.copy_to_host([torch.ones(4)])
    to_host.wait()
    assert device.now == 6.0


def test_copies_to_the_device_overlap_with_what_was_launched() -> None:
    device = FakeAsyncDevice(copy_bytes_per_second=16.0)
    compute = device.record(5.0)
    kept = [torch.ones(4)]
    copied, to_device = device.copy_to_device(kept)
    assert not torch.equal(copied[0], kept[0]), "not ordered: compute would read what is not there yet"
    device.order_after(to_device)
    assert torch.equal(copied[0], kept[0])
    assert not to_device.done()
    device.advance(1.0)
    assert to_device.done()
    assert not compute.done()


def test_work_ordered_after_a_copy_starts_after_it() -> None:
    device = FakeAsyncDevice(copy_bytes_per_second=4.0)
    kept = [torch.ones(4)]
    _copied, event = device.copy_to_device(kept)
    device.order_after(event)
    work = device.record(1.0)
    work.wait()
    assert device.now == 5.0


def test_a_source_freed_before_its_event_poisons_the_copy() -> None:
    device = FakeAsyncDevice(copy_bytes_per_second=16.0)
    source = torch.ones(4)
    (copied,), event = device.copy_to_host([source])
    del source
    event.wait()
    assert copied.isnan().all()
    assert len(device.violations) == 1
    assert "source of a copy of torch.float32 [4] freed before 1 s" in device.violations[0]


def test_a_source_freed_behind_an_ordered_restore_poisons_what_was_restored() -> None:
    device = FakeAsyncDevice(copy_bytes_per_second=16.0)
    host = torch.ones(4)
    (restored,), event = device.copy_to_device([host])
    device.order_after(event)
    assert restored.eq(1).all()
    del host
    event.wait()
    assert restored.isnan().all()
    assert len(device.violations) == 1


def test_a_view_keeps_its_storage_alive() -> None:
    device = FakeAsyncDevice(copy_bytes_per_second=16.0)
    source = torch.ones(4)
    view = source[1:]
    (copied,), event = device.copy_to_host([source])
    del source
    event.wait()
    assert copied.eq(1).all()
    assert view.eq(1).all()
    assert device.violations == []


def test_poison_reaches_the_whole_storage() -> None:
    whole = torch.zeros(4, dtype=torch.bfloat16)
    poison(whole[1:2])
    assert whole.isnan().all()
    ids = torch.zeros(3, dtype=torch.int64)
    poison(ids)
    assert ids.eq(-1).all()


def test_synchronize_waits_for_compute_and_copies() -> None:
    device = FakeAsyncDevice(copy_bytes_per_second=16.0)
    compute = device.record(0.5)
    kept = [torch.ones(4)]
    copies, copied = device.copy_to_device(kept)
    device.synchronize()
    assert compute.done()
    assert copied.done()
    assert copies[0].eq(1).all()


def test_what_is_launched_is_complete_behind_an_event_that_is_past() -> None:
    device = FakeAsyncDevice()
    given = torch.ones(4)
    seen: list[bool] = []
    with device.active():
        given.view(2, 2)  # a view launches nothing
        seen.append(device.idle)
        made = given + 1  # launched, and no event behind it
        seen.append(device.idle)
        event = device.record(1.0)
        seen.append(device.idle)
        event.wait()
        seen.append(device.idle)
        made.add_(1)
        seen.append(device.idle)
        device.record().wait()
    given.add_(1)  # not on the compute stream
    seen.append(device.idle)
    assert seen == [True, False, False, True, False, True]


def test_a_callers_memory_freed_under_the_compute_stream_is_a_violation() -> None:
    device = FakeAsyncDevice()
    kept, freed, late = torch.ones(2), torch.ones(3), torch.ones(4)
    with device.active():
        made = [kept + 1, freed + 1, late + 1]
        device.record(1.0)
        del made[0]  # the compute stream's own memory is reused in its order
    del freed
    device.advance(1.0)
    del late
    device.advance(1.0)
    assert device.violations == ["torch.float32 [3] freed while the compute stream may still read it"]


def test_memory_that_was_copied_to_the_device_belongs_to_the_compute_stream() -> None:
    device = FakeAsyncDevice()
    source = torch.ones(3)
    copied, event = device.copy_to_device([source])
    device.order_after(event)
    with device.active():
        made = copied[0] + 1
        device.record(1.0)
    copied.clear()
    device.synchronize()
    assert device.violations == []
    assert made.eq(2).all()


def test_events_of_a_caller_are_behind_its_own_work() -> None:
    device = FakeAsyncDevice()
    device.caller_launches(2.0)
    ready = device.caller_event()
    device.order_after(ready)
    assert not ready.done()
    device.record(1.0).wait()
    assert device.now == 3.0

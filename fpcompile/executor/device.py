"""Devices: where segments run, how the host learns that they have run, and copies that overlap with them.

Words
    *compute stream*  what launched segments are executed on, in order. On CPU, launching is executing.
    *copy stream*     a second one, for copies between host and device that overlap with compute.
    *event*           a point in a stream: ``done()`` asks whether the device is past it, ``wait()`` waits.
    *caller*          a thread that hands tensors over or takes them, with a stream of its own.

Typical use
    ``device = make_device("auto")``
    ``with device.active(): run.step(); event = device.record()``
    ``copies, event = device.copy_to_host(tensors)``: keep ``tensors`` until ``event.done()``

Invariants
    Nothing here waits for the device but ``Event.wait`` and ``Device.synchronize``.
    Copies are ordered behind what the compute stream holds when they are issued (to the host), and in front
    of what is launched after ``order_after`` (to the device). Who issues a copy keeps its source until the
    event: the allocator may give the memory away as soon as the last reference is gone.

:class:`fpcompile.testing.FakeAsyncDevice` behaves like CUDA on a virtual clock and in CPU memory, so that the
lifetime and run-ahead rules are tested without a GPU.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, final

import torch
from torch import Tensor

from fpcompile.errors import InvalidInputError, UnknownNameError

__all__ = ["CpuDevice", "CudaDevice", "Device", "Event", "breakdown", "make_device", "strided_like"]

KINDS: Final = ("auto", "cpu", "cuda")


def breakdown(error: BaseException | None) -> BaseException | None:
    """The error of a device that ``error`` is, or was caused by; None when nothing but a computation failed.

    torch raises its own class for those (an illegal access, a lost device); running out of memory is none.
    """
    while error is not None and not isinstance(error, torch.AcceleratorError):
        error = error.__cause__
    return error


class Event(ABC):
    """A point in a stream of a device."""

    __slots__ = ()

    @abstractmethod
    def done(self) -> bool:
        """Whether the device is past this point; never waits."""

    @abstractmethod
    def wait(self) -> None:
        """Block the calling thread until the device is past this point; errors of the device raise here."""


class Device(ABC):
    """What the executor needs of a device. ``asynchronous``: launched work completes some time later."""

    asynchronous: bool

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.torch_device})"

    @abstractmethod
    def active(self) -> contextlib.AbstractContextManager[None]:
        """Make the compute stream current in this thread: what is called inside is launched on it."""

    @abstractmethod
    def record(self, seconds: float = 0.0) -> Event:
        """An event behind everything launched on the compute stream.

        ``seconds`` is what the work since the last ``record`` is predicted to take. Real devices know better
        and ignore it.
        """

    @abstractmethod
    def order_after(self, event: Event) -> None:
        """What is launched from now on starts after ``event``; the host does not wait."""

    @abstractmethod
    def caller_event(self) -> Event:
        """An event behind what the calling thread has launched on its own current stream."""

    @abstractmethod
    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """The compute stream will read these tensors of callers: memory must not be reused under it."""

    @abstractmethod
    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Callers will use these tensors on their own streams: memory must not be reused under them."""

    @abstractmethod
    def copy_to_host(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """Start copying to host memory, behind what is launched so far; valid once the event is done.

        Sizes, strides and dtypes are kept. Keep ``tensors`` until the event is done.
        """

    @abstractmethod
    def copy_to_device(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """Start copying to device memory, beside compute; valid for what is launched after ``order_after``.

        Keep ``tensors`` until the event is done.
        """

    @abstractmethod
    def host_like(self, tensor: Tensor) -> Tensor:
        """Uninitialised host memory with the size, strides and dtype of ``tensor``; pinned where it matters.

        ``tensor`` must not overlap itself (an expanded view does: copy its storage instead).
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Block the calling thread until everything launched and copied is complete."""

    def free_cached(self) -> None:
        """Give memory back that an allocator keeps for later; nothing where none does."""
        return None


class _Past(Event):
    """The event of a device on which launching is executing."""

    __slots__ = ()

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


PAST: Final[Event] = _Past()


@final
class CpuDevice(Device):
    """The host. Every event is past; copies are immediate."""

    asynchronous = False

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def active(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, seconds: float = 0.0) -> Event:
        return PAST

    def order_after(self, event: Event) -> None:
        event.wait()

    def caller_event(self) -> Event:
        return PAST

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        return None

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        return None

    def copy_to_host(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        return [self.host_like(t).copy_(t) for t in tensors], PAST

    def copy_to_device(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        return self.copy_to_host(tensors)

    def host_like(self, tensor: Tensor) -> Tensor:
        return strided_like(tensor)

    def synchronize(self) -> None:
        return None


class _CudaEvent(Event):
    __slots__ = ("raw",)

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.raw = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.raw.record(stream)

    def done(self) -> bool:
        return bool(self.raw.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.raw.synchronize()


@final
class CudaDevice(Device):
    """One CUDA device with a compute and a copy stream of its own; never touches the default stream.

    Being apart from the default stream, work of the host application and of the engine overlap; tensors go
    into the engine by ``caller_event``, ``order_after`` and ``take_over``, and out of it by ``hand_over``.
    """

    asynchronous = True

    def __init__(self, torch_device: torch.device | str = "cuda") -> None:
        wanted = torch.device(torch_device)
        if not torch.cuda.is_available():
            raise InvalidInputError(
                "no CUDA device can be used",
                expected="a CUDA build of torch and a visible device",
                got=f"torch {torch.__version__}, torch.cuda.is_available() is False",
                remedy="use device='cpu', or 'auto'",
            )
        count = torch.cuda.device_count()
        index = wanted.index if ":" in str(wanted) else torch.cuda.current_device()
        if index >= count:
            raise InvalidInputError(
                "there is no such CUDA device",
                expected=f"an index from 0 to {count - 1}",
                got=str(wanted),
            )
        super().__init__(torch.device("cuda", index))
        self.compute = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self.copies = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with torch.cuda.device(self.torch_device), torch.cuda.stream(self.compute):
            yield

    def record(self, seconds: float = 0.0) -> Event:
        return _CudaEvent(self.compute)

    def order_after(self, event: Event) -> None:
        if isinstance(event, _CudaEvent):
            self.compute.wait_event(event.raw)
        else:
            event.wait()

    def caller_event(self) -> Event:
        return _CudaEvent(torch.cuda.current_stream(self.torch_device))

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        _record(tensors, self.compute)

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        _record(tensors, torch.cuda.default_stream(self.torch_device))

    def copy_to_host(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        self.copies.wait_stream(self.compute)
        with torch.cuda.stream(self.copies):
            copied = [self.host_like(t).copy_(t, non_blocking=True) for t in tensors]
        return copied, _CudaEvent(self.copies)

    def copy_to_device(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        with torch.cuda.stream(self.copies):
            copied = [strided_like(t, device=self.torch_device).copy_(t, non_blocking=True) for t in tensors]
        self.take_over(copied)  # allocated for the copy stream
        return copied, _CudaEvent(self.copies)

    def host_like(self, tensor: Tensor) -> Tensor:
        return strided_like(tensor, pinned=True)

    def free_cached(self) -> None:
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        self.compute.synchronize()
        self.copies.synchronize()


def _record(tensors: Iterable[Tensor], stream: torch.cuda.Stream) -> None:
    """Tell the allocator that ``stream`` uses these tensors, besides the one that they were allocated on."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(stream)


def make_device(device: str | torch.device | Device) -> Device:
    """``"auto"`` (CUDA when there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, a torch.device, or a Device.

    Raises :class:`UnknownNameError` for other names, :class:`InvalidInputError` when there is no such device.
    """
    if isinstance(device, Device):
        return device
    if device == "auto":
        return CudaDevice() if torch.cuda.is_available() else CpuDevice()
    name = str(device)
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise UnknownNameError("device", name, known=KINDS) from error
    if wanted.type == "cpu":
        return CpuDevice()
    if wanted.type == "cuda":
        return CudaDevice(wanted)
    raise UnknownNameError("device", name, known=KINDS)


def strided_like(tensor: Tensor, *, device: torch.device | None = None, pinned: bool = False) -> Tensor:
    """Uninitialised memory of the same size, strides and dtype on ``device`` (None: the host)."""
    return torch.empty_strided(
        tensor.size(),
        tensor.stride(),
        dtype=tensor.dtype,
        device=device or torch.device("cpu"),
        pin_memory=pinned,
    )

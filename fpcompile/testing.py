"""For the tests of those who embed the executor: an assertion of the yield rule, and a fake device.

``assert_yields(run)`` drives a run and asserts that control comes back at every cut.
:class:`FakeAsyncDevice` stands in for a GPU: virtual time, and poison where memory was freed too early.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpcompile.executor.device import Device, Event, strided_like
from fpcompile.executor.loop import Outcome, Steps, advance

__all__ = ["FakeAsyncDevice", "assert_yields", "poison"]


def assert_yields(
    run: Steps, *, every: float | None = None, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[str, float]]:
    """Drive ``run`` to its end and assert the yield rule of :mod:`fpcompile.executor.loop` at every cut.

    At each cut: nothing is launched while ``stop`` answers True, and the cursor never goes back. ``every``:
    the longest time in seconds between two cuts, by the host's clock (on an asynchronous device a launch, not
    its completion). Returns (segment name, seconds) of every launch.
    Raises AssertionError that names the segments which held control for longer, or broke the rule.
    """
    launches: list[tuple[str, float]] = []
    while not run.done:
        segment, at = run.next_segment, run.cursor
        outcome = advance(run, lambda: True)
        if outcome is not Outcome.STOPPED or run.cursor != at:
            raise AssertionError(f"segment {at} ({segment.name}) was launched although stop() answered True")
        start = clock()
        advance(run, lambda: False, 1)
        launches.append((segment.name, clock() - start))
        if run.cursor < at:
            raise AssertionError(f"a launch at segment {at} ({segment.name}) went back to {run.cursor}")
    if every is not None and (slow := [(name, took) for name, took in launches if took > every]):
        told = ", ".join(f"{name}: {took * 1e3:.3g} ms" for name, took in slow[:5])
        raise AssertionError(
            f"{len(slow)} of {len(launches)} cuts came later than {every * 1e3:.3g} ms: {told}"
        )
    return launches


@final
class FakeAsyncDevice(Device):
    """An asynchronous device on a virtual clock, in CPU memory: finds waits and lifetime bugs without a GPU.

    Launched work computes at once (so real runs work on it), but *completes* on the virtual clock ``now``,
    which only ``advance`` and waiting move. ``actual`` turns predicted seconds into the seconds that the work
    takes. Copies move data when they complete: until then their destination holds poison (NaN, or -1 for
    integers). A source whose last reference is dropped while a copy still reads it is poisoned, as if the
    allocator had given it away: the copy then delivers poison, and ``violations`` says so.

    What is called inside ``active()`` is launched on the compute stream, and complete when an event recorded
    behind it is past, no sooner: see ``idle``. What it reads and did not make is a caller's memory, of which
    the allocator knows nothing about the compute stream: unless it was taken over, freeing it before its
    reader is complete is a violation.
    """

    asynchronous = True

    def __init__(
        self, *, actual: Callable[[float], float] = float, copy_bytes_per_second: float = 10e9
    ) -> None:
        super().__init__(torch.device("cpu"))
        self.now = 0.0
        self.waits = 0
        self.violations: list[str] = []
        self._actual = actual
        self._bandwidth = copy_bytes_per_second
        self._compute_end = 0.0
        self._caller_end = 0.0
        self._copies: list[_FakeCopy] = []
        self._unrecorded = False
        self._own: dict[int, _Memory] = {}
        self._reads: dict[int, _Read] = {}

    @property
    def idle(self) -> bool:
        """Whether all that was launched is behind an event that is past; only then may others read it."""
        return not self._unrecorded and self._compute_end <= self.now

    def caller_launches(self, seconds: float) -> None:
        """A caller puts ``seconds`` of work on its own stream."""
        self._caller_end = max(self._caller_end, self.now) + seconds

    def clock(self) -> float:
        """The virtual time in seconds, for RunAhead and Engine."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let virtual time pass; copies that end by then are carried out."""
        for read in self._reads.values():
            if read.end > self.now and read.freed():
                self.violations.append(f"{read.what} freed while the compute stream may still read it")
        self.now += seconds
        self._reads = {
            key: read for key, read in self._reads.items() if read.end > self.now and not read.freed()
        }
        for copy in [c for c in self._copies if c.end <= self.now]:
            self._copies.remove(copy)
            if (what := copy.complete()) is not None:
                self.violations.append(what)

    def wait_until(self, time: float) -> None:
        """The host waits for the device: counted in ``waits``."""
        self.waits += 1
        self.advance(time - self.now)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with _Launches(self._launched):
            yield

    def _launched(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], writes: bool) -> None:
        """An operator was called on the compute stream."""
        for tensor in inputs:
            if _key(tensor) not in self._own:
                self._reads[_key(tensor)] = _Read(tensor)
        given = {_key(tensor) for tensor in inputs}
        made = [tensor for tensor in outputs if _key(tensor) not in given]
        self._take(made)
        self._unrecorded |= writes or bool(made)  # a view launches nothing

    def _take(self, tensors: Iterable[Tensor]) -> None:
        """The allocator knows that the compute stream uses these: freed, they are reused in its order."""
        for tensor in tensors:
            self._own[_key(tensor)] = _Memory(tensor)
            self._reads.pop(_key(tensor), None)

    def record(self, seconds: float = 0.0) -> Event:
        self._compute_end = max(self._compute_end, self.now) + self._actual(seconds)
        self._unrecorded = False
        self._own = {key: memory for key, memory in self._own.items() if not memory.freed()}
        for read in self._reads.values():
            read.end = min(read.end, self._compute_end)
        return _FakeEvent(self, self._compute_end)

    def order_after(self, event: Event) -> None:
        assert isinstance(event, _FakeEvent)
        self._compute_end = max(self._compute_end, event.time)
        for copy in self._copies:
            if copy.end <= event.time:
                copy.move()

    def caller_event(self) -> Event:
        return _FakeEvent(self, max(self._caller_end, self.now))

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        self._take(tensors)

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        return None

    def copy_to_host(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        return self._copy(tensors, after=self._compute_end)

    def copy_to_device(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        copied, event = self._copy(tensors, after=self.now)
        self._take(copied)
        return copied, event

    def _copy(self, tensors: Sequence[Tensor], *, after: float) -> tuple[list[Tensor], Event]:
        end = max([after, self.now, *(c.end for c in self._copies)])
        copied: list[Tensor] = []
        for source in tensors:
            target = self.host_like(source)
            poison(target)
            end += source.nbytes / self._bandwidth
            self._copies.append(_FakeCopy(source, target, end))
            copied.append(target)
        return copied, _FakeEvent(self, end)

    def host_like(self, tensor: Tensor) -> Tensor:
        return strided_like(tensor)

    def synchronize(self) -> None:
        self.wait_until(max([self.now, self._compute_end, *(c.end for c in self._copies)]))


class _Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of every operator that is called inside: its inputs, its outputs, whether it writes in place."""

    def __init__(self, tell: Callable[[Sequence[Tensor], Sequence[Tensor], bool], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default:  # torch.tensor(...): made here, beneath the operators
            self._tell([], [result], False)
            return result
        inputs, outputs = (
            [t for t in tree_leaves(v) if isinstance(t, Tensor)] for v in ((args, kwargs), result)
        )
        self._tell(inputs, outputs, bool(func._schema.is_mutable))
        return result


class _Memory:
    """The memory of a tensor, without keeping it; while this lives, ``_key`` is not given to another."""

    __slots__ = ("_storage",)

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def freed(self) -> bool:
        """Whether nobody refers to it any more."""
        return bool(self._storage.expired())  # type: ignore[no-untyped-call]


class _Read(_Memory):
    """A caller's memory that the compute stream reads until ``end``; inf before an event is recorded."""

    __slots__ = ("end", "what")

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self.what, self.end = f"{tensor.dtype} {list(tensor.shape)}", inf


def _key(tensor: Tensor) -> int:
    """Names the tensor's memory, as long as somebody refers to it, be it weakly."""
    return int(tensor.untyped_storage()._cdata)


class _FakeEvent(Event):
    __slots__ = ("device", "time")

    def __init__(self, device: FakeAsyncDevice, time: float) -> None:
        self.device, self.time = device, time

    def done(self) -> bool:
        return self.time <= self.device.now

    def wait(self) -> None:
        if not self.done():
            self.device.wait_until(self.time)


class _FakeCopy:
    """A copy under way. Holds aliases, and counts the references to see whether they are the last ones."""

    __slots__ = ("end", "moved", "source", "target")

    def __init__(self, source: Tensor, target: Tensor, end: float) -> None:
        self.source, self.target, self.end, self.moved = source.detach(), target.detach(), end, False

    def move(self) -> None:
        if not self.moved:
            self.target.copy_(self.source)
            self.moved = True

    def complete(self) -> str | None:
        """Carry the copy out; says so if its source was freed too early.

        A target may be freed: its memory belongs to the copy stream, and is used again in its order.
        """
        freed = _references(self.source) <= _ALONE
        if freed:
            poison(self.source)
            self.moved = False
        self.move()
        if not freed:
            return None
        return (
            f"source of a copy of {self.source.dtype} {list(self.source.shape)} freed before {self.end:.6g} s"
        )


def poison(tensor: Tensor) -> None:
    """Fill the storage with ones bits: NaN for floating-point types, -1 for signed integers."""
    torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(0xFF)


def _references(tensor: Tensor) -> int:
    """References to the tensor's storage, views and this one included."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


_ALONE: Final = _references(torch.empty(1))

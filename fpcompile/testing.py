"""For the tests of those who embed the executor: an assertion of the yield rule, and a fake device.

``assert_yields(run)`` drives a run and asserts that control comes back at every cut.
:class:`FakeAsyncDevice` stands in for a GPU: virtual time, and poison where memory was freed too early.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, final

import torch
from torch import Tensor

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
        self._copies: list[_FakeCopy] = []

    def clock(self) -> float:
        """The virtual time in seconds, for RunAhead and Engine."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let virtual time pass; copies that end by then are carried out."""
        self.now += seconds
        for copy in [c for c in self._copies if c.end <= self.now]:
            self._copies.remove(copy)
            if (what := copy.complete()) is not None:
                self.violations.append(what)

    def wait_until(self, time: float) -> None:
        """The host waits for the device: counted in ``waits``."""
        self.waits += 1
        self.advance(time - self.now)

    def active(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, seconds: float = 0.0) -> Event:
        self._compute_end = max(self._compute_end, self.now) + self._actual(seconds)
        return _FakeEvent(self, self._compute_end)

    def order_after(self, event: Event) -> None:
        assert isinstance(event, _FakeEvent)
        self._compute_end = max(self._compute_end, event.time)
        for copy in self._copies:
            if copy.end <= event.time:
                copy.move()

    def caller_event(self) -> Event:
        return _FakeEvent(self, self.now)

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        return None

    def copy_to_host(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        return self._copy(tensors, after=self._compute_end)

    def copy_to_device(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        return self._copy(tensors, after=self.now)

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

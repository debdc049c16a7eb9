"""Bounded run-ahead: how far the host may launch in front of the device.

Launching must go on while the device computes, or the device idles for one dispatch at every cut. But what is
launched must also finish before another run can have the device. So the amount in flight is bounded by
predicted *time*, and the host learns of completion from events, never by synchronising the stream.

Words
    *unit*      what one ``launch`` puts on the device: a segment (or a tile).
    *in flight* launched and not yet seen to be complete; counted in predicted seconds.
    *window*    the bound on the seconds in flight: at most ``max_blocking`` and :data:`DEFAULT_WINDOW`, at
                least one dispatch latency (measured), below which the device would idle at every cut.

Typical use
    ``ahead = RunAhead(device, max_blocking=0.002)``
    ``ahead.launch(run.step, seconds)`` for each segment; ``ahead.drain()`` before the device is given away
    ``ahead.keep(event, tensors)``: references that live until the event

Invariants
    After ``launch(_, cost)`` at most ``max(window, cost)`` seconds are in flight: a unit that is longer than
    the window is launched alone. While the sum of all costs is within the window, nothing waits.
    The bound is as good as the predictions; what would change this is a device that reports its progress.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from fpcompile.errors import InternalError, InvalidInputError
from fpcompile.executor.device import Device, Event

__all__ = ["DEFAULT_WINDOW", "RunAhead"]

DEFAULT_WINDOW: Final = 0.002
"""Seconds: several dispatches of ordinary segments, and no more than what users call instantaneous."""

_SMOOTHING: Final = 0.1


class RunAhead:
    """The units in flight on one device. Used by one thread."""

    def __init__(
        self,
        device: Device,
        *,
        max_blocking: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if max_blocking is not None and not max_blocking > 0:
            raise InvalidInputError(
                "max_blocking is wrong", expected="seconds > 0, or None", got=repr(max_blocking)
            )
        self.device = device
        self.in_flight = 0.0
        self._limit = min(DEFAULT_WINDOW, max_blocking or DEFAULT_WINDOW)
        self._dispatch = 0.0
        self._clock = clock
        self._units: deque[tuple[Event, float]] = deque()
        self._kept: list[tuple[Event, object]] = []

    @property
    def window(self) -> float:
        """Seconds that may be in flight now."""
        return max(self._dispatch, self._limit)

    def launch(self, work: Callable[[], object], cost: float) -> None:
        """Launch ``work``, predicted to take ``cost`` seconds, as soon as the window has room for it."""
        self.make_room(cost)
        start = self._clock()
        work()
        event = self.device.record(cost)
        spent = min(self._clock() - start, DEFAULT_WINDOW)  # the first call of a kernel may compile it
        self._dispatch += _SMOOTHING * (spent - self._dispatch)
        self._units.append((event, cost))
        self.in_flight += cost

    def make_room(self, cost: float) -> None:
        """Wait, oldest unit first, while ``cost`` more seconds would exceed the window."""
        units = self._units
        while units:
            event, oldest = units[0]
            if not event.done():
                if self.in_flight + cost <= self.window:
                    break
                event.wait()
            units.popleft()
            self.in_flight = self.in_flight - oldest if units else 0.0  # no rounding is left behind
        if self._kept:
            self._release()

    def keep(self, event: Event, *buffers: object) -> None:
        """Hold references to ``buffers``, which another stream may still use, until ``event`` is done."""
        self._kept.append((event, buffers))

    def _release(self) -> None:
        self._kept = [pair for pair in self._kept if not pair[0].done()]

    def drain(self) -> None:
        """Wait until nothing is in flight on the compute stream. Errors of the device raise here.

        That includes what was launched behind the last unit: the making of a result, half a unit that raised.
        """
        try:
            self.device.record().wait()
        finally:
            self._units.clear()
            self.in_flight = 0.0
        self._release()

    def validate(self) -> None:
        """Check that the seconds in flight are those of the units in flight."""
        total = sum(cost for _, cost in self._units)
        if abs(total - self.in_flight) > 1e-9 * max(1.0, total):
            raise InternalError("run-ahead lost count", expected=f"{total} s", got=f"{self.in_flight} s")

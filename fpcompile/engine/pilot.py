"""The executor's half of the driver: fly one run until it is done, stopped, or has failed.

Knows the device, the run-ahead and the hooks; knows nothing of requests or scheduling. When ``fly`` returns
anything but :attr:`Ending.UNDERWAY`, the device is free: nothing of the run is in flight.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from fpcompile.engine.outputs import inputs_of, tensors_in
from fpcompile.engine.prices import next_cost
from fpcompile.engine.programs import ProgramLike, RunLike
from fpcompile.errors import DeviceFailedError
from fpcompile.executor.device import Device, Event, breakdown
from fpcompile.executor.loop import Hook, Outcome, advance
from fpcompile.executor.runahead import RunAhead

__all__ = ["Ending", "Landing", "Pilot"]

logger = logging.getLogger(__name__)


class Ending(Enum):
    """How a flight ended; UNDERWAY: the host wanted control, the run keeps the device."""

    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    UNDERWAY = "underway"


@dataclass(frozen=True, slots=True)
class Landing:
    """``value`` when done, ``error`` when failed."""

    ending: Ending
    value: Any = None
    error: Exception | None = None


_STOPPED, _UNDERWAY = Landing(Ending.STOPPED), Landing(Ending.UNDERWAY)
_NOTHING = contextlib.nullcontext()


class Pilot:
    """Flies runs on one device, one at a time."""

    def __init__(
        self,
        device: Device,
        *,
        clock: Callable[[], float],
        max_blocking: float | None = None,
        on_segment: Hook | None = None,
    ) -> None:
        self.device = device
        self._clock = clock
        self._hook = on_segment
        self._ahead = RunAhead(device, max_blocking=max_blocking) if device.asynchronous else None

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """What must surround every flight in its thread: the device's stream, and no gradients."""
        if self._ahead is not None:
            return self._on_stream()
        return torch.no_grad() if torch.is_grad_enabled() else _NOTHING

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        with self.device.active(), torch.no_grad():
            yield

    def take(self, run: RunLike, ready: Event) -> None:
        """Before the first launch: the device waits for the inputs (``ready``), and the run may drop them."""
        self.device.order_after(ready)
        self.device.take_over(inputs_of(run))

    def cost(self, program: ProgramLike, run: RunLike) -> Callable[[], float] | None:
        """Predicted seconds of the next launch, for the run-ahead; None where it is not needed."""
        return None if self._ahead is None else next_cost(program, run)

    def fly(
        self,
        run: RunLike,
        stop: Callable[[], bool],
        limit: int | None,
        *,
        cost: Callable[[], float] | None,
        gives_back: bool,
    ) -> Landing:
        """Go on with ``run``. ``gives_back``: reaching ``limit`` launches ends the flight as a stop does.

        Raises :class:`DeviceFailedError`; what else a run raises is how its flight ends.
        """
        try:
            outcome = advance(
                run, stop, limit, ahead=self._ahead, cost=cost, on_segment=self._hook, clock=self._clock
            )
            if outcome is Outcome.QUOTA and not gives_back:
                return _UNDERWAY
            if outcome is not Outcome.DONE:
                self.wait()
                return _STOPPED
            value = run.result()
            self.deliver(value)  # it launches work of its own
            return Landing(Ending.DONE, value=value)
        except Exception as error:
            self.check(error)
            self.clear()
            return Landing(Ending.FAILED, error=error)

    def deliver(self, output: Any) -> None:
        """Before callers get what was made: on their streams, and complete."""
        if self._ahead is not None:
            self.device.hand_over(tensors_in(output))
            self._ahead.drain()

    def check(self, error: Exception) -> None:
        """Raise :class:`DeviceFailedError` if ``error`` says that nothing can be executed any more."""
        if (cause := breakdown(error)) is not None:
            raise DeviceFailedError(str(self.device.torch_device), cause=cause) from cause

    def wait(self) -> None:
        """Until all that was launched is complete."""
        if self._ahead is not None:
            self._ahead.drain()

    def clear(self) -> None:
        """Wait for what a failed run left in flight; the error that ended it is the one that counts."""
        if self._ahead is not None:
            try:
                self._ahead.drain()
            except Exception:
                logger.exception("the device failed again while a failed run was cleared away")

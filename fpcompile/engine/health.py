"""The watchdog: is the device still coming to cuts? :class:`Health`, a frozen answer, from any thread.

Words
    *overdue*   no cut for longer than :data:`PATIENCE` times what the launch under way was predicted to take,
                and for longer than :data:`FLOOR` seconds: below that, a busy machine is no incident.
    *incident*  from the cut behind which a launch became overdue to the next cut.

``engine.health()`` needs nothing of the device thread: it reads the time of the last cut, and only when that
is long ago what the launch was predicted to take. A cut costs the driver one attribute. Each incident is
logged once: by whoever asks first, or by the cut that ends it. Time that a host spends between two turns is
the host's, and an engine without work is healthy. An engine whose loop has broken (a device error) stays
unhealthy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["FLOOR", "PATIENCE", "Health", "Launching", "Watchdog"]

logger = logging.getLogger(__name__)

PATIENCE: Final = 10.0
"""Times the predicted seconds of a launch."""

FLOOR: Final = 1.0
"""Seconds without a cut that are always allowed: predictions of short launches say little about a stall."""


@dataclass(frozen=True, slots=True)
class Health:
    """``reason`` is empty when healthy. ``since``: seconds on the engine's clock, when this state began; of
    an incident, the last cut.
    """

    healthy: bool
    reason: str
    since: float


@dataclass(frozen=True, slots=True)
class Launching:
    """What is under way: in whose request, which segment, predicted seconds (0 when not known)."""

    request: str
    segment: str
    seconds: float


class Watchdog:
    """``launching(0)`` says what is under way, ``launching(1)`` what was before the last cut; None: nothing.

    It is called by any thread, but only when no cut came for longer than :data:`FLOOR`.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        launching: Callable[[int], Launching | None],
        *,
        patience: float = PATIENCE,
        floor: float = FLOOR,
    ) -> None:
        self.cut: float | None = None
        """When the last cut was; None while nothing is executed. Written by the driver."""
        self._clock, self._launching = clock, launching
        self._patience, self._floor = patience, floor
        self._lock = threading.Lock()
        self._since = clock()
        self._incident: float | None = None
        self._broken: Health | None = None

    # ---- for the driver

    def at_cut(self, now: float) -> None:
        """Control is back: an incident, if there is one, is over."""
        before, self.cut = self.cut, now
        if before is not None and now - before > self._floor:
            self._recover(before, now)

    def left(self) -> None:
        """Nothing is executed from now on."""
        self.at_cut(self._clock())
        self.cut = None

    def broke(self, error: BaseException) -> None:
        """The loop has ended for good."""
        said = (str(error).splitlines() or ["no message"])[0]
        reason = f"the engine is closed by {type(error).__name__}: {said}"
        self._broken = Health(False, reason, self._clock())

    def _recover(self, before: float, now: float) -> None:
        with self._lock:
            late = self._judge(before, now, behind=1)
            if late is not None:
                self._report(before, late)
            if self._incident is not None:
                self._incident, self._since = None, now
                logger.warning("a cut came after %.3g s: the engine is healthy again", now - before)

    # ---- for anybody

    def health(self) -> Health:
        """The state now."""
        if self._broken is not None:
            return self._broken
        cut = self.cut
        if cut is None or self._clock() - cut <= self._floor:
            return Health(True, "", self._since)
        with self._lock:
            late = self._judge(cut, self._clock(), behind=0)
            if late is None or self.cut != cut:  # a cut came meanwhile
                return Health(True, "", self._since)
            self._report(cut, late)
            return Health(False, late, cut)

    def _judge(self, cut: float, now: float, *, behind: int) -> str | None:
        """Why the launch behind ``cut`` is overdue; None when it is not."""
        launch = self._told(behind)
        expected = 0.0 if launch is None else launch.seconds
        if now - cut <= max(self._patience * expected, self._floor):
            return None
        what = "" if launch is None else f" in segment {launch.segment} of request {launch.request!r}"
        return f"no cut for {now - cut:.3g} s{what}, predicted to take {expected:.3g} s"

    def _told(self, behind: int) -> Launching | None:
        try:
            return self._launching(behind)
        except Exception:  # the device thread goes on meanwhile, and may have dropped the run
            logger.debug("what is under way cannot be told", exc_info=True)
            return None

    def _report(self, cut: float, reason: str) -> None:
        if self._incident != cut:
            self._incident = cut
            logger.error("the engine is unhealthy: %s", reason)

"""The executor's loop, owned by the host: it launches segments, and returns at cuts.

Yield rule (one sentence)
    Control returns to the host at every cut, so between two looks at ``stop`` (or two items of ``iterate``)
    exactly one ``step`` of one run is made, and none after ``stop`` has answered True.

Words
    *host*    whoever calls: the engine's device thread, an asyncio task, another server's own loop.
    *launch*  what one ``step`` puts on the device: a segment, a tile of one, or several small ones within the
              budget that the run was started with.
    *hook*    ``on_segment(run, segment, start, end)``, called after each launch with the clock's times around
              it. Without hooks there is no test, call or clock reading for them in the loop. A hook that
              raises is logged and never called again: see :class:`Guarded`.

Typical use
    ``outcome = advance(run, stop=flag.is_set)``
    ``for segment in iterate(run): await asyncio.sleep(0)``

Invariants
    A run is data: whoever got control back may drop it, or go on with it at any later time, on any thread.
    What a segment raises passes through unchanged; the run has then failed and other runs are not concerned.
    On an asynchronous device (``ahead``) returning means launched, not completed: ``ahead.drain()`` waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, Protocol

from fpcompile.errors import InternalError
from fpcompile.executor.runahead import RunAhead

__all__ = ["Guarded", "Hook", "Named", "Outcome", "Steps", "advance", "iterate"]

logger = logging.getLogger(__name__)


class Named(Protocol):
    """What the loop and its hooks need of a segment."""

    @property
    def index(self) -> int:
        """Its place in the program, from 0."""

    @property
    def name(self) -> str:
        """The module path, as the plan prints it."""


class Steps(Protocol):
    """What the loop needs of a run."""

    @property
    def done(self) -> bool:
        """Whether every segment has been launched."""

    @property
    def cursor(self) -> int:
        """Index of the next segment."""

    @property
    def next_segment(self) -> Named:
        """The segment that ``step`` goes on with."""

    def step(self) -> None:
        """Make one launch."""


Hook = Callable[[Any, Any, float, float], object]


class Outcome(Enum):
    """Why ``advance`` returned."""

    DONE = "done"
    STOPPED = "stopped"
    QUOTA = "quota"


def advance(
    run: Steps,
    stop: Callable[[], bool],
    max_segments: int | None = None,
    *,
    ahead: RunAhead | None = None,
    cost: Callable[[], float] | None = None,
    on_segment: Hook | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Launch until the run is done, ``stop()`` answers True, or ``max_segments`` launches are made.

    ``stop`` is asked before every launch, the first one included. ``ahead`` bounds how far launching runs in
    front of an asynchronous device; ``cost()`` is what the next launch is predicted to take in seconds.
    Raises what a segment raises (:class:`fpcompile.errors.SegmentError`).
    """
    launch = _launcher(run, ahead, cost, on_segment, clock)
    left = -1 if max_segments is None else max_segments
    while not run.done:
        if stop():
            return Outcome.STOPPED
        if left == 0:
            return Outcome.QUOTA
        left -= 1
        launch()
    return Outcome.DONE


def iterate(
    run: Steps,
    *,
    ahead: RunAhead | None = None,
    cost: Callable[[], float] | None = None,
    on_segment: Hook | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Named]:
    """The same as a generator: makes one launch, yields its segment at the cut, and so on to the end.

    Closing the generator leaves the run at its cut; a new ``iterate(run)`` goes on from there.
    """
    launch = _launcher(run, ahead, cost, on_segment, clock)
    while not run.done:
        segment = run.next_segment
        launch()
        yield segment


def _launcher(
    run: Steps,
    ahead: RunAhead | None,
    cost: Callable[[], float] | None,
    on_segment: Hook | None,
    clock: Callable[[], float],
) -> Callable[[], None]:
    """One call that makes the next launch; ``run.step`` itself when nothing else is asked for."""
    launch = run.step
    if ahead is not None:
        if cost is None:
            raise InternalError("run-ahead needs predictions", expected="seconds of each launch", got="none")
        bounded, step, predicted = ahead.launch, run.step, cost

        def launch_bounded() -> None:
            bounded(step, predicted())

        launch = launch_bounded
    if on_segment is None:
        return launch

    def observed() -> None:
        segment, start = run.next_segment, clock()
        launch()
        on_segment(run, segment, start, clock())

    return observed


class Guarded:
    """A hook that is logged and switched off when it raises: observers never harm what they observe.

    SystemExit counts as raising: in the device's thread it would end the engine, not the program. Only
    KeyboardInterrupt goes through, which the user sends and not the hook.
    """

    __slots__ = ("hook",)

    def __init__(self, hook: Hook) -> None:
        self.hook: Hook | None = hook

    def __call__(self, run: Any, segment: Any, start: float, end: float) -> None:
        if self.hook is None:
            return
        try:
            self.hook(run, segment, start, end)
        except (Exception, SystemExit):
            logger.exception("hook %r raised and is switched off", self.hook)
            self.hook = None

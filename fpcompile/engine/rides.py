"""A decode step that rides with a prompt: both joined to one run, which computes their tokens side by side.

A step of few sequences costs nearly what reading the weights costs; beside a prompt's tokens it costs its
share of their arithmetic (Sarathi, arXiv 2308.16369, calls it piggybacking). A prompt of which anything is
executed, or that takes longer than the streams' tokens may, is interrupted by steps of their own instead.

Invariants
    Nothing of the prompt's own run, or of the sequences, is changed before the ride ends: left on the way,
    for a pause or because something raised, both begin again, each by itself. What that repeats is never
    longer than the time within which the next tokens were wanted.
    The ride has a tile plan of its own, for the smallest budget of all in it.
    Who rides is computed with others: to rounding, as in a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol, final

from fpcompile.engine.flight import Flight, Ride
from fpcompile.engine.loads import Load, smallest_budget
from fpcompile.engine.pilot import Ending, Landing, Pilot
from fpcompile.engine.prices import Prices
from fpcompile.engine.steps import TokenStep
from fpcompile.executor.faults import forget_frames
from fpcompile.executor.packed import PackedCall
from fpcompile.executor.run import Run
from fpcompile.executor.together import Together

__all__ = ["Lane", "Rides", "fits"]

_WORTH: Final = 0.8
"""Of a step of its own: one that makes the prompt so much longer does not ride."""


def fits(now: float, left: float, both: float, step: float, due: float, deadlines: Iterable[float]) -> bool:
    """Whether a step shall ride with a prompt that takes ``left`` seconds by itself, ``both`` with the step.

    It does if that is cheaper than a ``step`` of its own, if its tokens, which are ``due``, then come in
    time, if the next prompt like this one would bring them too late, and if the prompt misses none of its
    ``deadlines`` for it.
    """
    end = now + both
    in_time = end <= due < end + both
    return in_time and both - left <= _WORTH * step and not any(now + left <= at < end for at in deadlines)


class Lane(Protocol):
    """Whose steps ride."""

    def ride(self, load: Load, left: float) -> TokenStep | None:
        """A step that rides with ``load``, which has ``left`` predicted seconds; None: it does not."""

    def arrive(self, begun: float, now: float, share: float) -> None:
        """The ride is done; of its time a ``share`` was the step's."""

    def alight(self) -> None:
        """The step has not been."""


@final
class Rides:
    """Makes the flights of prompts rides, and ends them."""

    def __init__(self, lane: Lane, pilot: Pilot, prices: Prices) -> None:
        self._lane, self._pilot, self._prices = lane, pilot, prices

    def begin(self, flight: Flight, goes_on: Callable[[], bool]) -> None:
        """Before the first launch of a flight: a step rides with it, if one may.

        ``goes_on()``: whether the flight still has the device: making a step may tell the scheduler that
        memory is short.
        """
        if flight.ride is not None or flight.alone:
            return
        flight.alone, load = True, flight.load  # it is asked once
        if flight.quota is not None or flight.error is not None or (own := _fresh(load)) is None:
            return
        left = self._prices.corrected(load.owner, load.tokens, load.left())
        if (step := self._lane.ride(load, left)) is None:
            return
        if flight.pause or not goes_on():
            self._lane.alight()
            return
        budget = smallest_budget([*load.tickets, *step.tickets], own.program)
        run = Together([step.run, own], [_nothing, own.result], max_blocking_ms=budget)
        share = step.rows / (step.rows + load.tokens)
        flight.ride = Ride(run, flight.begun, share, self._pilot.cost(load.program, run))
        for ticket in load.tickets:
            ticket.shared = True

    def landed(self, flight: Flight, landing: Landing, now: float) -> Landing | None:
        """How the prompt's flight ended; None when it goes on by itself, because the ride raised: if that
        raises too, the prompt is to blame, or else the step.
        """
        ride = flight.ride
        if ride is None or landing.ending is Ending.STOPPED:
            return landing
        if landing.error is not None:
            self.leave(flight)
            forget_frames(landing.error)
            return None
        flight.ride = None
        self._lane.arrive(ride.begun, now, ride.share)
        return Landing(Ending.DONE, value=landing.value[-1])

    def leave(self, flight: Flight) -> None:
        """Prompt and step are what they were before the ride, if there is one."""
        if flight.ride is not None:
            flight.ride.run.again()
            flight.ride, flight.load.executed = None, 0.0
            self._lane.alight()


def _fresh(load: Load) -> Run | None:
    """Its run, if a step can be executed with it: that of one prompt, of which nothing is executed."""
    run = load.run
    if load.shared or not isinstance(run, Run) or run.at or not isinstance(run.call, PackedCall):
        return None
    return run


def _nothing() -> Any:
    return None

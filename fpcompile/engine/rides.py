"""A decode step that rides with a prompt: both joined to one run, which computes their tokens side by side.

A step of few sequences costs nearly what reading the weights costs; beside a prompt's tokens it costs its
share of their arithmetic (Sarathi, arXiv 2308.16369, calls it piggybacking). A prompt of which anything is
executed, or that takes longer than the streams' tokens may, is interrupted by steps of their own instead.

Invariants
    Nothing of the prompt's own run, or of the sequences, is changed before the ride ends: left on the way,
    for a pause or because something raised, both begin again, each by itself. That happens to a prompt once
    at most, and what is repeated is never longer than the time within which the next tokens were wanted.
    The ride has a tile plan of its own, for the smallest budget of all in it.
    Who rides is computed with others: to rounding, as in a pack. Prompts with a strict budget never ride.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, final

from fpcompile.engine.flight import Flight, Ride
from fpcompile.engine.loads import Load, smallest_budget
from fpcompile.engine.metrics import Ticket
from fpcompile.engine.pilot import Ending, Landing, Pilot
from fpcompile.engine.prices import Prices
from fpcompile.engine.steps import TokenStep
from fpcompile.executor.faults import forget_frames
from fpcompile.executor.packed import PackedCall
from fpcompile.executor.run import Run
from fpcompile.executor.schedule import Shape
from fpcompile.executor.together import Together

__all__ = ["Lane", "Offer", "Rides", "fits"]

logger = logging.getLogger(__name__)

_WORTH: Final = 0.8
"""Of a step of its own: one that makes the prompt so much longer does not ride."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A ride with a prompt that takes ``left`` seconds by itself, ``both(tickets)`` with a step of these.

    ``deadlines``: of the prompt, on the engine's clock.
    """

    program: str
    left: float
    both: Callable[[Sequence[Ticket]], float]
    deadlines: Sequence[float]


def fits(offer: Offer, now: float, both: float, step: float, due: float, latest: float) -> bool:
    """Whether a step, by itself of ``step`` seconds, shall ride if the ride takes ``both``.

    Its tokens should be there when they are ``due``, and must at the ``latest``. It rides if that is cheaper,
    if its tokens are in time, even if a step of its own has to follow a ride that was broken off, and if that
    might not be so with the next prompt like this one. The prompt shall miss none of its deadlines for it,
    even if it has to begin again at the end of the ride.
    """
    end = now + both
    cheap = both - offer.left <= _WORTH * step
    in_time = end <= due and end + step <= latest
    next_one = end + both <= due and end + both + step <= latest
    kept = not any(now + offer.left <= deadline < end + offer.left for deadline in offer.deadlines)
    return cheap and in_time and not next_one and kept


class Lane(Protocol):
    """Whose steps ride."""

    def __len__(self) -> int:
        """Who decodes."""

    def ride(self, offer: Offer) -> TokenStep | None:
        """A step that rides; None: it does not."""

    def arrive(self, seconds: float) -> None:
        """The ride is done; of its time so much was the step's."""

    def alight(self) -> None:
        """The step has not been."""


@final
class Rides:
    """Makes the flights of prompts rides, and ends them."""

    def __init__(self, lane: Lane, pilot: Pilot, prices: Prices) -> None:
        self._lane, self._pilot, self._prices = lane, pilot, prices

    def begin(self, flight: Flight, goes_on: Callable[[], bool]) -> None:
        """Before the first launch of a flight: a step rides with it, if one may.

        ``goes_on()``: whether the flight still has the device, and keeps it: making a step may tell the
        scheduler that memory is short.
        """
        load = flight.load
        if not len(self._lane) or flight.ride is not None or flight.quota is not None:
            return
        if flight.error is not None or flight.pause:
            return
        if load.rode or load.retried or (own := _fresh(load)) is None:
            return
        alone = load.left()
        if not alone > 0:
            return
        left = self._prices.corrected(load.owner, load.tokens, alone)

        def both(tickets: Sequence[Ticket]) -> float:
            return left * _joined(own, tickets) / alone

        offer = Offer(load.owner, left, both, [ticket.request.deadline for ticket in load.served])
        if (step := self._lane.ride(offer)) is None:
            return
        if not goes_on():
            self._lane.alight()
            return
        load.rode = True
        budget = smallest_budget([*load.tickets, *step.tickets], own.program)
        run = Together([step.run, own], [_nothing, own.result], max_blocking_ms=budget)
        part = min(left / both(step.tickets), 1.0)
        flight.ride = Ride(run, part, self._pilot.cost(load.program, run))
        for ticket in (*load.tickets, *step.tickets):
            ticket.shared = True

    def landed(self, flight: Flight, landing: Landing) -> Landing | None:
        """How the prompt's flight ended; None when it goes on by itself, because the ride raised: if that
        raises too, the prompt is to blame, or else the step.
        """
        ride, load = flight.ride, flight.load
        if ride is None or landing.ending is Ending.STOPPED:
            return landing
        if landing.error is not None:
            about = {"request_id": load.tickets[0].id}
            logger.warning(
                "a decode step and a prompt failed together, and go on apart: %s", landing.error, extra=about
            )
            self.leave(flight)
            forget_frames(landing.error)
            return None
        flight.ride = None
        self._lane.arrive((1 - ride.own) * load.executed)
        return Landing(Ending.DONE, value=landing.value[-1])

    def leave(self, flight: Flight) -> None:
        """Prompt and step are what they were before the ride, if there is one."""
        if flight.ride is not None:
            flight.ride.run.again()
            flight.ride, flight.load.executed = None, 0.0
            self._lane.alight()


def _fresh(load: Load) -> Run | None:
    """Its run, if a step can be executed with it: that of one prompt, of which nothing is executed, and whose
    budget may be kept by another plan.
    """
    run = load.run
    if load.shared or not isinstance(run, Run) or run.at:
        return None
    return run if isinstance(run.call, PackedCall) and not run.call.strict else None


def _joined(own: Run, tickets: Sequence[Ticket]) -> float:
    """Predicted seconds of the prompt with one token of each stream."""
    shape, count = own.call.shape, len(tickets)
    sequences = [ticket.generation.sequence for ticket in tickets if ticket.generation is not None]
    context = math.ceil(sum(sequence.past + 1 for sequence in sequences) / count)
    joined = Shape(shape.tokens + count, shape.rows + count, (*shape.groups, (count, 1, context)))
    return own.program.predict(tokens=joined.tokens, rows=joined.rows, context=joined.mean_context)


def _nothing() -> Any:
    return None

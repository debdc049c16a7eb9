"""The run that has the device, from the scheduler's Launch to its Yielded, Completed or Failed.

A launch becomes a flight by *boarding*: a request that is launched first gets its inputs and its blocks, what
was moved away is brought back, and whoever goes on is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fpcompile.engine import journal
from fpcompile.engine.loads import Load, load_of
from fpcompile.engine.memory import Memory
from fpcompile.engine.metrics import Ticket
from fpcompile.engine.pilot import Pilot
from fpcompile.engine.programs import Programs, RunLike
from fpcompile.engine.recorder import Recorder
from fpcompile.engine.registry import Registry
from fpcompile.executor.together import Together
from fpcompile.scheduler.events import Launch

__all__ = ["Boarding", "Flight", "Ride"]


@dataclass(frozen=True, slots=True)
class Ride:
    """A decode step and a prompt as one ``run``; see :mod:`fpcompile.engine.rides`.

    ``own``: the part of it that the prompt takes by itself. ``cost()``: predicted seconds of the next launch,
    where that is needed.
    """

    run: Together
    own: float
    cost: Callable[[], float] | None


@dataclass(slots=True)
class Flight:
    """The run that has the device.

    ``quota``: segments left of the launch. ``begun``: since when it runs, in this turn.

    ``requested``: when its pause was asked for. ``made``: launches of this turn. ``lends``: whether it
    stopped for a decode step.
    """

    load: Load
    command: Launch
    quota: int | None
    begun: float
    pause: bool = False
    requested: float | None = None
    made: int = 0
    lends: bool = False
    error: Exception | None = None
    """Why it cannot be brought to the device, for the first time or again."""
    ride: Ride | None = None
    """With a decode step."""

    @property
    def run(self) -> RunLike:
        """What is executed."""
        return self.load.run if self.ride is None else self.ride.run

    @property
    def cost(self) -> Callable[[], float] | None:
        """Predicted seconds of the next launch, where that is needed."""
        return self.load.cost if self.ride is None else self.ride.cost


class Boarding:
    """Makes flights."""

    def __init__(
        self,
        pilot: Pilot,
        memory: Memory,
        programs: Programs,
        registry: Registry,
        recorder: Recorder | None,
    ) -> None:
        self._pilot, self._memory = pilot, memory
        self._programs, self._registry, self._recorder = programs, registry, recorder

    def board(self, command: Launch, tickets: Sequence[Ticket], now: float) -> Flight:
        """The flight of ``tickets``, whose requests ``command`` names.

        Raises :class:`DeviceFailedError`; any other error is the flight's own.
        """
        for ticket in tickets:
            if self._recorder is not None:
                self._recorder.launched(ticket, now)
            if ticket.started is None:
                self._registry.started()
            ticket.launched(now, tickets)
            journal.launched(ticket)
        load, error = self._boarded(command, tickets)
        return Flight(load, command, command.max_segments, now, error=error)

    def again(self, flight: Flight) -> None:
        """What could not be brought to the device may be now; if not, the flight has the new error."""
        tickets = flight.load.tickets
        if not all(ticket.seated for ticket in tickets):  # nobody has a seat in that load
            for ticket in tickets:
                ticket.load = None
        flight.load, flight.error = self._boarded(flight.command, tickets)
        flight.load.retried = True

    def _boarded(self, command: Launch, tickets: Sequence[Ticket]) -> tuple[Load, Exception | None]:
        errors = [self._seat(ticket) for ticket in tickets if not ticket.seated]
        error = next((error for error in errors if error is not None), None)
        load = load_of(command, tickets, self._programs[tickets[0].program], self._pilot.cost)
        return load, error or self._bring_back(load)

    def _seat(self, ticket: Ticket) -> Exception | None:
        """A request is launched first: its inputs are the device's, and it has its blocks."""
        try:
            if ticket.ready is not None:
                self._pilot.take(ticket.run, ticket.ready)
            self._memory.seat(ticket)
        except Exception as error:
            self._pilot.check(error)
            return error
        ticket.seated = True
        return None

    def _bring_back(self, load: Load) -> Exception | None:
        """What the run needs is on the device again, or an error that is its own."""
        try:
            if self._memory.board(load):
                load.cost = self._pilot.cost(load.program, load.run)
        except Exception as error:
            self._pilot.check(error)
            return error
        return None

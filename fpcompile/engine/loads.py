"""What one launch command executes: a request's run, a pack of several, or a step of their slices.

Words
    *load*    the run on the device with the tickets that it serves, under the core's name of the run.
    *served*  a ticket of the load that has not ended; others go on when one of them is cancelled.

The load of one request, or of a pack, lives until that ends; the load of a step, for one launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, final

from fpcompile.engine.metrics import Ticket
from fpcompile.engine.prices import context_of, next_cost, seconds_left, seconds_whole
from fpcompile.engine.programs import ProgramLike, RunLike
from fpcompile.executor.program import Program
from fpcompile.executor.run import Run
from fpcompile.executor.slices import Chunks, Sliced
from fpcompile.executor.together import Together
from fpcompile.scheduler.events import Launch

__all__ = ["UNFINISHED", "Load", "alone", "load_of", "pack", "smallest_budget", "step"]

UNFINISHED: Final = object()
"""In place of a result: more slices of this request follow."""


@final
class Load:
    """``tokens`` new tokens; ``seconds`` predicted when launched first, without corrections.

    ``executed``: device seconds so far. ``shared``: the run is none of a ticket's own. ``names``: ids of
    the tickets.
    """

    __slots__ = (
        "_context",
        "cost",
        "executed",
        "name",
        "names",
        "program",
        "retried",
        "rode",
        "run",
        "seconds",
        "shared",
        "slices",
        "tickets",
        "tokens",
    )

    def __init__(
        self,
        name: str,
        tickets: Sequence[Ticket],
        run: RunLike,
        program: ProgramLike,
        *,
        tokens: int,
        seconds: float,
        cost: Callable[[], float] | None,
        shared: bool,
        slices: bool = False,
    ) -> None:
        self.name, self.tickets = name, tuple(tickets)
        self.names = tuple([ticket.id for ticket in tickets])
        self.run, self.program = run, program
        self.tokens, self.seconds, self.cost = tokens, seconds, cost
        self.shared, self.slices = shared, slices
        self.executed = 0.0
        self._context: float | None = None
        self.retried = False
        """Whether it was begun again because memory ran out."""
        self.rode = False
        """Whether a decode step was executed with it, or would have been: no second one is."""

    @property
    def served(self) -> list[Ticket]:
        """Tickets that have not ended."""
        return [ticket for ticket in self.tickets if ticket.ended is None]

    @property
    def owner(self) -> str:
        """Name of the program."""
        return self.tickets[0].program

    def next_launch(self) -> float:
        """Predicted seconds of the launch that the run would make now."""
        if self.cost is None:
            self.cost = next_cost(self.program, self.run)
        return self.cost()

    def begin_again(self) -> None:
        """The run is at its beginning again: what it executed is lost, and its launches may be others."""
        self.executed, self.cost, self._context = 0.0, None, None
        if not self.shared:
            self.tokens, self.seconds = self.run.tokens, self.left()

    def left(self) -> float:
        """Predicted seconds that are left, without corrections."""
        if isinstance(self.run, Together) and not self.run.made:
            return self.seconds  # joining launches work, and may fail: that is the run's own
        if self._context is None:
            self._context = context_of(self.run)
        return seconds_left(self.program, self.run, self._context)

    def whole(self) -> float:
        """Predicted seconds of the whole load, without corrections, once its run is done."""
        return seconds_whole(self.program, self.run) if self.shared else self.seconds

    def results(self, value: Any) -> list[Any]:
        """What the run's result is for each ticket: an output, an error, or :data:`UNFINISHED`."""
        return list(value) if self.shared else [value]

    def release(self) -> None:
        """Drop what belongs to no ticket."""
        if self.shared:
            self.run.release()


Price = Callable[[ProgramLike, RunLike], Callable[[], float] | None]
"""Predicts the next launch, where that is needed."""


def load_of(command: Launch, tickets: Sequence[Ticket], program: ProgramLike, price: Price) -> Load:
    """What was launched before under this name, or a new load."""
    if command.tokens is not None:
        for ticket in tickets:
            ticket.shared = True
        return step(command.run, tickets, command.tokens, program, price)
    load = tickets[0].load
    if load is None:
        several = len(tickets) > 1
        load = pack(command.run, tickets, program, price) if several else alone(tickets[0], program, price)
        for ticket in tickets:
            ticket.load = load
            ticket.shared = ticket.shared or load.shared or isinstance(ticket.run, Chunks)
    return load


def alone(ticket: Ticket, program: ProgramLike, price: Price) -> Load:
    """The run of one request."""
    run = ticket.run
    return Load(
        ticket.id, [ticket], run, program,
        tokens=run.tokens, seconds=ticket.predicted, cost=price(program, run), shared=False,
    )  # fmt: skip


def pack(name: str, tickets: Sequence[Ticket], program: ProgramLike, price: Price) -> Load:
    """Several new requests as one run."""
    runs: list[Run] = [ticket.run for ticket in tickets]
    budget = smallest_budget(tickets, runs[0].program)
    run = Together(runs, [_caught(run.result) for run in runs], max_blocking_ms=budget)
    return _shared(name, tickets, run, program, price, sum(run.tokens for run in runs))


def step(
    name: str, tickets: Sequence[Ticket], sizes: Sequence[int], program: ProgramLike, price: Price
) -> Load:
    """The next slice of each request, as one run."""
    sliced: list[Sliced] = [ticket.run for ticket in tickets]
    slices: list[Run] = []

    def take() -> list[Run]:
        slices.extend(one.take(size) for one, size in zip(sliced, sizes, strict=True))
        return slices

    collect = [_put(one, slices, i) for i, one in enumerate(sliced)]
    run = Together(take, collect, max_blocking_ms=smallest_budget(tickets, sliced[0].run.program))
    return _shared(name, tickets, run, program, price, sum(sizes), slices=True)


def smallest_budget(tickets: Sequence[Ticket], program: Program) -> float | None:
    """The smallest budget in milliseconds of any of ``tickets``; None for the program's own."""
    own = math.inf if program.max_blocking_ms is None else program.max_blocking_ms
    budgets = [own if ticket.budget is None else ticket.budget for ticket in tickets]
    return None if all(ticket.budget is None for ticket in tickets) else min(budgets)


def _shared(
    name: str,
    tickets: Sequence[Ticket],
    run: Together,
    program: ProgramLike,
    price: Price,
    tokens: int,
    **more: bool,
) -> Load:
    seconds = sum(ticket.predicted for ticket in tickets)
    return Load(
        name, tickets, run, program,
        tokens=tokens, seconds=seconds, cost=price(program, run), shared=True, **more,
    )  # fmt: skip


def _caught(result: Callable[[], Any]) -> Callable[[], Any]:
    """An error in making one member's result is that member's."""

    def collect() -> Any:
        try:
            return result()
        except Exception as error:
            return error

    return collect


def _put(sliced: Sliced, slices: Sequence[Run], i: int) -> Callable[[], Any]:
    finish = _caught(sliced.result)

    def collect() -> Any:
        sliced.put(slices[i])
        return finish() if sliced.done else UNFINISHED

    return collect

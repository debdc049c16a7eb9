"""A decode step as a run: the launches of the program, then the choice of each member's token.

Choosing is cut as well: sorting a vocabulary for every member in one go would hold the device for long. All
that want the plain argmax get it together; each other member is a launch of its own.

Invariants
    A sampler or processor that raises gives its own member an error in place of a token, and nobody else.
    Whoever has ended meanwhile gets None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from fpcompile.engine.metrics import Ticket
from fpcompile.executor.decode import Step
from fpcompile.executor.loop import Named
from fpcompile.executor.sampling import Sampler

__all__ = ["TokenStep"]

_CHOOSING: Final = 1e-4  # seconds of one choice, roughly: nothing is planned by it


@dataclass(frozen=True, slots=True)
class _Choice:
    """Choosing as a hook sees it."""

    index: int
    name: str = "sampling"


@final
class TokenStep:
    """One token for each of ``tickets``; :meth:`result` is a list of tokens and exceptions in their order.

    ``due``: when the first of the tokens is. ``seconds`` predicted for all of it, ``executed`` so far.
    """

    __slots__ = (
        "_choices", "_left", "_logits", "_plain", "_step", "due", "executed", "predicted", "rode",
        "seconds", "tickets",
    )  # fmt: skip

    def __init__(self, tickets: Sequence[Ticket], step: Step, *, due: float, seconds: float) -> None:
        self.tickets = tuple(tickets)
        self.due, self.seconds, self.executed = due, seconds, 0.0
        self.predicted = step.seconds
        """The same without what was learnt."""
        self.rode = False
        """Whether it was executed with a prompt."""
        self._step = step
        self._logits: Tensor | None = None
        self._choices: list[Tensor | Exception | None] = [None] * len(self.tickets)
        self._plain: tuple[list[int], Tensor] | None = None
        plain = [i for i, t in enumerate(self.tickets) if _sampler(t).plain]
        self._left = [[i] for i in sorted({*range(len(self.tickets))} - {*plain})]
        if plain:
            self._left.append(plain)

    @property
    def run(self) -> Any:
        """What computes the logits."""
        return self._step.run

    @property
    def left(self) -> float:
        """Predicted seconds that are left of it."""
        return max(self.seconds - self.executed, 0.0)

    @property
    def tokens(self) -> int:
        """New tokens."""
        return len(self.tickets)

    @property
    def rows(self) -> int:
        """Positions whose logits are computed."""
        return len(self.tickets)

    @property
    def done(self) -> bool:
        """Whether every token is chosen."""
        return self._step.run.done and not self._left

    @property
    def cursor(self) -> int:
        """Index of the next segment."""
        return int(self._step.run.cursor)

    @property
    def next_segment(self) -> Named:
        """The segment that ``step`` goes on with."""
        run = self._step.run
        segment: Named = _Choice(self.cursor) if run.done else run.next_segment
        return segment

    @property
    def live_bytes(self) -> int:
        """Bytes of the live values."""
        return int(self._step.run.live_bytes)

    @property
    def kv_bytes(self) -> int:
        """None of its own: the caches are the sequences'."""
        return 0

    def cost(self) -> float:
        """Predicted seconds of the next launch."""
        return _CHOOSING if self._step.run.done else self._step.cost()

    def step(self) -> None:
        """Make one launch, or choose."""
        if not self._step.run.done:
            self._step.run.step()
            return
        if self._logits is None:
            self._logits = self._step.logits()
        members = self._left.pop()
        if _sampler(self.tickets[members[0]]).plain:
            rows = self._logits if len(members) == len(self.tickets) else self._logits[members]
            self._plain = members, rows.float().argmax(dim=-1)
        else:
            self._choose(members[0], self._logits)

    def _choose(self, place: int, logits: Tensor) -> None:
        ticket = self.tickets[place]
        if ticket.ended is not None:
            return
        try:
            self._choices[place] = _sampler(ticket).choose(logits[place])[0]
        except Exception as error:
            self._choices[place] = error

    def result(self) -> list[int | Exception | None]:
        """For each ticket its token, what its sampler raised, or None when it has ended."""
        tokens = [choice for choice in self._choices if isinstance(choice, Tensor)]
        values = iter(torch.stack(tokens).tolist() if tokens else ())
        chosen: list[int | Exception | None] = [
            next(values) if isinstance(choice, Tensor) else choice for choice in self._choices
        ]
        if self._plain is not None:
            for place, token in zip(self._plain[0], self._plain[1].tolist(), strict=True):
                chosen[place] = token
        return chosen

    def undo(self) -> None:
        """Take the sequences back to before the step."""
        self._step.undo()

    def suspend(self) -> None:
        """Drop what can be computed again."""
        self._step.run.suspend()

    def release(self) -> None:
        """Drop every tensor; the sequences are spoilt if it has begun."""
        self._step.run.release()
        self._logits = None


def _sampler(ticket: Ticket) -> Sampler:
    assert ticket.generation is not None
    return ticket.generation.sampler

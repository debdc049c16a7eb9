"""The core's record of one run, and the read-only view of it that policies see.

A job is born with its request and dies with the run. Its numbers change only through :meth:`Job.launched`
and :meth:`Job.stopped`, its state only through :meth:`Job.advance` and the table of ``states``.
"""

from __future__ import annotations

from typing import Protocol

from fpcompile.scheduler.errors import TransitionError
from fpcompile.scheduler.events import Request
from fpcompile.scheduler.future import Growing
from fpcompile.scheduler.states import TRANSITIONS, State, legal_kinds

__all__ = ["Job", "RequestView"]

_STORY = 64


class RequestView(Protocol):
    """What a policy may read about a request, its own or a run that it leads."""

    @property
    def request(self) -> Request:
        """The request (of a packed run: its first member)."""

    @property
    def sequence(self) -> int:
        """Order of arrival at this core, from 0: breaks ties."""

    @property
    def deadline(self) -> float:
        """Absolute seconds; of a packed run what its batching rule says."""

    @property
    def state(self) -> State:
        """Where the run is."""

    @property
    def executed(self) -> float:
        """Device seconds executed up to the last stop."""

    @property
    def started(self) -> bool:
        """Whether it was ever launched."""

    def remaining(self, now: float) -> float:
        """Predicted seconds on the device until it is done, decode steps included (never negative)."""


class Job:
    """Mutable record of one run; see :class:`RequestView` for the fields that policies may read."""

    __slots__ = (
        "boosted", "cost", "deadline", "entry", "executed", "held", "host", "joined", "key", "launched_at",
        "left", "request", "sequence", "started", "state", "stopped_at", "story", "tokens_left", "withdrawn",
    )  # fmt: skip

    def __init__(self, request: Request, sequence: int) -> None:
        self.request = request
        self.sequence = sequence
        self.deadline = request.deadline
        self.cost = request.cost  # predicted seconds of the whole run, members and decode steps included
        self.left = request.cost  # predicted seconds left at the last stop (or launch)
        self.tokens_left = request.tokens  # for step policies
        self.executed = 0.0
        self.launched_at: float | None = None
        self.stopped_at = 0.0
        self.started = False
        self.boosted = False  # suspended for too long: goes first and is not paused again
        self.withdrawn = False  # the first member was cancelled, other members go on
        self.held = 0  # cache blocks on the device
        self.joined: list[Job] = []  # the other members of a packed run
        self.host: Job | None = None  # the packed run that this request joined
        self.key: object = None  # last sort key, owned by the queue
        self.entry = 0  # version of the valid queue entry, owned by the queue
        self.state = State.NEW
        self.story: list[tuple[float, str, str]] = []

    def __repr__(self) -> str:
        return f"Job({self.request.id!r}, {self.state.value}, left={self.left:.6g})"

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def members(self) -> tuple[str, ...]:
        if not self.joined:
            return (self.request.id,)
        return (self.request.id, *(job.request.id for job in self.joined))

    @property
    def blocks(self) -> int:
        """Cache blocks that the whole run needs, members included."""
        return self.request.kv_blocks + sum(job.request.kv_blocks for job in self.joined)

    @property
    def growing(self) -> list[Growing]:
        """Of each member that will generate: the blocks of its prompt, and the tokens to come."""
        requests = [self.request, *(job.request for job in self.joined)]
        return [(r.kv_blocks, r.decode_tokens) for r in requests if r.decode_tokens and r.kv_blocks]

    @property
    def has_joined(self) -> bool:
        """Whether a request that joined this run is still wanted."""
        return any(job.state is State.JOINED for job in self.joined)

    def remaining(self, now: float) -> float:
        """Predicted seconds left at ``now``: falls while the run is on the device."""
        at = self.launched_at
        left = self.left if at is None else self.left - (now - at)
        return left if left > 0.0 else 0.0

    def advance(self, kind: str, now: float) -> None:
        """Take the table's transition for ``kind``, or raise :class:`TransitionError`."""
        to = TRANSITIONS.get((self.state, kind))
        if to is None:
            raise TransitionError(self.id, self.state.value, kind, legal_kinds(self.state), self.story)
        self.state = to
        if len(self.story) >= _STORY:
            del self.story[1 : _STORY // 2]  # keep the arrival and the recent part
        self.story.append((now, kind, to.value))

    def paced(self, factor: float, now: float) -> None:
        """From now on what is left of it takes ``factor`` times as long."""
        left = self.remaining(now) * factor
        self.left = left if self.launched_at is None else left + (now - self.launched_at)
        self.cost *= factor

    def launched(self, now: float) -> None:
        """The device starts to execute this run."""
        self.launched_at = now
        self.started = True

    def stopped(self, now: float, left: float | None) -> None:
        """The device stopped executing; ``left`` as told by the device, or None for predicted - executed."""
        assert self.launched_at is not None
        self.executed += now - self.launched_at
        self.left = self.remaining(now) if left is None else left
        self.launched_at = None
        self.stopped_at = now

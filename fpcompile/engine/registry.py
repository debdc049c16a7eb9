"""Who is in the engine: the requests that have not ended, and whether another one may come in.

Words
    *live*     admitted and not ended.
    *waiting*  live and never launched; only these count against ``max_queue``.

Invariants
    A request id names one live request at most, and is not used again until :data:`REMEMBERED` others have
    ended: the scheduler keeps their stories, and metrics name requests by it.
    Once closed, nothing is admitted. All methods may be called from any thread, and none blocks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from fpcompile.engine.metrics import Ticket
from fpcompile.errors import EngineClosedError, InvalidInputError, QueueFullError

__all__ = ["REMEMBERED", "Registry"]

REMEMBERED: Final = 8192
"""Ended ids that are not used again; more than the scheduler remembers."""


class Registry:
    """The live requests of one engine."""

    def __init__(self, max_queue: int | None) -> None:
        given: Any = max_queue
        if given is not None and (type(given) is not int or given < 1):
            raise InvalidInputError(
                "max_queue is wrong", expected="a whole number of requests >= 1, or None", got=repr(given)
            )
        self.max_queue = max_queue
        self.waiting = 0
        self.closed = False
        self._cause: BaseException | None = None
        self._lock = threading.RLock()
        self._live: dict[str, Ticket] = {}
        self._used: set[str] = set()
        self._ended: deque[str] = deque()
        self._count = 0

    def __len__(self) -> int:
        return len(self._live)

    def new_id(self) -> str:
        """``request-1``, ``request-2``, and so on, leaving out what callers have used."""
        with self._lock:
            while True:
                self._count += 1
                if (name := f"request-{self._count}") not in self._used:
                    return name

    def check(self, request_id: str | None, retry_after: Callable[[], float]) -> None:
        """Raise if a request of this id would not be admitted now."""
        with self._lock:
            self._check(request_id, retry_after)

    def admit(self, ticket: Ticket, retry_after: Callable[[], float], enter: Callable[[], object]) -> None:
        """Let a request in, and call ``enter`` before anybody can close the engine.

        Raises :class:`EngineClosedError`, :class:`QueueFullError`, :class:`InvalidInputError` for a used id.
        """
        with self._lock:
            self._check(ticket.id, retry_after)
            self._live[ticket.id] = ticket
            self._used.add(ticket.id)
            self.waiting += 1
            enter()

    def _check(self, request_id: str | None, retry_after: Callable[[], float]) -> None:
        if self.closed:
            cause = self._cause
            raise EngineClosedError(
                "the engine is closed",
                expected="submit() before close()",
                got="submit() after close()" if cause is None else f"{type(cause).__name__}: {cause}",
                remedy="create a new Engine",
            )
        if request_id in self._used:
            raise InvalidInputError(
                f"request_id {request_id!r} is already used",
                expected="an id of its own for every request, or None",
                got="one that is live" if request_id in self._live else "one that ended a moment ago",
            )
        if self.max_queue is not None and self.waiting >= self.max_queue:
            raise QueueFullError(
                f"the queue is full: {self.waiting} requests wait (max_queue)", retry_after=retry_after()
            )

    def get(self, request_id: str) -> Ticket | None:
        """The live request of this id."""
        return self._live.get(request_id)

    def live(self) -> list[Ticket]:
        """All live requests, in order of admission."""
        with self._lock:
            return list(self._live.values())

    def started(self) -> None:
        """One that waited was launched."""
        with self._lock:
            self.waiting -= 1

    def remove(self, ticket: Ticket) -> None:
        """It has ended."""
        with self._lock:
            del self._live[ticket.id]
            if ticket.started is None:
                self.waiting -= 1
            self._ended.append(ticket.id)
            if len(self._ended) > REMEMBERED:
                self._used.discard(self._ended.popleft())

    def close(self, cause: BaseException | None = None) -> None:
        """Admit nothing from now on; ``cause`` when that was not asked for."""
        with self._lock:
            self.closed = True
            self._cause = self._cause or cause

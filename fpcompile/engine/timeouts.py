"""When requests time out: what ``submit(timeout=...)`` asked for, heard by the driver at the next cut.

A time here only makes the driver withdraw the request, as a cancel does; who is told what is the driver's.
Times of requests that have ended meanwhile stay until they are due, and mean nothing then.
"""

from __future__ import annotations

import heapq
from math import inf

__all__ = ["Timeouts"]


class Timeouts:
    """Seconds on the engine's clock. Used by the driver only, but for ``next``, which anybody may read."""

    __slots__ = ("_heap", "next")

    def __init__(self) -> None:
        self.next = inf
        self._heap: list[tuple[float, str]] = []

    def add(self, time: float, request_id: str) -> None:
        """This request shall have ended by ``time``; inf for one that may take any time."""
        if time < inf:
            heapq.heappush(self._heap, (time, request_id))
            self.next = self._heap[0][0]

    def due(self, now: float) -> list[str]:
        """The requests whose time has come, each once, earliest first."""
        names: list[str] = []
        while self._heap and self._heap[0][0] <= now:
            names.append(heapq.heappop(self._heap)[1])
        self.next = self._heap[0][0] if self._heap else inf
        return names

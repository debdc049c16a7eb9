"""The way from the submitting threads to the device thread: append, raise the flag, and that is all.

Words
    *flag*  True when something has been put in since the last ``take``. The device thread reads it between
            segments: it is the preemption flag, a plain attribute that costs nothing to read.

Invariants
    ``put`` never blocks, and may be called from anywhere, even by a finalizer in the middle of another
    ``put`` (that is what SimpleQueue is for). An entry is in exactly one ``take``, in the order of putting.
    A raised flag may be spurious, a missing one may not: ``take`` lowers it before it empties the box.
"""

from __future__ import annotations

import contextlib
from queue import Empty, SimpleQueue

from fpcompile.scheduler.events import Arrival, Cancelled

__all__ = ["Inbox"]


class Inbox:
    """Arrivals and cancellations on their way."""

    __slots__ = ("_first", "_queue", "flag")

    def __init__(self) -> None:
        self.flag = False
        self._queue: SimpleQueue[Arrival | Cancelled | None] = SimpleQueue()
        self._first: list[Arrival | Cancelled | None] = []

    def put(self, entry: Arrival | Cancelled) -> None:
        """Hand over an event; from any thread."""
        self._queue.put(entry)
        self.flag = True

    def nudge(self) -> None:
        """Wake the device thread, so that it looks at what else has changed."""
        self._queue.put(None)
        self.flag = True

    def take(self) -> list[Arrival | Cancelled]:
        """Everything put in so far, oldest first."""
        self.flag = False
        taken, self._first = self._first, []
        while not self._queue.empty():  # nobody else takes
            taken.append(self._queue.get_nowait())
        return [entry for entry in taken if entry is not None]

    def wait(self, timeout: float | None) -> None:
        """Block the device thread until something is put in, at most ``timeout`` seconds."""
        with contextlib.suppress(Empty):
            self._first.append(self._queue.get(timeout=timeout))
            self.flag = True

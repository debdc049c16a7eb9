"""A paused run is moved out of the way and comes back: by a copy on the host, or by a new beginning.

Looks at one run at a time (*held*, see :mod:`fpcompile.engine.memory_seats`) and keeps no sums: what all of
them hold, and who has to give way, is the business of :mod:`fpcompile.engine.memory`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import final

from fpcompile.engine.loads import Load
from fpcompile.engine.memory_seats import Held, install
from fpcompile.engine.prices import seconds_left
from fpcompile.engine.recorder import Recorder
from fpcompile.errors import InternalError
from fpcompile.executor.faults import unless_out_of_memory
from fpcompile.executor.pool import Room
from fpcompile.executor.together import Together

__all__ = ["Moves"]


@final
class Moves:
    """``rate``: bytes per second of copies, as predicted. Counts what was moved since it was made."""

    def __init__(self, rate: float, clock: Callable[[], float], recorder: Recorder | None) -> None:
        self.rate = rate
        self.offloads = self.recomputations = self.copied_bytes = 0
        self._clock, self._recorder = clock, recorder
        self._dropped: list[tuple[Load, float]] = []

    def better_again(self, held: Held, copying: int) -> bool:
        """Whether computing again is predicted to take less than copying there and back."""
        moved = copying + held.own + held.in_blocks
        return held.droppable and held.load.executed < moved / self.rate

    def put_away(self, held: Held, name: str, rooms: Sequence[Room] = ()) -> bool:
        """Copy what a run holds of its own, and what lies in ``rooms``, to the host; False where memory ran
        out before all of it was there. ``name``: of the span in the timeline.
        """
        parking, run, parked = held.parking, held.load.run, held.parked

        def copy() -> int:
            with self._copying(held, name):
                return parking.stash(run, rooms) + (0 if parked else parking.park(run))

        if (copied := unless_out_of_memory(copy)) is None:
            return False
        self.copied_bytes += copied
        if not parked:
            self.offloads += 1
            for seat in held.seats:
                seat.ticket.offloads += 1
        return True

    def drop(self, held: Held) -> None:
        """Drop all that a run holds: it begins again when it has the device."""
        if not held.droppable:
            raise InternalError("a run that cannot be computed again is dropped", got=held.load.name)
        held.dropped = True  # first: who reads statistics meanwhile does not join it without its blocks
        held.parking.forget(held.rooms)
        for seat in held.seats:
            if seat.origin is not None:
                seat.origin.again()
            seat.ticket.recomputations += 1
            if seat.ticket.reused_tokens:  # what is shared is not written again
                for room in held.rooms:
                    room.free()
                held.evicted = True
        if isinstance(held.load.run, Together):
            held.load.run.again()
        self.recomputations += 1
        load = held.load
        self._dropped.append((load, load.seconds if load.shared else seconds_left(load.program, load.run)))

    def bring_back(self, held: Held) -> None:
        """What a run needs is on the device again, in its blocks; of one that was dropped, its inputs."""
        for room in held.rooms if held.evicted else ():
            if room.parked:  # not one that was taken before an earlier attempt failed
                room.take()
        if held.dropped:
            for seat in held.seats:
                install(seat)
            if isinstance(held.load.run, Together):
                held.load.run.again()  # who asked it meanwhile has joined it without its blocks
            held.load.begin_again()
            return
        with self._copying(held, "restored"):
            if held.evicted:
                held.parking.restore(held.rooms)
            if held.parked:
                held.parking.bring_back()

    def take_dropped(self) -> list[tuple[Load, float]]:
        """Runs that begin again, with their predicted seconds, since this was asked last."""
        dropped, self._dropped = self._dropped, []
        return dropped

    @contextlib.contextmanager
    def _copying(self, held: Held, name: str) -> Iterator[None]:
        """A span of the timeline."""
        start = self._clock()
        yield
        if self._recorder is not None:
            for seat in held.seats:
                self._recorder.copied(seat.ticket, name, start, self._clock())

"""Memory has run out: what is paused gives its memory up, and what failed for want of it is done once more.

Whoever asks does the work again itself; here memory is freed, and a run is taken back to its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar, final

from fpcompile.engine import journal
from fpcompile.engine.loads import Load
from fpcompile.engine.memory import Memory
from fpcompile.executor.device import Device
from fpcompile.executor.faults import forget_frames, out_of_memory
from fpcompile.executor.offload import settle

__all__ = ["Relief"]

_T = TypeVar("_T")


@final
class Relief:
    """``last_first()``: the runs that are not on the device by name, whose memory is moved first in front."""

    def __init__(self, memory: Memory, device: Device, last_first: Callable[[], Iterable[str]]) -> None:
        self._memory, self._device, self._last_first = memory, device, last_first

    def relieve(self, budget: float | None = None) -> None:
        """Move paused runs until they hold no more than ``budget`` bytes, or than the engine's own budget."""
        self._memory.relieve(self._last_first(), budget)

    def make_room(self) -> None:
        """Free all that can be freed; what is on its way to the host is waited for."""
        self.relieve(0.0)
        for event, _ in self._memory.flying:
            event.wait()
        settle(self._memory.flying)
        self._device.free_cached()

    def before_launch(self, load: Load, error: Exception) -> bool:
        """Make room, if memory ran out while ``load`` got what it needs on the device, for the first time, or
        again and there is no other way than to bring it back. Whether it was: then that can be tried again.
        """
        whole = all(ticket.ended is None for ticket in load.tickets)
        if load.retried or not whole or not out_of_memory(error) or self._memory.droppable(load):
            return False
        forget_frames(error)
        self.make_room()
        for ticket in load.tickets:
            journal.restarted(ticket, error)
        return True

    def once_more(self, work: Callable[[], _T]) -> _T:
        """What ``work()`` returns, at the second attempt if there is no memory at the first."""
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
            forget_frames(error)
        self.make_room()
        return work()

    def begin_again(self, load: Load, error: Exception) -> bool:
        """Make room and take a run back before its first launch, if ``error`` says that memory ran out, and
        it has not been taken back before. Whether it was.

        (Before its last launch would mean to keep the inputs of every launch while it executes.)
        """
        if load.retried or load.slices or not out_of_memory(error):
            return False
        load.retried = True
        forget_frames(error)
        self.make_room()
        if not self._memory.begin_again(load):
            return False
        load.executed = 0.0
        for ticket in load.served:
            journal.restarted(ticket, error)
        return True

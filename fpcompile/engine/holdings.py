"""What the members of a pool hold and want together, kept up as it changes.

The scheduler is told of it with most of what happens, and most of that changes nothing for those that decode:
so nobody is looked at then but who is *stale*, and blocks are counted where they change hands.

Words
    *member*  a request that decodes, by name; see :mod:`fpcompile.engine.decode_memory`.
    *stale*   a member that may hold, want or expect something else than when it was looked at last.
    *away*    a member without blocks.

Invariants
    ``blocks`` and ``told`` are what a look at every member would give, if whoever changes one says so:
    ``count`` when its blocks are other ones, ``stale`` when its tokens or what is expected of it are.
    Members are told of in the order in which they were counted first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import final

from fpcompile.scheduler.future import Growing

__all__ = ["Holdings"]


@final
class Holdings:
    """``look(name)``: what a member holds, or wants if it is away, and how many tokens are to come.

    Used by one thread; ``blocks`` may be read by any.
    """

    def __init__(self, look: Callable[[str], Growing]) -> None:
        self._look = look
        self._counted: dict[str, list[int]] = {}
        self._holders: dict[int, int] = {}  # by block
        self._growing: dict[str, Growing] = {}
        self._stale: dict[str, None] = {}
        self._told: tuple[int, tuple[Growing, ...]] | None = None

    @property
    def blocks(self) -> int:
        """Blocks that members hold, each once."""
        return len(self._holders)

    def count(self, name: str, blocks: list[int]) -> None:
        """A member, a new one perhaps, has these blocks now; the list is another one when they are others."""
        known = self._counted.get(name)
        if known is blocks:
            return
        if known is None:
            known, self._growing[name] = [], (0, 0)
        same = len(known) if blocks[: len(known)] == known else 0  # it grew
        for block in blocks[same:]:
            self._holders[block] = self._holders.get(block, 0) + 1
        self._leave(known[same:])
        self._counted[name] = blocks
        self._stale[name] = None

    def stale(self, names: Iterable[str]) -> None:
        """Look at these again before anything is told of them."""
        for name in names:
            if name in self._counted:
                self._stale[name] = None

    def forget(self, name: str) -> None:
        """No member any more. Again is no mistake."""
        blocks = self._counted.pop(name, None)
        if blocks is not None:
            self._leave(blocks)
            del self._growing[name]
            self._stale.pop(name, None)
            self._told = None

    def _leave(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            left = self._holders[block] - 1
            if left:
                self._holders[block] = left
            else:
                del self._holders[block]

    def told(self) -> tuple[int, tuple[Growing, ...]]:
        """Blocks that members hold, and want if they are away; and of each what it holds and expects."""
        if self._stale:
            stale, self._stale = self._stale, {}
            self._growing.update((name, self._look(name)) for name in stale)
            self._told = None
        if self._told is None:
            wanted = sum(self._growing[name][0] for name, held in self._counted.items() if not held)
            self._told = self.blocks + wanted, tuple(self._growing.values())
        return self._told

"""The cache of one sequence that decodes, in blocks of a pool: what a prompt's room becomes when it is done.

Nothing is copied: the blocks of the prompt go on to be the sequence's, and it gets further ones behind them.
:class:`PooledGrowingKV` is for a pool what :class:`fpcompile.executor.kv.GrowingKV` is for memory of its own,
with the same reading and writing, so decoders need not know where a cache lies.

Invariants
    What is written lies behind the prompt, so blocks of a prompt that others share are never written.
    ``make_room`` before a step is where blocks are taken, so that whoever owns the pool can choose who gets
    them; ``append`` takes them only for who has not asked.
    A sequence that ended in the middle of a step has no blocks any more, and the step goes on for the others:
    its tokens are counted and written nowhere. What is read for it means nothing, and nobody gets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from fpcompile.errors import InternalError
from fpcompile.executor.kv import KV, NO_STORAGES, GrowingKV, LayerKV
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.pool import PooledKV, Room

__all__ = ["PooledGrowingKV", "Tail", "growing", "kept_in_pool", "longest_span"]


@final
class Tail:
    """The layers of a sequence whose cache lies in ``room``; ``spare``: blocks that it may yet need."""

    __slots__ = ("layers", "room", "spare")

    def __init__(self, room: Room, spare: int = 0) -> None:
        if room.batch != 1:
            raise InternalError("a room of several sequences goes on", got=str(room.batch))
        self.room, self.spare = room, spare
        self.layers: dict[int, PooledGrowingKV] = {}
        room.tail = self

    @property
    def lengths(self) -> dict[int, int]:
        """Where each layer's written tokens end, counted from the beginning of the room."""
        return {layer: kv.stop for layer, kv in self.layers.items()}

    @property
    def missing(self) -> int:
        """Blocks that one more token needs: one, or none."""
        stop = max((kv.stop for kv in self.layers.values()), default=0)
        return int(stop >= self.room.tokens)

    def drop_behind(self) -> None:
        """Give back whole blocks that no layer will read again: those behind every sliding window."""
        if self.layers and all(kv.spans for kv in self.layers.values()):
            self.room.drop(min(kv.first for kv in self.layers.values()))

    def make_room(self) -> None:
        """Take what one more token needs."""
        if self.missing:
            self.room.grow(self.spare)


@final
class PooledGrowingKV:
    """One layer of a sequence that decodes. Positions count from the beginning of the room.

    ``keys``, ``values`` and ``start`` are views (copies, where the room is scattered) that the next
    ``append`` makes obsolete. ``span`` is as for :class:`GrowingKV`.
    """

    __slots__ = ("_layer", "_origin", "_seen", "_span", "_tail", "first", "stop")

    def __init__(self, kv: PooledKV, span: int, tail: Tail) -> None:
        self._layer, self._origin, self._span, self._tail = kv.layer, kv.start, span, tail
        self.first, self.stop = 0, kv.length
        self._seen: tuple[list[int], Tensor, Tensor] | None = None
        tail.layers[kv.layer] = self

    @property
    def tail(self) -> Tail:
        """The whole sequence."""
        return self._tail

    @property
    def spans(self) -> bool:
        """Whether it sees a window only."""
        return self._span > 0

    @property
    def keys(self) -> Tensor:
        """``[1, Hkv, n, D]``."""
        return self._read()[0]

    @property
    def values(self) -> Tensor:
        """``[1, Hkv, n, Dv]``."""
        return self._read()[1]

    def _read(self) -> tuple[Tensor, Tensor]:
        """Views are kept until the next ``append``, or until the blocks are other ones; copies are not."""
        room, seen = self._tail.room, self._seen
        if seen is not None and seen[0] is room.blocks:
            return seen[1], seen[2]
        keys, values = room.read(self._layer, self.stop, self.first)
        self._seen = (room.blocks, keys, values) if room.contiguous else None
        return keys, values

    @property
    def start(self) -> int:
        """Position of the first visible token in the sequence."""
        return self._origin + self.first

    @property
    def storages(self) -> Mapping[int, int]:
        """None: the memory is the pool's."""
        return NO_STORAGES

    @property
    def pooled_bytes(self) -> int:
        """Bytes of this layer's part of the room's blocks."""
        pool = self._tail.room.pool
        return len(self._tail.room.blocks) * pool.block_tokens * pool.layout.layer_bytes(self._layer)

    @property
    def nbytes(self) -> int:
        """The same."""
        return self.pooled_bytes

    def kept(self) -> LayerKV:
        """A copy of what is visible."""
        return LayerKV(self.keys.clone(), self.values.clone(), self.start)

    def append(self, keys: Tensor, values: Tensor) -> PooledGrowingKV:
        """Write new tokens in place; behind a span, what the first of them cannot see goes out of view."""
        if self._span:
            self.first = max(self.first, self.stop - self._span + 1)
        new, room = int(keys.shape[2]), self._tail.room
        if not room.parked:
            while self.stop + new > room.tokens:
                room.grow(self._tail.spare)
            room.write(self._layer, self.stop, keys, values)
        self._seen = None
        self.stop += new
        return self

    def crop(self, end: int) -> None:
        """Forget what was appended at position ``end`` and behind it, by the newest ``append`` at most."""
        self.stop = min(self.stop, end - self._origin)
        self._seen = None
        self._tail.room.forget()


def kept_in_pool(layers: Mapping[int, KV]) -> bool:
    """Whether the blocks of these layers go on to be the sequence's."""
    return any(isinstance(kv, PooledKV) and kv.room.tail is not None for kv in layers.values())


def growing(kv: KV, span: int) -> GrowingKV | PooledGrowingKV:
    """What continues ``kv``: in the room where it lies if somebody keeps that (a :class:`Tail`), else in
    memory of its own.
    """
    if isinstance(kv, PooledKV) and kv.room.tail is not None:
        return PooledGrowingKV(kv, span, kv.room.tail)
    return GrowingKV(kv, span)


def longest_span(program: PackedProgram) -> int:
    """The longest window of any layer in tokens; 0 when one of them sees everything."""
    spans = [call.mask.span for call in program.attention]
    return max(spans) if spans and all(spans) else 0

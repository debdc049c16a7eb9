"""One preallocated memory for the keys and values of many runs, handed out in blocks of tokens.

Words
    *layout*  widths of every cache entry of a program: heads, key width, value width. Programs whose layouts
              are equal can share a pool.
    *room*    the blocks of one group of sequences, in all layers. Reserved for the whole prompt when a run
              starts; what attention reads and writes there are :class:`PooledKV`, one for each layer.
    *stash*   the contents of a room in host memory, while it has no blocks, and (until dropped) after that.
    *grow*    a sequence that decodes gets a block more: the next one if nobody has it; else the room moves to
              an extent with one more, if there is one; else it is scattered. A move copies the cache once, a
              scattered room is gathered for every layer of every step (seen on a CPU, 2048 tokens in 16
              layers of 8 heads: 48 ms once, against 173 ms for each step).
    *drop*    blocks at the beginning of a room that no layer will read again are given back.

Layout of the memory: one tensor ``[heads, blocks * block_tokens, width]`` each for keys and values of a
layer. So a room whose blocks form one extent is read as a strided view without a copy: rows of a head lie one
behind the other as in a tensor of its own, only the distance between heads differs. That is how the kernels
give the bits of a bare run. A room of several extents is gathered for each layer; the kernel then sees a
tensor like that of a bare run.

Invariants
    Every token of a room is written once, in order; what lies behind the written ones is never read.
    A room without blocks (``parked``) is not read or written. Work on blocks is ordered by the compute stream
    alone: copies to the host go by way of a tensor of their own, so that the blocks are free at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from fpcompile.errors import InternalError, InvalidInputError
from fpcompile.executor.blocks import BlockPool, extents
from fpcompile.executor.faults import unless_out_of_memory
from fpcompile.executor.kv import NO_STORAGES, LayerKV
from fpcompile.models.attention import AttentionCall

if TYPE_CHECKING:
    from fpcompile.executor.pool_growing import Tail

__all__ = ["KVPool", "Layout", "PooledKV", "Room", "Stash", "layout_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """``entries`` are (layer, heads, key width, value width), sorted by layer."""

    entries: tuple[tuple[int, int, int, int], ...]
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return sum(h * (k + v) * self.dtype.itemsize for _, h, k, v in self.entries)

    def layer_bytes(self, layer: int) -> int:
        """Bytes of one token in one layer."""
        return sum(h * (k + v) * self.dtype.itemsize for i, h, k, v in self.entries if i == layer)


def layout_of(calls: Iterable[AttentionCall], dtype: torch.dtype) -> Layout:
    """The layout of a program with these attention calls."""
    return Layout(tuple(sorted((c.layer, c.kv_heads, *c.dims) for c in calls if c.writes)), dtype)


@final
class KVPool:
    """``blocks`` blocks of ``block_tokens`` tokens on a device, and who has which of them."""

    def __init__(self, layout: Layout, blocks: int, block_tokens: int, device: torch.device) -> None:
        self.layout, self.block_tokens = layout, block_tokens
        self.block_bytes = block_tokens * layout.token_bytes
        """Of one block, in all layers."""
        self.blocks = BlockPool(blocks)
        rows = blocks * block_tokens
        self.stores = {
            layer: (
                torch.empty(heads, rows, key, dtype=layout.dtype, device=device),
                torch.empty(heads, rows, value, dtype=layout.dtype, device=device),
            )
            for layer, heads, key, value in layout.entries
        }

    def needed(self, tokens: int) -> int:
        """Blocks of a sequence of ``tokens`` tokens."""
        return -(-tokens // self.block_tokens)

    def check(self, blocks: int, *, what: str, got: str, instead: str) -> None:
        """Raise :class:`InvalidInputError` if ``what`` needs more ``blocks`` than there are."""
        if blocks > self.blocks.total:
            raise InvalidInputError(
                f"the {what} needs {blocks} cache blocks of {self.block_tokens} tokens",
                expected=f"at most {self.blocks.total}, the size of the pool",
                got=got,
                remedy=f"Engine(kv_blocks={blocks}) or more, or {instead}",
            )

    def room(self, batch: int, tokens: int, shared: Sequence[int] = (), *, spare: int = 0) -> Room:
        """Blocks for ``batch`` sequences of ``tokens`` tokens each.

        ``shared``: blocks at the beginning of the (single) sequence that hold their contents already; the
        room takes over the references to them. ``spare``: blocks that it may grow by.
        """
        per = self.needed(tokens)
        try:
            own = self.blocks.take(batch * per - len(shared), spare)
        except Exception:
            self.blocks.give(shared)
            raise
        return Room(self, batch, per, [*shared, *own])


class Stash:
    """Contents of a room in host memory: for each layer pieces ``(keys, values)`` along the tokens."""

    __slots__ = ("pieces",)

    def __init__(self) -> None:
        self.pieces: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def tokens(self, layer: int) -> int:
        """Tokens of that layer that are here."""
        return sum(int(keys.shape[2]) for keys, _ in self.pieces.get(layer, ()))

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(t.nbytes for pieces in self.pieces.values() for pair in pieces for t in pair)


@final
class Room:
    """The blocks of one group of ``batch`` sequences, ``per`` blocks each, one sequence behind the other."""

    __slots__ = ("_base", "_gathered", "_spans", "batch", "blocks", "dropped", "per", "pool", "stash", "tail")

    def __init__(self, pool: KVPool, batch: int, per: int, blocks: list[int]) -> None:
        self.pool, self.batch, self.per = pool, batch, per
        self.stash = Stash()
        self.dropped = 0
        self.tail: Tail | None = None
        self._gathered: tuple[tuple[int, int, int], Tensor, Tensor] | None = None
        self.blocks: list[int] = []
        self._place(blocks)

    @property
    def parked(self) -> bool:
        """Whether it has no blocks now."""
        return not self.blocks

    @property
    def contiguous(self) -> bool:
        """Whether attention reads the blocks in place."""
        return self._base is not None

    def _place(self, blocks: list[int]) -> None:
        """Blocks of one extent are read as one strided tensor from ``_base``; else each sequence's extents,
        as (place in the memory, tokens), are in ``_spans``.
        """
        size = self.pool.block_tokens
        whole = extents(blocks)
        self._base = whole[0][0] * size if len(whole) == 1 else None
        self._spans = [
            [(first * size, count * size) for first, count in extents(blocks[i : i + self.per])]
            for i in range(0, len(blocks), self.per)
        ]
        self.blocks = blocks

    def _view(self, store: Tensor, base: int, start: int, stop: int) -> Tensor:
        """The tokens ``start`` to ``stop`` of every sequence, in place: ``[batch, heads, n, width]``."""
        heads, rows, width = store.shape
        distance = self.per * self.pool.block_tokens * width
        return store.as_strided(
            (self.batch, heads, stop - start, width),
            (distance, rows * width, width, 1),
            (base + start - self.dropped) * width,
        )

    def _parts(self, sequence: int, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
        """(place in the memory, from, to) of the tokens ``start`` to ``stop`` of a scattered sequence."""
        begin = self.dropped
        for first, count in self._spans[sequence]:
            low, high = max(start, begin), min(stop, begin + count)
            if low < high:
                yield first + low - begin, low, high
            begin += count

    def write(self, layer: int, at: int, keys: Tensor, values: Tensor) -> None:
        """Put ``keys [batch, heads, n, width]`` and ``values`` behind the ``at`` tokens that are there."""
        stop = at + int(keys.shape[2])
        room = self.tokens
        for store, new in zip(self.pool.stores[layer], (keys, values), strict=True):
            if new.dtype != store.dtype or stop > room:
                raise InvalidInputError(
                    "keys or values do not fit the cache blocks",
                    expected=f"{store.dtype}, at most {room} tokens",
                    got=f"{new.dtype}, {stop} tokens",
                    remedy="use an Engine without kv_blocks for this program",
                )
            if self._base is not None:
                self._view(store, self._base, at, stop).copy_(new)
                continue
            for sequence in range(self.batch):
                for place, low, high in self._parts(sequence, at, stop):
                    part = new[sequence, :, low - at : high - at]
                    store[:, place : place + high - low].copy_(part)
        self._gathered = None

    def read(self, layer: int, stop: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens ``start`` to ``stop``: views, or gathered; of one layer at a time."""
        keys, values = self.pool.stores[layer]
        start = max(start, self.dropped)
        if self._base is not None:
            return self._view(keys, self._base, start, stop), self._view(values, self._base, start, stop)
        known, what = self._gathered, (layer, start, stop)
        if known is None or known[0] != what:
            known = (what, self._gather(keys, start, stop), self._gather(values, start, stop))
            self._gathered = known
        return known[1], known[2]

    def _gather(self, store: Tensor, start: int, stop: int) -> Tensor:
        """A copy of the tokens ``start`` to ``stop`` of every sequence."""
        if self._base is not None:
            view = self._view(store, self._base, start, stop)
            return view.clone(memory_format=torch.contiguous_format)
        out = store.new_empty(self.batch, store.shape[0], stop - start, store.shape[2])
        for sequence in range(self.batch):
            for place, low, high in self._parts(sequence, start, stop):
                out[sequence, :, low - start : high - start] = store[:, place : place + high - low]
        return out

    def forget(self) -> None:
        """Drop what can be gathered again."""
        self._gathered = None

    def copies(self, lengths: dict[int, int]) -> dict[int, tuple[Tensor, Tensor]]:
        """For each layer the tokens that the stash lacks, of the ``lengths`` tokens that are written."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, length in lengths.items():
            known = self.dropped + self.stash.tokens(layer)
            if known < length:
                keys, values = (self._gather(store, known, length) for store in self.pool.stores[layer])
                found[layer] = (keys, values)
        return found

    def free(self) -> None:
        """Give the blocks back; the stash says what was in them."""
        self.forget()
        blocks, self.blocks = self.blocks, []
        self.pool.blocks.give(blocks)

    def release(self) -> None:
        """Nobody needs the room or its contents any more."""
        self.free()
        self.stash.pieces.clear()

    def take(self, spare: int | None = None) -> None:
        """Blocks again, other ones perhaps; write into them what the run needs.

        ``spare``: blocks that it may grow by, of a sequence that decodes; None for one that does not.
        """
        if not self.parked:
            raise InternalError("a room has blocks already", got=str(len(self.blocks)))
        blocks, count = self.pool.blocks, self.batch * self.per
        extent = None if spare is None else blocks.take_extent(count, spare)
        self._place(extent or blocks.take(count))

    # ---- one sequence that goes on

    @property
    def tokens(self) -> int:
        """Tokens that each sequence has room for."""
        return self.dropped + self.per * self.pool.block_tokens

    def grow(self, spare: int = 0) -> None:
        """One block more, see the module; ``spare``: blocks that may follow."""
        blocks = self.pool.blocks
        behind = blocks.extend(self.blocks[-1])
        if behind is None and self.move(len(self.blocks) + 1, spare):
            return
        more = blocks.take(1) if behind is None else [behind]
        self.per += 1
        self._place([*self.blocks, *more])

    def move(self, count: int, spare: int = 0) -> bool:
        """To one extent of ``count`` blocks, if there is one, and memory for what copying takes. Blocks that
        others hold as well stay theirs.
        """
        old, new = self.blocks, self.pool.blocks.take_extent(count, spare)
        if new is None:
            return False
        copied = None
        try:
            copied = unless_out_of_memory(lambda: self._copy(old, new[0]))
        finally:
            if copied is None:
                self.pool.blocks.give(new)
        if copied is None:
            return False
        self.per = count
        self.forget()
        self._place(new)
        self.pool.blocks.give(old)
        return True

    def _copy(self, blocks: Sequence[int], to: int) -> bool:
        """The contents of ``blocks`` to an extent that begins with block ``to``."""
        size = self.pool.block_tokens
        for store in (store for pair in self.pool.stores.values() for store in pair):
            at = to * size
            for first, count in extents(blocks):
                store[:, at : at + count * size] = store[:, first * size : (first + count) * size]
                at += count * size
        return True

    def drop(self, tokens: int) -> None:
        """Nothing before ``tokens`` is read any more: whole blocks of that are given back."""
        size = self.pool.block_tokens
        count = min((tokens - self.dropped) // size, self.per - 1)
        if count > 0:
            gone, kept = self.blocks[:count], self.blocks[count:]
            self.forget()
            self.stash.pieces.clear()
            self.dropped, self.per = self.dropped + count * size, self.per - count
            self._place(kept)
            self.pool.blocks.give(gone)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PooledKV:
    """The first ``length`` tokens of one layer in a room; as :class:`fpcompile.executor.kv.LayerKV`."""

    room: Room
    layer: int
    length: int = 0
    start: int = 0

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``; a view into the pool, or gathered."""
        return self.room.read(self.layer, self.length)[0]

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, n, Dv]``."""
        return self.room.read(self.layer, self.length)[1]

    @property
    def storages(self) -> Mapping[int, int]:
        """None: the memory is the pool's."""
        return NO_STORAGES

    @property
    def pooled_bytes(self) -> int:
        """Bytes of this layer's part of the room's blocks, written or not."""
        pool = self.room.pool
        return len(self.room.blocks) * pool.block_tokens * pool.layout.layer_bytes(self.layer)

    def append(self, keys: Tensor, values: Tensor) -> PooledKV:
        """Write new tokens in place, behind the old ones."""
        self.room.write(self.layer, self.length, keys, values)
        return dataclasses.replace(self, length=self.length + int(keys.shape[2]))

    def kept(self) -> LayerKV:
        """A copy in memory of its own."""
        keys, values = self.room.read(self.layer, self.length)
        return LayerKV(
            keys.clone(memory_format=torch.contiguous_format),
            values.clone(memory_format=torch.contiguous_format),
            self.start,
        )

"""A sequence that decodes in blocks of a pool: it reads what a cache of its own would, wherever they lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompile.errors import InternalError
from fpcompile.executor.blocks import BlockPool, extents
from fpcompile.executor.device import CpuDevice
from fpcompile.executor.kv import GrowingKV, LayerKV
from fpcompile.executor.offload import Parking
from fpcompile.executor.pool import KVPool, Layout, PooledKV
from fpcompile.executor.pool_growing import PooledGrowingKV, Tail, growing, kept_in_pool

SIZE = 4
LAYOUT = Layout(((0, 2, 3, 5), (1, 2, 3, 5)), torch.float32)


def tokens(start: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values that say which token they are of."""
    base = torch.arange(start, start + count, dtype=torch.float32)
    keys = base[None, None, :, None] + torch.arange(2.0)[None, :, None, None] / 10 + torch.arange(3.0) / 100
    values = base[None, None, :, None] - torch.arange(2.0)[None, :, None, None] / 10 - torch.arange(5.0) / 100
    return keys, values


def pool_of(blocks: int = 16) -> KVPool:
    pool = KVPool(LAYOUT, blocks, SIZE, torch.device("cpu"))
    for store in (s for pair in pool.stores.values() for s in pair):
        store.fill_(torch.nan)
    return pool


class Both:
    """The same sequence in a pool and in memory of its own; layer 1 has a window when ``spans`` say so."""

    def __init__(self, pool: KVPool, length: int, spans: tuple[int, int] = (0, 0)) -> None:
        room = pool.room(1, length)
        self.tail, self.at = Tail(room), length
        self.pooled: list[PooledGrowingKV] = []
        self.own: list[GrowingKV] = []
        for layer, span in enumerate(spans):
            kv = PooledKV(room, layer).append(*tokens(0, length))
            grown = growing(kv, span)
            assert isinstance(grown, PooledGrowingKV)
            self.pooled.append(grown)
            self.own.append(GrowingKV(LayerKV(*tokens(0, length)), span))

    def append(self) -> None:
        self.tail.drop_behind()
        self.tail.make_room()
        for pooled, own in zip(self.pooled, self.own, strict=True):
            pooled.append(*tokens(self.at, 1))
            own.append(*tokens(self.at, 1))
        self.at += 1
        self.check()

    def check(self) -> None:
        for pooled, own in zip(self.pooled, self.own, strict=True):
            assert pooled.start == own.start
            assert torch.equal(pooled.keys, own.keys)
            assert torch.equal(pooled.values, own.values)
            assert torch.equal(pooled.kept().keys, own.kept().keys)


def test_blocks_follow_one_another_while_they_are_free() -> None:
    pool = pool_of()
    both = Both(pool, 6)
    base = pool.stores[0][0].data_ptr()
    for _ in range(20):
        both.append()
        assert both.pooled[0].keys.untyped_storage().data_ptr() == base, "read in place"
    assert both.tail.room.blocks == list(range(7))
    both.tail.room.release()
    assert pool.blocks.free == 16


def test_without_a_free_neighbour_it_moves_once() -> None:
    pool = pool_of()
    both, other = Both(pool, 8), pool.blocks.take(1)
    both.append()
    assert both.tail.room.blocks == [3, 4, 5]
    assert both.tail.room.contiguous
    for _ in range(20):
        both.append()
    assert both.tail.room.blocks[0] == 3, "and then goes on where it is"
    pool.blocks.validate()
    pool.blocks.give(other)


def test_without_any_extent_it_is_scattered_and_gathered() -> None:
    pool = pool_of(8)
    both, others = Both(pool, 8), pool.blocks.take(6)
    pool.blocks.give([others[1], others[3], others[5]])  # 3, 5 and 7
    for _ in range(9):
        both.append()
    assert not both.tail.room.contiguous
    assert extents(both.tail.room.blocks) == [(0, 2), (3, 1), (5, 1), (7, 1)]
    pool.blocks.validate()
    for _ in range(3):
        both.append()
    with pytest.raises(InternalError, match="more cache blocks"):
        both.append()


def test_a_block_that_others_share_is_never_written() -> None:
    pool = pool_of()
    both = Both(pool, 8)
    room = both.tail.room
    pool.blocks.file(room.blocks[0], b"first")
    pool.blocks.file(room.blocks[1], b"second")
    shared = pool.blocks.share([b"first", b"second"])
    before = [t[:, : 2 * SIZE].clone() for pair in pool.stores.values() for t in pair]
    for _ in range(5):
        both.append()
    blocker = pool.blocks.take_extent(1)
    assert room.move(len(room.blocks) + 1), "a copy: the others keep theirs"
    both.check()
    after = [t[:, : 2 * SIZE] for pair in pool.stores.values() for t in pair]
    assert all(map(torch.equal, before, after))
    assert blocker is not None
    pool.blocks.give(blocker)
    room.release()
    pool.blocks.give(shared)
    assert (pool.blocks.cached, pool.blocks.free) == (2, 14)


def test_blocks_behind_every_window_are_given_back() -> None:
    pool = pool_of()
    both = Both(pool, 10, (6, 9))
    for _ in range(40):
        both.append()
        assert len(both.tail.room.blocks) <= 4
    assert both.tail.room.dropped >= 36
    mixed = Both(pool, 10, (6, 0))
    for _ in range(9):
        mixed.append()
    assert mixed.tail.room.dropped == 0, "one layer sees everything"
    assert mixed.pooled[0].keys.shape[2] == 6


@pytest.mark.parametrize("spans", [(0, 0), (6, 0), (6, 9)], ids=str)
def test_away_and_back_again(spans: tuple[int, int]) -> None:
    """Only what is new is copied the second time."""
    pool, parking = pool_of(), Parking(CpuDevice())
    both = Both(pool, 10, spans)
    copied = []
    for _ in range(2):
        for _ in range(3):
            both.append()
        room = both.tail.room
        copied.append(parking.put_away(room, both.tail.lengths))
        room.free()
        assert pool.blocks.free == 16
        elsewhere = pool.blocks.take(3)
        room.take(2)
        parking.restore([room])
        pool.blocks.give(elsewhere)
        both.check()
    assert copied[1] < copied[0] or spans == (6, 9)
    for _ in range(9):
        both.append()


def test_what_is_undone_is_written_again() -> None:
    both = Both(pool_of(), 7, (0, 5))
    for _ in range(6):
        both.append()
        for pooled, own in zip(both.pooled, both.own, strict=True):
            pooled.append(*tokens(900, 1))
            pooled.crop(both.at)
            own.append(*tokens(900, 1))
            own.crop(both.at)
        both.check()


def test_a_room_that_nobody_keeps_is_left_alone() -> None:
    pool = pool_of()
    kv = PooledKV(pool.room(1, 8), 0).append(*tokens(0, 5))
    assert not kept_in_pool({0: kv})
    own = growing(kv, 0)
    assert isinstance(own, GrowingKV)
    own.append(*tokens(5, 1))
    assert kv.length == 5


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
@settings(deadline=None)
def test_sequences_that_grow_side_by_side_never_mix(moves: list[tuple[str, bool]]) -> None:
    """Whoever grows, moves or goes: each reads its own tokens, and the blocks add up."""
    pool = pool_of(20)
    alive: dict[str, Both] = {}
    for name, ends in moves:
        if name not in alive:
            alive[name] = Both(pool, 5)
        elif ends:
            alive.pop(name).tail.room.release()
        elif pool.blocks.available >= alive[name].tail.missing:
            alive[name].append()
        for both in alive.values():
            both.check()
        pool.blocks.validate()
        assert pool.blocks.used == sum(len(both.tail.room.blocks) for both in alive.values())


# ---- places


def test_who_will_grow_is_placed_with_room_behind() -> None:
    blocks = BlockPool(32)
    assert blocks.take(4, 4) == [0, 1, 2, 3], "nobody is in front"
    assert blocks.take(4, 4) == [8, 9, 10, 11], "four are left for the one in front"
    assert blocks.take(2, 100) == [21, 22], "not more than half of what is there"
    assert blocks.take(4) == [4, 5, 6, 7], "who does not grow takes the smallest place"
    blocks.validate()


def test_the_next_block_is_taken_from_the_cache_too() -> None:
    blocks = BlockPool(4)
    mine, other = blocks.take(1), blocks.take(1)
    blocks.file(other[0], b"key")
    blocks.give(other)
    assert blocks.extend(mine[0]) == other[0]
    assert blocks.known([b"key"]) == 0
    assert blocks.extend(3) is None, "there is none behind the last one"
    assert blocks.extend(other[0]) == 2
    assert blocks.extend(mine[0]) is None, "it is held"
    blocks.validate()


def test_an_extent_costs_no_more_of_the_cache_than_lies_in_it() -> None:
    blocks = BlockPool(6)
    taken = blocks.take(6)
    for block in (0, 2, 3):
        blocks.file(block, bytes([block]))
    blocks.give([block for block in taken if block != 4])
    assert (blocks.free, blocks.cached) == (2, 3)
    assert blocks.take_extent(4) == [0, 1, 2, 3]
    assert blocks.take_extent(2) is None
    blocks.give([0])
    assert blocks.take_extent(1) == [0]
    blocks.validate()


def test_who_ended_in_the_middle_of_a_step_writes_nowhere() -> None:
    """Some layers have the new token, its blocks are somebody else's by then, and the step goes on."""
    pool = pool_of(8)
    both = Both(pool, 6, (0, 4))
    both.pooled[0].append(*tokens(6, 1))
    both.tail.room.release()
    other = pool.room(1, 8 * SIZE)
    for layer in (0, 1):
        other.write(layer, 0, *tokens(100, 8 * SIZE))
    for stop in (7, 8, 9):  # the last one behind what it had room for
        kv = both.pooled[1].append(*tokens(900, 1))
        assert kv.stop == stop
        assert kv.keys.shape[2] == 4, "what it reads means nothing, but it can be read"
    for layer in (0, 1):
        assert torch.equal(other.read(layer, 8 * SIZE)[0], tokens(100, 8 * SIZE)[0])
        assert torch.equal(other.read(layer, 8 * SIZE)[1], tokens(100, 8 * SIZE)[1])
    both.pooled[1].crop(6)
    other.release()
    assert pool.blocks.free == 8

"""Bookkeeping of cache blocks: extents, references, prefixes; random histories against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompile.errors import InternalError, InvalidInputError
from fpcompile.executor.blocks import BlockPool, extents, prefix_keys


def test_blocks_come_in_the_smallest_extent_that_is_large_enough() -> None:
    pool = BlockPool(16)
    parts = [pool.take(n) for n in (4, 2, 4, 3, 3)]
    pool.give(parts[0])
    pool.give(parts[3])
    assert pool.take(2) == [10, 11], "three are free there, four in front"
    assert pool.take(4) == [0, 1, 2, 3]
    pool.validate()


def test_scattered_blocks_are_taken_from_the_largest_extents() -> None:
    pool = BlockPool(10)
    parts = [pool.take(2) for _ in range(5)]
    for part in (parts[0], parts[2], parts[3]):
        pool.give(part)
    assert extents(pool.take(5)) == [(4, 4), (0, 1)]
    assert (pool.free, pool.used) == (1, 9)
    pool.validate()


def test_what_is_given_back_joins_its_neighbours() -> None:
    pool = BlockPool(6)
    a, b, c = pool.take(2), pool.take(2), pool.take(2)
    for part in (a, c, b):
        pool.give(part)
        pool.validate()
    assert pool.take(6) == list(range(6))


def test_keys_depend_on_everything_before_and_on_the_salt() -> None:
    keys = prefix_keys(range(10), 4, b"tenant")
    assert len(keys) == 2, "only full blocks"
    assert prefix_keys([*range(8), 99], 4, b"tenant") == keys
    assert prefix_keys([*range(4), 99, 5, 6, 7], 4, b"tenant")[0] == keys[0]
    assert prefix_keys([99, *range(1, 8)], 4, b"tenant")[1] != keys[1]
    assert not set(prefix_keys(range(10), 4, b"another")) & set(keys)


def test_a_prefix_is_shared_while_used_and_kept_afterwards() -> None:
    pool = BlockPool(8)
    keys = prefix_keys(range(12), 4, b"")
    first = pool.take(4)
    for block, key in zip(first, keys, strict=False):
        pool.file(block, key)
    assert pool.share(keys[:2]) == first[:2]
    pool.give(first)
    assert (pool.used, pool.cached, pool.free) == (2, 1, 5)
    pool.give(first[:2])
    assert (pool.used, pool.cached, pool.free) == (0, 3, 5)
    assert pool.known(keys) == 3
    assert pool.share(keys) == first[:3]
    pool.validate()


def test_cached_blocks_are_given_up_end_of_the_oldest_first() -> None:
    pool = BlockPool(6)
    old, new = prefix_keys([1] * 6, 2, b""), prefix_keys([2] * 6, 2, b"")
    for keys in (old, new):
        blocks = pool.take(3)
        for block, key in zip(blocks, keys, strict=True):
            pool.file(block, key)
        pool.give(blocks)
    taken = pool.take(1)
    assert (pool.known(old), pool.known(new)) == (2, 3)
    pool.give(pool.share(old))  # used again: now the other one is the oldest
    pool.give(taken)
    pool.take(2)
    assert (pool.known(old), pool.known(new)) == (2, 2)
    pool.take(4)
    assert pool.cached == 0
    pool.validate()


def test_equal_contents_are_kept_once() -> None:
    pool = BlockPool(4)
    (key,) = prefix_keys([7, 7], 2, b"")
    a, b = pool.take(1), pool.take(1)
    pool.file(a[0], key)
    pool.file(b[0], key)
    pool.give(b)
    pool.give(a)
    assert (pool.cached, pool.free) == (1, 3)
    pool.validate()


def test_misuse_is_a_defect() -> None:
    pool = BlockPool(2)
    blocks = pool.take(2)
    with pytest.raises(InternalError, match="more cache blocks"):
        pool.take(1)
    pool.give(blocks)
    with pytest.raises(InternalError, match="nobody holds"):
        pool.give(blocks[:1])
    with pytest.raises(InternalError, match="nobody holds"):
        pool.file(0, b"key")
    with pytest.raises(InvalidInputError):
        BlockPool(0)


def test_validate_finds_a_lost_block() -> None:
    pool = BlockPool(3)
    pool.take(1)
    pool._references.clear()
    with pytest.raises(InternalError, match="free \\+ used \\+ cached"):
        pool.validate()


_PROMPTS = st.lists(st.integers(0, 1), min_size=0, max_size=9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(_PROMPTS, st.integers(1, 4), st.booleans()), max_size=25), st.randoms())
def test_any_history_keeps_the_invariants(history: list[tuple[list[int], int, bool]], random: object) -> None:
    """Requests with prompts over two words come and go; contents under a key are always those it names."""
    pool, held, contents = BlockPool(9), list[tuple[list[int], list[bytes]]](), dict[int, bytes]()
    for tokens, more, ends in history:
        keys = prefix_keys(tokens, 2, b"salt")
        known = keys[: pool.known(keys)]
        cached = sum(pool._by_key[key] in pool._cached for key in known)
        need = len(keys) - len(known) + more
        if need <= pool.available - cached:
            shared = pool.share(keys)
            assert [contents[block] for block in shared] == known
            free = sorted(set(range(9)) - set(pool._references))
            longest = max((size for _, size in extents(free)), default=0)
            own = (pool.take_extent(need) if ends else pool.take(need)) or pool.take(need)
            assert len(own) == need
            if ends and longest >= need:
                assert own == list(range(own[0], own[0] + need)), "one extent, if there is one"
            assert not set(own) & {block for blocks, _ in held for block in blocks}, "nobody else's"
            for block in own:
                contents.pop(block, None)
            held.append(([*shared, *own], keys))
            pool.validate()
        if ends and held:
            blocks, names = held.pop(random.randrange(len(held)))  # type: ignore[attr-defined]
            for block, key in zip(blocks, names, strict=False):
                contents[block] = key
                pool.file(block, key)
            pool.give(blocks)
            pool.validate()
    for blocks, _ in held:
        pool.give(blocks)
    pool.validate()
    assert pool.used == 0
    assert len(pool.take(9)) == 9, "what is cached can always be taken"

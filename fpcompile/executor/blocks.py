"""Which blocks of a cache are free, used, or kept for their contents: bookkeeping without tensors.

Words
    *block*   a fixed number of tokens in every layer's cache; named by its index.
    *extent*  blocks that lie one behind the other; kernels read an extent without a copy.
    *key*     names what a full block holds: a digest of all tokens up to its end, of the tenant and the
              program (:func:`prefix_keys`). Equal keys, equal contents.
    *used*    held by at least one run; *cached*: held by nobody, but with contents that have a key;
              *free*: the rest.

Typical use
    ``shared = blocks.share(keys)`` then ``mine = blocks.take(n)``; when the run ends
    ``blocks.file(block, key)`` for each full block, and ``blocks.give(shared + mine)``.

Invariants (``validate``)
    free + used + cached = total. What is cached can always be taken: the least recently used first, the end
    of a prefix before its beginning. A key names one block. Extents, of free blocks and of
    those that are free or cached, are sorted, apart and not empty.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import pairwise
from math import inf

from fpcompile.errors import InternalError, InvalidInputError

__all__ = ["BlockPool", "extents", "prefix_keys"]


def prefix_keys(tokens: Sequence[int], block_tokens: int, salt: bytes) -> list[bytes]:
    """A key for each full block of ``tokens``; each depends on all tokens before, and on ``salt``."""
    raw, size = array("q", tokens).tobytes(), 8 * block_tokens
    keys: list[bytes] = []
    key = blake2b(salt, digest_size=16).digest()
    for end in range(size, len(raw) + 1, size):
        key = blake2b(key + raw[end - size : end], digest_size=16).digest()
        keys.append(key)
    return keys


def extents(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """``blocks``, in their order, as (first, count) of the extents that they form."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        if found and block == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((block, 1))
    return found


class BlockPool:
    """The blocks of one cache. One thread at a time changes it; the counts may be read by any."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise InvalidInputError("a pool without blocks", expected="at least 1", got=repr(total))
        self.total = total
        self._free: list[tuple[int, int]] = [(0, total)]
        self._unheld: list[tuple[int, int]] = [(0, total)]  # free or cached
        self._references: dict[int, int] = {}
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.free = total
        """Blocks that nobody holds and that hold nothing of worth."""
        self.shared = 0
        """References to used blocks beyond the first one of each."""
        self.changes = 0
        """How often blocks went from hand to hand."""

    @property
    def used(self) -> int:
        """Blocks that runs hold."""
        return len(self._references)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and whose contents may be used again."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that ``take`` could give."""
        return self.free + self.cached

    def take(self, count: int, spare: int = 0) -> list[int]:
        """``count`` blocks, in one extent if there is one, for whoever asks; their contents are undefined.

        The smallest extent that is large enough, so that large ones last; else the largest ones there are.
        Cached blocks are given up when the free ones are too few. ``spare``: blocks that will be asked for
        later (``extend``): the place is then chosen so that as many stay free behind it, see ``_roomy``.
        """
        if count > self.available:
            raise InternalError(
                "more cache blocks are taken than there are", expected=f"<= {self.available}", got=str(count)
            )
        while self.free < count:
            self._forget(next(iter(self._cached)))
        blocks: list[int] = []
        while len(blocks) < count:
            wanted = count - len(blocks)
            first, part = self._roomy(wanted, spare) if spare else self._tight(wanted)
            self._cut(first, part)
            blocks += range(first, first + part)
        return blocks

    def take_extent(self, count: int, spare: int = 0) -> list[int] | None:
        """``count`` blocks in one extent, or None and nothing is taken; cached ones in it are given up."""
        if any(size >= count for _, size in self._free):
            return self.take(count, spare)
        fitting = [extent for extent in self._unheld if extent[1] >= count]
        if not fitting:
            return None
        first, _ = min(fitting, key=lambda e: (e[1], e[0]))
        blocks = list(range(first, first + count))
        for block in blocks:
            if block in self._cached:
                self._forget(block)
        self._cut(first, count)
        return blocks

    def extend(self, block: int) -> int | None:
        """The block right behind ``block``, if nobody holds it."""
        behind = block + 1
        if behind in self._cached:
            self._forget(behind)
        place = bisect_right(self._free, (behind, self.total)) - 1
        if place < 0 or not behind < sum(self._free[place]):
            return None
        self._cut(behind, 1)
        return behind

    def _tight(self, wanted: int) -> tuple[int, int]:
        """(first, count) of the smallest free extent that has so many, or of the largest."""
        fitting = [extent for extent in self._free if extent[1] >= wanted]
        if fitting:
            return min(fitting, key=lambda e: (e[1], e[0]))[0], wanted
        first, size = max(self._free, key=lambda e: (e[1], -e[0]))
        return first, size

    def _roomy(self, wanted: int, spare: int) -> tuple[int, int]:
        """The same in the largest free extent, away from whoever is in front of it and may grow as well."""
        first, size = max(self._free, key=lambda e: (e[1], -e[0]))
        gap = min(spare, max(size - wanted, 0) // 2) if first else 0
        return first + gap, min(size, wanted)

    def _cut(self, first: int, count: int) -> None:
        """Somebody holds these free blocks, which lie in one extent."""
        _carve(self._free, first, count)
        _carve(self._unheld, first, count)
        self.free -= count
        self.changes += 1
        self._references.update((block, 1) for block in range(first, first + count))

    def known(self, keys: Sequence[bytes]) -> int:
        """How many of the first blocks named by ``keys`` are there; changes nothing."""
        count = 0
        while count < len(keys) and keys[count] in self._by_key:
            count += 1
        return count

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of ``keys``, one more reference to each."""
        blocks = [self._by_key[key] for key in keys[: self.known(keys)]]
        for block in blocks:
            if block in self._cached:
                del self._cached[block]
                _carve(self._unheld, block, 1)
                self._references[block] = 1
            else:
                self._references[block] += 1
                self.shared += 1
        self.changes += 1
        return blocks

    def file(self, block: int, key: bytes) -> None:
        """``block``, which somebody holds, is full and holds what ``key`` names."""
        if block not in self._references:
            raise InternalError("a block that nobody holds is filed", got=str(block))
        if key not in self._by_key and block not in self._key_of:
            self._by_key[key] = block
            self._key_of[block] = key

    def give(self, blocks: Sequence[int]) -> None:
        """One reference less to each; what has a key and no reference stays cached."""
        self.changes += 1
        for block in reversed(blocks):  # the end of a prefix is of no use without its beginning
            left = self._references.get(block, 0) - 1
            if left < 0:
                raise InternalError("a block is given back that nobody holds", got=str(block))
            if left:
                self._references[block] = left
                self.shared -= 1
                continue
            del self._references[block]
            _join(self._unheld, block)
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._release(block)

    def forget_all(self) -> None:
        """Nothing is cached any more."""
        for block in list(self._cached):
            self._forget(block)

    def _forget(self, block: int) -> None:
        del self._cached[block]
        del self._by_key[self._key_of.pop(block)]
        self._release(block)

    def _release(self, block: int) -> None:
        _join(self._free, block)
        self.free += 1

    def validate(self) -> None:
        """Check the invariants; raises :class:`InternalError` naming the broken one."""
        free, unheld = (
            {b for first, size in found for b in range(first, first + size)}
            for found in (self._free, self._unheld)
        )
        groups = (free, set(self._references), set(self._cached))
        facts = {
            "free + used + cached = total": sum(map(len, groups)) == self.total,
            "every block is in one of them": set().union(*groups) == set(range(self.total)),
            "free blocks are counted": len(free) == self.free,
            "extents are joined": all(
                sum(a) < b[0] for found in (self._free, self._unheld) for a, b in pairwise(found)
            ),
            "extents without a holder are free or cached": unheld == free | groups[2],
            "further references are counted": self.shared == sum(self._references.values()) - self.used,
            "a key names one block": self._by_key == {k: b for b, k in self._key_of.items()},
            "cached blocks have keys": groups[2] <= set(self._key_of) <= groups[1] | groups[2],
        }
        for what, holds in facts.items():
            if not holds:
                raise InternalError(
                    f"cache blocks: {what}",
                    got=f"free {self.free}, used {self.used}, cached {self.cached} of {self.total}",
                )


def _carve(free: list[tuple[int, int]], first: int, count: int) -> None:
    """Take these blocks, which lie in one of the sorted extents, out of it."""
    place = bisect_right(free, (first, inf)) - 1
    start, size = free[place]
    rest = [(start, first - start), (first + count, start + size - first - count)]
    free[place : place + 1] = [extent for extent in rest if extent[1]]


def _join(free: list[tuple[int, int]], block: int) -> None:
    """Put a block to the sorted extents, joined to its neighbours."""
    place = bisect_right(free, (block, 0))
    first, size = block, 1
    if place < len(free) and free[place][0] == block + 1:
        size += free.pop(place)[1]
    if place and sum(free[place - 1]) == block:
        place -= 1
        first, size = free[place][0], free.pop(place)[1] + size
    free.insert(place, (first, size))

"""How much cache the requests that generate will hold at most: Past-Future's rule, and what it predicts from.

Words
    *growing*  one request's cache as a pair: blocks that it holds, tokens that are still to come. A new one
               holds the blocks of its prompt.
    *peak*     the most blocks that a batch will ever hold together. Requests get a token each at a time, so
               whoever has least to come ends first and gives everything back: with the others sorted by what
               is to come, longest first, ``max_i (sum_{j <= i} blocks_j + i * tokens_i / block_tokens)``
               (Past-Future, ASPLOS 2025). Rounded up for each request, so never too small.
    *cut off*  ended by its ``max_new_tokens``: it says only that it would have gone on.

How many tokens will come is guessed from the past: of the engine's last requests that made more tokens than
this one has made so far, the length that nine in ten do not exceed. As long as there are too few of those to
tell (:data:`LEAST`), and for whatever was cut off, it is the request's own ``max_new_tokens``.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from typing import Final, final

__all__ = ["FILLED", "LEAST", "Growing", "OutputLengths", "everything", "peak", "peak_of"]

Growing = tuple[int, int]
"""(blocks held, tokens to come)."""

FILLED: Final = 0.95
"""Part of the cache that the predicted peak may fill."""

LEAST: Final = 20
"""Lengths that a prediction needs."""

_KEPT: Final = 1000
_QUANTILE: Final = 0.9


def peak(growing: Iterable[Growing], block_tokens: int) -> int:
    """The most blocks that these will hold together, if each gets a token at a time.

    >>> peak([(1, 32), (1, 32)], 16), peak([(4, 0), (1, 64)], 16)
    (6, 5)
    """
    return int(peak_of([(blocks, tokens, 1) for blocks, tokens in growing], block_tokens))


def peak_of(growing: Iterable[tuple[float, int, float]], every: int = 1) -> float:
    """The same of anything that grows: (what is held, tokens to come, what each ``every`` tokens add).

    >>> peak_of([(64, 2, 8.0), (16, 4, 8.0)])
    112.0
    """
    held = rate = most = 0.0
    for has, tokens, adds in sorted(growing, key=lambda one: -one[1]):
        held, rate = held + has, rate + adds
        most = max(most, held + rate * -(-tokens // every))
    return most


def everything(growing: Iterable[Growing], block_tokens: int) -> int:
    """The blocks of all of them at their ends, in whatever order they come to those."""
    return sum(blocks + -(-tokens // block_tokens) for blocks, tokens in growing)


@final
class OutputLengths:
    """The newest output lengths. One thread writes; any may ask."""

    def __init__(self) -> None:
        self._newest: deque[tuple[int, bool]] = deque()
        self._sorted: tuple[list[int], list[int]] = ([], [])  # ended by themselves, cut off

    def ended(self, tokens: int, *, cut: bool) -> None:
        """A request has ended, or its memory was given back, behind so many tokens."""
        own, off = (list(lengths) for lengths in self._sorted)
        insort(off if cut else own, tokens)
        self._newest.append((tokens, cut))
        if len(self._newest) > _KEPT:
            oldest, was_cut = self._newest.popleft()
            (off if was_cut else own).remove(oldest)
        self._sorted = own, off

    def expected(self, made: int, most: int) -> int:
        """Tokens in all that a request will make that has made ``made`` of at most ``most``."""
        own, off = self._sorted
        shorter = bisect_right(own, made)
        count = len(own) - shorter + len(off) - bisect_right(off, made)
        if count < LEAST:
            return most
        place = shorter + math.ceil(_QUANTILE * count) - 1
        return min(own[place], most) if place < len(own) else most

"""Predicted seconds of the tiles of one stage, from tiles that were measured.

A tile is no short prefill: it reads its rows out of a long value, copies its results to their place, and is
the first to touch the memory there; a block of queries is masked, and walked by the kernel in other pieces
than a whole attention; a range of experts looks for its rows among all. So tiles are measured as they are
executed (:mod:`fpcompile.executor.measure_tiles`), and kept beside the stages' own medians under keys with
one more name:

    ROWS      (rows, seconds) of a range of tokens or rows
    BLOCK     with the number of queries: (keys that it is given, seconds) of a block of all heads
    WRITTEN   (tokens, seconds) of writing keys and values
    RANGE     (tokens, seconds) of a range of all experts
    PART      the same of a range of an eighth of them
    COLLECTED (tokens, seconds) of collecting results
    COLUMNS   with the number of rows: (units, seconds) of a range of columns
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fpcompile.executor.cost_model import Coefficients, Curve, Key, Samples, fit
from fpcompile.executor.schedule import keys_given

ROWS, BLOCK, WRITTEN, RANGE, PART, COLLECTED, COLUMNS = (
    " tile",
    " block",
    " written",
    " range",
    " part of it",
    " collected",
    " columns",
)
_NAMES = frozenset({ROWS, BLOCK, WRITTEN, RANGE, PART, COLLECTED, COLUMNS})
_LEAST = 0.25  # of the time of all experts: what their rows are taken to cost at least


def part_of(experts: int) -> int:
    """How many experts a :data:`PART` has."""
    return max(1, experts // 8)


def of_tiles(key: Key) -> bool:
    """Whether a key of samples is one of tiles."""
    return any(name in _NAMES for name in key)


@dataclasses.dataclass(frozen=True, eq=False)
class TileCosts:
    """Curves of one stage's tiles; None, or empty, for what was not measured.

    ``blocks`` are lines over keys for rising numbers of queries, ``written`` is for one token.
    A range of experts takes ``fixed`` and its share of ``shared``. ``columns`` are lines over units for
    rising numbers of rows.
    """

    rows: Curve | None = None
    blocks: tuple[tuple[int, Coefficients], ...] = ()
    written: float | None = None
    fixed: Curve | None = None
    shared: Curve | None = None
    collected: Curve | None = None
    columns: tuple[tuple[int, Coefficients], ...] = ()

    def seconds(self, tokens: int, context: float) -> float | None:
        """A range of ``tokens`` rows, or a block of as many queries that end ``context``."""
        if self.rows is not None:
            return self.rows.whole(tokens)
        if not self.blocks or tokens < self.blocks[0][0]:  # few queries pay for reading the keys
            return None
        queries, line = next(b for b in reversed(self.blocks) if b[0] <= tokens)
        keys = keys_given(math.ceil(context))
        return line.seconds(keys, keys) * tokens / queries

    def experts(self, tokens: int, share: float) -> float | None:
        """A range of experts that is given ``share`` of the rows of ``tokens`` tokens."""
        if self.fixed is None or self.shared is None:
            return None
        return self.fixed.whole(tokens) + share * self.shared.whole(tokens)

    def range_of_columns(self, rows: int, units: int) -> float | None:
        """A range of ``units`` units: priced for the next number of rows that was measured."""
        if not self.columns:
            return None
        known, line = next((c for c in self.columns if c[0] >= rows), self.columns[-1])
        return line.seconds(units, units) * max(1.0, rows / known)


def tile_costs(key: Key, samples: Samples, experts: int) -> TileCosts:
    """What ``samples`` say of the tiles of the stages of one key, which have ``experts`` experts."""

    def curve(name: str) -> Curve | None:
        found = samples.get((*key, name))
        return Curve.through(found, pairs=False) if found and len(found) > 1 else None

    tokens, seconds = samples.get((*key, WRITTEN), ((0, 0.0),))[-1]
    fixed, shared = _experts(samples.get((*key, RANGE), ()), samples.get((*key, PART), ()), experts)
    return TileCosts(
        rows=curve(ROWS),
        blocks=_lines(key, samples, BLOCK),
        written=seconds / tokens if tokens else None,
        fixed=fixed,
        shared=shared,
        collected=curve(COLLECTED),
        columns=_lines(key, samples, COLUMNS),
    )


def _lines(key: Key, samples: Samples, name: str) -> tuple[tuple[int, Coefficients], ...]:
    prefix = (*key, name)
    found = {int(k[-1]): p for k, p in samples.items() if k[:-1] == prefix}
    return tuple((size, _line(points)) for size, points in sorted(found.items()))


def _line(points: Sequence[tuple[int, float]]) -> Coefficients:
    if len(points) > 1:
        return fit(points, False)
    ((keys, seconds),) = points
    return Coefficients(0.0, seconds / keys, 0.0)


def _experts(
    all_: Sequence[tuple[int, float]], part: Sequence[tuple[int, float]], experts: int
) -> tuple[Curve | None, Curve | None]:
    """What a range takes whatever its experts, and what all of them take besides."""
    if len(all_) < 2 or [n for n, _ in all_] != [n for n, _ in part]:
        return None, None
    share = part_of(experts) / experts
    fixed: list[tuple[int, float]] = []
    shared: list[tuple[int, float]] = []
    for (n, whole), (_, some) in zip(all_, part, strict=True):
        rows = min(whole, max((whole - some) / (1 - share), _LEAST * whole))
        shared.append((n, rows))
        fixed.append((n, max(whole - rows, 1e-7)))
    return Curve.through(fixed, pairs=False), Curve.through(shared, pairs=False)

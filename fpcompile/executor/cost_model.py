"""Predicted seconds of a program's stages, from medians that were measured at some lengths.

Words: a *curve* is one stage's seconds as a function of the length n of a whole prefill; its *knots* are the
medians measured; ``pairs`` curves (attention, and whatever is executed whole) pay for pairs of a query and a
key it sees, others for rows only.

Between knots a curve is a power of n, a straight line in logarithms, as kernels change with the size and no
polynomial follows them. Outside it follows ``a + b n + d n²`` (d only for pairs), fitted to the nearest knots
and scaled to meet the last one. Curves never fall, so that the largest tile within a budget can be bisected.

For n new tokens that end a context of c, each token sees w = 2c - n keys, counted twice, and pays what one of
a prefill of w tokens does: ``a + n (T(w) - a) / w``. That is T(n) for a whole prefill, and the sum for a
batch of equal ones.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fpcompile.executor.tile_costs import TileCosts

Key = tuple[str, ...]
Samples = dict[Key, tuple[tuple[int, float], ...]]
"""For each stage's key the pairs (tokens or rows, median seconds)."""

_TAIL = 4  # knots that decide how a curve goes on behind the last one
_KNOWN = 1024  # lengths for which predictions of whole runs are kept


@dataclasses.dataclass(frozen=True, slots=True)
class Coefficients:
    """``a`` seconds, ``b`` seconds per token, ``d`` seconds per (token x visible token)."""

    a: float
    b: float
    d: float

    def __add__(self, other: Coefficients) -> Coefficients:
        return Coefficients(self.a + other.a, self.b + other.b, self.d + other.d)

    def scaled(self, factor: float) -> Coefficients:
        """All three multiplied by ``factor``."""
        return Coefficients(self.a * factor, self.b * factor, self.d * factor)

    def seconds(self, tokens: float, context: float) -> float:
        """Predicted seconds."""
        return self.a + self.b * tokens + self.d * tokens * (2 * context - tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Seconds of one stage; ``fit`` is the formula nearest to all knots, the curve itself without any."""

    fit: Coefficients
    pairs: bool = True
    knots: tuple[tuple[int, float], ...] = ()

    @classmethod
    def through(cls, samples: Sequence[tuple[int, float]], *, pairs: bool) -> Curve:
        """The curve through medians at rising lengths; where one is above a later one, near both."""
        knots = zip((n for n, _ in samples), rising([seconds for _, seconds in samples]), strict=True)
        return cls(fit(samples, pairs), pairs, tuple(knots))

    def seconds(self, tokens: int, context: float) -> float:
        """Predicted seconds for ``tokens`` tokens (or rows) that end ``context``."""
        if not self.knots:
            return self.fit.seconds(tokens, context)
        if not self.pairs or context == tokens:
            return self.whole(tokens)
        width = 2 * context - tokens
        return self.fixed + tokens * max(0.0, self.whole(width) - self.fixed) / width

    @property
    def fixed(self) -> float:
        """Seconds that do not depend on the length."""
        return min([self.fit.a, *(seconds for _, seconds in self.knots[:1])])

    def whole(self, n: float) -> float:
        """Predicted seconds of a whole prefill of ``n`` tokens."""
        sizes, logs = self._logs
        if n <= sizes[0]:
            return self.knots[0][1] * self._head.seconds(n, n) / self._head.seconds(sizes[0], sizes[0])
        if n >= sizes[-1]:
            return self.knots[-1][1] * self._tail.seconds(n, n) / self._tail.seconds(sizes[-1], sizes[-1])
        at = bisect.bisect_right(sizes, n)
        (x0, y0), (x1, y1) = logs[at - 1], logs[at]
        return math.exp(y0 + (y1 - y0) * (math.log(n) - x0) / (x1 - x0))

    @functools.cached_property
    def _logs(self) -> tuple[list[int], list[tuple[float, float]]]:
        return [n for n, _ in self.knots], [(math.log(n), math.log(s)) for n, s in self.knots]

    @functools.cached_property
    def _head(self) -> Coefficients:
        return fit(self.knots[:_TAIL], self.pairs)

    @functools.cached_property
    def _tail(self) -> Coefficients:
        return fit(self.knots[-_TAIL:], self.pairs)


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Predicted seconds of every stage of one program on one device; ``samples`` is what was measured.

    ``tiles`` are those of each stage; where a tile was not measured it is priced as a prefill of its length.
    """

    device: str
    curves: tuple[Curve, ...]
    segments: tuple[int, ...]
    by_rows: tuple[bool, ...]
    samples: Samples
    tiles: tuple[TileCosts, ...] = ()

    @property
    def coefficients(self) -> tuple[Coefficients, ...]:
        """The formula of every stage: coarser than its curve."""
        return tuple(curve.fit for curve in self.curves)

    def stage(self, index: int, *, tokens: int, rows: int, context: float) -> float:
        """Predicted seconds of stage ``index``: ``tokens`` tokens (or ``rows`` rows) that end ``context``."""
        if self.by_rows[index]:
            return self.curves[index].seconds(rows, rows)
        return self.curves[index].seconds(tokens, context)

    def tile(self, index: int, *, tokens: int, context: float) -> float:
        """Predicted seconds of a tile of stage ``index``: of ``tokens`` tokens or rows, or of a block of as
        many queries, all heads, that end ``context``.
        """
        found = self.tiles[index].seconds(tokens, context) if self.tiles else None
        return self.stage(index, tokens=tokens, rows=tokens, context=context) if found is None else found

    def written(self, index: int, *, tokens: int) -> float:
        """Predicted seconds that the first tile of attention takes besides: it writes all keys and values."""
        found = self.tiles[index].written if self.tiles else None
        return 0.0 if found is None else found * tokens

    def experts(self, index: int, *, tokens: int, share: float) -> float:
        """Predicted seconds of a range of experts with ``share`` of the rows of ``tokens`` tokens."""
        found = self.tiles[index].experts(tokens, share) if self.tiles else None
        return share * self.stage(index, tokens=tokens, rows=1, context=tokens) if found is None else found

    def collected(self, index: int, *, tokens: int) -> float:
        """Predicted seconds of collecting ``tokens`` tokens behind the last range of experts."""
        curve = self.tiles[index].collected if self.tiles else None
        return 0.0 if curve is None else curve.whole(tokens)

    def columns(self, index: int, *, rows: int, units: int, of: int) -> float:
        """Predicted seconds of ``units`` of ``of`` units of columns, for ``rows`` rows."""
        found = self.tiles[index].range_of_columns(rows, units) if self.tiles else None
        whole = self.stage(index, tokens=rows, rows=rows, context=rows)
        return units / of * whole if found is None else found

    def segment(self, index: int, *, tokens: int, rows: int, context: float) -> float:
        """Predicted seconds of segment ``index``."""
        stages = range(bisect.bisect_left(self.segments, index), bisect.bisect_right(self.segments, index))
        return sum(self.stage(i, tokens=tokens, rows=rows, context=context) for i in stages)

    def remaining(self, *, tokens: int, rows: int, context: float, start: int = 0) -> float:
        """Predicted seconds of the segments from ``start`` on; it looks at each distinct curve once.

        What the curves said is kept for some lengths: a run is asked again whenever it is paused.
        """
        first, counts = self._left
        key = tokens, rows, context
        seconds = self._known.get(key)
        if seconds is None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            seconds = [self.stage(index, tokens=tokens, rows=rows, context=context) for index in first]
            self._known[key] = seconds
        left = counts[bisect.bisect_left(self.segments, start)]
        return sum(count * each for count, each in zip(left, seconds, strict=True))

    @functools.cached_property
    def _known(self) -> dict[tuple[int, int, float], list[float]]:
        return {}

    @functools.cached_property
    def _left(self) -> tuple[list[int], list[list[int]]]:
        """The first stage of each distinct curve, and for each stage and the end how many are left of it."""
        kinds: dict[tuple[int, bool], int] = {}
        for curve, by_rows in zip(self.curves, self.by_rows, strict=True):
            kinds.setdefault((id(curve), by_rows), len(kinds))
        first: list[int] = []
        counts = np.zeros((len(self.curves) + 1, len(kinds)), dtype=int)
        for i, (curve, by_rows) in enumerate(zip(self.curves, self.by_rows, strict=True)):
            kind = kinds[id(curve), by_rows]
            if kind == len(first):
                first.append(i)
            counts[: i + 1, kind] += 1
        return first, counts.tolist()

    def rows(self) -> list[tuple[str, tuple[float, float, float]]]:
        """(number, coefficients) of every stage: what the scheduler's cost table is made from."""
        return [(str(i), (c.a, c.b, c.d)) for i, c in enumerate(self.coefficients)]


def fit(samples: Sequence[tuple[int, float]], pairs: bool) -> Coefficients:
    """Non-negative least squares of the relative error over the medians, by dropping negative terms."""
    n = np.array([size for size, _ in samples], dtype=float)
    y = np.array([seconds for _, seconds in samples])
    basis = np.stack([np.ones_like(n), n, n * n], axis=1) / y[:, None]
    active = list(range(min(3 if pairs else 2, len(n))))
    while True:
        solution, *_ = np.linalg.lstsq(basis[:, active], np.ones_like(y), rcond=None)
        if (solution >= 0).all():
            break
        active.pop(int(np.argmin(solution)))
    full = np.zeros(3)
    full[active] = solution
    return Coefficients(*(float(v) for v in full))


def rising(seconds: Sequence[float]) -> list[float]:
    """The rising numbers nearest to ``seconds``, which are positive: least squares of their logarithms, by
    pooling neighbours. Noise is as often above as below; taking the lower of two would lower every price.
    """
    pools: list[tuple[float, int]] = []  # sums of logarithms, and of how many
    for each in seconds:
        total, count = math.log(each), 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before, more = pools.pop()
            total, count = total + before, count + more
        pools.append((total, count))
    return [math.exp(total / count) for total, count in pools for _ in range(count)]

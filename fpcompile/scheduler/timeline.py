"""Where a run can stop, in seconds of its own execution, for each grain.

A *timeline* has a length (device seconds of the whole run, stop points paid) and answers: the first stop
point at or after an offset. It is derived from the cost table and the lengths of the run's members.

How a grain becomes stop points
    model: none. layers: after each group of layers. half-layer: after each half of a layer's segments.
    operator: after each segment. tokens: after each chunk (each one pays every segment's fixed cost).
    tile: evenly, at most ``size`` microseconds apart: segments longer than that are executed in tiles,
    shorter ones are coalesced.
Every stop point passed costs ``check`` seconds, and ``sync`` more when the grain synchronises.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate
from math import ceil, floor

from fpcompile.scheduler.costs import CostTable
from fpcompile.scheduler.policy import Grain

__all__ = ["Timeline", "Timelines"]

_EPSILON = 1e-9


class Timeline:
    """Length and stop points of one run; stop points are computed when first asked for."""

    __slots__ = ("_cuts", "_maker", "_rows", "length")

    def __init__(self, maker: Timelines, tokens: int, squares: int) -> None:
        self._maker = maker
        self._rows = (tokens, squares)
        self._cuts: list[float] | None = None
        self.length = maker.length(tokens, squares)

    def next_stop(self, offset: float) -> float:
        """Seconds of execution at the first stop point from ``offset`` on; the length if there is none."""
        maker = self._maker
        if maker.grain.unit == "tile":
            spacing = maker.spacing(self.length)
            return min(self.length, spacing * ceil((offset - _EPSILON) / spacing))
        if self._cuts is None:
            self._cuts = maker.cuts(*self._rows)
        index = bisect_left(self._cuts, offset - _EPSILON)
        return self._cuts[index] if index < len(self._cuts) else self.length

    def after(self, offset: float, launches: int) -> float:
        """Seconds of execution behind so many launches from a stop point on; each ends at the next one."""
        maker = self._maker
        if maker.grain.unit == "tile":
            spacing = maker.spacing(self.length)
            return min(self.length, spacing * (floor((offset + _EPSILON) / spacing) + launches))
        if self._cuts is None:
            self._cuts = maker.cuts(*self._rows)
        index = bisect_right(self._cuts, offset + _EPSILON) + launches - 1
        return min(self.length, self._cuts[index]) if index < len(self._cuts) else self.length


class Timelines:
    """Makes timelines for one cost table and one grain; keeps those of single prompts."""

    def __init__(self, table: CostTable, grain: Grain) -> None:
        self.table = table
        self.grain = grain
        self.stop_cost = table.check + (table.sync if grain.synchronises else 0.0)
        self._known: dict[int, Timeline] = {}
        self._layers = sorted({row.layer for row in table.segments} - {-1})
        self._ends = self._segment_groups(grain.size) if grain.unit in ("layers", "half-layer") else []

    def of(self, lengths: list[int]) -> Timeline:
        """The timeline of a packed run of whole prompts of these lengths."""
        if len(lengths) == 1:
            known = self._known.get(lengths[0])
            if known is None:
                known = self._known[lengths[0]] = Timeline(self, lengths[0], lengths[0] ** 2)
            return known
        return Timeline(self, sum(lengths), sum(n * n for n in lengths))

    def length(self, tokens: int, squares: int) -> float:
        """Device seconds of a run, uninterrupted, with the stop points that it passes."""
        total = self.table.total
        linear = total.b * tokens + total.c * squares
        unit = self.grain.unit
        if unit == "tokens":
            chunks = ceil(tokens / self.grain.size)
            return chunks * total.a + linear + (chunks - 1) * self.stop_cost
        seconds = total.a + linear
        if unit == "model" or not self.stop_cost:
            return seconds
        if unit == "tile":
            return seconds + ceil(seconds / (self.grain.size * 1e-6)) * self.stop_cost
        if unit == "operator":
            return seconds + (len(self.table.segments) - 1) * self.stop_cost
        return seconds + (len(self._group_ends(tokens)) - 1) * self.stop_cost

    def spacing(self, length: float) -> float:
        """Distance of the stop points of the tile grain."""
        return length / ceil(length / (self.grain.size * 1e-6 + self.stop_cost))

    def cuts(self, tokens: int, squares: int) -> list[float]:
        """Offsets of all stop points, the end included."""
        if self.grain.unit == "model":
            return []
        if self.grain.unit == "tokens":
            return self._chunk_ends(tokens)
        rows = self.table.segments
        times = [row.a + row.b * tokens + row.c * squares for row in rows]
        if self.grain.unit == "operator":
            return list(accumulate(time + self.stop_cost for time in times))
        ends = list(accumulate(times))
        return [ends[end] + i * self.stop_cost for i, end in enumerate(self._group_ends(tokens))]

    def _chunk_ends(self, tokens: int) -> list[float]:
        size, total = self.grain.size, self.table.total
        starts = range(0, tokens, size)
        chunks = (total.seconds(min(size, tokens - at), at) + self.stop_cost for at in starts)
        return list(accumulate(chunks))

    def _group_ends(self, tokens: int) -> list[int]:
        if self.grain.unit == "layers" and self.grain.size == 0:
            bounds = (512, 1024, 2048, 4096)
            return self._segment_groups(2 ** sum(tokens > bound for bound in bounds))
        return self._ends

    def _segment_groups(self, groups: int) -> list[int]:
        """Index of the last segment of each group."""
        rows, layers = self.table.segments, self._layers
        last = {row.layer: index for index, row in enumerate(rows)}  # of each layer
        if self.grain.unit == "half-layer":
            first = {row.layer: len(rows) - 1 - i for i, row in enumerate(reversed(rows))}
            halves = {first[at] + ceil((last[at] - first[at] + 1) / 2) - 1 for at in layers}
            return sorted(halves | {last[at] for at in layers} | {len(rows) - 1})
        groups = min(groups, len(layers))
        ends = {last[layers[ceil(len(layers) * (i + 1) / groups) - 1]] for i in range(groups)}
        return sorted((ends - {max(ends, default=0)}) | {len(rows) - 1})

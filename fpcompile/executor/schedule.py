"""The tile plan of a run: its launches. Fixed when the run starts, plain data, saved with it.

Without a budget one launch is one segment. With a budget (seconds that the device may be busy with one
launch) consecutive stages are launched together while their predicted sum stays under it, and a stage that
alone exceeds it is tiled: token-wise stages over ranges of at least 64 rows, attention over blocks of query
rows and heads.

A block of attention is given its keys in whole blocks of 512, and has the bits of the whole then, whatever
its size (on a CPU, see :mod:`fpcompile.executor.masks`; each machine is asked, see
:mod:`fpcompile.executor.measure_tiles`). The one that begins a sequence needs no mask where it ends with a
block of keys: it is a shorter prompt, priced as one, and as long as the budget allows, since the kernel
computes no pairs in vain there, and many queries faster.

Experts are tiled over ranges of experts and all tokens where one expert fits the budget: such ranges give the
bits of one call (:mod:`fpcompile.models.division`). Fewer tokens would give an expert fewer rows, and its
product other bits. Which rows an expert is given is not known before; a plan allows for twice its share.
Behind the last range the results are collected, by ranges of tokens. Where one expert is too much, it is
ranges of tokens, or of tokens and of experts, whichever is predicted to cost less: every range of tokens
reads the weights of all experts that it chooses, a range of experts its own only.

A head reads all of its weight for a single row. Where ranges of rows do not keep the budget it is tiled over
ranges of columns (:mod:`fpcompile.passes.columns`), each over all rows, or over as many as one unit allows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

from fpcompile.executor.stages import Stage

MIN_ROWS = 64
SKEW = 2.0  # times its share of the rows that an expert may be given for its range to keep the budget
_WORTH = 1.1  # ranges of tokens that cost no more than this times ranges of experts are preferred
KEY_BLOCK = 512
_ALIKE = 1.02  # costs that are not told apart
_INSTANT = 1e-9  # seconds


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """Whole stages ``first`` to ``last`` (exclusive), or one tile of stage ``first``.

    A tile covers ``start`` to ``stop`` (tokens, rows, or positions within sequence group ``group``) and the
    query heads (experts, units of columns) ``head_start`` to ``head_stop``; ``final`` marks the last tile of
    its stage. An empty range of experts behind the last one collects the results of its tokens.
    """

    first: int
    last: int
    start: int = 0
    stop: int = 0
    group: int = 0
    head_start: int = 0
    head_stop: int = 0
    final: bool = True

    @property
    def tiled(self) -> bool:
        """Whether this is a tile."""
        return self.stop > 0


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What a tile plan depends on besides the program: the lengths of the run."""

    tokens: int
    rows: int
    groups: tuple[tuple[int, int, int], ...]  # (sequences, new tokens, context) of each group

    @property
    def mean_context(self) -> float:
        """The context of one sequence of ``tokens`` new tokens that has as many pairs of query and key."""
        pairs = sum(batch * length * (2 * context - length) for batch, length, context in self.groups)
        return (self.tokens + pairs / self.tokens) / 2


class Heads(NamedTuple):
    """How many query heads a stage has that can be attended apart (0 for none), and how many of them only
    together: that depends on the device, and what a plan counts does not. ``first``: how many go together in
    a block that begins a sequence, where that is attended as a whole sequence is; 0 where it is not.
    """

    total: int = 0
    unit: int = 1
    first: int = 0


class StageCosts(Protocol):
    """Predicted seconds of a stage for a number of tokens (or rows) that end a context. Stages of the same
    :attr:`Stage.key` cost the same.
    """

    def stage(self, index: int, *, tokens: int, rows: int, context: float) -> float:
        """Seconds of stage ``index`` executed whole."""

    def tile(self, index: int, *, tokens: int, context: float) -> float:
        """Seconds of a tile of ``tokens`` tokens or rows; of attention a block of so many queries, all heads,
        that end ``context``.
        """

    def written(self, index: int, *, tokens: int) -> float:
        """Seconds that the first tile of attention takes besides, for the keys and values of all tokens."""

    def experts(self, index: int, *, tokens: int, share: float) -> float:
        """Seconds of a range of experts that is given ``share`` of what all of them are given."""

    def collected(self, index: int, *, tokens: int) -> float:
        """Seconds of collecting the results of ``tokens`` tokens behind the last range of experts."""

    def columns(self, index: int, *, rows: int, units: int, of: int) -> float:
        """Seconds of ``units`` of ``of`` units of columns, for ``rows`` rows."""


def keys_given(context: int) -> int:
    """How many keys a block of queries is given that ends ``context``, where there are as many."""
    return -(-context // KEY_BLOCK) * KEY_BLOCK


def by_segment(stages: Sequence[Stage]) -> tuple[Launch, ...]:
    """One launch for each segment."""
    launches: list[Launch] = []
    first = 0
    for i in range(1, len(stages) + 1):
        if i == len(stages) or stages[i].segment != stages[first].segment:
            launches.append(Launch(first, i))
            first = i
    return tuple(launches)


def by_budget(
    stages: Sequence[Stage], shape: Shape, costs: StageCosts, seconds: float, heads: Sequence[Heads]
) -> tuple[Launch, ...]:
    """Launches of at most ``seconds`` predicted seconds each, as far as the smallest tile allows.

    ``heads[i]`` are those of stage i: none when it is no attention, or they cannot be computed apart.
    """
    launches: list[Launch] = []
    begun, spent = 0, 0.0

    def flush(upto: int) -> None:
        nonlocal begun, spent
        if upto and stages[upto - 1].bound:
            return
        if begun < upto:
            launches.append(Launch(begun, upto))
        begun, spent = upto, 0.0

    known: dict[Hashable, list[Launch]] = {}  # of a stage in the place of the first one: layers are alike
    for i, stage in enumerate(stages):
        cost = _stage_seconds(i, shape, costs)
        if spent + cost > seconds:
            flush(i)
        if cost > seconds and stage.over and begun == i and not stage.bound:
            kind = stage.over, stage.key, stage.experts, stage.columns, heads[i]
            if kind not in known:
                known[kind] = [
                    _of_stage(tile, 0) for tile in _tiles(i, stage, shape, costs, seconds, heads[i])
                ]
            if len(known[kind]) > 1:
                launches.extend(_of_stage(tile, i) for tile in known[kind])
                begun, spent = i + 1, 0.0
                continue
        spent += cost
    flush(len(stages))
    return tuple(launches)


def _tiles(
    index: int, stage: Stage, shape: Shape, costs: StageCosts, seconds: float, apart: Heads
) -> list[Launch]:
    if stage.over == "attention":
        return _attention_tiles(index, shape, costs, seconds, apart)
    if stage.over == "tokens" and stage.experts:
        return _expert_tiles(index, stage.experts, shape, costs, seconds)
    if stage.columns:
        return _column_tiles(index, stage, shape, costs, seconds)
    return _row_tiles(index, stage.over, shape, costs, seconds)


def _of_stage(tile: Launch, index: int) -> Launch:
    """The same tile of another stage."""
    bounds = tile.start, tile.stop, tile.group, tile.head_start, tile.head_stop
    return Launch(index, index + 1, *bounds, tile.final)


def launch_seconds(
    launch: Launch, stages: Sequence[Stage], shape: Shape, costs: StageCosts, heads: Sequence[Heads]
) -> float:
    """Predicted seconds of a launch; each sequence attends to its own context."""
    index = launch.first
    if not launch.tiled:
        return sum(_stage_seconds(i, shape, costs) for i in range(launch.first, launch.last))
    size = launch.stop - launch.start
    count = launch.head_stop - launch.head_start
    if stages[index].over == "attention":
        batch, length, context = shape.groups[launch.group]
        share = count / heads[index].total if heads[index].total else 1.0
        visible = context - length + launch.stop
        if visible == size and _as_whole(size, length, count, heads[index]):
            seconds = share * batch * costs.stage(index, tokens=size, rows=size, context=size)
        else:
            seconds = share * batch * costs.tile(index, tokens=size, context=visible)
        first = launch.start == launch.group == launch.head_start == 0
        return seconds + (costs.written(index, tokens=shape.tokens) if first else 0.0)
    if not launch.head_stop:
        return costs.tile(index, tokens=size, context=size)
    if stages[index].columns:
        return costs.columns(index, rows=size, units=count, of=stages[index].columns)
    if not count:
        return costs.collected(index, tokens=size)
    return costs.experts(index, tokens=size, share=_skewed(count, stages[index].experts))


def _stage_seconds(index: int, shape: Shape, costs: StageCosts) -> float:
    return costs.stage(index, tokens=shape.tokens, rows=shape.rows, context=shape.mean_context)


def _skewed(some: int, experts: int) -> float:
    """The share of the work that a plan allows a range of ``some`` experts."""
    return min(1.0, SKEW * some / experts)


def _row_tiles(index: int, over: str, shape: Shape, costs: StageCosts, seconds: float) -> list[Launch]:
    total = shape.tokens if over == "tokens" else shape.rows
    ranges = _row_ranges(total, lambda n: costs.tile(index, tokens=n, context=n), seconds)
    if len(ranges) == 1:  # as a tile it would keep the budget, and as a whole it does not
        ranges = _ranges(total, MIN_ROWS * math.ceil(total / 2 / MIN_ROWS))
    return _final([Launch(index, index + 1, a, b, final=False) for a, b in ranges])


def _row_ranges(total: int, cost: Callable[[int], float], seconds: float) -> list[tuple[int, int]]:
    """About equal ranges, none of which costs more than ``seconds``, as far as the smallest tile allows."""
    units = max(1, _largest(lambda k: cost(MIN_ROWS * k), seconds, total // MIN_ROWS))
    count = math.ceil(total / (MIN_ROWS * units))
    units = math.ceil(total / count / MIN_ROWS)
    while units > 1 and cost(max(b - a for a, b in _ranges(total, MIN_ROWS * units))) > seconds:
        units -= 1  # the remainder made the last tile too long
    return _ranges(total, MIN_ROWS * units)


def _expert_tiles(index: int, experts: int, shape: Shape, costs: StageCosts, seconds: float) -> list[Launch]:
    """Ranges of experts over all tokens; else ranges of tokens, or of experts over ranges of tokens that are
    as long as one expert allows.
    """

    def one(n: int) -> float:
        return costs.experts(index, tokens=n, share=_skewed(1, experts))

    if one(shape.tokens) <= seconds:
        return _ranges_of_experts(index, experts, [(0, shape.tokens)], costs, seconds)
    by_rows = _row_tiles(index, "tokens", shape, costs, seconds)
    ranges = _row_ranges(shape.tokens, one, seconds)
    by_experts = _ranges_of_experts(index, experts, ranges, costs, seconds)
    rows = [costs.tile(index, tokens=t.stop - t.start, context=t.stop - t.start) for t in by_rows]
    parts = [
        costs.experts(index, tokens=b - a, share=1.0) + costs.collected(index, tokens=b - a)
        for a, b in ranges
    ]
    return by_rows if max(rows) <= seconds and sum(rows) <= _WORTH * sum(parts) else by_experts


def _ranges_of_experts(
    index: int, experts: int, ranges: Sequence[tuple[int, int]], costs: StageCosts, seconds: float
) -> list[Launch]:
    """For each range of tokens the ranges of experts, and behind them the collected ranges of its tokens."""
    tiles: list[Launch] = []
    for start, stop in ranges:
        size = stop - start

        def some(count: int, size: int = size) -> float:
            return costs.experts(index, tokens=size, share=_skewed(count, experts))

        group = max(1, _largest(some, seconds, experts))
        tiles += [
            Launch(index, index + 1, start, stop, 0, first, min(first + group, experts), final=False)
            for first in range(0, experts, group)
        ]
        tiles += [
            Launch(index, index + 1, start + a, start + b, 0, experts, experts, final=False)
            for a, b in _row_ranges(size, lambda n: costs.collected(index, tokens=n), seconds)
        ]
    return _final(tiles)


def _column_tiles(index: int, stage: Stage, shape: Shape, costs: StageCosts, seconds: float) -> list[Launch]:
    """Ranges of rows, if they keep the budget; else of columns, over as many rows as one unit allows."""
    by_rows = _row_tiles(index, stage.over, shape, costs, seconds)
    longest = max(t.stop - t.start for t in by_rows)
    if len(by_rows) > 1 and costs.tile(index, tokens=longest, context=longest) <= seconds:
        return by_rows
    units, tiles = stage.columns, list[Launch]()
    ranges = _row_ranges(shape.rows, lambda n: costs.columns(index, rows=n, units=1, of=units), seconds)
    for start, stop in ranges:

        def some(count: int, rows: int = stop - start) -> float:
            return costs.columns(index, rows=rows, units=count, of=units)

        most = max(1, _largest(some, seconds, units))
        if most == units and len(ranges) == 1:  # as ranges they would keep the budget, and as a whole not
            most = math.ceil(units / 2)
        count = math.ceil(units / most)
        bounds = [units * i // count for i in range(count + 1)]
        tiles += [
            Launch(index, index + 1, start, stop, 0, first, last, final=False)
            for first, last in itertools.pairwise(bounds)
        ]
    return _final(tiles)


def _attention_tiles(
    index: int, shape: Shape, costs: StageCosts, seconds: float, apart: Heads
) -> list[Launch]:
    tiles: list[Launch] = []
    unit, heads = apart.unit, apart.total // apart.unit  # from here on heads, or groups of them
    written = costs.written(index, tokens=shape.tokens)
    for group, (batch, length, context) in enumerate(shape.groups):
        past = context - length

        def cost(start: int, rows: int, batch: int = batch, past: int = past) -> float:
            return batch * costs.tile(index, tokens=rows, context=past + start + rows)

        def pairs(start: int, rows: int, past: int = past) -> int:
            return rows * (2 * (past + start) + rows)

        start, together = 0, 0
        if apart.first and not past:
            limit = seconds if group else max(seconds - written, _INSTANT)
            start, together = _first_block(index, batch, length, costs, limit, apart)
            tiles += _over_heads(index, 0, start, group, apart.total, together) if start else ()
        while start < length:
            rest = length - start
            limit = seconds if start or group else max(seconds - written, _INSTANT)
            rows, share = _block(
                functools.partial(cost, start),
                functools.partial(pairs, start),
                limit,
                past + start,
                rest,
                heads,
            )
            if 0 < rest - rows < MIN_ROWS:  # the remainder joins, unless that makes the block too long
                needed = math.ceil(cost(start, rest) / limit)
                if needed <= max(heads, 1) or rows <= MIN_ROWS:
                    rows, share = rest, max(1, min(needed, max(heads, 1)))
                else:
                    rows -= MIN_ROWS
            step = unit * max(1, heads // share)  # at most 1 / share of the heads in each tile
            tiles += _over_heads(index, start, start + rows, group, apart.total, step)
            start += rows
    return _final(tiles)


def _over_heads(index: int, start: int, stop: int, group: int, total: int, step: int) -> list[Launch]:
    """One block of queries in tiles of ``step`` query heads; in one tile where heads cannot be divided."""
    return [
        Launch(index, index + 1, start, stop, group, head, min(head + step, total), final=False)
        for head in range(0, max(total, 1), step)
    ]


def _first_block(
    index: int, batch: int, length: int, costs: StageCosts, seconds: float, apart: Heads
) -> tuple[int, int]:
    """(rows, heads in a tile) of the block that begins a sequence, as :attr:`Heads.first` says: as long as
    the budget allows. None, (0, 0), where too few rows fit.
    """

    def cost(rows: int) -> float:
        return batch * costs.stage(index, tokens=rows, rows=rows, context=rows)

    ends = [n for n in range(length // KEY_BLOCK * KEY_BLOCK, 0, -KEY_BLOCK) if length - n >= MIN_ROWS]
    for rows in (length, *ends):
        if cost(rows) <= seconds:
            return rows, apart.total
        if apart.first / apart.total * cost(rows) <= seconds:
            return rows, apart.first
    return 0, 0


def _as_whole(rows: int, length: int, count: int, apart: Heads) -> bool:
    """Whether ``count`` heads of the first ``rows`` of a sequence are attended as a whole sequence is."""
    return bool(apart.first) and count % apart.first == 0 and (rows == length or rows % KEY_BLOCK == 0)


def _block(
    cost: Callable[[int], float],
    pairs: Callable[[int], int],
    seconds: float,
    before: int,
    rest: int,
    heads: int,
) -> tuple[int, int]:
    """(rows, head groups) of the next block, behind ``before`` tokens and with ``rest`` left: of the numbers
    of rows that heads apart make short enough one that costs the least for a pair of query and key, and of
    these one with few launches.
    """
    most = max(heads, 1)
    limit = seconds * most
    units = _largest(lambda k: cost(MIN_ROWS * k), limit, rest // MIN_ROWS)
    # a kernel may take less time for more rows: beyond units powers of two are tried
    powers = (MIN_ROWS << i for i in range((rest // MIN_ROWS).bit_length()))
    # behind a block that ends with one of keys no keys are given in vain
    ends = (n - (before + n) % KEY_BLOCK for n in (MIN_ROWS * units, KEY_BLOCK))
    candidates = {MIN_ROWS * units, rest, *powers, *(n for n in ends if 2 * MIN_ROWS <= n <= rest)}
    sizes = [rows for rows in sorted(candidates) if rows and cost(rows) <= limit]
    if not sizes:
        return min(MIN_ROWS, rest), most
    share = {rows: min(most, max(1, math.ceil(cost(rows) / seconds))) for rows in sizes}
    price = {rows: cost(rows) / pairs(rows) for rows in sizes}
    cheap = [rows for rows in sizes if price[rows] <= _ALIKE * min(price.values())]
    best = min(cheap, key=lambda rows: math.ceil(most / (most // share[rows])) / pairs(rows))
    return best, share[best]


def _largest(cost: Callable[[int], float], limit: float, upto: int) -> int:
    """The largest k from 1 to ``upto`` with ``cost(k) <= limit`` (0 if none); cost does not decrease."""
    low, high = 0, upto
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def _ranges(total: int, size: int) -> list[tuple[int, int]]:
    """Ranges of ``size``; a remainder under the smallest tile joins the last one."""
    cuts = list(range(0, total, size))
    if len(cuts) > 1 and total - cuts[-1] < MIN_ROWS:
        cuts.pop()
    return list(zip(cuts, [*cuts[1:], total], strict=True))


def _final(tiles: list[Launch]) -> list[Launch]:
    tiles[-1] = dataclasses.replace(tiles[-1], final=True)
    return tiles

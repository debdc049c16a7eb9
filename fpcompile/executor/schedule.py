"""The tile plan of a run: its launches. Fixed when the run starts, plain data, saved with it.

Without a budget one launch is one segment. With a budget (seconds that the device may be busy with one
launch) consecutive stages are launched together while their predicted sum stays under it, and a stage that
alone exceeds it is tiled: token-wise stages over ranges of at least 64 rows, attention over blocks of query
rows and groups of key/value heads.

Row blocks of attention are multiples of 512 where the budget allows: there the tiles give the bits of the
whole on CPU; smaller blocks agree to rounding (measured, see docs/design.md).

Experts are tiled over ranges of tokens, or over ranges of tokens and of experts where that is predicted to
cost less: every range of tokens reads the weights of all experts that it chooses, a range of experts its own
only. Which rows an expert is given is not known before; a plan allows for twice its share. Ranges of experts
give the bits of one call (:mod:`fpcompile.models.division`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from fpcompile.executor.stages import Stage

MIN_ROWS = 64
SKEW = 2.0  # times its share of the rows that an expert may be given for its range to keep the budget
_WORTH = 1.1  # ranges of tokens that cost no more than this times ranges of experts are preferred
EXACT_ROWS = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """Whole stages ``first`` to ``last`` (exclusive), or one tile of stage ``first``.

    A tile covers ``start`` to ``stop`` (tokens, rows, or positions within sequence group ``group``) and the
    key/value heads (or experts) ``head_start`` to ``head_stop``; ``final`` marks the last tile of its stage.
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


class StageCosts(Protocol):
    """Predicted seconds of a stage for a number of tokens (or rows) that end a context."""

    def stage(self, index: int, *, tokens: int, rows: int, context: float) -> float:
        """Seconds of stage ``index``."""


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
    stages: Sequence[Stage], shape: Shape, costs: StageCosts, seconds: float, kv_heads: Sequence[int]
) -> tuple[Launch, ...]:
    """Launches of at most ``seconds`` predicted seconds each, as far as the smallest tile allows.

    ``kv_heads[i]`` is the number of key/value heads of stage i, 0 when it is no attention or its heads
    cannot be computed apart.
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

    for i, stage in enumerate(stages):
        cost = _stage_seconds(i, shape, costs)
        if spent + cost > seconds:
            flush(i)
        if cost > seconds and stage.over and begun == i and not stage.bound:
            if stage.over == "attention":
                tiles = _attention_tiles(i, shape, costs, seconds, kv_heads[i])
            elif stage.over == "tokens" and stage.experts:
                tiles = _expert_tiles(i, stage.experts, shape, costs, seconds)
            else:
                tiles = _row_tiles(i, stage.over, shape, costs, seconds)
            if len(tiles) > 1:
                launches.extend(tiles)
                begun, spent = i + 1, 0.0
                continue
        spent += cost
    flush(len(stages))
    return tuple(launches)


def launch_seconds(
    launch: Launch, stages: Sequence[Stage], shape: Shape, costs: StageCosts, kv_heads: Sequence[int]
) -> float:
    """Predicted seconds of a launch; each sequence attends to its own context."""
    index = launch.first
    if not launch.tiled:
        return sum(_stage_seconds(i, shape, costs) for i in range(launch.first, launch.last))
    size = launch.stop - launch.start
    if stages[index].over != "attention":
        experts = launch.head_stop - launch.head_start
        share = min(1.0, SKEW * experts / stages[index].experts) if experts else 1.0
        return share * costs.stage(index, tokens=size, rows=size, context=size)
    batch, length, context = shape.groups[launch.group]
    share = (launch.head_stop - launch.head_start) / kv_heads[index] if kv_heads[index] else 1.0
    visible = context - length + launch.stop
    return share * batch * costs.stage(index, tokens=size, rows=1, context=visible)


def _stage_seconds(index: int, shape: Shape, costs: StageCosts) -> float:
    return costs.stage(index, tokens=shape.tokens, rows=shape.rows, context=shape.mean_context)


def _row_tiles(index: int, over: str, shape: Shape, costs: StageCosts, seconds: float) -> list[Launch]:
    total = shape.tokens if over == "tokens" else shape.rows

    def cost(n: int) -> float:
        return costs.stage(index, tokens=n, rows=n, context=n)

    units = max(1, _largest(lambda k: cost(MIN_ROWS * k), seconds, total // MIN_ROWS))
    count = math.ceil(total / (MIN_ROWS * units))
    units = math.ceil(total / count / MIN_ROWS)
    while units > 1 and cost(max(b - a for a, b in _ranges(total, MIN_ROWS * units))) > seconds:
        units -= 1  # the remainder made the last tile too long
    return _final([Launch(index, index + 1, a, b, final=False) for a, b in _ranges(total, MIN_ROWS * units)])


def _expert_tiles(index: int, experts: int, shape: Shape, costs: StageCosts, seconds: float) -> list[Launch]:
    """Ranges of tokens, or ranges of experts over ranges of tokens that are as long as one expert allows."""

    def cost(n: int) -> float:
        return costs.stage(index, tokens=n, rows=n, context=n)

    by_rows = _row_tiles(index, "tokens", shape, costs, seconds)
    most = math.ceil(shape.tokens / MIN_ROWS)
    units = max(1, _largest(lambda k: SKEW * cost(min(MIN_ROWS * k, shape.tokens)) / experts, seconds, most))
    ranges = _ranges(shape.tokens, MIN_ROWS * units)
    longest = max(cost(b - a) for a, b in ranges)
    if units > 1 and SKEW * longest > seconds * experts:  # the remainder made the last range too long
        ranges = _ranges(shape.tokens, MIN_ROWS * (units - 1))
        longest = max(cost(b - a) for a, b in ranges)
    group = max(1, min(experts, int(seconds * experts / (SKEW * longest))))
    sizes = [t.stop - t.start for t in by_rows]
    if group == experts or (
        max(map(cost, sizes)) <= seconds
        and sum(map(cost, sizes)) <= _WORTH * sum(cost(b - a) for a, b in ranges)
    ):
        return by_rows
    return _final(
        [
            Launch(index, index + 1, a, b, 0, first, min(first + group, experts), final=False)
            for a, b in ranges
            for first in range(0, experts, group)
        ]
    )


def _attention_tiles(index: int, shape: Shape, costs: StageCosts, seconds: float, heads: int) -> list[Launch]:
    tiles: list[Launch] = []
    for group, (batch, length, context) in enumerate(shape.groups):
        past = context - length

        def cost(start: int, rows: int, batch: int = batch, past: int = past) -> float:
            return batch * costs.stage(index, tokens=rows, rows=1, context=past + start + rows)

        start = 0
        while start < length:
            rest = length - start
            rows, share = _block(functools.partial(cost, start), seconds, rest, heads)
            if 0 < rest - rows < MIN_ROWS:  # the remainder joins, unless that makes the block too long
                fits = cost(start, rest) <= seconds * share or rows <= MIN_ROWS
                rows = rest if fits else rows - (EXACT_ROWS if rows > EXACT_ROWS else MIN_ROWS)
            step = max(1, heads // share) if heads else 0  # at most 1 / share of the heads in each tile
            for head in range(0, max(heads, 1), max(step, 1)):
                tiles.append(
                    Launch(
                        index,
                        index + 1,
                        start,
                        start + rows,
                        group,
                        head,
                        min(head + step, heads),
                        final=False,
                    )
                )
            start += rows
    return _final(tiles)


def _block(cost: Callable[[int], float], seconds: float, rest: int, heads: int) -> tuple[int, int]:
    """(rows, head groups) of the next block: exact row blocks first, heads apart if they must be."""
    exact = EXACT_ROWS * max(1, _largest(lambda k: cost(EXACT_ROWS * k), seconds, rest // EXACT_ROWS))
    rows = min(exact, rest)
    share = math.ceil(cost(rows) / seconds)
    if share <= max(heads, 1):
        return rows, max(1, share)
    rows = MIN_ROWS * max(
        1, _largest(lambda k: cost(MIN_ROWS * k) / max(heads, 1), seconds, rows // MIN_ROWS)
    )
    return min(rows, rest), max(heads, 1)


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

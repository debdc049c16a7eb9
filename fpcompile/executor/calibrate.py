"""Seconds of each stage, measured on the device.

Identical stages (same callables, same shapes) share their measurements, so a long prefill need not be run to
its end: when all that comes next has been measured, the run jumps from one cut to a later one with
values of the same shapes, behind the last attention. The results of such a run mean nothing; its times do.

Other processes only ever add to a measured time. What the next length will take is therefore judged by the
fastest run so far, and of the times of a stage the lower median counts. Where the time is short a length is
run once instead of three times, since kernels are warm from shorter ones; the first lengths are measured even
if the time is over, so that there is a curve.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fpcompile.executor.cost_model import Coefficients, CostModel, Curve, Key, Samples
from fpcompile.executor.schedule import Launch
from fpcompile.executor.tile_costs import of_tiles, tile_costs
from fpcompile.ir import LiveSet, PartKind, Route

if TYPE_CHECKING:
    from fpcompile.executor.program import Program
    from fpcompile.executor.run import Run

LENGTHS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MOST_ROWS = 256  # of logits: more of them are a multiple
_ROUNDS = 3  # of each length, the first one a warm-up
_LEAST = 4  # lengths that are measured after the time is over too
_PATIENCE = 2  # times the whole time, that one of them may take
_GROWTH = 2.7  # of the time from one length to its double: between twice and four times
_SMALL = 0.1  # of the time left: a length that takes no more is run to its end
_SLOW = 50  # a shortest length that takes more than this part of the time leaves room for every second one
_log = logging.getLogger(__name__)


def measure(program: Program, *, lengths: tuple[int, ...] = LENGTHS, seconds: float = 5.0) -> Samples:
    """Median seconds of each stage of ``program`` at increasing lengths, found in about ``seconds``.

    Longer lengths than that allows are left out. Random token ids are used; the device should be otherwise
    idle: medians bear some noise.
    """
    measured: dict[Key, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    limit = program.max_tokens or max(lengths)
    end = time.perf_counter() + seconds
    jump = find_jump(program) if program.plan.route is Route.PACKED else None
    share = 1.0 if jump is None else 1 - (jump[1] - jump[0]) / len(program.stages)
    ladder = sorted({min(n, limit) for n in lengths})
    whole = min(_timed(program, ladder[0], None, None) for _ in range(2))  # seconds of a run to its end
    if whole * _ROUNDS > seconds / _SLOW:
        ladder = [*ladder[:-1:2], ladder[-1]]
    for number, length in enumerate(ladder):
        left = end - time.perf_counter()
        next_ = whole * _GROWTH ** math.log2(length / ladder[number - 1]) if number else whole
        small = next_ * _ROUNDS < _SMALL * left
        one = next_ * (1.0 if small else share)
        if one > left and (number >= _LEAST or (number and one > _PATIENCE * seconds)):
            _log.warning(
                "calibration: %g s were enough for %d tokens; longer prompts are predicted from these "
                "(program.calibrate(seconds=...) measures longer)",
                seconds,
                ladder[number - 1],
            )
            break
        patience = _PATIENCE * seconds if number < _LEAST else left
        rounds = _ROUNDS if one * _ROUNDS <= patience else 1
        times: list[float] = []
        for repeat in range(rounds):
            into = measured if repeat or rounds == 1 else None
            rows = min(length, MOST_ROWS) if repeat == rounds - 1 else 1
            times.append(_timed(program, length, into, None if small else jump, rows=rows))
        whole = min(times) / (1.0 if small else share)
    return {
        key: tuple((n, lower_median(times)) for n, times in sorted(found.items()))
        for key, found in measured.items()
    }


def lower_median(times: Sequence[float]) -> float:
    """The median; of two in the middle the shorter one."""
    return sorted(times)[(len(times) - 1) // 2]


def cost_model(program: Program, samples: Samples) -> CostModel:
    """The cost model that follows from ``samples``.

    A stage that was not measured (of another variant of a generic program) is given the mean of the others.
    """
    kinds = {s.key: s.over not in ("tokens", "rows") for s in program.stages}
    stages = {key: found for key, found in samples.items() if not of_tiles(key)}
    curves = {key: Curve.through(found, pairs=kinds.get(key, True)) for key, found in stages.items()}
    tiles = {s.key: tile_costs(s.key, samples, s.experts) for s in program.stages}
    mean = sum((c.fit for c in curves.values()), Coefficients(0.0, 0.0, 0.0)).scaled(1 / len(curves))
    other = Curve(mean)
    return CostModel(
        device=str(program.device),
        curves=tuple(curves.get(s.key, other) for s in program.stages),
        segments=tuple(s.segment for s in program.stages),
        by_rows=tuple(s.over == "rows" for s in program.stages),
        samples=samples,
        tiles=tuple(tiles[s.key] for s in program.stages),
    )


def _sample(program: Program, length: int, *, rows: int) -> Run:
    """A run that launches every stage by itself."""
    run = program.sample(length, rows=rows)
    run.schedule = tuple(Launch(i, i + 1) for i in range(len(run.program.stages)))
    return run


def _timed(
    program: Program,
    length: int,
    into: dict[Key, dict[int, list[float]]] | None,
    jump: tuple[int, int, dict[str, str]] | None,
    *,
    rows: int = 1,
) -> float:
    """Seconds of a run over ``length`` tokens, with or without a jump."""
    begun = time.perf_counter()
    _measure(_sample(program, length, rows=rows), into, jump)
    return time.perf_counter() - begun


def _measure(
    run: Run, into: dict[Key, dict[int, list[float]]] | None, jump: tuple[int, int, dict[str, str]] | None
) -> None:
    """Step ``run`` to its end; record each stage's seconds unless this is the warm-up."""
    synchronize = torch.cuda.synchronize if run.program.device.type == "cuda" else _nothing
    while not run.done:
        if jump is not None and run.at == jump[0]:
            _, run.at, names = jump
            run.values = {new: run.values[old] for new, old in names.items()}
        stage = run.program.stages[run.next_stage]
        synchronize()
        start = time.perf_counter()
        run.step()
        synchronize()
        if into is not None:
            size = run.rows if stage.over == "rows" else run.tokens
            into[stage.key][size].append(time.perf_counter() - start)
    run.release()


def find_jump(program: Program) -> tuple[int, int, dict[str, str]] | None:
    """(stage, later stage, value there -> value here): what lies between has been measured before.

    None where there is none: the live sets of no two cuts agree, or attention comes behind.
    """
    known: set[Key] = set()
    fresh: list[int] = []
    for i, stage in enumerate(program.stages):
        if stage.key not in known:
            known.add(stage.key)
            fresh.append(i)
    gap, until = max(
        ((b - a, b) for a, b in zip(fresh, [*fresh[1:], len(program.stages)], strict=True)), default=(0, 0)
    )
    starts = {
        i: s.segment for i, s in enumerate(program.stages) if i and program.stages[i - 1].segment != s.segment
    }
    first = until - gap + 1
    later = [i for i in starts if first < i <= until and not _attends(program, i)]
    for here in (i for i in starts if i >= first):
        for there in reversed(later):
            if there > here:
                names = _renamed(_live(program, starts[here]), _live(program, starts[there]))
                if names is not None:
                    return here, there, names
    return None


def _attends(program: Program, first: int) -> bool:
    return any(p.part.kind is PartKind.ATTENTION for s in program.stages[first:] for p in s.steps)


def _live(program: Program, segment: int) -> LiveSet:
    return program.segments[segment - 1].live


def _renamed(here: LiveSet, there: LiveSet) -> dict[str, str] | None:
    """Which value of one live set may stand for each of another: the same, or one of its shape and dtype."""
    names = {n: n for n in there.names if n in here.names}
    free = [v for v in here.values if v.name not in names]
    for wanted in (v for v in there.values if v.name not in names):
        found = next((v for v in free if (v.shape, v.dtype) == (wanted.shape, wanted.dtype)), None)
        if found is None:
            return None
        free.remove(found)
        names[wanted.name] = found.name
    return names


def _nothing() -> None:
    return None

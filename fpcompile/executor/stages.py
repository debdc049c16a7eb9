"""Stages: the steps of a program grouped by how they may be tiled.

A *stage* is a run of consecutive parts of one segment that are executed on the same ranges of tokens (or of
kept rows), or a single part that is executed whole, or an attention call. A launch executes whole stages,
or one tile of one stage (:mod:`fpcompile.executor.schedule`). Experts that can be executed in ranges are a
stage of their own, and so is a head whose columns can be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fpcompile.executor.columns import Columns
from fpcompile.ir import Part, PartKind, Plan, Segment
from fpcompile.models.division import Division

if TYPE_CHECKING:
    from fpcompile.executor.run import Run

Executable = Callable[["Run", list[Tensor], Mapping[str, int]], Sequence[Tensor]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A part bound to what executes it; ``frees`` are the values that nothing reads after it.

    ``function`` takes the run, the part's input values (a list that it may empty, to give memory back
    early) and the lengths to execute it at, and returns the values of its outputs; ``names`` are the local
    names of its nodes, which locate an error. ``division`` says how experts are executed in ranges,
    ``columns`` how a head is.
    """

    part: Part
    function: Executable
    names: tuple[str, ...]
    frees: tuple[str, ...]
    division: Division | None = None
    columns: Columns | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """``inputs`` and ``outputs`` are (value, dimension that runs over ``over``, -1 for none).

    ``over`` is ``tokens``, ``rows``, ``attention`` or empty (executed whole only); ``frees`` are the inputs
    that nothing reads after the stage. ``bound``: no launch may end behind it, see
    :class:`fpcompile.ir.Part`.
    """

    segment: int
    steps: tuple[Step, ...]
    over: str
    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[tuple[str, int], ...]
    frees: tuple[str, ...]
    bound: bool = False

    @property
    def experts(self) -> int:
        """How many experts can be executed in ranges; 0 for none."""
        division = self.steps[0].division if self.steps else None
        return 0 if division is None else division.experts

    @property
    def columns(self) -> int:
        """How many units of columns can be executed in ranges; 0 for none."""
        columns = self.steps[0].columns if self.steps else None
        return 0 if columns is None else columns.units

    @property
    def key(self) -> tuple[str, ...]:
        """What decides the stage's time at given lengths: its callables."""
        return tuple(s.part.function for s in self.steps)


def build_stages(
    plan: Plan,
    bind: Callable[[Part], tuple[Executable, tuple[str, ...]]],
    division: Callable[[Part], Division | None] = lambda part: None,
    columns: Callable[[Part], Columns | None] = lambda part: None,
) -> tuple[Stage, ...]:
    """All stages of a plan, in order; ``bind`` gives a part's executable and local names, ``division`` how
    its experts are executed in ranges, if it has any, ``columns`` how its columns are.
    """
    stages: list[Stage] = []
    for segment in plan.segments:
        frees = zip(segment.parts, _frees(segment), strict=True)
        steps = [Step(p, *bind(p), free, division(p), columns(p)) for p, free in frees]
        while steps:
            over = _over(steps[0].part)
            count = 1
            while over in ("tokens", "rows") and count < len(steps) and _joins(steps[0], steps[count]):
                count += 1
            stages.append(_stage(segment, tuple(steps[:count]), over, steps[count:]))
            del steps[:count]
    return tuple(stages)


def live_before(plan: Plan, stages: Sequence[Stage]) -> tuple[tuple[str, ...], ...]:
    """For each stage, and for the end, the values that it and later stages read, in order of definition."""
    needed: set[str] = set(plan.results)
    found = [needed]
    for stage in reversed(stages):
        needed = (needed - {n for n, _ in stage.outputs}) | {n for n, _ in stage.inputs}
        found.append(needed)
    order = [*plan.inputs, *(name for stage in stages for name, _ in stage.outputs)]
    return tuple(tuple(n for n in order if n in names) for names in reversed(found))


def _joins(step: Step, later: Step) -> bool:
    """Whether two steps are executed on the same ranges."""
    alone = (step.division, step.columns, later.division, later.columns)
    return _over(step.part) == _over(later.part) and all(own is None for own in alone)


def _over(part: Part) -> str:
    return "attention" if part.kind is PartKind.ATTENTION else part.over


def _stage(segment: Segment, steps: tuple[Step, ...], over: str, later: Sequence[Step]) -> Stage:
    defined = [n for s in steps for n in s.part.outputs]
    wanted = {*segment.live.names, *(n for s in later for n in s.part.inputs)}
    axes: dict[str, int] = {}
    for step in steps:
        inner, outer = step.part.axes if step.part.over else ((), ())
        axes.update(zip(step.part.inputs, inner, strict=False))
        axes.update(zip(step.part.outputs, outer, strict=False))
    read = dict.fromkeys(n for s in steps for n in s.part.inputs if n not in defined)
    return Stage(
        segment.index,
        steps,
        over,
        tuple((n, axes.get(n, -1)) for n in read),
        tuple((n, axes.get(n, -1)) for n in defined if n in wanted),
        tuple(n for n in read if n not in wanted),
        steps[-1].part.bound,
    )


def _frees(segment: Segment) -> tuple[tuple[str, ...], ...]:
    """For each part of a segment, the inputs that nothing reads after it."""
    needed = set(segment.live.names)
    found: list[tuple[str, ...]] = []
    for part in reversed(segment.parts):
        found.append(tuple(name for name in dict.fromkeys(part.inputs) if name not in needed))
        needed = (needed - set(part.outputs)) | set(part.inputs)
    return tuple(reversed(found))

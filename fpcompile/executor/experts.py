"""Tiles of experts: which experts of a program are executed in ranges, and one such range."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fpcompile.executor.schedule import Launch
from fpcompile.executor.stages import Step
from fpcompile.ir import Part, PartKind
from fpcompile.models.capture import Bindings
from fpcompile.models.division import Division

if TYPE_CHECKING:
    from fpcompile.executor.run import Run


def divisions(captured: Bindings) -> Callable[[Part], Division | None]:
    """How the experts of each part are executed in ranges; checked once for each distinct function.

    None for those whose ranges give other bits than one call, and on the meta device, which computes none.
    """
    checked: dict[str, bool] = {}

    def division(part: Part) -> Division | None:
        found = captured.leaves[part.call].division if part.kind is PartKind.LEAF else None
        if found is None or next(found.module.parameters()).is_meta:
            return None
        if part.function not in checked:
            checked[part.function] = found.agrees()
        return found if checked[part.function] else None

    return division


def with_range(step: Step, launch: Launch, state: dict[str, Tensor]) -> Step:
    """``step`` executing the launch's range of experts on the tokens that it is given.

    ``state`` (a run's partial results) holds what earlier ranges of the same tokens gave. The result is empty
    before the last range of them.
    """
    division = step.division
    assert division is not None
    name = f"{step.part.outputs[0]} of experts"

    def execute(run: Run, tensors: Sequence[Tensor], lengths: Mapping[str, int]) -> Sequence[Tensor]:
        if launch.head_start == 0:
            state[name] = division.room(tensors)
        division.add(state[name], tensors, launch.head_start, launch.head_stop)
        if launch.head_stop < division.experts:
            return ()
        return (division.result(state.pop(name), tensors),)

    return dataclasses.replace(step, function=execute)

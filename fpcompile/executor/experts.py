"""Tiles of experts: which experts of a program are executed in ranges, and one such range."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from fpcompile.executor.schedule import Launch
from fpcompile.executor.stages import Stage, Step
from fpcompile.ir import Part, PartKind
from fpcompile.models.capture import Bindings
from fpcompile.models.division import Division

if TYPE_CHECKING:
    from fpcompile.executor.run import Run


@final
class Divisions:
    """How the experts of a program's parts are executed in ranges; found once for each distinct function."""

    def __init__(self, captured: Bindings) -> None:
        self._leaves = captured.leaves
        self._refused: dict[str, str | None] = {}
        self._parts: dict[str, list[str]] = {}

    def of(self, part: Part) -> Division | None:
        """The division of a part's experts; None for other parts, for experts whose ranges give other bits
        than one call or that cannot be divided, and on the meta device, which computes none.
        """
        leaf = self._leaves[part.call] if part.kind is PartKind.LEAF else None
        if leaf is None or leaf.kind != "experts":
            return None
        found = leaf.division
        if found is not None and next(found.module.parameters()).is_meta:
            return None
        if part.function not in self._refused:
            why = "their implementation cannot be" if found is None else found.disagreement()
            self._refused[part.function] = why
        self._parts.setdefault(part.function, []).append(part.name)
        return found if self._refused[part.function] is None else None

    @property
    def notes(self) -> tuple[str, ...]:
        """For each function that stays undivided a sentence with the reason and the parts that call it."""
        return tuple(
            f"experts are not divided, a long launch is cut into ranges of tokens only: {why}: "
            f"{named(self._parts[function])}"
            for function, why in self._refused.items()
            if why is not None
        )


def named(parts: Sequence[str]) -> str:
    """The first of some parts that are alike, and how many there are."""
    return parts[0] if len(parts) == 1 else f"{parts[0]} and {len(parts) - 1} more"


def with_range(step: Step, launch: Launch, state: dict[str, Tensor]) -> Step:
    """``step`` executing the launch's range of experts on the tokens that it is given; an empty range behind
    the last expert collects the results of its tokens.

    ``state`` (a run's partial results) holds what earlier ranges of the same tokens gave, without the tokens
    that were collected. There is no result before these.
    """
    division = step.division
    assert division is not None
    name = f"{step.part.outputs[0]} of experts"

    def execute(run: Run, tensors: Sequence[Tensor], lengths: Mapping[str, int]) -> Sequence[Tensor]:
        if launch.head_start < launch.head_stop:
            if launch.head_start == 0:
                state[name] = division.room(tensors)
            division.add(state[name], tensors, launch.head_start, launch.head_stop)
            return ()
        held = state.pop(name)
        mine = tensors[0].shape[0] * division.rows
        if mine < held.shape[0]:
            state[name] = held[mine:]
        return (division.collect(held[:mine], tensors),)

    return dataclasses.replace(step, function=execute)


def state_notes(stages: Sequence[Stage], dtype: torch.dtype, tokens: int) -> tuple[str, ...]:
    """What ranges of experts hold besides a run's live values, as a sentence; none without experts."""
    held = [s.steps[0].division for s in stages if s.experts]
    rows = [(d.rows, d.width) for d in held if d is not None]
    if not rows:
        return ()
    most, width = max(rows, key=lambda r: r[0] * r[1])
    nbytes = tokens * most * width * dtype.itemsize
    return (
        f"while experts are executed in ranges a run holds n * {most} * {width} more values: "
        f"{nbytes / 1e6:.3g} MB at n = {tokens}",
    )

"""A run: one execution in flight. Data, never a parked thread.

Words: ``schedule`` is the run's tile plan, fixed at its start; ``at`` the next launch; ``values`` the live
values; ``partial`` the outputs of a stage of which some tiles are done; ``kv`` the keys and values written
so far. :meth:`Run.step` makes one launch; between two steps the run can wait, be snapshotted or dropped.
Invariant: between steps ``values`` holds exactly what the next stage and later ones read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fpcompile.errors import InternalError, UsageError
from fpcompile.executor.columns import Columns
from fpcompile.executor.experts import with_range
from fpcompile.executor.faults import segment_error
from fpcompile.executor.kv import KV, kv_bytes, storages_of
from fpcompile.executor.rooms import room
from fpcompile.executor.schedule import Launch
from fpcompile.executor.stages import Stage, Step
from fpcompile.ir import Segment
from fpcompile.models.ambient import is_plain, plain

if TYPE_CHECKING:
    from fpcompile.executor.call import Call
    from fpcompile.executor.checkpoint import Checkpoint
    from fpcompile.executor.program import Program


class Run:
    """One execution. Made by :meth:`Program.start` and :meth:`Program.resume`."""

    __slots__ = ("_released", "at", "call", "kv", "masks", "partial", "program", "schedule", "values")

    def __init__(
        self,
        program: Program,
        call: Call,
        values: dict[str, Tensor],
        kv: list[dict[int, KV]],
        schedule: tuple[Launch, ...],
        *,
        at: int = 0,
        partial: dict[str, Tensor] | None = None,
    ) -> None:
        self.program = program
        self.call = call
        self.values = values
        self.kv = kv
        self.schedule = schedule
        self.at = at
        self.partial: dict[str, Tensor] = partial or {}
        self.masks: dict[Hashable, Tensor | None] = {}
        self._released = False

    @property
    def tokens(self) -> int:
        """New tokens in this run, all sequences together."""
        return self.call.lengths["tokens"]

    @property
    def rows(self) -> int:
        """Positions whose logits are computed."""
        return self.call.lengths["rows"]

    @property
    def context(self) -> int:
        """Longest context of any sequence, cached tokens included."""
        return self.call.context

    @property
    def done(self) -> bool:
        """Whether every launch has been made."""
        return self.at == len(self.schedule)

    @property
    def next_stage(self) -> int:
        """Index of the stage that the next launch begins with."""
        return len(self.program.stages) if self.done else self.schedule[self.at].first

    @property
    def cursor(self) -> int:
        """Index of the segment that the next launch belongs to; the number of segments at the end."""
        program, schedule, at = self.program, self.schedule, self.at
        if at == len(schedule):
            return len(program.segments)
        return program.stages[schedule[at].first].segment

    @property
    def next_segment(self) -> Segment:
        """The segment that :meth:`step` goes on with."""
        program = self.program
        return program.plan.segments[program.stages[self.schedule[self.at].first].segment]

    @property
    def live_bytes(self) -> int:
        """Bytes of the storages behind live values and partial outputs, each counted once."""
        return sum(storages_of([*self.values.values(), *self.partial.values()]).values())

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values written so far, cached ones included."""
        return kv_bytes(self.kv)

    def step(self) -> None:
        """Make one launch: a segment, several small ones within the budget, or a tile.

        Launched, not completed, on an asynchronous device. Raises :class:`SegmentError` with the node and the
        model's source line when it fails; the run is then released and cannot go on. Raises
        :class:`UsageError` on a run that is done or released.
        """
        at, schedule = self.at, self.schedule
        if self._released or at == len(schedule):
            self._usable()
            raise UsageError("the run is done", remedy="take its result()")
        program = self.program
        try:
            if is_plain(program.device_type):
                self._launch(program.stages, schedule[at])
            else:
                with plain(program.device_type):
                    self._launch(program.stages, schedule[at])
            self.at = at + 1
        except BaseException:  # an interrupt too: half a step is neither the cut before nor the one behind
            self.release()
            raise

    def _launch(self, stages: Sequence[Stage], launch: Launch) -> None:
        if launch.tiled:
            self._tile(stages[launch.first], launch)
            return
        values, lengths = self.values, self.call.lengths
        for index in range(launch.first, launch.last):
            stage = stages[index]
            for step in stage.steps:
                part = step.part
                arguments = [values[name] for name in part.inputs]
                for name in step.frees:
                    del values[name]
                # no name for the results: what reads one last shall be able to free it
                values.update(zip(part.outputs, self._call(stage, step, arguments, lengths), strict=True))

    def _call(
        self, stage: Stage, step: Step, arguments: list[Tensor], lengths: Mapping[str, int]
    ) -> Sequence[Tensor]:
        try:
            return step.function(self, arguments, lengths)
        except Exception as error:
            segment = self.program.segments[stage.segment]
            raise segment_error(segment, step.part, step.names, error) from error

    def _tile(self, stage: Stage, launch: Launch) -> None:
        """Execute one tile; its results go into ``partial``, and into ``values`` with the last one."""
        if stage.over == "attention":
            step = stage.steps[0]
            (name,) = step.part.outputs

            def attend(_: Run, arguments: Sequence[Tensor], __: Mapping[str, int]) -> Sequence[Tensor]:
                return (self.call.attend(self, step.part, launch, arguments, self.partial.get(name)),)

            bound = dataclasses.replace(step, function=attend)
            arguments = [self.values[n] for n in step.part.inputs]
            self.partial[name] = self._call(stage, bound, arguments, self.call.lengths)[0]
        elif (columns := stage.steps[0].columns) is not None:
            self._columns(stage, launch, columns)
        else:
            self._rows(stage, launch)
        if launch.final:
            for name in stage.frees:
                del self.values[name]
            self.values.update((name, self.partial.pop(name)) for name, _ in stage.outputs)

    def _rows(self, stage: Stage, launch: Launch) -> None:
        size = launch.stop - launch.start
        lengths = {**self.call.lengths, stage.over: size}
        local = {
            name: self.values[name] if axis < 0 else self.values[name].narrow(axis, launch.start, size)
            for name, axis in stage.inputs
        }
        for step in stage.steps:
            if launch.head_stop:
                step = with_range(step, launch, self.partial)
            outputs = self._call(stage, step, [local[n] for n in step.part.inputs], lengths)
            names = step.part.outputs if outputs else ()  # none before the last range of experts
            local.update(zip(names, outputs, strict=True))
        for name, axis in stage.outputs:
            if name not in local:
                continue
            whole = self.partial.get(name)
            if whole is None:
                whole = room(local[name], axis, self.call.lengths[stage.over])
                self.partial[name] = whole
            whole.narrow(axis, launch.start, size).copy_(local[name])

    def _columns(self, stage: Stage, launch: Launch, columns: Columns) -> None:
        """A range of a head's columns, or all of them, for a range of its rows, written to its place."""
        step, size = stage.steps[0], launch.stop - launch.start
        ((given, axis),) = stage.inputs
        (name,) = step.part.outputs
        if name not in self.partial:
            self.partial[name] = columns.room(self.values[given])
        out = self.partial[name].narrow(axis, launch.start, size)
        first, last = launch.head_start, launch.head_stop or columns.units

        def write(_: Run, arguments: Sequence[Tensor], __: Mapping[str, int]) -> Sequence[Tensor]:
            columns.write(out, arguments[0], first, last)
            return ()

        rows = self.values[given].narrow(axis, launch.start, size)
        self._call(stage, dataclasses.replace(step, function=write), [rows], self.call.lengths)

    def suspend(self) -> None:
        """Drop what can be computed again (masks): a paused run holds its live set and cache only."""
        self.masks.clear()

    def begin_again(
        self,
        call: Call,
        values: dict[str, Tensor],
        kv: list[dict[int, KV]],
        schedule: tuple[Launch, ...],
    ) -> None:
        """Go back before the first launch, with what the run was started with; also after a failure."""
        self.suspend()
        self.call, self.values, self.kv, self.schedule = call, values, kv, schedule
        self.at, self.partial = 0, {}
        self._released = False

    def release(self) -> None:
        """Drop every tensor. The run cannot go on."""
        self.suspend()
        self.values.clear()
        self.partial.clear()
        self.kv = [{} for _ in self.kv]
        self._released = True

    def checkpoint(self) -> Checkpoint:
        """A portable snapshot between two steps. Cheap: it shares the tensors, which never change."""
        from fpcompile.executor.checkpoint import take

        self._usable()
        return take(self)

    def result(self) -> Any:
        """What the model's own forward returns; for a decoder LM ``.logits`` and ``.past_key_values``."""
        self._usable()
        if not self.done:
            raise UsageError(
                "the run is not done",
                got=f"launch {self.at} of {len(self.schedule)}",
                remedy="step() on",
            )
        return self.call.result(self)

    def _usable(self) -> None:
        if self._released:
            raise UsageError("the run has failed or was released", remedy="start it again")

    def validate(self) -> None:
        """Check the invariant: the values held are exactly those that the next stage and later ones read."""
        live = self.program.live[self.next_stage]
        if not self._released and set(self.values) != set(live):
            raise InternalError(
                "a run holds other values than its live set", expected=str(live), got=str(list(self.values))
            )

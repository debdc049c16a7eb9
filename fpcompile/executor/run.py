"""A run: one execution in flight. Data, never a parked thread.

Words: ``cursor`` is the next segment; ``values`` are the live values of the cut before it; ``kv`` the keys
and values written so far. :meth:`Run.step` launches one segment; between two steps the run can wait, be
snapshotted or dropped. Invariant: after every step ``values`` holds exactly the segment's live set.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpcompile.errors import InternalError, UsageError
from fpcompile.executor.faults import segment_error
from fpcompile.executor.kv import LayerKV
from fpcompile.ir import Segment

if TYPE_CHECKING:
    from fpcompile.executor.call import Call
    from fpcompile.executor.checkpoint import Checkpoint
    from fpcompile.executor.program import Program, Step


class Run:
    """One execution. Made by :meth:`Program.start` and :meth:`Program.resume`."""

    __slots__ = ("_released", "call", "cursor", "kv", "masks", "program", "values")

    def __init__(
        self,
        program: Program,
        call: Call,
        values: dict[str, Tensor],
        kv: list[dict[int, LayerKV]],
        *,
        cursor: int = 0,
    ) -> None:
        self.program = program
        self.call = call
        self.values = values
        self.kv = kv
        self.cursor = cursor
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
    def done(self) -> bool:
        """Whether every segment has been launched."""
        return self.cursor == len(self.program.segments)

    @property
    def next_segment(self) -> Segment:
        """The segment that :meth:`step` would launch."""
        return self.program.segments[self.cursor]

    @property
    def live_bytes(self) -> int:
        """Bytes of the storages behind the live values, each counted once."""
        return _storage_bytes(self.values.values())

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values written so far, cached ones included."""
        return _storage_bytes(t for group in self.kv for kv in group.values() for t in (kv.keys, kv.values))

    def step(self) -> None:
        """Launch one segment (launched, not completed, on an asynchronous device).

        Raises :class:`SegmentError` with the node and the model's source line when the segment raises; the
        run is then released and cannot go on. Raises :class:`UsageError` on a run that is done or released.
        """
        self._usable()
        if self.done:
            raise UsageError("the run is done", remedy="take its result()")
        with torch.no_grad():
            for step in self.program.steps[self.cursor]:
                try:
                    self._execute(step)
                except Exception as error:
                    failed = segment_error(self.next_segment, step.part, step.names, error)
                    self.release()
                    raise failed from error
        self.cursor += 1

    def _execute(self, step: Step) -> None:
        part, values = step.part, self.values
        arguments = [values[name] for name in part.inputs]
        outputs = step.function(self, arguments)
        for name in step.frees:
            del values[name]
        values.update(zip(part.outputs, outputs, strict=True))

    def suspend(self) -> None:
        """Drop what can be computed again (masks): a paused run holds its live set and cache only."""
        self.masks.clear()

    def release(self) -> None:
        """Drop every tensor. The run cannot go on."""
        self.suspend()
        self.values.clear()
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
                got=f"segment {self.cursor} of {len(self.program.segments)}",
                remedy="step() on",
            )
        return self.call.result(self)

    def _usable(self) -> None:
        if self._released:
            raise UsageError("the run has failed or was released", remedy="start it again")

    def validate(self) -> None:
        """Check the invariant: the values held are exactly the live set of the cut."""
        live = self.program.live_names(self.cursor)
        if not self._released and set(self.values) != set(live):
            raise InternalError(
                "a run holds other values than its live set", expected=str(live), got=str(list(self.values))
            )


def _storage_bytes(tensors: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

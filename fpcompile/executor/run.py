"""A run: one execution in flight. Data, never a parked thread.

Words: ``cursor`` is the next segment; ``values`` are the live values of the cut before it; ``kv`` the keys
and values written so far. :meth:`Run.step` launches one segment; between two steps the run can wait, be
snapshotted or dropped. Invariant: after every step ``values`` holds exactly the segment's live set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpcompile.errors import InternalError, UsageError
from fpcompile.executor.faults import segment_error
from fpcompile.executor.inputs import Group, Inputs, Layout
from fpcompile.executor.kv import LayerKV, pad_layers, write_cache
from fpcompile.ir import PartKind, Segment
from fpcompile.models.attention import AttentionCall, MaskSpec

if TYPE_CHECKING:
    from fpcompile.executor.checkpoint import Checkpoint
    from fpcompile.executor.program import Program, Step


class Run:
    """One prefill or continuation. Made by :meth:`Program.start` and :meth:`Program.resume`."""

    __slots__ = (
        "_masks", "_released", "cursor", "kept", "kv", "layout", "lengths", "padding", "program", "scatter",
        "use_cache", "values",
    )  # fmt: skip

    def __init__(
        self,
        program: Program,
        *,
        layout: Layout,
        values: dict[str, Tensor],
        kv: list[dict[int, LayerKV]],
        rows: int,
        kept: int,
        scatter: Tensor | None,
        padding: Tensor | None,
        use_cache: bool,
        cursor: int = 0,
    ) -> None:
        self.program = program
        self.layout = layout
        self.values = values
        self.kv = kv
        self.kept = kept
        self.scatter = scatter
        self.padding = padding
        self.use_cache = use_cache
        self.cursor = cursor
        self.lengths = {"tokens": layout.tokens, "rows": rows}
        self._masks: dict[tuple[MaskSpec, str, int, Group], Tensor | None] = {}
        self._released = False

    @classmethod
    def begin(cls, program: Program, inputs: Inputs, kv: list[dict[int, LayerKV]], *, use_cache: bool) -> Run:
        """A run at its first segment; nothing is executed."""
        values = {
            "input_ids": inputs.token_ids,
            "position_ids": inputs.position_ids,
            "logits_to_keep": inputs.keep,
        }
        return cls(
            program,
            layout=inputs.layout,
            values={name: values[name] for name in program.first_live},
            kv=kv,
            rows=int(inputs.keep.shape[0]),
            kept=inputs.kept,
            scatter=inputs.scatter,
            padding=inputs.padding,
            use_cache=use_cache,
        )

    @property
    def tokens(self) -> int:
        """New tokens in this run, all sequences together."""
        return self.lengths["tokens"]

    @property
    def rows(self) -> int:
        """Positions whose logits are computed."""
        return self.lengths["rows"]

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
        if part.kind is PartKind.GRAPH:
            outputs = step.function(*arguments, *step.weights, *(self.lengths[n] for n in part.lengths))
        elif part.kind is PartKind.ATTENTION:
            outputs = (self._attend(self.program.attention[part.call], *arguments),)
        else:
            outputs = self.program.leaves[part.call].run(arguments, self.layout.lengths)
        for name in step.frees:
            del values[name]
        values.update(zip(part.outputs, outputs, strict=True))

    def _attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of each sequence over its context; ``[1, H, tokens, D]`` -> ``[1, tokens, H, Dv]``."""
        outputs: list[Tensor] = []
        for group, layers in zip(self.layout.groups, self.kv, strict=True):
            queries, keys, values = (_unpack(x, group) for x in (q, k, v))
            past = layers.get(call.layer)
            kv = past.append(keys, values) if past else LayerKV(keys.contiguous(), values.contiguous())
            layers[call.layer] = kv
            out = call.attend(queries, kv.keys, kv.values, self._mask(call, group, kv, queries))
            outputs.append(out.reshape(1, group.batch * group.length, *out.shape[2:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _mask(self, call: AttentionCall, group: Group, kv: LayerKV, like: Tensor) -> Tensor | None:
        key = (call.mask, call.implementation, kv.start, group)
        if key not in self._masks:
            self._masks[key] = call.mask.build(
                call.implementation,
                queries=group.length,
                q_offset=group.past,
                keys=int(kv.keys.shape[2]),
                k_offset=kv.start,
                like=like,
                config=self.program.config,
            )
        return self._masks[key]

    def suspend(self) -> None:
        """Drop what can be computed again (masks): a paused run holds its live set and cache only."""
        self._masks.clear()

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
        """The model's own output type: ``.logits [batch, kept, vocabulary]``, ``.past_key_values``."""
        self._usable()
        if not self.done:
            raise UsageError(
                "the run is not done",
                got=f"segment {self.cursor} of {len(self.program.segments)}",
                remedy="step() on",
            )
        packed = self.values[self.program.plan.output]
        if self.scatter is None:
            logits = packed.view(self.layout.batch, self.kept, packed.shape[-1])
        else:
            flat = packed.new_zeros(self.layout.batch * self.kept, packed.shape[-1])
            flat[self.scatter] = packed[0]
            logits = flat.view(self.layout.batch, self.kept, packed.shape[-1])
        cache = None
        if self.use_cache:
            layers = self.kv[0] if self.padding is None else pad_layers(self.kv, self.padding)
            cache = write_cache(self.program.config, layers)
        return self.program.output_type(logits=logits, past_key_values=cache)

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


def _unpack(packed: Tensor, group: Group) -> Tensor:
    """A group's part of ``[1, H, tokens, D]`` as ``[batch, H, length, D]``, without a copy."""
    part = packed if packed.shape[2] == group.stop - group.start else packed[:, :, group.start : group.stop]
    if group.batch == 1:
        return part
    heads, _, dim = part[0].shape
    return part[0].view(heads, group.batch, group.length, dim).transpose(0, 1)


def _storage_bytes(tensors: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

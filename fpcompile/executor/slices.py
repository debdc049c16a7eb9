"""A run executed in slices of its tokens: each slice continues the cache of the one before.

This is chunked prefill as a way to execute a run that was started whole. The result is that of the run: the
positions that its ``start`` asked for are collected from the slices, and the cache grows from slice to slice.
The numbers are those of a prompt that is continued piece by piece, which the model itself would give to
rounding. A model whose rotary frequencies follow the length of the call (longrope, dynamic) would give early
slices other ones than the whole prompt has: engines refuse it (``PackedProgram.follows_length``).

Words
    *slice*  a range of the run's packed row of tokens, executed as a run of its own. Of a batch, the
             sequences are sliced one behind the other.
    *chunk*  a slice of fixed size.

Invariants
    At most one slice of a run is under way. A slice in which no position was asked for computes the logits of
    its last one, and drops them: the graph has at least one row.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from fpcompile.errors import InternalError, UsageError
from fpcompile.executor.inputs import Group, Layout
from fpcompile.executor.kv import KV, LayerKV, kv_bytes
from fpcompile.executor.packed import PackedCall
from fpcompile.executor.run import Run
from fpcompile.executor.schedule import Shape

__all__ = ["Chunks", "Sliced"]


@final
class Sliced:
    """A run of a packed program that nobody has stepped, to be executed by :meth:`take` and :meth:`put`."""

    __slots__ = ("_keep", "_max_blocking_ms", "_order", "_sequences", "at", "caches", "call", "pieces", "run")

    def __init__(self, run: Run, max_blocking_ms: float | None = None) -> None:
        call = run.call
        if not isinstance(call, PackedCall) or run.at:
            raise InternalError("a run that cannot be sliced", got=repr(run))
        self.run, self.call = run, call
        self.at = 0
        """Tokens executed."""
        self._max_blocking_ms = max_blocking_ms
        kept = run.values["logits_to_keep"].tolist()
        self._order = sorted(range(len(kept)), key=kept.__getitem__)
        """Which of the kept rows, by position."""
        self._keep: list[int] = [kept[i] for i in self._order]
        """Positions whose logits are asked for, in order."""
        self.pieces: dict[int, Tensor] = {}
        """Logits of the slices so far, by the token that the slice begins with."""
        self._sequences = [
            (g.start + i * g.length, g.length, g.past) for g in call.layout.groups for i in range(g.batch)
        ]
        self.caches = self._begun()
        """The cache of each sequence."""

    def _begun(self) -> list[dict[int, KV]]:
        return [
            {layer: _part(kv, i) for layer, kv in layers.items()}
            for group, layers in zip(self.call.layout.groups, self.run.kv, strict=True)
            for i in range(group.batch)
        ]

    @property
    def contexts(self) -> list[int]:
        """For each sequence the tokens that its cache will hold."""
        return [past + length for _, length, past in self._sequences]

    def again(self) -> None:
        """Back to the beginning; what was computed is dropped."""
        self.at, self.pieces, self.caches = 0, {}, self._begun()

    @property
    def tokens(self) -> int:
        """New tokens of the whole run."""
        return self.run.tokens

    @property
    def rows(self) -> int:
        """Positions whose logits are asked for."""
        return self.run.rows

    @property
    def done(self) -> bool:
        """Whether every token was executed."""
        return self.at == self.tokens

    @property
    def live_bytes(self) -> int:
        """Bytes of the logits so far."""
        return sum(piece.nbytes for piece in list(self.pieces.values()))  # asked by any thread

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache so far."""
        return kv_bytes(self.caches)

    def shape(self, start: int, stop: int) -> Shape:
        """What a slice from ``start`` to ``stop`` computes."""
        groups = tuple((1, g.length, g.context) for g, _ in self._groups(start, stop))
        rows = self._rows(start, stop)
        return Shape(stop - start, max(1, len(rows)), groups)

    def take(self, tokens: int) -> Run:
        """The next ``tokens`` tokens as a run of which nothing is executed; :meth:`put` it when done."""
        start, stop = self.at, self.at + tokens
        if not 0 < tokens <= self.tokens - start:
            raise InternalError(
                "a slice beyond the run", expected=f"1 to {self.tokens - start}", got=str(tokens)
            )
        parts = self._groups(start, stop)
        rows = [self._keep[i] - start for i in self._rows(start, stop)] or [tokens - 1]
        values = {
            name: torch.tensor(rows, device=value.device)
            if name == "logits_to_keep"
            else value[:, start:stop]
            for name, value in self.run.values.items()
        }
        call = PackedCall(
            self.call.program,
            Layout(tuple(group for group, _ in parts), tokens),
            rows=len(rows),
            kept=len(rows),
            use_cache=stop < self.tokens or self.call.use_cache,
        )
        program = self.run.program
        kv = [dict(self.caches[i]) for _, i in parts]
        return Run(
            program, call, values, kv, program.tile_plan(call.shape, self._max_blocking_ms, warn=False)
        )

    def put(self, done: Run) -> None:
        """The slice that was taken is done."""
        start, stop = self.at, self.at + done.tokens
        if self._rows(start, stop):
            self.pieces[start] = done.values[done.program.plan.output]
        for (_, i), layers in zip(self._groups(start, stop), done.kv, strict=True):
            self.caches[i] = layers
        self.at = stop

    def result(self) -> Any:
        """What the run's own :meth:`Run.result` gives, once every token was executed."""
        if not self.done:
            raise UsageError(
                "the run is not done", got=f"{self.at} of {self.tokens} tokens", remedy="execute the rest"
            )
        run = self.run
        pieces = [piece for _, piece in sorted(self.pieces.items())]
        packed = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        self.pieces = {}
        if self._order != sorted(self._order):
            order = torch.tensor(self._order, device=packed.device)
            packed = torch.empty_like(packed).index_copy_(1, order, packed)
        run.values = {run.program.plan.output: packed}
        run.kv, begun = [], 0
        for group in self.call.layout.groups:
            run.kv.append(_joined(self.caches[begun : begun + group.batch]) if self.call.use_cache else {})
            begun += group.batch
        run.at = len(run.schedule)
        return run.result()

    def suspend(self) -> None:
        """Nothing is held that could be computed again."""

    def release(self) -> None:
        """Drop every tensor."""
        self.run.release()
        self.pieces = {}
        self.caches = [{} for _ in self.caches]

    def _groups(self, start: int, stop: int) -> list[tuple[Group, int]]:
        """The parts of sequences that lie between ``start`` and ``stop``, and of which sequence each is."""
        found = []
        for i, (begin, length, past) in enumerate(self._sequences):
            low, high = max(start, begin), min(stop, begin + length)
            if low < high:
                found.append((Group(low - start, 1, high - low, past + low - begin), i))
        return found

    def _rows(self, start: int, stop: int) -> range:
        """Which of the kept positions, in their order, lie between ``start`` and ``stop``."""
        return range(bisect_left(self._keep, start), bisect_left(self._keep, stop))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk as a hook sees it."""

    index: int
    name: str


@final
class Chunks:
    """A run that steps in chunks of ``size`` tokens: it can stop behind each of them, and nowhere else."""

    __slots__ = ("size", "sliced")

    def __init__(self, sliced: Sliced, size: int) -> None:
        self.sliced, self.size = sliced, size

    @property
    def tokens(self) -> int:
        """New tokens of the whole run."""
        return self.sliced.tokens

    @property
    def rows(self) -> int:
        """Positions whose logits are asked for."""
        return self.sliced.rows

    @property
    def done(self) -> bool:
        """Whether every chunk was executed."""
        return self.sliced.done

    @property
    def cursor(self) -> int:
        """Index of the next chunk."""
        return -(-self.sliced.at // self.size)

    @property
    def next_segment(self) -> _Chunk:
        """The next chunk."""
        start, stop = self.sliced.at, self._stop(self.sliced.at)
        return _Chunk(self.cursor, f"tokens {start} to {stop}")

    @property
    def live_bytes(self) -> int:
        """Bytes of the logits so far."""
        return self.sliced.live_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache so far."""
        return self.sliced.kv_bytes

    def step(self) -> None:
        """Execute the next chunk, all launches of it."""
        part = self.sliced.take(self._stop(self.sliced.at) - self.sliced.at)
        try:
            while not part.done:
                part.step()
        except BaseException:
            part.release()  # the slices before it are as they were: this one may be taken again
            raise
        self.sliced.put(part)

    def next_shape(self) -> Shape:
        """What the next chunk computes."""
        return self.sliced.shape(self.sliced.at, self._stop(self.sliced.at))

    def left(self) -> list[Shape]:
        """What each of the chunks that are left computes."""
        starts = range(self.sliced.at, self.tokens, self.size)
        return [self.sliced.shape(start, self._stop(start)) for start in starts]

    def result(self) -> Any:
        """The run's result."""
        return self.sliced.result()

    def suspend(self) -> None:
        """Nothing is held that could be computed again."""

    def release(self) -> None:
        """Drop every tensor."""
        self.sliced.release()

    def _stop(self, start: int) -> int:
        return min(start + self.size, self.tokens)


def _part(kv: KV, i: int) -> KV:
    """One sequence of a batch."""
    return LayerKV(kv.keys[i : i + 1], kv.values[i : i + 1], kv.start)


def _joined(sequences: list[dict[int, KV]]) -> dict[int, KV]:
    """Sequences of equal length as one batch."""
    if len(sequences) == 1:
        return sequences[0]
    return {
        layer: LayerKV(
            torch.cat([layers[layer].keys for layers in sequences]),
            torch.cat([layers[layer].values for layers in sequences]),
            kv.start,
        )
        for layer, kv in sequences[0].items()
    }

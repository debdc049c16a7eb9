"""Seconds and bits of tiles, measured as runs execute them: inside a long prefill, before the stage itself.

For each distinct stage of a run over made-up tokens some tiles are executed, and then the whole. Their times
are what tile plans are priced by (:mod:`fpcompile.executor.tile_costs`). Their rows are compared with the
whole's by bits: whether a kernel gives a row the same bits in smaller company depends on the machine, the
dtype and the sizes, so it is asked and told (``explain()``), not assumed.

Layers that are alike are left out, as in :mod:`fpcompile.executor.calibrate`.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from fpcompile.executor.calibrate import MOST_ROWS, find_jump, lower_median
from fpcompile.executor.cost_model import CostModel, Key, Samples
from fpcompile.executor.experts import named
from fpcompile.executor.schedule import KEY_BLOCK, MIN_ROWS, Launch, keys_given
from fpcompile.executor.stages import Stage
from fpcompile.executor.tile_costs import BLOCK, COLLECTED, COLUMNS, PART, RANGE, ROWS, WRITTEN, part_of
from fpcompile.ir import Segment
from fpcompile.models.ambient import plain

if TYPE_CHECKING:
    from fpcompile.executor.program import Program

SIZES = (64, 128, 256, 512, 1024)
"""Rows, and queries, of the tiles that are compared with the whole."""
_TIMED = (64, 256, 1024)  # queries of the blocks whose times are kept: the kernel walks them otherwise
FEW_ROWS = (1, 16, 64)
"""Rows of the ranges of columns: what a kernel does differs most between one row and several."""
_LENGTHS = (4096, 2048, 1024, 512, 256, 128)
_WORK = 6.0  # times the stages themselves: what their tiles take
_PLACES = (0.3, 0.6, 0.9)  # of a value: where tiles are taken
_REPEATS = 3
_BEYOND = 2  # times the longest prefill that was measured: what a longer one takes is not known well enough


@dataclasses.dataclass(frozen=True, slots=True)
class TileBits:
    """Which tiles of a prefill of ``tokens`` tokens gave the bits of the whole: for each stage's key what was
    tried, in words.
    """

    tokens: int
    compared: Mapping[Key, tuple[tuple[str, bool], ...]]

    def notes(self, stages: Sequence[Stage], segments: Sequence[Segment]) -> tuple[str, ...]:
        """What ``explain()`` says of tiles: a sentence for each kind of segment with some that differ."""
        found: list[str] = []
        for key, tried in self.compared.items():
            others = [what for what, same in tried if not same]
            names = [segments[s.segment].name for s in stages if s.key == key]
            if others and names:
                found.append(
                    f"tiles that round otherwise than the whole: {', '.join(others)} "
                    f"(tried {', '.join(what for what, _ in tried)} of {self.tokens} tokens): {named(names)}"
                )
        return tuple(found) or (
            f"tiles had the bits of the whole in all {len(self.compared)} kinds of segments that were tried "
            f"at {self.tokens} tokens",
        )

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"tokens": self.tokens, "compared": [[list(k), list(v)] for k, v in self.compared.items()]}

    @classmethod
    def read(cls, content: Any) -> TileBits:
        """From :meth:`plain`; raises what broken data raises."""
        compared = {
            tuple(map(str, key)): tuple((str(what), bool(same)) for what, same in tried)
            for key, tried in content["compared"]
        }
        return cls(int(content["tokens"]), compared)


def measure_tiles(program: Program, costs: CostModel, *, seconds: float) -> tuple[Samples, TileBits | None]:
    """Measure and compare the tiles of ``program`` at the longest length for which about ``seconds`` suffice.

    ``costs`` predicts the stages themselves. Nothing where nothing is tiled.
    """
    length = _length(program, costs, seconds)
    if not length:
        return {}, None
    probe = _Probe(program, length)
    run, jump, known = probe.run, find_jump(program), set[Key]()
    while not run.done:
        if jump is not None and run.at == jump[0]:
            _, run.at, names = jump
            run.values = {new: run.values[old] for new, old in names.items()}
        index = run.at
        stage = program.stages[index]
        if stage.over and not stage.bound and stage.key not in known:
            known.add(stage.key)
            probe.tiles(index, stage)
        run.step()
        probe.compare()
    run.release()
    samples = {
        key: tuple((n, lower_median(times)) for n, times in sorted(found.items()))
        for key, found in probe.seconds.items()
    }
    bits = {key: tuple(found.items()) for key, found in probe.bits.items()}
    return samples, TileBits(length, bits)


def _length(program: Program, costs: CostModel, seconds: float) -> int:
    stages = {s.key: i for i, s in enumerate(program.stages) if s.over}
    known = max(n for found in costs.samples.values() for n, _ in found)
    limit = min(program.max_tokens or _LENGTHS[0], max(_BEYOND * known, _LENGTHS[-1]))
    fitting = [n for n in _LENGTHS if n <= limit]
    if not stages or not fitting:
        return 0

    def work(length: int) -> float:
        size = {"tokens": length, "rows": min(length, MOST_ROWS), "context": length}
        return _WORK * sum(costs.stage(i, **size) for i in stages.values())

    return next((n for n in fitting if work(n) <= seconds), fitting[-1])


@final
class _Probe:
    """A run that is stepped stage by stage, and the tiles that were executed before each of them."""

    def __init__(self, program: Program, length: int) -> None:
        self.program = program
        self.run = program.sample(length, rows=min(length, MOST_ROWS))
        self.run.schedule = tuple(Launch(i, i + 1) for i in range(len(program.stages)))
        self.seconds: dict[Key, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.bits: dict[Key, dict[str, bool]] = defaultdict(dict)
        self._kept: list[tuple[Key, str, str, tuple[slice, ...], Tensor]] = []
        self._cuda = program.device.type == "cuda"

    def tiles(self, index: int, stage: Stage) -> None:
        """Execute tiles of the stage that comes next; the run is as before."""
        if stage.over == "attention":
            self._attention(index, stage)
        else:
            self._rows(index, stage)
            if stage.experts:
                self._experts(index, stage)
            if stage.columns:
                self._columns(index, stage)
        self.run.partial.clear()

    def compare(self) -> None:
        """Compare what tiles gave with the values that the run has now."""
        for key, what, name, at, tile in self._kept:
            same = _same_bits(self.run.values[name][at], tile)
            self.bits[key][what] = self.bits[key].get(what, True) and same
        self._kept.clear()

    def _execute(self, *launches: Launch) -> float:
        """Seconds of launches that are not in the run's schedule."""
        run = self.run
        schedule, at = run.schedule, run.at
        run.schedule, run.at = launches, 0
        self._synchronize()
        begun = time.perf_counter()
        while not run.done:
            run.step()
        self._synchronize()
        spent = time.perf_counter() - begun
        run.schedule, run.at = schedule, at
        return spent

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _keep(self, stage: Stage, what: str, start: int, stop: int, heads: slice | None = None) -> None:
        for name, axis in stage.outputs:
            over = (slice(None), slice(start, stop), heads or slice(None))
            at = over if stage.over == "attention" else (*[slice(None)] * axis, slice(start, stop))
            self._kept.append((stage.key, what, name, at, self.run.partial[name][at].clone()))

    def _rows(self, index: int, stage: Stage) -> None:
        total = self.run.tokens if stage.over == "tokens" else self.run.rows
        for size in (n for n in SIZES if 2 * n <= total):
            for place in _PLACES:
                start = int(place * (total - size)) // MIN_ROWS * MIN_ROWS
                self.run.partial.clear()  # memory is touched for the first time, as in a run
                spent = self._execute(Launch(index, index + 1, start, start + size, final=False))
                self.seconds[(*stage.key, ROWS)][size].append(spent)
                self._keep(stage, f"{size} rows", start, start + size)

    def _attention(self, index: int, stage: Stage) -> None:
        run, heads = self.run, self.program.heads()[index]
        total, before = run.tokens, [dict(layers) for layers in run.kv]

        def block(stop: int, size: int, last: int = heads.total) -> Launch:
            return Launch(index, index + 1, stop - size, stop, 0, 0, last, final=False)

        self._execute(block(MIN_ROWS, MIN_ROWS))  # whatever a process does once
        for _ in range(_REPEATS):
            run.partial.clear()  # keys and values are written anew
            run.kv = [dict(layers) for layers in before]
            first, again = (self._execute(block(MIN_ROWS, MIN_ROWS)) for _ in range(2))
            self.seconds[(*stage.key, WRITTEN)][total].append(max(first - again, 1e-7))
        for size in (n for n in SIZES if 2 * n <= total):
            stops = [n for n in (total // 4, total // 2, total) if n >= 2 * size]
            for stop in stops if len(stops) > 1 else [size, *stops]:
                for _ in range(_REPEATS if size in _TIMED else 1):
                    spent = self._execute(block(stop, size))
                    if size in _TIMED:
                        keys = min(total, keys_given(stop))
                        self.seconds[(*stage.key, BLOCK, str(size))][keys].append(spent)
                self._keep(stage, f"{size} queries", stop - size, stop)
            stop = total // 2 + size + MIN_ROWS if total // 2 > size + MIN_ROWS else total - MIN_ROWS
            self._execute(block(stop, size))  # where no block of keys ends
            self._keep(stage, f"{size} queries", stop - size, stop)
            if heads.total > heads.unit:
                self._execute(block(total, size, heads.unit))
                some = "one head" if heads.unit == 1 else f"{heads.unit} heads"
                self._keep(stage, f"{size} queries of {some}", total - size, total, slice(0, heads.unit))
        stop = total // 2 // KEY_BLOCK * KEY_BLOCK
        if heads.first and stop:
            self._execute(block(stop, stop, heads.first))
            self._keep(stage, f"{stop} queries in front", 0, stop, slice(0, heads.first))
        run.kv = before

    def _columns(self, index: int, stage: Stage) -> None:
        """Ranges of columns for few rows, compared with the model's own linear of as many.

        The rows lie as those of a run that has no others: which kernel torch takes depends on strides.
        """
        units, columns = stage.columns, stage.steps[0].columns
        assert columns is not None
        ((given, axis),), ((name, _),) = stage.inputs, stage.outputs
        every = self.run.values[given]

        def some(rows: int, first: int, last: int) -> Launch:
            return Launch(index, index + 1, 0, rows, 0, first, last, final=False)

        for rows in (n for n in FEW_ROWS if n <= self.run.rows):
            x = every.narrow(axis, 0, rows).clone(memory_format=torch.contiguous_format)
            self.run.values[given] = x
            for count in sorted({1, max(1, units // 4)}):
                for place in _PLACES:
                    self.run.partial.clear()
                    first = int(place * (units - count))
                    spent = self._execute(some(rows, first, first + count))
                    self.seconds[(*stage.key, COLUMNS, str(rows))][count].append(spent)
            self.run.partial.clear()
            whole = columns.room(x)
            with plain(self.run.program.device_type):
                dataclasses.replace(columns, packed=()).write(whole, x, 0, units)
            bounds = sorted({0, 1, units // 2, units})
            self._execute(*(some(rows, a, b) for a, b in itertools.pairwise(bounds)))
            same = _same_bits(whole, self.run.partial[name])
            self.bits[stage.key][f"ranges of columns of {rows} row{'s' * (rows > 1)}"] = same
        self.run.values[given] = every
        self.run.partial.clear()

    def _experts(self, index: int, stage: Stage) -> None:
        total, experts = self.run.tokens, stage.experts
        seconds, part, half = self.seconds, part_of(experts), experts // 2

        def some(tokens: int, first: int, last: int) -> Launch:
            return Launch(index, index + 1, 0, tokens, 0, first, last, final=False)

        for n in sorted({MIN_ROWS, total // 4, total}):
            for _ in range(2):
                self.run.partial.clear()
                seconds[(*stage.key, RANGE)][n].append(self._execute(some(n, 0, experts)))
                seconds[(*stage.key, COLLECTED)][n].append(self._execute(some(n, experts, experts)))
                self.run.partial.clear()
                seconds[(*stage.key, PART)][n].append(self._execute(some(n, 0, part)))
        self.run.partial.clear()
        bounds = ((0, half), (half, experts), (experts, experts))
        self._execute(*(some(total, a, b) for a, b in bounds))
        self._keep(stage, f"ranges of {half} experts", 0, total)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous().flatten(), b.contiguous().flatten()
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))

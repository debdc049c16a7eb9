"""Seconds of each stage, measured on the device and fitted.

Identical stages (same callables, same shapes) share one measurement. For n new tokens that see a context
of c, the model is ``a + b n + d n (2c - n)``: constant, token-wise and attention work (for a whole prefill
c = n, so the last term is d n²). Coefficients are non-negative and fitted to relative errors with numpy.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from fpcompile.executor.schedule import Launch

if TYPE_CHECKING:
    from fpcompile.executor.program import Program
    from fpcompile.executor.run import Run

LENGTHS = (16, 64, 128, 256, 512, 1024, 2048)
Key = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Coefficients:
    """``a`` seconds, ``b`` seconds per token, ``d`` seconds per (token x visible token)."""

    a: float
    b: float
    d: float

    def __add__(self, other: Coefficients) -> Coefficients:
        return Coefficients(self.a + other.a, self.b + other.b, self.d + other.d)

    def scaled(self, factor: float) -> Coefficients:
        """All three multiplied by ``factor``."""
        return Coefficients(self.a * factor, self.b * factor, self.d * factor)

    def seconds(self, tokens: int, context: float) -> float:
        """Predicted seconds."""
        return self.a + self.b * tokens + self.d * tokens * (2 * context - tokens)


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Predicted seconds of every stage of one program on one device.

    ``samples`` keeps what was measured: for each stage's key the pairs (tokens or rows, median seconds).
    """

    device: str
    coefficients: tuple[Coefficients, ...]
    segments: tuple[int, ...]
    by_rows: tuple[bool, ...]
    samples: dict[Key, tuple[tuple[int, float], ...]]

    def stage(self, index: int, *, tokens: int, rows: int, context: float) -> float:
        """Predicted seconds of stage ``index``: ``tokens`` tokens (or ``rows`` rows) that end ``context``."""
        if self.by_rows[index]:
            return self.coefficients[index].seconds(rows, rows)
        return self.coefficients[index].seconds(tokens, context)

    def segment(self, index: int, *, tokens: int, rows: int, context: float) -> float:
        """Predicted seconds of segment ``index``."""
        stages = range(bisect.bisect_left(self.segments, index), bisect.bisect_right(self.segments, index))
        return sum(self.stage(i, tokens=tokens, rows=rows, context=context) for i in stages)

    def remaining(self, *, tokens: int, rows: int, context: float, start: int = 0) -> float:
        """Predicted seconds of the segments from ``start`` on; its cost does not grow with their number."""
        over_tokens, over_rows = self._suffixes[bisect.bisect_left(self.segments, start)]
        return over_tokens.seconds(tokens, context) + over_rows.seconds(rows, rows)

    @functools.cached_property
    def _suffixes(self) -> list[tuple[Coefficients, Coefficients]]:
        """For each stage and the end, the summed coefficients from there on: of tokens, and of rows."""
        sums = [(Coefficients(0.0, 0.0, 0.0), Coefficients(0.0, 0.0, 0.0))]
        for coefficients, by_rows in zip(reversed(self.coefficients), reversed(self.by_rows), strict=True):
            tokens, rows = sums[-1]
            sums.append((tokens, rows + coefficients) if by_rows else (tokens + coefficients, rows))
        return sums[::-1]

    def rows(self) -> list[tuple[str, tuple[float, float, float]]]:
        """(number, coefficients) of every stage: what the scheduler's cost table is made from."""
        return [(str(i), (c.a, c.b, c.d)) for i, c in enumerate(self.coefficients)]


def calibrate(program: Program, *, lengths: tuple[int, ...] = LENGTHS, seconds: float = 3.0) -> CostModel:
    """Measure ``program`` at increasing lengths for about ``seconds`` and fit its cost model.

    Random token ids are used; the device should be otherwise idle. A stage that these runs did not execute
    (of another variant of a generic program) is given the mean of those that they did.
    """
    measured: dict[Key, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    limit = program.max_tokens or max(lengths)
    begun = time.perf_counter()
    spent = 0.0
    for length in sorted({min(n, limit) for n in lengths}):
        if spent * 3 > seconds - (time.perf_counter() - begun) and length > lengths[0]:
            break
        rounds = time.perf_counter()
        for repeat in range(3):
            run = program.sample(length, rows=length if repeat else 1)
            run.schedule = tuple(Launch(i, i + 1) for i in range(len(run.program.stages)))
            _measure(run, measured if repeat else None)
        spent = time.perf_counter() - rounds
    fitted = {key: _fit(samples) for key, samples in measured.items()}
    other = sum(fitted.values(), Coefficients(0.0, 0.0, 0.0)).scaled(1 / len(fitted))
    return CostModel(
        device=str(program.device),
        coefficients=tuple(fitted.get(s.key, other) for s in program.stages),
        segments=tuple(s.segment for s in program.stages),
        by_rows=tuple(s.over == "rows" for s in program.stages),
        samples={
            k: tuple((n, float(np.median(t))) for n, t in sorted(v.items())) for k, v in measured.items()
        },
    )


def _measure(run: Run, into: dict[Key, dict[int, list[float]]] | None) -> None:
    """Step ``run`` to its end; record each stage's seconds unless this is the warm-up."""
    synchronize = torch.cuda.synchronize if run.program.device.type == "cuda" else _nothing
    while not run.done:
        stage = run.program.stages[run.next_stage]
        synchronize()
        start = time.perf_counter()
        run.step()
        synchronize()
        if into is not None:
            size = run.rows if stage.over == "rows" else run.tokens
            into[stage.key][size].append(time.perf_counter() - start)
    run.release()


def _nothing() -> None:
    return None


def _fit(samples: dict[int, list[float]]) -> Coefficients:
    """Non-negative least squares of the relative error over the medians, by dropping negative terms."""
    n = np.array(sorted(samples), dtype=float)
    y = np.array([np.median(samples[int(k)]) for k in n])
    basis = np.stack([np.ones_like(n), n, n * n], axis=1) / y[:, None]
    active = list(range(min(3, len(n))))
    while True:
        solution, *_ = np.linalg.lstsq(basis[:, active], np.ones_like(y), rcond=None)
        if (solution >= 0).all():
            break
        active.pop(int(np.argmin(solution)))
    full = np.zeros(3)
    full[active] = solution
    return Coefficients(*(float(v) for v in full))

"""Seconds of each segment, measured on the device and fitted.

Identical segments (same callables, same shapes) share one measurement. For n new tokens that see a context
of c, the model is ``a + b n + d n (2c - n)``: constant, token-wise and attention work (for a whole prefill
c = n, so the last term is d n²). Coefficients are non-negative and fitted to relative errors with numpy.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from fpcompile.ir import ROWS, Segment

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

    def seconds(self, tokens: int, context: int) -> float:
        """Predicted seconds."""
        return self.a + self.b * tokens + self.d * tokens * (2 * context - tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class CostModel:
    """Predicted seconds of every segment of one program on one device.

    ``samples`` keeps what was measured: for each segment key the pairs (tokens or rows, median seconds).
    """

    device: str
    coefficients: tuple[Coefficients, ...]
    by_rows: tuple[bool, ...]
    samples: dict[Key, tuple[tuple[int, float], ...]]

    def segment(self, index: int, *, tokens: int, rows: int = 1, context: int | None = None) -> float:
        """Predicted seconds of segment ``index``."""
        if self.by_rows[index]:
            return self.coefficients[index].seconds(rows, rows)
        return self.coefficients[index].seconds(tokens, tokens if context is None else context)

    def remaining(self, *, tokens: int, rows: int = 1, context: int | None = None, start: int = 0) -> float:
        """Predicted seconds of the segments from ``start`` on."""
        return sum(
            self.segment(i, tokens=tokens, rows=rows, context=context)
            for i in range(start, len(self.coefficients))
        )

    def rows(self) -> list[tuple[str, tuple[float, float, float]]]:
        """(segment number, coefficients) of every segment: what the scheduler's cost table is made from."""
        return [(str(i), (c.a, c.b, c.d)) for i, c in enumerate(self.coefficients)]


def segment_key(segment: Segment) -> Key:
    """What decides a segment's time at given lengths: its callables."""
    return tuple(p.function for p in segment.parts)


def is_by_rows(segment: Segment) -> bool:
    """Whether a segment's work depends on the kept rows only (the LM head)."""
    return ROWS in segment.cost.flops.free_symbols and len(segment.cost.flops.free_symbols) == 1


def calibrate(program: Program, *, lengths: tuple[int, ...] = LENGTHS, seconds: float = 3.0) -> CostModel:
    """Measure ``program`` at increasing lengths for about ``seconds`` and fit its cost model.

    Random token ids are used; the device should be otherwise idle.
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
            run = program.start(
                _random_ids(program, length), logits_to_keep=length if repeat else 1, use_cache=False
            )
            _measure(run, measured if repeat else None)
        spent = time.perf_counter() - rounds
    fitted = {key: _fit(samples) for key, samples in measured.items()}
    return CostModel(
        device=str(program.device),
        coefficients=tuple(fitted[segment_key(s)] for s in program.segments),
        by_rows=tuple(is_by_rows(s) for s in program.segments),
        samples={
            k: tuple((n, float(np.median(t))) for n, t in sorted(v.items())) for k, v in measured.items()
        },
    )


def _random_ids(program: Program, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(program.vocabulary, (1, length), generator=generator)


def _measure(run: Run, into: dict[Key, dict[int, list[float]]] | None) -> None:
    """Step ``run`` to its end; record each segment's seconds unless this is the warm-up."""
    synchronize = torch.cuda.synchronize if run.program.device.type == "cuda" else _nothing
    while not run.done:
        segment = run.next_segment
        synchronize()
        start = time.perf_counter()
        run.step()
        synchronize()
        if into is not None:
            into[segment_key(segment)][run.rows if is_by_rows(segment) else run.tokens].append(
                time.perf_counter() - start
            )
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

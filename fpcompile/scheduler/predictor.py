"""Time to first token, predicted from costs and corrected by what was measured.

``CostPredictor`` multiplies the cost table by a correction per octave of lengths: the exponentially weighted
mean of measured / predicted, drawn towards the correction over all lengths while the octave has few
measurements. Lengths beyond any measurement use the overall correction: there is no table limit.

Invariants
    ``predict`` is positive, monotone in tokens within one octave, and equals the cost table before the first
    ``correct``. ``error`` is of predictions made before each correction: it is honest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.costs import CostTable

__all__ = ["CostPredictor", "PredictionError", "TtftPredictor"]


class TtftPredictor(Protocol):
    """Predicts device seconds of prefills."""

    def predict(self, tokens: int, context: int = 0) -> float:
        """Device seconds of a prefill of ``tokens`` new tokens after ``context`` cached ones."""

    def predict_pack(self, lengths: Iterable[int]) -> float:
        """Device seconds of one launch of several whole prompts of these lengths."""

    def correct(self, tokens: int, measured: float) -> None:
        """A whole prefill of ``tokens`` took ``measured`` device seconds."""


@dataclass(frozen=True, slots=True)
class PredictionError:
    """Relative errors of the predictions so far: ``(predicted - measured) / measured``."""

    count: int
    mean: float
    mean_absolute: float
    worst: float


@dataclass(slots=True)
class _Ratio:
    value: float = 1.0
    count: int = 0

    def update(self, ratio: float, weight: float) -> None:
        self.count += 1
        self.value += (ratio - self.value) * max(weight, 1.0 / self.count)


class CostPredictor:
    """A :class:`TtftPredictor` over a cost table.

    ``weight`` is that of the newest measurement (the first few count equally); ``shrink`` the number of
    measurements at which an octave's own correction counts as much as the overall one.
    """

    def __init__(self, table: CostTable, *, weight: float = 0.1, shrink: float = 4.0) -> None:
        if not 0 < weight <= 1:
            raise InvalidInputError("predictor weight", expected="in (0, 1]", got=repr(weight))
        self.table = table
        self._weight, self._shrink = weight, shrink
        self._overall = _Ratio()
        self._octaves: dict[int, _Ratio] = {}
        self._errors = [0, 0.0, 0.0, 0.0]

    def _factor(self, tokens: int) -> float:
        octave = self._octaves.get(tokens.bit_length())
        if octave is None:
            return self._overall.value
        trust = octave.count / (octave.count + self._shrink)
        return trust * octave.value + (1 - trust) * self._overall.value

    def predict(self, tokens: int, context: int = 0) -> float:
        return self._factor(tokens) * self.table.seconds(tokens, context)

    def predict_pack(self, lengths: Iterable[int]) -> float:
        slices = [(tokens, 0) for tokens in lengths]
        return self._factor(sum(tokens for tokens, _ in slices)) * self.table.pack_seconds(slices)

    def correct(self, tokens: int, measured: float) -> None:
        if tokens < 1 or not measured > 0 or not isfinite(measured):
            raise InvalidInputError(
                "a correction needs a real measurement",
                expected="tokens >= 1 and finite seconds > 0",
                got=f"tokens={tokens}, measured={measured}",
            )
        error = (self.predict(tokens) - measured) / measured
        count, total, absolute, worst = self._errors
        self._errors = [count + 1, total + error, absolute + abs(error), max(worst, abs(error))]
        ratio = measured / self.table.seconds(tokens)
        self._overall.update(ratio, self._weight)
        self._octaves.setdefault(tokens.bit_length(), _Ratio()).update(ratio, self._weight)

    @property
    def error(self) -> PredictionError:
        """How good the predictions were, each judged before it was corrected."""
        count, total, absolute, worst = self._errors
        n = max(int(count), 1)
        return PredictionError(int(count), total / n, absolute / n, worst)

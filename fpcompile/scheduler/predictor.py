"""Time to first token, predicted from costs and corrected by what was measured.

A :class:`Correction` is a factor per octave of lengths: the exponentially weighted mean of measured /
predicted, drawn towards the correction over all lengths while the octave has few measurements. Lengths beyond
any measurement use the overall correction: there is no table limit. ``CostPredictor`` multiplies a cost table
by it; the engine multiplies the program's own predictions, which know rows and cached tokens as well.

Invariants
    ``predict`` is positive, monotone in tokens within one octave, and equals the cost table before the first
    ``correct``. ``error`` is of predictions made before each correction: it is honest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Protocol

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.costs import CostTable

__all__ = ["Correction", "CostPredictor", "PredictionError", "TtftPredictor", "overall_error"]


_STEP = 3.0


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

    def update(self, ratio: float, weight: float, prior: int) -> None:
        """Move towards ``ratio``; by one stalled measurement no further than towards thrice the value."""
        self.count += 1
        ratio = min(max(ratio, self.value / _STEP), self.value * _STEP)
        self.value += (ratio - self.value) * max(weight, 1.0 / (self.count + prior))


class Correction:
    """What measurements say about predicted seconds.

    ``weight`` is that of the newest measurement (the first few count equally); ``shrink`` the number of
    measurements at which an octave's own correction counts as much as the overall one; ``prior`` how many
    measurements the uncorrected prediction counts as.
    """

    def __init__(self, *, weight: float = 0.1, shrink: float = 4.0, prior: int = 0) -> None:
        if not 0 < weight <= 1:
            raise InvalidInputError("predictor weight", expected="in (0, 1]", got=repr(weight))
        self._weight, self._shrink, self._prior = weight, shrink, prior
        self._overall = _Ratio()
        self._octaves: dict[int, _Ratio] = {}
        self._errors = [0, 0.0, 0.0, 0.0]

    def factor(self, tokens: int) -> float:
        """What to multiply a prediction for ``tokens`` tokens by."""
        octave = self._octaves.get(tokens.bit_length())
        if octave is None:
            return self._overall.value
        trust = octave.count / (octave.count + self._shrink)
        return trust * octave.value + (1 - trust) * self._overall.value

    def learn(self, tokens: int, predicted: float, measured: float) -> None:
        """``tokens`` tokens took ``measured`` seconds; ``predicted`` without any correction."""
        if tokens < 1 or not 0 < measured < inf or not 0 < predicted < inf:
            raise InvalidInputError(
                "a correction needs a real measurement",
                expected="tokens >= 1 and finite seconds > 0",
                got=f"tokens={tokens}, predicted={predicted}, measured={measured}",
            )
        error = (self.factor(tokens) * predicted - measured) / measured
        count, total, absolute, worst = self._errors
        self._errors = [count + 1, total + error, absolute + abs(error), max(worst, abs(error))]
        ratio = measured / predicted
        self._overall.update(ratio, self._weight, self._prior)
        octave = self._octaves.setdefault(tokens.bit_length(), _Ratio())
        octave.update(ratio, self._weight, self._prior)

    @property
    def error(self) -> PredictionError:
        """How good the predictions were, each judged before it was corrected."""
        return overall_error([self])


def overall_error(corrections: Iterable[Correction]) -> PredictionError:
    """The error of all the predictions that these have corrected."""
    rows = [tuple(one._errors) for one in corrections]
    count = int(sum(row[0] for row in rows))
    n = max(count, 1)
    worst = max((row[3] for row in rows), default=0.0)
    return PredictionError(count, sum(row[1] for row in rows) / n, sum(row[2] for row in rows) / n, worst)


class CostPredictor:
    """A :class:`TtftPredictor` over a cost table; ``correction``: one to share, else its own."""

    def __init__(
        self,
        table: CostTable,
        *,
        weight: float = 0.1,
        shrink: float = 4.0,
        correction: Correction | None = None,
    ) -> None:
        self.table = table
        self.correction = correction or Correction(weight=weight, shrink=shrink)

    def predict(self, tokens: int, context: int = 0) -> float:
        return self.correction.factor(tokens) * self.table.seconds(tokens, context)

    def predict_pack(self, lengths: Iterable[int]) -> float:
        slices = [(tokens, 0) for tokens in lengths]
        return self.correction.factor(sum(tokens for tokens, _ in slices)) * self.table.pack_seconds(slices)

    def correct(self, tokens: int, measured: float) -> None:
        self.correction.learn(tokens, self.table.seconds(max(tokens, 1)), measured)

    @property
    def error(self) -> PredictionError:
        """How good the predictions were, each judged before it was corrected."""
        return self.correction.error

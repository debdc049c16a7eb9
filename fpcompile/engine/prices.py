"""Predicted seconds: of the next launch, which bounds the run-ahead of an asynchronous device, and of runs.

A compiled run follows its tile plan: its launches are priced one by one. Any other run is priced by segment.
:class:`Prices` corrects the programs' predictions by what completed runs took; only the scheduler hears the
corrected ones. Tile plans, and so the bits, depend on the programs' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fpcompile.engine.programs import ProgramLike, RunLike
from fpcompile.executor.run import Run
from fpcompile.executor.schedule import launch_seconds
from fpcompile.scheduler.predictor import Correction, PredictionError, overall_error

__all__ = ["Prices", "context_of", "next_cost"]


def context_of(run: RunLike) -> float:
    """The context to predict a run with, in tokens; see :attr:`Shape.mean_context`."""
    return run.call.shape.mean_context if isinstance(run, Run) else run.tokens


def next_cost(program: ProgramLike, run: RunLike) -> Callable[[], float]:
    """A cheap function for the predicted seconds of the launch that ``run.step`` would make now."""
    if isinstance(run, Run):
        compiled, owner = run, run.program
        shape, costs, heads = run.call.shape, owner.costs, owner.kv_heads()
        by_launch = tuple(launch_seconds(n, owner.stages, shape, costs, heads) for n in run.schedule)
        return lambda: by_launch[compiled.at]
    context = context_of(run)
    by_segment = tuple(
        program.segment_seconds(index, tokens=run.tokens, rows=run.rows, context=context)
        for index in range(len(program.segments))
    )
    return lambda: by_segment[run.cursor]


class Prices:
    """What has been learnt about each program's predictions. Written by the driver, read by anybody."""

    def __init__(self, programs: Iterable[str]) -> None:
        self._of = {name: Correction(prior=1) for name in programs}

    def correction(self, program: str) -> Correction:
        """That of one program, by name."""
        return self._of[program]

    def corrected(self, program: str, tokens: int, predicted: float) -> float:
        """Seconds that a run of ``tokens`` tokens will take, if the program predicts ``predicted``."""
        return predicted * self._of[program].factor(tokens)

    def learn(self, program: str, tokens: int, predicted: float, measured: float) -> None:
        """A whole run took ``measured`` device seconds. Clocks that stand still teach nothing."""
        if predicted > 0 and measured > 0:
            self._of[program].learn(tokens, predicted, measured)

    @property
    def error(self) -> PredictionError:
        """Of the predictions of all programs."""
        return overall_error(self._of.values())

"""Predicted seconds: of the next launch, which bounds the run-ahead of an asynchronous device, and of runs.

A compiled run follows its tile plan: its launches are priced one by one. Any other run is priced by segment.
:class:`Prices` corrects the programs' predictions by what completed runs took; only the scheduler hears the
corrected ones. Tile plans, and so the bits, depend on the programs' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

from fpcompile.engine.programs import ProgramLike, RunLike
from fpcompile.executor.loop import Named
from fpcompile.executor.run import Run
from fpcompile.executor.schedule import Shape, launch_seconds
from fpcompile.executor.slices import Chunks
from fpcompile.executor.together import Together
from fpcompile.scheduler.predictor import Correction, PredictionError, overall_error

__all__ = [
    "PackPredictor",
    "Prices",
    "context_of",
    "launch_of",
    "next_cost",
    "seconds_behind",
    "seconds_left",
    "seconds_whole",
]


def context_of(run: RunLike) -> float:
    """The context to predict a run with, in tokens; see :attr:`Shape.mean_context`."""
    if isinstance(run, Together):
        return run.joined.call.shape.mean_context
    return run.call.shape.mean_context if isinstance(run, Run) else run.tokens


def seconds_left(program: ProgramLike, run: RunLike, context: float | None = None) -> float:
    """Predicted seconds until ``run`` is done; ``context`` is :func:`context_of` it, if that is known."""
    if isinstance(run, Chunks):
        return sum(_seconds(program, shape) for shape in run.left())
    if context is None:
        context = context_of(run)
    return max(program.predict(tokens=run.tokens, rows=run.rows, context=context, start=run.cursor), 0.0)


def seconds_whole(program: ProgramLike, run: RunLike) -> float:
    """Predicted seconds of a run from its beginning, wherever it is now."""
    return max(program.predict(tokens=run.tokens, rows=run.rows, context=context_of(run)), 0.0)


def _seconds(program: ProgramLike, shape: Shape) -> float:
    return max(program.predict(tokens=shape.tokens, rows=shape.rows, context=shape.mean_context), 0.0)


def seconds_behind(program: ProgramLike, run: Run, cached: int) -> float:
    """Predicted seconds of a prompt of which ``cached`` tokens need not be executed."""
    return _seconds(program, Shape(run.tokens - cached, run.rows, ((1, run.tokens - cached, run.context),)))


def next_cost(program: ProgramLike, run: RunLike) -> Callable[[], float]:
    """A cheap function for the predicted seconds of the launch that ``run.step`` would make now."""
    if isinstance(run, Run):
        compiled, owner = run, run.program
        shape, costs, heads = run.call.shape, owner.costs, owner.heads()
        by_launch = tuple(launch_seconds(n, owner.stages, shape, costs, heads) for n in run.schedule)
        return lambda: by_launch[compiled.at]
    if isinstance(run, Chunks):
        chunks = run
        return lambda: _seconds(program, chunks.next_shape())
    if isinstance(run, Together):
        return _once_joined(program, run)
    context = context_of(run)
    by_segment = tuple(
        program.segment_seconds(index, tokens=run.tokens, rows=run.rows, context=context)
        for index in range(len(program.segments))
    )
    return lambda: by_segment[run.cursor]


def launch_of(program: ProgramLike, run: RunLike, *, behind: int = 0) -> tuple[str, float]:
    """Segment and predicted seconds of the launch that ``run`` makes next, or of the one ``behind`` it."""
    if isinstance(run, Together):
        if not run.made:
            return "joining", 0.0
        run = run.joined
    if isinstance(run, Run):
        owner, at = run.program, max(min(run.at, len(run.schedule) - 1 + behind) - behind, 0)
        launch = run.schedule[at]
        segment: Named = owner.segments[owner.stages[launch.first].segment]
        shape = run.call.shape
        return segment.name, launch_seconds(launch, owner.stages, shape, owner.costs, owner.heads())
    if isinstance(run, Chunks):
        return run.next_segment.name, _seconds(program, run.next_shape())
    index = max(min(run.cursor, len(program.segments) - 1 + behind) - behind, 0)
    seconds = program.segment_seconds(index, tokens=run.tokens, rows=run.rows, context=context_of(run))
    return program.segments[index].name, seconds


def _once_joined(program: ProgramLike, run: Together) -> Callable[[], float]:
    """Joining launches work: it waits until the run is executed."""
    made: list[Callable[[], float]] = []

    def cost() -> float:
        if not made:
            made.append(next_cost(program, run.joined))
        return made[0]()

    return cost


class PackPredictor:
    """What a core that packs asks: seconds of whole prompts alone and together, corrected."""

    def __init__(self, program: ProgramLike, correction: Correction) -> None:
        self._program, self._correction = program, correction

    def predict(self, tokens: int, context: int = 0) -> float:
        """Of ``tokens`` new tokens behind ``context`` cached ones."""
        return self._of(Shape(tokens, 1, ((1, tokens, context + tokens),)))

    def predict_pack(self, lengths: Iterable[int]) -> float:
        """Of several whole prompts, one row of logits for each."""
        groups = tuple((1, length, length) for length in lengths)
        return self._of(Shape(sum(length for _, length, _ in groups), len(groups), groups))

    def correct(self, tokens: int, measured: float) -> None:
        """A prompt took so long."""
        predicted = _seconds(self._program, Shape(tokens, 1, ((1, tokens, tokens),)))
        self._correction.learn(tokens, predicted, measured)

    def _of(self, shape: Shape) -> float:
        return self._correction.factor(shape.tokens) * _seconds(self._program, shape)


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
        if 0 < predicted < inf and 0 < measured < inf:
            self._of[program].learn(tokens, predicted, measured)

    @property
    def error(self) -> PredictionError:
        """Of the predictions of all programs."""
        return overall_error(self._of.values())

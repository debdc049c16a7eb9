"""What the next launch of a run is predicted to cost: what bounds the run-ahead of an asynchronous device.

A compiled run follows its tile plan: its launches are priced one by one. Any other run is priced by segment.
"""

from __future__ import annotations

from collections.abc import Callable

from fpcompile.engine.programs import ProgramLike, RunLike
from fpcompile.executor.run import Run
from fpcompile.executor.schedule import launch_seconds

__all__ = ["context_of", "next_cost"]


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

"""What the next launch of a run is predicted to cost: what bounds the run-ahead of an asynchronous device.

A compiled run follows its tile plan: its launches are priced one by one. Any other run is priced by segment.
"""

from __future__ import annotations

from collections.abc import Callable

from fpcompile.engine.programs import ProgramLike, RunLike
from fpcompile.executor.run import Run
from fpcompile.executor.schedule import Launch

__all__ = ["context_of", "next_cost"]


def context_of(run: RunLike) -> int:
    """Tokens that the last new token looks back to, cached ones included."""
    return run.call.context if isinstance(run, Run) else run.tokens


def next_cost(program: ProgramLike, run: RunLike) -> Callable[[], float]:
    """A cheap function for the predicted seconds of the launch that ``run.step`` would make now."""
    if isinstance(run, Run):
        compiled = run
        by_launch = tuple(_launch_seconds(run, launch) for launch in run.schedule)
        return lambda: by_launch[compiled.at]
    context = context_of(run)
    by_segment = tuple(
        program.segment_seconds(index, tokens=run.tokens, rows=run.rows, context=context)
        for index in range(len(program.segments))
    )
    return lambda: by_segment[run.cursor]


def _launch_seconds(run: Run, launch: Launch) -> float:
    costs, shape, index = run.program.costs, run.call.shape, launch.first
    if not launch.tiled:
        context = run.call.context
        return sum(
            costs.stage(i, tokens=shape.tokens, rows=shape.rows, context=context)
            for i in range(launch.first, launch.last)
        )
    size = launch.stop - launch.start
    if run.program.stages[index].over != "attention":
        return costs.stage(index, tokens=size, rows=size, context=size)
    batch, length, context = shape.groups[launch.group]
    heads = run.program.kv_heads()[index]
    share = (launch.head_stop - launch.head_start) / heads if heads else 1.0
    visible = context - length + launch.stop
    return share * batch * costs.stage(index, tokens=size, rows=1, context=visible)

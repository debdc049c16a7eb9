"""How an engine executes the runs of its policy: whole, in chunks, packed with others, or in shared steps.

| policy | a request's run | a launch |
|---|---|---|
| any other | as started | that run, until it is done or stopped at a cut |
| ``chunked:N`` | chunks of N tokens | the same; it stops behind chunks only |
| packs requests | as started | several new ones joined, with one tile plan, stopped at any cut |
| ``vllm:N,T`` | slices | one slice of each member, joined; to its end |

Only programs of the packed route can execute slices and packs, since there attention is told where each
sequence begins; and what is joined must be of one program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fpcompile.engine.programs import Programs, RunLike
from fpcompile.errors import InvalidInputError
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.run import Run
from fpcompile.executor.slices import Chunks, Sliced
from fpcompile.scheduler.policy import Policy, StepPolicy

__all__ = ["Shape", "shape_of", "whole"]

Shape = Callable[[RunLike, float | None], Any]
"""(a run as started, its own budget in milliseconds) -> what the engine keeps of it."""


def whole(run: RunLike, budget: float | None) -> Any:
    """As it was started."""
    return run


_WHOLE = "a policy that runs one whole request at a time, such as 'fpcompile', 's-edf' or 'fcfs'"


def shape_of(policy: Policy, packs: bool, programs: Programs) -> Shape:
    """How runs are kept under ``policy``; ``packs``: whether requests are packed.

    Raises :class:`InvalidInputError` when one of the programs cannot be executed so.
    """
    steps = isinstance(policy, StepPolicy)
    chunks = policy.grain.unit == "tokens" and not steps
    if not (steps or chunks or packs):
        return whole
    does = "packs requests" if packs else "slices prompts"
    if packs and (steps or chunks):
        raise InvalidInputError(
            f"policy {policy.name!r} slices prompts, and its options ask to pack whole ones",
            expected="one of both",
            got="pack > 0",
            remedy="leave out pack=, or use a policy that runs whole prompts",
        )
    for name in programs.names:
        program = programs[name]
        if (steps or chunks) and isinstance(program, PackedProgram) and program.follows_length:
            raise InvalidInputError(
                f"policy {policy.name!r} slices prompts, which program {name!r} cannot execute",
                expected="a model whose rotary frequencies are the same at every length",
                got="one whose frequencies follow the length of the prompt (dynamic, longrope)",
                remedy=f"use {_WHOLE}",
            )
        if not isinstance(program, PackedProgram):
            raise InvalidInputError(
                f"policy {policy.name!r} {does}, which program {name!r} cannot execute",
                expected="a program of the packed route",
                got=type(programs[name]).__name__,
                remedy=f"use {_WHOLE}, or fpcompile.segment(model, route='packed')",
            )
    if not chunks and len({id(programs[name]) for name in programs.names}) > 1:
        raise InvalidInputError(
            f"policy {policy.name!r} {does}, and requests of several programs cannot share a launch",
            expected="one program",
            got=", ".join(programs.names),
            remedy=f"use {_WHOLE}, or an engine for each program",
        )
    size = policy.grain.size

    def shape(run: RunLike, budget: float | None) -> Any:
        if not (steps or chunks):
            return run
        assert isinstance(run, Run)
        sliced = Sliced(run, budget)
        return sliced if steps else Chunks(sliced, size)

    return shape

"""The demonstration: urgent requests overtake a long prefill, and every result has the model's own bits.

Steps
    1. The unmodified model computes every request alone: the bits to compare with, and the long one's time.
    2. ``fcfs``, then the chosen policy: the long prompt is submitted, the urgent ones arrive during it, open
       loop, at fixed fractions (:data:`ARRIVALS`) of the measured time, whatever the engine does meanwhile.
    3. Model and program in turns, uninterrupted: what being segmented costs when nobody is urgent.

Invariants
    Nothing in the result is assumed: every time is measured and every bit is compared, in this process.
    Both policies get the same prompts, SLOs and arrival times.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fpcompile.api import segment
from fpcompile.cli.bits import compare_outputs
from fpcompile.cli.demo_values import DemoOptions, DemoResult, Outcome, PolicyRun, Prompt
from fpcompile.cli.interleave import Spread, interleave, ratio
from fpcompile.cli.load import describe, forward_arguments, load_model, random_ids
from fpcompile.engine.engine import Engine
from fpcompile.errors import InvalidInputError
from fpcompile.executor.device import make_device
from fpcompile.scheduler import make_policy

if TYPE_CHECKING:
    from fpcompile.executor.program import Program

__all__ = ["ARRIVALS", "Stages", "check_output", "run_demo", "urgent_slo"]

ARRIVALS = (0.10, 0.27, 0.33, 0.56, 0.80)
"""Arrivals of the urgent prompts, as parts of the long prefill's time; two of them close together."""

_URGENT_SHARE, _URGENT_TIMES, _LONG_TIMES = 0.1, 5.0, 3.0
_COMPARED_TOKENS, _COMPARED_ROUNDS, _COMPARED_SECONDS = 512, 9, 12.0


Asked = Mapping[str, Any]
"""What every call is asked for, besides its ids: see :func:`fpcompile.cli.load.forward_arguments`."""


class Stages(Protocol):
    """Where progress is shown: ``with stages("compile", 3) as advance: ... advance()``."""

    def __call__(self, title: str, steps: int) -> contextlib.AbstractContextManager[Callable[[], object]]:
        """Open a stage of ``steps`` steps."""


def run_demo(options: DemoOptions, stages: Stages) -> DemoResult:
    """Everything but the printing. Raises typed errors before anything slow where that is possible."""
    _check(options)
    device = make_device(options.device).torch_device
    with stages("load model", 1) as advance:
        model = load_model(options.model, device=device)
        advance()
    with stages("compile", 2) as advance:
        start = time.perf_counter()
        program = segment(model, granularity=options.granularity, max_blocking_ms=options.max_blocking_ms)
        seconds = time.perf_counter() - start
        advance()
        asked = forward_arguments(model)
        program.start(random_ids(model, options.long_tokens, seed=0), **asked)  # refuses a wrong length
        program.calibrate()
        Engine(program, policy=options.policy).close()  # refuses a policy that an engine cannot execute
        advance()
    with torch.no_grad():
        prompts = _prompts(model, asked, options, stages)
        runs = [
            _serve(program, asked, policy, prompts, stages)
            for policy in dict.fromkeys(("fcfs", options.policy))
        ]
        tokens = min(_COMPARED_TOKENS, options.long_tokens)
        versus, control = _versus(model, program, asked, tokens, stages)
    return DemoResult(
        title=describe(model, options.model),
        segments=len(program.segments),
        compile_seconds=seconds,
        prompts=prompts,
        runs=tuple(runs),
        versus=versus,
        control=control,
        versus_tokens=tokens,
    )


def _check(options: DemoOptions) -> None:
    make_policy(options.policy)
    slo = options.urgent_slo
    if slo is not None and not 0 < slo < math.inf:
        raise InvalidInputError("the SLO of urgent requests is wrong", expected="seconds > 0", got=repr(slo))


def urgent_slo(long_alone: float, urgent_alone: float) -> float:
    """The SLO of urgent requests in seconds, when none is given.

    A tenth of the long prefill's time, but never under five times what the urgent prompt takes alone.
    """
    return _rounded(max(_URGENT_SHARE * long_alone, _URGENT_TIMES * urgent_alone))


def _rounded(seconds: float) -> float:
    """Two significant digits: an SLO is a promise that somebody states."""
    return float(f"{seconds:.2g}")


def _prompts(model: Any, asked: Asked, options: DemoOptions, stages: Stages) -> tuple[Prompt, ...]:
    """All requests with the unmodified model's outputs; the long one first."""
    sizes = [options.long_tokens, *[options.urgent_tokens] * len(ARRIVALS)]
    ids = [random_ids(model, size, seed=seed) for seed, size in enumerate(sizes)]
    expected, alone = [], []
    with stages("unmodified model", len(ids) + 1) as advance:
        model(input_ids=ids[-1], **asked)  # warm up
        advance()
        for one in ids:
            _synchronize(model.device)
            start = time.perf_counter()
            expected.append(model(input_ids=one, **asked))
            _synchronize(model.device)
            alone.append(time.perf_counter() - start)
            advance()
    slo = urgent_slo(alone[0], min(alone[1:])) if options.urgent_slo is None else options.urgent_slo
    slos = [_rounded(_LONG_TIMES * alone[0]), *[slo] * len(ARRIVALS)]
    offsets = [0.0, *(part * alone[0] for part in ARRIVALS)]
    return tuple(
        Prompt(f"urgent {i}" if i else "long", ids[i], offsets[i], slos[i], alone[i], e)
        for i, e in enumerate(expected)
    )


def _serve(
    program: Program, asked: Asked, policy: str, prompts: tuple[Prompt, ...], stages: Stages
) -> PolicyRun:
    """Submit every prompt at its offset, open loop, and wait for all of them."""
    with stages(f"serve: {policy}", len(prompts)) as advance, Engine(program, policy=policy) as engine:
        handles = []
        begun = time.perf_counter()
        for prompt in prompts:
            time.sleep(max(0.0, begun + prompt.offset - time.perf_counter()))
            handle = engine.submit(input_ids=prompt.ids, ttft_slo=prompt.slo, request_id=prompt.name, **asked)
            handle.add_done_callback(lambda _: advance())
            handles.append(handle)
        outcomes = tuple(_outcome(h, p) for h, p in zip(handles, prompts, strict=True))
        timeline, blocking = engine.timeline(), engine.statistics().blocking
    return PolicyRun(policy, outcomes, blocking, timeline.spans, timeline.marks)


def _outcome(handle: Any, prompt: Prompt) -> Outcome:
    output = handle.result()
    metrics = handle.metrics
    return Outcome(
        name=prompt.name,
        ttft=metrics.ttft,
        met=metrics.slo_met,
        waited=metrics.queued,
        suspended=metrics.suspended,
        preemptions=metrics.preemptions,
        bits=compare_outputs(output, prompt.expected),
    )


def _versus(model: Any, program: Program, asked: Asked, tokens: int, stages: Stages) -> tuple[Spread, Spread]:
    """Segmented / unmodified and unmodified / unmodified, interleaved."""
    ids = random_ids(model, tokens, seed=1)

    def unmodified() -> None:
        model(input_ids=ids, **asked)

    candidates = {
        "model": unmodified,
        "control": unmodified,
        "program": lambda: program(input_ids=ids, **asked),
    }
    with stages("segmented / unmodified", _COMPARED_ROUNDS + 1) as advance:
        seconds = interleave(
            candidates,
            rounds=_COMPARED_ROUNDS,
            budget=_COMPARED_SECONDS,
            synchronize=lambda: _synchronize(model.device),
            on_round=lambda done: advance(),
        )
    return ratio(seconds, "program", "model"), ratio(seconds, "control", "model")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_output(folder: Path) -> None:
    """Make the output folder, or say why that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"the output folder {str(folder)!r} cannot be made",
            got=str(error),
            remedy="give a folder that can be written with --output",
        ) from error

"""The demonstration: urgent requests overtake a long prefill, and every result has the model's own bits.

Steps
    1. The unmodified model computes every request alone: the bits to compare with, and the machine's speed.
    2. ``fcfs``, then the chosen policy: the long prompt is submitted, the urgent ones arrive during it, open
       loop, at times fixed before (:mod:`fpcompile.cli.demo_times`), whatever the engine does meanwhile.
    3. Model and program in turns, uninterrupted: what being segmented costs when nobody is urgent.

Invariants
    Nothing in the result is assumed: every time is measured and every bit is compared, in this process.
    Both policies get the same prompts, SLOs and arrival times.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fpcompile.api import segment
from fpcompile.cli.bits import compare_outputs
from fpcompile.cli.demo_times import ARRIVALS, Speed
from fpcompile.cli.demo_values import DemoOptions, DemoResult, Outcome, PolicyRun, Prompt
from fpcompile.cli.interleave import Spread, interleave, ratio
from fpcompile.cli.load import describe, forward_arguments, load_config, load_model, random_ids
from fpcompile.engine.engine import Engine
from fpcompile.errors import InvalidInputError, UnknownNameError
from fpcompile.executor.device import make_device
from fpcompile.executor.packed import position_limit
from fpcompile.executor.program import check_budget
from fpcompile.ir import Granularity
from fpcompile.scheduler import make_policy
from fpcompile.scheduler.policy import StepPolicy

if TYPE_CHECKING:
    from fpcompile.engine.metrics import RequestMetrics
    from fpcompile.executor.program import Program

__all__ = ["Stages", "check_output", "run_demo"]

_PROBES = 3
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
        _in_a_thread(program.calibrate)  # as the engine's: torch may compute at another speed in the main one
        advance()
    with torch.no_grad():
        prompts = _prompts(model, program, asked, options, stages)
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
    check_budget(options.max_blocking_ms)
    if options.granularity not in list(Granularity):
        raise UnknownNameError("granularity", options.granularity, known=[str(g) for g in Granularity])
    policy = make_policy(options.policy)
    if isinstance(policy, StepPolicy) or policy.grain.unit == "tokens" or policy.batching is not None:
        raise InvalidInputError(
            f"the demonstration compares bits, and policy {options.policy!r} does not promise them",
            expected="a policy that runs one whole prompt at a time, such as 's-edf', 'edf' or 'fpcompile'",
            got="one that packs requests or slices prompts: their results agree to rounding",
            remedy="choose another, or measure it with `fpcompile bench goodput --real`",
        )
    slo = options.urgent_slo
    if slo is not None and not 0 < slo < math.inf:
        raise InvalidInputError("the SLO of urgent requests is wrong", expected="seconds > 0", got=repr(slo))
    limit = position_limit(load_config(options.model))
    for name, tokens in (("long", options.long_tokens), ("urgent", options.urgent_tokens)):
        if limit is not None and tokens > limit:
            raise InvalidInputError(
                f"the {name} prompt is longer than the positions of {options.model!r}",
                expected=f"at most {limit} tokens (max_position_embeddings)",
                got=f"{tokens} tokens",
                remedy=f"use fewer --{name}-tokens",
            )


def _prompts(
    model: Any, program: Program, asked: Asked, options: DemoOptions, stages: Stages
) -> tuple[Prompt, ...]:
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
    speed = _speed(program, asked, ids, alone, options, stages)
    slo = speed.urgent_slo() if options.urgent_slo is None else options.urgent_slo
    slos = [speed.long_slo(), *[slo] * len(ARRIVALS)]
    offsets = [0.0, *speed.arrivals()]
    return tuple(
        Prompt(f"urgent {i}" if i else "long", ids[i], offsets[i], slos[i], alone[i], e)
        for i, e in enumerate(expected)
    )


def _in_a_thread(work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result()


def _speed(
    program: Program,
    asked: Asked,
    ids: Sequence[torch.Tensor],
    alone: Sequence[float],
    options: DemoOptions,
    stages: Stages,
) -> Speed:
    """What the requests take alone: the model's times, those of an idle engine, and what it predicts."""
    with stages("program alone", _PROBES + 1) as advance, Engine(program, policy="fcfs") as engine:

        def served(one: torch.Tensor) -> RequestMetrics:
            handle = engine.submit(input_ids=one, **asked)
            handle.result()
            advance()
            return handle.metrics

        urgent = [served(ids[-1]) for _ in range(_PROBES)]
        long = served(ids[0])
    shape = {"tokens": options.long_tokens, "rows": program.start(ids[0], **asked).rows}
    longest = max(program.segment_seconds(s.index, **shape) for s in program.segments)
    if options.max_blocking_ms is not None:
        longest = min(longest, options.max_blocking_ms / 1e3)
    return Speed(
        long=(alone[0], long.executed),
        urgent=(*alone[1:], *(metrics.executed for metrics in urgent)),
        predicted_urgent=urgent[0].predicted_ttft,
        longest_segment=longest,
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

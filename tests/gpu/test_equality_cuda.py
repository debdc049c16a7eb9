"""Bits on CUDA: preempted at every cut, a run equals the unmodified model on the same device.

The reference runs in the same process with the attention implementation that the model itself chose.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fpcompile
from fpcompile.engine.engine import Engine
from fpcompile.models.zoo import MAIN_ARCHS, sample_ids, tiny_model
from tests.cpu.support import (
    DTYPES,
    LENGTHS,
    Outcome,
    cuts,
    differences,
    finish,
    outcome,
    reference,
    relay,
)

URGENT = 5
"""Tokens of the requests that interrupt; none of LENGTHS."""


def compiled(arch: str, dtype: torch.dtype, device: str) -> tuple[Any, fpcompile.Program]:
    """A tiny model on ``device``, and its program of the packed route."""
    model: Any = tiny_model(arch, dtype=dtype)
    model.to(device)
    return model, fpcompile.segment(model, route="packed")


def wrong_by_checkpoints(model: Any, program: fpcompile.Program, ids: Tensor) -> list[str]:
    """What differs when a run is snapshotted, resumed and relayed at each of its cuts."""
    expected = reference(model, ids)
    wrong: list[str] = []

    def compare(what: str, got: Outcome) -> None:
        wrong.extend(f"{ids.shape[1]} tokens, {what}: {d}" for d in differences(got, expected))

    compare("uninterrupted", outcome(program(ids)))
    snapshots = []
    run = program.start(ids)
    for _ in cuts(run):
        run.suspend()
        snapshots.append(run.checkpoint())
    compare("snapshotted at every cut", outcome(run.result()))
    for cut, snapshot in enumerate(snapshots):
        compare(f"resumed at cut {cut}", finish(program.resume(snapshot)))
    compare("relayed", relay(program, program.start(ids)))
    return wrong


def wrong_in_the_engine(model: Any, program: fpcompile.Program, ids: Tensor) -> list[str]:
    """What differs when an urgent request comes in each segment and takes the device at the next cut."""
    urgent_ids = sample_ids(URGENT, seed=9).to(ids.device)
    expected, expected_urgent = reference(model, ids), reference(model, urgent_ids)
    handles: list[Any] = []

    def interrupt(run: fpcompile.Run, segment: Any, start: float, end: float) -> None:
        if run.tokens == ids.shape[1] and len(handles) <= segment.index:
            handles.append(engine.submit(urgent_ids, ttft_slo=1e3))

    with Engine(program, on_segment=interrupt) as engine:
        handle = engine.submit(ids, ttft_slo=1e6)
        wrong = differences(outcome(handle.result(60)), expected)
        for urgent in handles:
            wrong += differences(outcome(urgent.result(60)), expected_urgent)
    if handle.metrics.preemptions != len(program.segments) - 1:
        wrong.append(f"{handle.metrics.preemptions} preemptions at {len(program.segments) - 1} cuts")
    return [f"{ids.shape[1]} tokens, preempted in the engine: {what}" for what in wrong]


def wrong_at_any_cut(arch: str, dtype: torch.dtype, device: str) -> list[str]:
    """Everything that differs from the unmodified model on ``device``, over all lengths."""
    model, program = compiled(arch, dtype, device)
    wrong: list[str] = []
    for length in LENGTHS:
        ids = sample_ids(length, seed=length).to(device)
        wrong += wrong_by_checkpoints(model, program, ids)
        wrong += wrong_in_the_engine(model, program, ids)
    return wrong


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_preempted_at_every_cut_it_gives_the_bits_of_the_unmodified_model(
    arch: str, dtype: torch.dtype
) -> None:
    wrong = wrong_at_any_cut(arch, dtype, "cuda")
    assert not wrong, "\n".join(wrong)

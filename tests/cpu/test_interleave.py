"""Any interleaving of any runs gives each run its own bits."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fpcompile
from fpcompile.models.zoo import sample_ids
from tests.cpu.support import Outcome, differences, model_of, outcome, program_of, reference

PROGRAMS = (
    ("llama", torch.float32),
    ("gpt_oss", torch.float32),  # eager attention with sinks, sliding layers, experts
    ("qwen3_moe", torch.bfloat16),
)
LENGTHS = (1, 2, 3, 16, 17, 33, 40)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One run: which program, how many tokens, which rows, and whether it continues a cache."""

    program: int
    length: int
    keep: int
    cached: int
    seed: int


@dataclasses.dataclass(frozen=True, slots=True)
class Pick:
    """One move of the schedule: which of the unfinished runs, how many steps, and what happens to it then."""

    run: int
    steps: int
    then: str


requests = st.builds(
    Request,
    program=st.integers(0, len(PROGRAMS) - 1),
    length=st.sampled_from(LENGTHS),
    keep=st.sampled_from((0, 1, 5)),
    cached=st.sampled_from((0, 0, 7, 20)),
    seed=st.integers(0, 3),
)
picks = st.builds(
    Pick,
    run=st.integers(0, 4),
    steps=st.integers(1, 12),
    then=st.sampled_from(("nothing", "nothing", "suspend", "resume", "fork")),
)


@functools.cache
def _case(request: Request) -> tuple[Tensor, Outcome | None, Outcome]:
    """New ids, what is cached, and what the model returns."""
    arch, dtype = PROGRAMS[request.program]
    model = model_of(arch, dtype)
    ids = sample_ids(request.cached + request.length, seed=request.seed)
    with torch.no_grad():
        cache = model(input_ids=ids[:, : request.cached]).past_key_values if request.cached else None
    new = ids[:, request.cached :]
    return new, cache, reference(model, new, past_key_values=cache, logits_to_keep=request.keep)


def _start(request: Request) -> fpcompile.Run:
    new, cache, _ = _case(request)
    program = program_of(*PROGRAMS[request.program])
    return program.start(new, past_key_values=cache, logits_to_keep=request.keep)


@pytest.mark.slow
@settings(max_examples=60)
@given(wanted=st.lists(requests, min_size=2, max_size=5), schedule=st.lists(picks, max_size=40))
def test_any_interleaving_gives_each_run_its_own_bits(wanted: list[Request], schedule: list[Pick]) -> None:
    runs = [(request, _start(request)) for request in wanted]
    for pick in schedule:
        index = pick.run % len(runs)
        request, run = runs[index]
        for _ in range(pick.steps):
            if not run.done:
                run.step()
                run.validate()
        if pick.then == "suspend":
            run.suspend()
        elif pick.then in ("resume", "fork"):
            again = run.program.resume(run.checkpoint())
            if pick.then == "fork" and len(runs) < 8:
                runs.append((request, again))
            else:
                run.release()
                runs[index] = (request, again)
    while not all(run.done for _, run in runs):  # what is left, one step each in turn
        for _, run in runs:
            if not run.done:
                run.step()
    found = [differences(outcome(run.result()), _case(request)[2]) for request, run in runs]
    assert found == [[]] * len(runs)


@pytest.mark.slow
def test_a_step_of_one_run_touches_no_tensor_of_another() -> None:
    """Stronger than equal results: versions of every tensor that the other run holds stay as they are."""
    program = program_of("gpt_oss")
    held, busy = program.start(sample_ids(17, seed=1)), program.start(sample_ids(17, seed=2))
    for _ in range(len(program.segments)):
        busy.step()
        held.suspend()
        tensors = [
            *held.values.values(),
            *(t for g in held.kv for kv in g.values() for t in (kv.keys, kv.values)),
        ]
        before = [(t.data_ptr(), t._version, t.clone()) for t in tensors]
        other = program.start(sample_ids(33, seed=3))
        while not other.done:
            other.step()
        assert all(
            (t.data_ptr(), t._version) == (pointer, version) and torch.equal(t, bits)
            for t, (pointer, version, bits) in zip(tensors, before, strict=True)
        )
        held.step()
    expected = [reference(model_of("gpt_oss"), sample_ids(17, seed=s)) for s in (1, 2)]
    assert [differences(outcome(r.result()), e) for r, e in zip((held, busy), expected, strict=True)] == [
        [],
        [],
    ]

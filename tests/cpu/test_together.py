"""Runs executed as one, and in slices: each result is the unmodified model's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fpcompile.errors import UsageError
from fpcompile.executor.slices import Chunks, Sliced
from fpcompile.executor.together import Together, join
from fpcompile.models.zoo import sample_ids
from tests.cpu.support import Outcome, model_of, outcome, program_of, reference, relative_error

TOLERANCE = 1e-5  # fp32, kernels at other lengths sum in another order


def close(got: Outcome, expected: Outcome) -> None:
    """Same shapes, same numbers to rounding, same cache."""
    assert got.logits.shape == expected.logits.shape
    assert relative_error(got.logits, expected.logits) < TOLERANCE
    assert len(got.layers) == len(expected.layers)
    for mine, theirs in zip(got.layers, expected.layers, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.shape == b.shape
            assert relative_error(a, b) < TOLERANCE


def ended(run: Any) -> Any:
    while not run.done:
        run.step()
    return run.result()


def requests(arch: str) -> list[tuple[dict[str, Any], Outcome]]:
    """Arguments of several kinds, with what the model returns for each alone."""
    model = model_of(arch)
    prompt, batch = sample_ids(40, seed=1), torch.cat([sample_ids(9, seed=2), sample_ids(9, seed=3)])
    cached = sample_ids(30, seed=4)
    with torch.no_grad():
        cache = model(input_ids=cached[:, :20], use_cache=True).past_key_values
    asked: list[dict[str, Any]] = [
        {"input_ids": prompt},
        {"input_ids": sample_ids(70, seed=5), "logits_to_keep": 1},
        {"input_ids": batch, "logits_to_keep": torch.tensor([8, 0, 3])},
        {"input_ids": cached[:, 20:], "past_key_values": cache},
        {"input_ids": sample_ids(5, seed=6), "use_cache": False},
    ]
    return [(one, reference(model, **_renamed(one))) for one in asked]


def _renamed(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ids" if name == "input_ids" else name: value for name, value in arguments.items()}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["qwen3", "gemma3", "gpt_oss", "phi3"])
def test_runs_executed_as_one_keep_their_own_results(arch: str) -> None:
    program = program_of(arch)
    asked = requests(arch)
    members = [program.start(**arguments) for arguments, _ in asked]
    together = Together(members, [run.result for run in members])
    assert (together.tokens, together.rows) == (40 + 70 + 18 + 10 + 5, 40 + 1 + 6 + 10 + 5)
    for got, (arguments, expected) in zip(ended(together), asked, strict=True):
        assert type(got) is type(program(**arguments))
        if arguments.get("use_cache") is False:
            assert got.past_key_values is None
            assert relative_error(got.logits, expected.logits) < TOLERANCE
        else:
            close(outcome(got), expected)
    assert together.joined.live_bytes == together.joined.kv_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 16, 64, 1000])
@pytest.mark.parametrize("arch", ["qwen3", "gemma3", "gpt_oss"])
def test_a_run_in_chunks_gives_the_models_own_result(arch: str, size: int) -> None:
    program = program_of(arch)
    for arguments, expected in requests(arch):
        run = Chunks(Sliced(program.start(**arguments)), size)
        count = len(run.left())
        assert count == -(-run.tokens // size)
        assert sum(shape.tokens for shape in run.left()) == run.tokens
        for number in range(count):
            assert run.cursor == number
            run.step()
        got = outcome(run.result())
        assert relative_error(got.logits, expected.logits) < TOLERANCE
        if arguments.get("use_cache") is not False:
            close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["qwen3", "gemma3", "gpt_oss"])
def test_slices_of_several_runs_share_a_step(arch: str) -> None:
    program, model = program_of(arch), model_of(arch)
    asked = requests(arch)[:4]
    padded = torch.ones(2, 12, dtype=torch.long)
    padded[0, :5] = 0
    ids = sample_ids(24, seed=8).view(2, 12)
    alone = [reference(model, ids[:1, 5:]), reference(model, ids[1:])]
    sliced = [Sliced(program.start(**arguments)) for arguments, _ in asked]
    sliced.append(Sliced(program.start(ids, attention_mask=padded)))
    while not all(one.done for one in sliced):
        members = [(one, one.take(min(13, one.tokens - one.at))) for one in sliced if not one.done]
        ended(Together([part for _, part in members], [partial(o.put, p) for o, p in members]))
    for one, (_, expected) in zip(sliced, asked, strict=False):
        close(outcome(one.result()), expected)
    got = sliced[-1].result().logits
    assert relative_error(got[:1, 5:], alone[0].logits) < TOLERANCE
    assert relative_error(got[1:], alone[1].logits) < TOLERANCE
    assert bool((got[0, :5] == 0).all())


@pytest.mark.slow
def test_a_result_in_slices_can_be_continued() -> None:
    program, model = program_of("qwen3"), model_of("qwen3")
    ids = sample_ids(33, seed=9)
    cache = ended(Chunks(Sliced(program.start(ids[:, :32])), 10)).past_key_values
    assert isinstance(cache, DynamicCache)
    with torch.no_grad():
        theirs = model(input_ids=ids[:, 32:], past_key_values=cache).logits
        whole = model(input_ids=ids).logits
    assert relative_error(theirs[:, -1], whole[:, -1]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning")
def test_a_joined_run_has_a_tile_plan_of_its_own() -> None:
    program = program_of("qwen3")
    members = [program.start(sample_ids(n, seed=n), logits_to_keep=1) for n in (90, 130)]
    joined = join(members, 0.05)
    assert len(joined.schedule) > len(members[0].schedule)
    expected = reference(model_of("qwen3"), sample_ids(130, seed=130), logits_to_keep=1)
    together = Together(members, [run.result for run in members], max_blocking_ms=0.05)
    close(outcome(ended(together)[1]), expected)


def test_a_run_alone_is_its_own_and_nothing_ends_early() -> None:
    program = program_of("qwen3")
    run = program.start(sample_ids(6, seed=1))
    assert join([run]) is run
    sliced = Sliced(program.start(sample_ids(6, seed=1)))
    with pytest.raises(UsageError, match="0 of 6 tokens"):
        sliced.result()
    together = Together([program.start(sample_ids(6, seed=1)) for _ in range(2)], [])
    together.step()
    together.release()
    assert together.live_bytes == together.kv_bytes == 0

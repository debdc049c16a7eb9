"""Rotary variants on both sides of their thresholds: the model's bits, never silently something else.

The reference is a freshly built model for every sequence of calls. transformers' dynamic NTK keeps the
frequencies of the longest call it has seen in a buffer (and longrope swaps a buffer), so what a used model
returns depends on what ran before; a program has no such memory, and equals a model that is asked for the
first time.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fpcompile
from fpcompile.errors import InvalidInputError
from fpcompile.models.zoo import ROPE_THRESHOLD, ROPE_VARIANTS, sample_ids, tiny_model
from tests.cpu.support import (
    Outcome,
    differences,
    finish,
    outcome,
    program_of,
    reference,
    relative_error,
    relay,
)

BOTH_SIDES = (ROPE_THRESHOLD - 1, ROPE_THRESHOLD, ROPE_THRESHOLD + 1, 3 * ROPE_THRESHOLD)
CASES = [
    *(("llama", rope) for rope in ROPE_VARIANTS),
    *(("gpt_neox", rope) for rope in ("dynamic", "longrope")),  # rotates a part of each head
    *(("gemma3_text", rope) for rope in ("linear", "dynamic")),  # parameters per layer type
    ("phi3", "longrope"),
    ("gpt_oss", "yarn"),
]
SHORT, LONG = ROPE_THRESHOLD - 12, ROPE_THRESHOLD + 12


def fresh(arch: str, rope: str, ids: Tensor, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Outcome:
    """What a model that has never run returns."""
    return reference(tiny_model(arch, rope=rope, dtype=dtype), ids, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "rope"), CASES)
def test_on_both_sides_of_the_threshold_the_bits_are_the_models(arch: str, rope: str) -> None:
    program = program_of(arch, rope=rope)
    for length in BOTH_SIDES:
        ids = sample_ids(length, seed=length)
        expected = fresh(arch, rope, ids)
        assert differences(outcome(program(ids)), expected) == [], length
        assert differences(relay(program, program.start(ids)), expected) == [], length


@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPE_VARIANTS)
def test_the_threshold_matters_to_the_tiny_models(rope: str) -> None:
    """Otherwise the test above could not fail: variants differ from one another beyond the threshold."""
    ids = sample_ids(LONG, seed=1)
    others = [r for r in ROPE_VARIANTS if r != rope]
    mine = fresh("llama", rope, ids)
    assert all(relative_error(mine.logits, fresh("llama", r, ids).logits) > 1e-4 for r in others)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "rope"), [("llama", "dynamic"), ("phi3", "longrope")])
def test_in_reduced_precision_too(arch: str, rope: str) -> None:
    program = program_of(arch, torch.bfloat16, rope=rope)
    for length in (SHORT, LONG):
        ids = sample_ids(length, seed=length)
        expected = fresh(arch, rope, ids, torch.bfloat16)
        assert differences(relay(program, program.start(ids)), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "rope"), [("llama", "dynamic"), ("phi3", "longrope"), ("gpt_neox", "longrope")]
)
def test_runs_on_both_sides_do_not_disturb_one_another(arch: str, rope: str) -> None:
    """A shared frequency buffer would show here: short and long runs take turns at every cut."""
    program = program_of(arch, rope=rope)
    lengths = (SHORT, LONG, ROPE_THRESHOLD, 3 * ROPE_THRESHOLD, SHORT)
    every = [sample_ids(n, seed=i) for i, n in enumerate(lengths)]
    expected = [fresh(arch, rope, ids) for ids in every]
    runs = [program.start(ids) for ids in every]
    for run in itertools.cycle(runs):
        if not run.done:
            run.step()
        if all(r.done for r in runs):
            break
    assert [differences(finish(r), e) for r, e in zip(runs, expected, strict=True)] == [[]] * len(runs)
    again = [differences(outcome(program(i)), e) for i, e in zip(every, expected, strict=True)]
    assert again == [[]] * len(runs)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "rope"), [*(("llama", r) for r in ROPE_VARIANTS), ("phi3", "longrope")])
def test_a_continuation_over_the_threshold_is_the_models(arch: str, rope: str) -> None:
    program = program_of(arch, rope=rope)
    ids = sample_ids(LONG, seed=3)
    for cached in (SHORT, ROPE_THRESHOLD - 1, ROPE_THRESHOLD, LONG - 1):
        model = tiny_model(arch, rope=rope)
        with torch.no_grad():
            theirs = model(input_ids=ids[:, :cached], use_cache=True)
        mine = program(ids[:, :cached])
        assert differences(outcome(mine), outcome(theirs)) == []
        expected = reference(model, ids[:, cached:], past_key_values=theirs.past_key_values)
        run = program.start(ids[:, cached:], past_key_values=mine.past_key_values)
        assert differences(relay(program, run), expected) == [], cached


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "rope"), [("llama", "dynamic"), ("phi3", "longrope")])
def test_a_padded_batch_gives_each_sequence_its_own_side(arch: str, rope: str) -> None:
    """The model itself rotates a whole batch as its longest sequence needs; packed, each one is alone."""
    program = program_of(arch, rope=rope)
    ids = torch.zeros(2, LONG, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, size in enumerate((SHORT, LONG)):
        ids[row, :size] = sample_ids(size, seed=row)[0]
        mask[row, :size] = 1
    logits = program(ids, attention_mask=mask).logits
    for row, size in enumerate((SHORT, LONG)):
        alone = fresh(arch, rope, ids[row : row + 1, :size])
        assert relative_error(logits[row, :size], alone.logits[0]) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("rope", [r for r in ROPE_VARIANTS if r != "dynamic"])
def test_more_tokens_than_positions_are_refused(rope: str) -> None:
    program = program_of("llama", rope=rope)
    limit = program.config.max_position_embeddings
    assert program(sample_ids(limit), logits_to_keep=1).logits.shape[1] == 1
    with pytest.raises(InvalidInputError, match="longer than the model's positions") as caught:
        program.start(sample_ids(limit + 1))
    assert caught.value.expected is not None
    assert str(limit) in caught.value.expected
    assert caught.value.got == f"{limit + 1} tokens"


@pytest.mark.slow
def test_dynamic_frequencies_grow_with_the_sequence_and_know_no_limit() -> None:
    program = program_of("llama", rope="dynamic")
    assert program.config.max_position_embeddings == ROPE_THRESHOLD
    ids = sample_ids(20 * ROPE_THRESHOLD, seed=2)
    assert differences(outcome(program(ids)), fresh("llama", "dynamic", ids)) == []


@pytest.mark.slow
@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_used_model_compiles_to_the_same_program(rope: str) -> None:
    """Segmented after a long call, while the model's buffers hold the frequencies of that call."""
    model = tiny_model("llama", rope=rope)
    with torch.no_grad():
        model(input_ids=sample_ids(LONG))
    program: fpcompile.Program = fpcompile.segment(model, route="packed")
    for length in (SHORT, ROPE_THRESHOLD + 4, LONG, 3 * ROPE_THRESHOLD):
        ids = sample_ids(length, seed=length)
        assert differences(outcome(program(ids)), fresh("llama", rope, ids)) == [], length


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "rope"), [("phi3", "longrope"), ("minicpm3", "longrope"), ("llama", "dynamic")]
)
def test_the_generic_route_gives_the_models_bits_too(arch: str, rope: str) -> None:
    program: Any = fpcompile.segment(tiny_model(arch, rope=rope), route="generic")
    for length in (SHORT, LONG, SHORT + 1):
        ids = sample_ids(length, seed=length)
        assert differences(outcome(program(input_ids=ids)), fresh(arch, rope, ids)) == [], length
    ids = sample_ids(LONG, seed=1)
    ours = program(input_ids=ids[:, :SHORT]).past_key_values
    with torch.no_grad():
        theirs = tiny_model(arch, rope=rope)(input_ids=ids[:, :SHORT]).past_key_values
    own = fresh(arch, rope, ids[:, SHORT:], past_key_values=theirs)
    assert differences(outcome(program(input_ids=ids[:, SHORT:], past_key_values=ours)), own) == []

"""Continuing a cache: by a program, by the model, and by ``generate``."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import fpcompile
from fpcompile.models.zoo import MAIN_ARCHS, sample_ids
from tests.cpu.support import (
    DTYPES,
    cache_layers,
    differences,
    finish,
    model_of,
    outcome,
    program_of,
    reference,
    relative_error,
    relay,
    same_bits,
)

SPLITS = ((1, 1), (5, 12), (15, 2), (20, 1), (40, 30))
"""(cached, new) tokens; the window of 16 is crossed before, inside and behind the new ones."""
NEW_TOKENS = 16


@torch.no_grad()
def _cache(model: PreTrainedModel, ids: Tensor) -> Any:
    return model(input_ids=ids, use_cache=True).past_key_values


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_a_continued_cache_gives_the_models_own_continuation(arch: str, dtype: torch.dtype) -> None:
    model, program = model_of(arch, dtype), program_of(arch, dtype)
    for cached, new in SPLITS:
        ids = sample_ids(cached + new, seed=cached)
        cache = _cache(model, ids[:, :cached])
        before = copy.deepcopy(cache_layers(cache))
        expected = reference(model, ids[:, cached:], past_key_values=cache)
        run = program.start(input_ids=ids[:, cached:], past_key_values=cache)
        assert differences(relay(program, run), expected) == [], f"{cached} cached, {new} new"
        assert run.tokens == new
        for mine, theirs in zip(cache_layers(cache), before, strict=True):
            assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True)), "the given cache changed"


@pytest.mark.slow
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_a_prompt_in_three_pieces_is_within_rounding_of_the_prompt_at_once(arch: str) -> None:
    program = program_of(arch)
    ids = sample_ids(50, seed=9)
    whole = reference(model_of(arch), ids)
    cache: Any = None
    pieces = []
    for piece in (ids[:, :13], ids[:, 13:14], ids[:, 14:]):
        out = program(piece, past_key_values=cache)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert relative_error(torch.cat(pieces, dim=1), whole.logits) <= 2e-6
    assert cache.get_seq_length() == 50


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt_oss"])
def test_a_batch_continues(arch: str) -> None:
    model, program = model_of(arch), program_of(arch)
    ids = sample_ids(30, batch=3, seed=2)
    cache = _cache(model, ids[:, :20])
    expected = reference(model, ids[:, 20:], past_key_values=cache, logits_to_keep=2)
    run = program.start(
        ids[:, 20:], past_key_values=cache, logits_to_keep=2, attention_mask=torch.ones(3, 30)
    )
    assert differences(relay(program, run), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_generate_goes_on_with_the_returned_cache(arch: str) -> None:
    model: Any = model_of(arch)  # typed as a module, whose attributes may be tensors
    program = program_of(arch)
    ids = sample_ids(21, seed=4)
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **greedy)
    assert expected.shape == (1, 21 + NEW_TOKENS)
    out = program(ids[:, :-1], logits_to_keep=1)
    assert torch.equal(model.generate(ids, past_key_values=out.past_key_values, **greedy), expected)

    out = program(ids)  # the whole prompt is cached, and its next token known
    known = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    greedy["max_new_tokens"] = NEW_TOKENS - 1
    assert torch.equal(model.generate(known, past_key_values=out.past_key_values, **greedy), expected)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_decoding_by_the_program_gives_the_bits_of_decoding_by_the_model(arch: str) -> None:
    model, program = model_of(arch), program_of(arch)
    ids = sample_ids(14, seed=5)
    theirs: Any = None
    mine: Any = None
    for _ in range(6):  # over the window's end
        with torch.no_grad():
            expected = model(input_ids=ids, past_key_values=theirs, use_cache=True)
        theirs = expected.past_key_values
        got = program(ids, past_key_values=mine)
        mine = got.past_key_values
        assert differences(outcome(got), outcome(expected)) == []
        ids = got.logits[:, -1:].argmax(-1)


def test_one_cache_continues_in_many_ways() -> None:
    model, program = model_of("llama"), program_of("llama")
    cache = _cache(model, sample_ids(12, seed=6))
    endings = [sample_ids(n, seed=n) for n in (3, 1, 9)]
    expected = [reference(model, ending, past_key_values=cache) for ending in endings]
    runs = [program.start(ending, past_key_values=cache) for ending in endings]
    while not all(run.done for run in runs):
        for run in runs:
            if not run.done:
                run.step()
    assert [differences(finish(run), e) for run, e in zip(runs, expected, strict=True)] == [[]] * 3


def test_the_caller_may_go_on_with_a_cache_that_a_run_was_given() -> None:
    """The model appends to its cache object; a run that was started from it sees the cache as it was."""
    model, program = model_of("llama"), program_of("llama")
    cache, ids = _cache(model, sample_ids(12, seed=6)), sample_ids(4, seed=7)
    expected = reference(model, ids, past_key_values=cache)
    run = program.start(ids, past_key_values=cache)
    with torch.no_grad():
        model(input_ids=sample_ids(5), past_key_values=cache)
    assert cache.get_seq_length() == 17
    assert differences(finish(run), expected) == []


def test_a_returned_cache_may_be_changed_while_the_run_is_still_held() -> None:
    program = program_of("llama")
    run = program.start(sample_ids(12, seed=6))
    first = finish(run)
    keys = first.layers[0][0].clone()
    cache = run.result().past_key_values
    program(sample_ids(3), past_key_values=cache)
    with torch.no_grad():
        model_of("llama")(input_ids=sample_ids(3), past_key_values=cache)
    again = outcome(run.result())
    assert same_bits(again.layers[0][0], keys)
    assert differences(again, first) == []


def test_an_empty_cache_is_no_cache() -> None:
    program = program_of("llama")
    ids = sample_ids(9)
    expected = outcome(program(ids))
    for empty in (None, DynamicCache(config=model_of("llama").config), DynamicCache()):
        assert differences(outcome(program(ids, past_key_values=empty)), expected) == []


def test_a_checkpoint_carries_the_continued_cache() -> None:
    model, program = model_of("llama"), program_of("llama")
    ids = sample_ids(20, seed=3)
    cache = _cache(model, ids[:, :12])
    run = program.start(ids[:, 12:], past_key_values=cache)
    checkpoint = run.checkpoint()
    assert run.kv_bytes == sum(t.nbytes for layer in cache_layers(cache) for t in layer)
    expected = reference(model, ids[:, 12:], past_key_values=cache)
    assert differences(finish(program.resume(dataclasses.replace(checkpoint))), expected) == []


def test_the_program_is_a_drop_in_for_the_model_in_a_greedy_loop() -> None:
    """The loop that a user writes by hand, with the model's argument names."""
    ids = sample_ids(10, seed=1)

    def decode(step: Any) -> list[int]:
        tokens, cache, given = [], None, ids
        for _ in range(8):
            with torch.no_grad():
                out = step(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, given = out.past_key_values, out.logits.argmax(-1)
            tokens.append(int(given))
        return tokens

    program: fpcompile.Program = program_of("llama")
    assert decode(program) == decode(model_of("llama"))

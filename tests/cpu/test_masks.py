"""Rows, batches and padding: ``logits_to_keep``, several sequences at once, padding on either side.

Bits are equal where the same kernels run on the same shapes: an unpadded batch is one. A padded batch is
packed, so its kernels see other shapes; its real tokens must be within rounding of each sequence alone
(fp32: 2e-6 of the largest logit; bf16: an error against fp32 of at most 1.1 times the model's own).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fpcompile.errors import InvalidInputError
from fpcompile.models.zoo import MAIN_ARCHS, sample_ids
from tests.cpu.support import (
    DTYPES,
    Outcome,
    cuts,
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

ROUNDING_FP32 = 2e-6
WIDTH = 40
SIZES = (40, 7, 23)


def padded(side: str, sizes: tuple[int, ...] = SIZES, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """A batch of sequences of ``sizes`` tokens, padded to ``width`` with id 0, and its attention mask."""
    ids, mask = (
        torch.zeros(len(sizes), width, dtype=torch.long),
        torch.zeros(len(sizes), width, dtype=torch.long),
    )
    for row, size in enumerate(sizes):
        at = slice(width - size, width) if side == "left" else slice(0, size)
        ids[row, at] = sample_ids(size, seed=row)[0]
        mask[row, at] = 1
    return ids, mask


@pytest.mark.slow
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_kept_rows_are_the_models(arch: str) -> None:
    ids = sample_ids(WIDTH, seed=1)
    choices: list[Any] = [
        0,
        1,
        5,
        WIDTH,
        torch.tensor([3]),
        torch.tensor([39, 0, 17]),
        torch.tensor([-1, -40]),
    ]
    for keep in choices:
        expected = reference(model_of(arch), ids, logits_to_keep=keep)
        got = outcome(program_of(arch)(ids, logits_to_keep=keep))
        assert differences(got, expected) == [], keep


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_a_batch_of_three_is_the_models(arch: str, dtype: torch.dtype) -> None:
    program = program_of(arch, dtype)
    for length, keep in ((1, 0), (2, 1), (WIDTH, 0), (WIDTH, torch.tensor([0, 39]))):
        ids = sample_ids(length, batch=3, seed=length)
        expected = reference(model_of(arch, dtype), ids, logits_to_keep=keep)
        assert differences(relay(program, program.start(ids, logits_to_keep=keep)), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_the_real_tokens_of_a_padded_batch_are_each_sequence_alone(arch: str, side: str) -> None:
    ids, mask = padded(side)
    for dtype in DTYPES:
        got = outcome(program_of(arch, dtype)(ids, attention_mask=mask))
        assert got.logits.shape[:2] == ids.shape
        for row in range(len(SIZES)):
            real = mask[row] == 1
            own = ids[row, real][None]
            exact = reference(model_of(arch), own)
            theirs = reference(model_of(arch, dtype), own)
            _close(got.logits[row, real], theirs.logits[0], exact.logits[0], dtype)
            for mine, own_layer, exact_layer in zip(got.layers, theirs.layers, exact.layers, strict=True):
                for which in (0, 1):
                    columns = mine[which].shape[2]  # fewer than the width in a sliding layer
                    kept = mine[which][row][:, real[-columns:]]
                    if side == "left":
                        assert kept.shape[1] == min(columns, SIZES[row])
                    if kept.shape[1]:  # behind right padding, a window may hold no real token
                        last = slice(-kept.shape[1], None)
                        _close(kept, own_layer[which][0][:, last], exact_layer[which][0][:, last], dtype)
        assert not got.logits[mask == 0].any(), "logits of hidden positions are zero"


def _close(got: Tensor, theirs: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within rounding, by the tier of ``dtype``."""
    if dtype == torch.float32:
        assert relative_error(got, theirs) <= ROUNDING_FP32
    else:
        assert relative_error(got, exact) <= 1.1 * relative_error(theirs, exact)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_agrees_with_the_model_given_the_same_mask(side: str) -> None:
    ids, mask = padded(side)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for arch in ("llama", "mistral", "gemma2", "gpt_oss"):
        expected = reference(model_of(arch), ids, attention_mask=mask, position_ids=positions)
        got = outcome(program_of(arch)(ids, attention_mask=mask))
        real = mask == 1
        assert relative_error(got.logits[real], expected.logits[real]) <= ROUNDING_FP32, arch


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_position_ids_of_the_caller(arch: str) -> None:
    """An offset gives the model's bits; positions that count padding, the model's own default."""
    program = program_of(arch)
    ids = sample_ids(23, batch=2)
    offset = torch.arange(5, 28)[None]
    expected = reference(model_of(arch), ids, position_ids=offset)
    assert differences(outcome(program(ids, position_ids=offset)), expected) == []
    run = program.start(ids, position_ids=offset.expand(2, -1))
    assert differences(relay(program, run), expected) == []

    ids, mask = padded("left")
    columns = torch.arange(ids.shape[1])[None]
    theirs = reference(model_of(arch), ids, attention_mask=mask, position_ids=columns)
    got = outcome(program(ids, attention_mask=mask, position_ids=columns))
    real = mask == 1
    assert relative_error(got.logits[real], theirs.logits[real]) <= ROUNDING_FP32
    if arch == "gpt2":  # learned positions: counting padding or not is another number
        counted = outcome(program(ids, attention_mask=mask))
        assert relative_error(counted.logits[real], theirs.logits[real]) > 100 * ROUNDING_FP32


def test_a_model_without_position_ids_takes_none() -> None:
    program, ids = program_of("moss_transcribe_diarize"), sample_ids(9)
    expected = reference(model_of("moss_transcribe_diarize"), ids)
    assert differences(outcome(program(ids, position_ids=None)), expected) == []
    with pytest.raises(InvalidInputError, match="position_ids is not an argument"):
        program(ids, position_ids=torch.arange(9)[None])


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_pauses_change_no_bit_of_a_padded_batch(side: str) -> None:
    ids, mask = padded(side)
    for arch in ("llama", "gpt_oss", "qwen3_moe"):
        program = program_of(arch)
        for keep in (0, 1, torch.tensor([39, 2])):
            expected = outcome(program(ids, attention_mask=mask, logits_to_keep=keep))
            run = program.start(ids, attention_mask=mask, logits_to_keep=keep)
            assert differences(relay(program, run), expected) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_kept_rows_of_a_padded_batch_are_rows_of_all_logits(side: str) -> None:
    program = program_of("llama")
    ids, mask = padded(side)
    every = program(ids, attention_mask=mask).logits
    for keep, columns in ((1, [39]), (5, [35, 36, 37, 38, 39]), (torch.tensor([39, 2]), [39, 2])):
        got = program(ids, attention_mask=mask, logits_to_keep=keep).logits
        assert got.shape == (3, len(columns), every.shape[-1])
        assert relative_error(got, every[:, columns]) <= ROUNDING_FP32


def test_when_every_kept_row_is_padding_the_logits_are_zero() -> None:
    ids, mask = padded("right", sizes=(7, 9))
    out = program_of("llama")(ids, attention_mask=mask, logits_to_keep=1)
    assert out.logits.shape == (2, 1, out.logits.shape[-1])
    assert not out.logits.any()


def test_a_mask_that_hides_nothing_changes_no_bit() -> None:
    program = program_of("llama")
    ids = sample_ids(17, batch=2)
    expected = outcome(program(ids))
    for mask in (torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool), torch.ones(2, 17)):
        assert differences(outcome(program(ids, attention_mask=mask)), expected) == []


def test_padded_sequences_cost_their_own_tokens_only() -> None:
    ids, mask = padded("left")
    run = program_of("llama").start(ids, attention_mask=mask, logits_to_keep=1)
    assert run.tokens == sum(SIZES)
    assert run.rows == len(SIZES)


def test_without_a_cache_none_is_returned() -> None:
    program = program_of("llama")
    ids = sample_ids(9)
    out = program(ids, use_cache=False)
    assert out.past_key_values is None
    assert same_bits(out.logits, program(ids).logits)


def test_it_returns_what_the_model_returns() -> None:
    ids = sample_ids(9)
    with torch.no_grad():
        expected = model_of("llama")(input_ids=ids)
    got = program_of("llama")(input_ids=ids)
    assert type(got) is type(expected)
    assert set(got.keys()) == set(expected.keys())
    assert type(got.past_key_values) is type(expected.past_key_values)
    assert [type(x) for x in got.past_key_values.layers] == [type(x) for x in expected.past_key_values.layers]
    assert not got.logits.requires_grad


@pytest.mark.parametrize("form", [list, lambda ids: ids[0].tolist(), lambda ids: ids[0], torch.Tensor.int])
def test_ids_come_as_lists_vectors_and_int32_too(form: Any) -> None:
    program = program_of("llama")
    ids = sample_ids(9)
    given = ids.tolist() if form is list else form(ids)
    run = program.start(given)
    assert list(cuts(run)) == list(range(len(program.segments) + 1))
    assert differences(outcome(run.result()), outcome(program(ids))) == []


def test_the_callers_tensors_are_not_changed_and_may_be_changed_after_start() -> None:
    program = program_of("llama")
    ids, mask = padded("left")
    keep = torch.tensor([39, 2])
    before = [t.clone() for t in (ids, mask, keep)]
    expected: Outcome = outcome(program(ids, attention_mask=mask, logits_to_keep=keep))
    assert all(same_bits(a, b) for a, b in zip((ids, mask, keep), before, strict=True))
    run = program.start(ids, attention_mask=mask, logits_to_keep=keep)
    for tensor in (ids, mask, keep):
        tensor.zero_()
    assert differences(finish(run), expected) == []


def test_unpadded_ids_may_be_changed_after_start() -> None:
    program = program_of("llama")
    ids = sample_ids(9, seed=3)
    expected = outcome(program(ids.clone()))
    run = program.start(ids)
    ids.zero_()
    assert differences(finish(run), expected) == []

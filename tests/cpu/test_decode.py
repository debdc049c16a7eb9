"""Decode steps by themselves: the model's own bits alone, to rounding beside others, whatever the masks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fpcompile
from fpcompile.errors import InvalidInputError, UnsupportedModelError
from fpcompile.executor import decode_generic
from fpcompile.executor.decode import Decoder, Generates, PackedDecoder, rounded_up
from fpcompile.executor.decode_generic import GenericDecoder
from fpcompile.executor.generic import GenericProgram
from fpcompile.executor.kv import GrowingKV, LayerKV
from fpcompile.executor.sampling import Wishes
from fpcompile.executor.schedule import launch_seconds
from fpcompile.models.zoo import sample_ids, tiny_any, tiny_model
from tests.cpu.support import DTYPES, model_of, program_of, relative_error, same_bits

ARCHS = ("qwen3", "gemma2", "gpt_oss", "mixtral")
"""Grouped heads; softcap and windows; sinks, windows and experts; windows and experts."""


@functools.cache
def generic(arch: str) -> GenericProgram:
    """A tiny model, compiled by the generic route."""
    program = fpcompile.segment(tiny_model(arch), route="generic")
    assert isinstance(program, GenericProgram)
    return program


def ended(run: Any) -> Any:
    while not run.done:
        run.step()
    return run.result()


def decoder_of(program: fpcompile.Program) -> Decoder:
    """The decoder of a program that generates."""
    assert isinstance(program, Generates)
    return program.decoder()


def opened(decoder: Decoder, ids: Tensor) -> tuple[Any, Tensor]:
    """A sequence behind its prompt, and the logits of its first token."""
    begun = decoder.begin(ids)
    return decoder.open(begun, ended(begun.run))


def stepped(decoder: Decoder, sequences: Sequence[Any], tokens: Sequence[int]) -> Tensor:
    """The logits behind one more token of each."""
    step = decoder.step(sequences, tokens)
    while not step.run.done:
        step.run.step()
        step.run.validate()
    return step.logits()


def next_logits(model: Any, cache: Any, token: int) -> Tensor:
    """What the unmodified model gives for one more token; the cache grows."""
    out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    logits: Tensor = out.logits[0, -1]
    return logits


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_alone_a_sequence_has_the_models_bits(arch: str, dtype: torch.dtype) -> None:
    model, decoder = model_of(arch, dtype), decoder_of(program_of(arch, dtype))
    ids, more = sample_ids(11, seed=1), sample_ids(30, seed=2)[0].tolist()  # beyond the window of 16
    sequence, logits = opened(decoder, ids)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    assert same_bits(logits, out.logits[0, -1])
    for token in more:
        (got,) = stepped(decoder, [sequence], [token])
        assert same_bits(got, next_logits(model, out.past_key_values, token))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("arch", ["gemma2", "gpt_oss"])
def test_sequences_join_and_leave_between_steps(arch: str) -> None:
    model, decoder = model_of(arch), decoder_of(program_of(arch))
    prompts = [sample_ids(n, seed=n) for n in (1, 19, 40)]
    caches = [model(input_ids=ids, use_cache=True).past_key_values for ids in prompts]
    sequences = [opened(decoder, ids)[0] for ids in prompts]
    tokens = iter(sample_ids(200, seed=3)[0].tolist())
    for members in ([0], [0, 1], [2, 0, 1], [1, 2], [2], [0, 1, 2]):
        given_tokens = [next(tokens) for _ in members]
        got = stepped(decoder, [sequences[i] for i in members], given_tokens)
        assert got.shape == (len(members), model.config.get_text_config().vocab_size)
        for row, i, token in zip(got, members, given_tokens, strict=True):
            assert relative_error(row, next_logits(model, caches[i], token)) < 1e-5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("arch", ["qwen3", "gpt_oss"])
def test_a_step_can_be_undone_wherever_it_stopped(arch: str) -> None:
    decoder = decoder_of(program_of(arch))
    prompts = [sample_ids(n, seed=n) for n in (14, 64)]
    tokens = sample_ids(6, seed=3)[0].tolist()
    expected = [opened(decoder, ids)[0] for ids in prompts]
    rows = [stepped(decoder, expected, [token, token]) for token in tokens]
    sequences = [opened(decoder, ids)[0] for ids in prompts]
    launches = len(decoder.step(sequences, [1, 1]).run.schedule)
    for place, token in enumerate(tokens):
        failed = decoder.step(sequences, [token + 1, 3])
        for _ in range(launches * place // 5):
            failed.run.step()
        if failed.run.done:
            failed.logits()
        failed.run.release()
        failed.undo()
        assert same_bits(stepped(decoder, sequences, [token, token]), rows[place])


@torch.no_grad()
def test_a_cache_can_be_continued_and_stays_as_it_was() -> None:
    model, decoder = model_of("qwen3"), decoder_of(program_of("qwen3"))
    ids = sample_ids(30, seed=5)
    cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
    before = copy.deepcopy(cache)
    begun = decoder.begin(ids[:, 20:], past_key_values=cache)
    sequence, _ = decoder.open(begun, ended(begun.run))
    (got,) = stepped(decoder, [sequence], [7])
    whole = model(input_ids=torch.cat([ids, torch.tensor([[7]])], dim=1)).logits[0, -1]
    assert relative_error(got, whole) < 1e-5
    assert all(same_bits(a.keys, b.keys) for a, b in zip(cache.layers, before.layers, strict=True))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, "2 sequences"),
        ({"input_ids": [[1, 2]], "attention_mask": torch.tensor([[0, 1]])}, "hidden"),
        ({"input_ids": [[1, 2]], "position_ids": torch.tensor([[3, 4]])}, "position_ids"),
        ({"input_ids": [[1, 2]], "logits_to_keep": 2}, "logits_to_keep"),
        ({"input_ids": [[1, 2]], "use_cache": False}, "use_cache"),
        ({"input_ids": []}, "empty"),
    ],
)
def test_what_cannot_be_continued_is_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        decoder_of(program_of("qwen3")).begin(**inputs)


@pytest.mark.slow
def test_what_generate_would_begin_anew_is_refused() -> None:
    """phi3 drops its cache where its rotary frequencies change, behind 32 tokens here."""
    decoder = decoder_of(program_of("phi3", torch.float32, "operator", "longrope"))
    for prompt, count in ((25, 8), (33, 20)):
        decoder.sampler(decoder.begin(sample_ids(prompt)), Wishes(count))
    for prompt, count in ((25, 9), (32, 2)):
        with pytest.raises(InvalidInputError, match="crosses"):
            decoder.sampler(decoder.begin(sample_ids(prompt)), Wishes(count))


def test_a_step_keeps_the_budget() -> None:
    program = program_of("qwen3")
    decoder = decoder_of(program)
    assert isinstance(decoder, PackedDecoder)
    sequences = [opened(decoder, sample_ids(n, seed=n))[0] for n in (30, 50)]
    whole = decoder.step(sequences, [1, 2]).run
    assert len(whole.schedule) == len(program.segments), "without a budget a launch is a segment"
    budget = decoder.seconds(sequences) / 4
    run = decoder.step(sequences, [1, 2], [budget * 1e3, None]).run
    assert 4 <= len(run.schedule) < len(program.segments)
    shape, heads = run.call.shape, program.heads()
    seconds = [launch_seconds(n, program.stages, shape, program.costs, heads) for n in run.schedule]
    assert sum(s > budget * 1.2 for s in seconds) <= len(run.schedule) // 4, "contexts are rounded up"


def test_plans_are_made_for_few_lengths() -> None:
    assert [rounded_up(n) for n in (1, 15, 16, 17, 31, 33, 1000)] == [1, 15, 16, 18, 32, 36, 1024]
    assert len({rounded_up(n) for n in range(1024, 2048)}) == 9


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "mamba"])
def test_generic_programs_continue_one_sequence(arch: str) -> None:
    """As ``generate`` calls the model; two sequences in turns do not meet."""
    program = generic(arch)
    model: Any = program.model
    decoder = program.decoder()
    assert not decoder.together
    prompts = [sample_ids(n, seed=n) % 100 for n in (13, 5)]
    wishes = Wishes(max_new_tokens=6)
    made: list[list[int]] = []
    open_ones = []
    for ids in prompts:
        begun = decoder.begin(ids)
        sampler = decoder.sampler(begun, wishes)
        sequence, logits = decoder.open(begun, ended(begun.run))
        made.append([int(sampler.choose(logits))])
        open_ones.append((sequence, sampler))
    for _ in range(5):
        for tokens, (sequence, sampler) in zip(made, open_ones, strict=True):
            step = decoder.step([sequence], [tokens[-1]])
            ended(step.run)
            tokens.append(int(sampler.choose(step.logits()[0])))
        assert decoder.nbytes(open_ones[0][0]) > 0
    for ids, tokens in zip(prompts, made, strict=True):
        own = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert own[0, ids.shape[1] :].tolist() == tokens


@pytest.mark.slow
def test_a_model_that_keeps_its_state_to_itself_is_refused_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = GenericDecoder(generic("gpt2"))
    monkeypatch.setattr(
        decode_generic, "_STATES", ()
    )  # as for recurrent_gemma, whose state is in its modules
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="no cache and no state"):
            decoder.begin([[3, 4, 5]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [("BertForSequenceClassification", "does not generate"), ("T5ForConditionalGeneration", "encoder")],
)
def test_models_without_a_head_or_with_an_encoder_are_refused(name: str, message: str) -> None:
    case = tiny_any(name)
    program = fpcompile.segment(case.model, example_inputs=case.small)
    assert isinstance(program, Generates)
    with pytest.raises(InvalidInputError, match=message):
        program.decoder()


class Model:
    """Keys and values as lists: what the growing cache must show."""

    def __init__(self, tensors: LayerKV, span: int) -> None:
        self.all, self.span = tensors, span

    def append(self, keys: Tensor) -> LayerKV:
        """All of them, and of those what the first new token sees."""
        self.all = self.all.append(keys, keys + 1)
        seen = int(self.all.keys.shape[2])
        low = max(0, seen - int(keys.shape[2]) - self.span + 1) if self.span else 0
        return LayerKV(self.all.keys[:, :, low:], self.all.values[:, :, low:], low + self.all.start)


@settings(max_examples=60, deadline=None)
@given(
    first=st.integers(1, 90),
    start=st.integers(0, 5),
    span=st.sampled_from([0, 1, 2, 7, 40]),
    appends=st.lists(st.integers(1, 30), max_size=12),
)
def test_growing_caches_show_what_was_written(first: int, start: int, span: int, appends: list[int]) -> None:
    numbers = iter(range(10_000))

    def new(count: int) -> Tensor:
        rows = [[float(next(numbers))] * 2 for _ in range(count)]
        return torch.tensor(rows).view(1, 1, count, 2)

    keys = new(first)
    given_kv = LayerKV(keys, keys + 1, start)
    before = keys.clone()
    growing, model = GrowingKV(given_kv, span), Model(given_kv, span)
    for count in appends:
        more = new(count)
        assert growing.append(more, more + 1) is growing
        expected = model.append(more)
        assert growing.start == expected.start
        assert torch.equal(growing.keys, expected.keys)
        assert torch.equal(growing.values, expected.values)
    assert torch.equal(keys, before), "what it was given is not its own"


def test_growing_caches_are_copied_seldom_and_keep_a_window_only() -> None:
    one = torch.zeros(1, 1, 1, 4)
    growing = GrowingKV(LayerKV(one, one), 0)
    places = set()
    for _ in range(2000):
        growing.append(one, one)
        places.add(growing.keys.untyped_storage().data_ptr())
    assert len(places) < 25
    window = GrowingKV(LayerKV(one, one), 16)
    for _ in range(2000):
        window.append(one, one)
    assert window.nbytes <= 2 * (2 * 16 + 64) * 4 * 4

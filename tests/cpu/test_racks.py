"""Sequences side by side: what each sees is its own, and beside others it has its numbers to rounding."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fpcompile
from fpcompile.executor import racks as module
from fpcompile.executor.decode import PackedDecoder
from fpcompile.executor.kv import KV, LayerKV, kv_bytes
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.racks import Abreast, Flight, Place, Racks, room_for
from fpcompile.models.attention import AttentionCall, MaskKind, MaskSpec
from fpcompile.models.zoo import sample_ids, tiny_model
from tests.cpu.support import model_of, program_of, relative_error, same_bits
from tests.cpu.test_decode import next_logits, opened, stepped

SPANS = {0: 0, 1: 7}
NOTHING: Callable[[], object] = lambda: None  # noqa: E731


def call_of(span: int, kind: MaskKind = MaskKind.SLIDING) -> AttentionCall:
    """One that masks and is never made."""
    spec = MaskSpec(kind, span) if span else MaskSpec(MaskKind.CAUSAL)
    return AttentionCall(nn.Identity(), lambda *_: (torch.zeros(0), None), "sdpa", 0, spec, {}, 1, 1, (1, 1))


class Sequence_:
    """``written``: the number of each of its tokens."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self.written = [float(number) for number in numbers]
        self.past = len(self.written)
        self.place: Place | None = None


def layers_of(sequence: Sequence_, cut: int = 0) -> dict[int, KV]:
    """Keys are the numbers, values the negative ones; ``cut`` tokens of the window's layer are gone."""
    keys = torch.tensor(sequence.written).view(1, 1, -1, 1)
    return {0: LayerKV(keys, -keys), 1: LayerKV(keys[:, :, cut:], -keys[:, :, cut:], cut)}


def advance(
    racks: Racks,
    members: Sequence[Sequence_],
    numbers: Sequence[float],
    *,
    commit: bool = True,
    meanwhile: Callable[[], object] = NOTHING,
) -> None:
    """A step: every member sees its own tokens and the new one, and no more."""
    flight = Flight()
    groups = racks.groups(members, flight, ragged=len(members) > 1)
    assert sorted(i for indices, _ in groups for i in indices) == list(range(len(members)))
    meanwhile()
    for indices, caches in groups:
        for layer, kv in caches.items():
            assert isinstance(kv, Abreast)
            new = torch.tensor([numbers[i] for i in indices]).view(-1, 1, 1, 1)
            assert kv.append(new, -new) is kv
            mask = kv.mask(call_of(SPANS[layer]), torch.float32)
            assert mask.shape == (len(indices), 1, 1, kv.keys.shape[2])
            for row, index in enumerate(indices):
                own = [*members[index].written, numbers[index]][-SPANS[layer] :]
                visible = mask[row, 0, 0] == 0
                assert kv.keys[row, 0, visible, 0].tolist() == own
                assert kv.values[row, 0, visible, 0].tolist() == [-number for number in own]
            if len(members) == 1:
                assert kv.keys.shape[2] == len(own), "alone there is nothing besides"
                assert kv.start == members[0].past + 1 - len(own)
    for member, number in zip(members, numbers, strict=True) if commit else ():
        member.past += 1
        member.written.append(number)
    if commit or numbers[0] % 2:
        racks.landed(members, flight)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    limit=st.sampled_from([128, 512, 8192]),
    moves=st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "leave", "step", "step", "undone", "meanwhile"]),
            st.integers(1, 300),
            st.lists(st.integers(0, 20), max_size=8),
        ),
        min_size=3,
        max_size=20,
    ),
)
def test_each_sees_its_own(limit: int, moves: list[tuple[str, int, list[int]]]) -> None:
    """Whoever comes, goes, outgrows its room, or is there when a step fails."""
    counter = itertools.count(1)
    racks, sequences = Racks(SPANS), list[Sequence_]()

    def new(count: int) -> list[float]:
        return [float(next(counter)) for _ in range(count)]

    def put(tokens: int) -> None:
        sequence = Sequence_(new(tokens))
        racks.put(sequence, layers_of(sequence, min(tokens % 3, max(0, tokens - 6))))
        sequences.append(sequence)

    def come_and_go(tokens: int) -> None:
        put(tokens)
        if len(sequences) > 3:
            del sequences[tokens % len(sequences)]
        put(tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOKENS", limit)
        put(moves[0][1])
        for kind, tokens, chosen in moves:
            members = [sequences[i] for i in sorted({i % len(sequences) for i in chosen or [0]})]
            if kind == "put":
                put(tokens)
            elif kind == "leave" and len(sequences) > 1:
                del sequences[tokens % len(sequences)]
            elif kind == "meanwhile":
                advance(racks, members, new(len(members)), meanwhile=lambda n=tokens: come_and_go(n))  # type: ignore[misc]
            elif kind == "undone":
                advance(racks, members, new(len(members)), commit=False)
            else:
                for _ in range(tokens // 12):
                    advance(racks, members, new(len(members)))
            del members


def test_chunks_are_counted_from_position_zero() -> None:
    racks = Racks({0: 8})
    sequences = [Sequence_(range(n)) for n in (11, 16, 23)]
    for sequence in sequences:
        racks.put(sequence, {0: layers_of(sequence)[0]})
    ((order, caches),) = racks.groups(sequences, Flight(), ragged=True)
    kv = caches[0]
    assert isinstance(kv, Abreast)
    new = torch.tensor([float(sequences[index].past) for index in order]).view(-1, 1, 1, 1)
    kv.append(new, -new)
    mask = kv.mask(call_of(8, MaskKind.CHUNKED), torch.float32)
    for row, index in enumerate(order):
        past = sequences[index].past
        seen = kv.keys[row, 0, mask[row, 0, 0] == 0, 0].tolist()
        assert seen == list(range(past // 8 * 8, past + 1))


def test_memory_is_shared_out_and_ends_with_the_last_tenant() -> None:
    racks = Racks(SPANS)
    sequences = [Sequence_(range(40)) for _ in range(9)]
    for sequence in sequences:
        racks.put(sequence, layers_of(sequence))
    (rack,) = {sequence.place.rack for sequence in sequences if sequence.place}
    assert rack.slots == 16
    assert rack.nbytes == 16 * (128 + 78) * 2 * 4
    assert sum(map(racks.nbytes, sequences)) == pytest.approx(rack.nbytes, abs=9)
    del sequence, sequences[2:]
    advance(racks, sequences, [1.0, 2.0])
    assert rack.slots == 4, "what few need is given back"
    seen = weakref.ref(rack)
    del rack, sequences
    assert seen() is None


def test_a_rack_is_bounded_and_long_sequences_have_one_each() -> None:
    racks = Racks({0: 0})
    sequences = [Sequence_(range(n)) for n in (100,) * 40 + (5000,) * 2]
    for sequence in sequences:
        racks.put(sequence, {0: layers_of(sequence)[0]})
    groups = racks.groups(sequences, Flight(), ragged=True)
    assert sorted(len(members) for members, _ in groups) == [1, 1, 8, 32]


def test_where_memory_ends_a_rack_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    racks, first, second = Racks(SPANS), Sequence_(range(40)), Sequence_(range(50))
    racks.put(first, layers_of(first))
    new_zeros, made = Tensor.new_zeros, itertools.count(1)

    def scarce(self: Tensor, *size: int) -> Tensor:
        if next(made) == 3:
            raise torch.OutOfMemoryError("keys of the second layer")
        return new_zeros(self, *size)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_zeros", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            racks.put(second, layers_of(second))
    assert first.place is not None
    assert {t.shape[0] for pair in first.place.rack.tensors.values() for t in pair} == {1}
    advance(racks, [first], [1.0])
    racks.put(second, layers_of(second))
    advance(racks, [first, second], [2.0, 3.0])


def test_a_window_slides_in_its_slot_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is longer than what it slides by; were a layer moved and the next one not, the second attempt
    would move the first one again.
    """
    racks, sequence = Racks({0: 384, 1: 384}), Sequence_(range(1, 401))
    keys = torch.tensor(sequence.written).view(1, 1, -1, 1)
    racks.put(sequence, {layer: LayerKV(keys, -keys) for layer in (0, 1)})
    place, clone, calls = module.place_of(sequence), Tensor.clone, itertools.count(1)

    def short(tensor: Tensor, **options: Any) -> Tensor:
        if next(calls) == 3:
            raise MemoryError("injected")
        return clone(tensor, **options)

    def groups() -> Any:
        return racks.groups([sequence], Flight(), ragged=False)

    monkeypatch.setattr(Tensor, "clone", short)
    while sequence.past < 600:
        try:
            ((_, caches),) = groups()
        except MemoryError:
            ((_, caches),) = groups()
        sequence.past += 1
        new = torch.full((1, 1, 1, 1), float(sequence.past))
        for kv in caches.values():
            kv.append(new, -new)
            assert kv.keys.flatten().tolist() == list(range(sequence.past - 383, sequence.past + 1))
            assert torch.equal(kv.values, -kv.keys)
    assert module.place_of(sequence) is place, "it was not put elsewhere"
    assert place.origins == {384: 146}


def test_rooms_are_few_and_not_much_larger() -> None:
    rooms = [room_for(n) for n in range(1, 20_000)]
    assert all(n + 64 <= room <= 2 * (n + max(64, n // 4)) for n, room in enumerate(rooms, 1))
    assert all(room <= 1.9 * n for n, room in enumerate(rooms, 1) if n > 1000)
    assert len({room for room in rooms if 1024 <= room < 16384}) == 8


def test_what_another_left_behind_is_not_there() -> None:
    """A NaN under a mask would come through."""
    racks = Racks({0: 0})
    first, stays, last = Sequence_([float("nan")] * 50), Sequence_([1.0] * 20), Sequence_([2.0] * 30)
    racks.put(stays, {0: layers_of(stays)[0]})
    racks.put(first, {0: layers_of(first)[0]})
    del first
    racks.put(last, {0: layers_of(last)[0]})
    ((_, caches),) = racks.groups([stays, last], Flight(), ragged=True)
    assert bool(torch.isfinite(caches[0].keys).all())
    (whole,) = {sequence.place.rack for sequence in (stays, last) if sequence.place}
    assert bool(torch.isfinite(whole.tensors[0][0][:2]).all())


# ---- real models


def decoder_of(arch: str, dtype: torch.dtype = torch.float32) -> PackedDecoder:
    """One of its own."""
    program = program_of(arch, dtype)
    assert isinstance(program, PackedProgram)
    return PackedDecoder(program)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "gpt_oss", "mixtral", "gemma3n_text"])
def test_beside_others_a_sequence_has_its_numbers(arch: str) -> None:
    """Windows, soft caps, sinks, experts, shared caches; lengths of two rooms, past every window."""
    limit = 1e-5 if arch == "gemma3n_text" else 2e-6  # it differs as much where each is attended by itself
    model, decoder = model_of(arch), decoder_of(arch)
    prompts = [sample_ids(n, seed=n) for n in (1, 14, 30, 61, 70)]
    caches = [model(input_ids=ids, use_cache=True).past_key_values for ids in prompts]
    sequences = [opened(decoder, ids)[0] for ids in prompts]
    assert len({id(sequence.place.rack) for sequence in sequences}) == 2
    for tokens in torch.split(sample_ids(100, seed=3)[0], 5):
        rows = stepped(decoder, sequences, tokens.tolist())
        for row, cache, token in zip(rows, caches, tokens.tolist(), strict=True):
            assert relative_error(row, next_logits(model, cache, token)) < limit


@pytest.mark.slow
@torch.no_grad()
def test_in_bf16_the_error_is_the_models() -> None:
    model, decoder = model_of("qwen3", torch.bfloat16), decoder_of("qwen3", torch.bfloat16)
    exact: Any = copy.deepcopy(model)
    exact.float()
    prompts = [sample_ids(n, seed=n) for n in (5, 20, 33, 64, 64, 90)]
    caches = [[m(input_ids=ids, use_cache=True).past_key_values for ids in prompts] for m in (model, exact)]
    sequences = [opened(decoder, ids)[0] for ids in prompts]
    errors = torch.zeros(2, dtype=torch.float64)
    for tokens in torch.split(sample_ids(180, seed=3)[0], 6):
        rows = stepped(decoder, sequences, tokens.tolist())
        for row, own, best, token in zip(rows, *caches, tokens.tolist(), strict=True):
            right = next_logits(exact, best, token).double()
            for place, got in enumerate((row, next_logits(model, own, token))):
                errors[place] += (got.double() - right).square().mean()
    assert float(errors[0] / errors[1]) ** 0.5 < 1.1


@torch.no_grad()
def test_one_call_of_a_layer_serves_a_rack(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of("qwen3")
    sequences = [opened(decoder, sample_ids(n, seed=n))[0] for n in (1, 20, 21, 40)]
    decoder.seconds(sequences)  # calibrates, which attends as well
    batches: list[int] = []
    attend = AttentionCall.attend

    def counted(call: AttentionCall, q: Tensor, *rest: Any) -> Tensor:
        batches.append(int(q.shape[0]))
        return attend(call, q, *rest)

    monkeypatch.setattr(AttentionCall, "attend", counted)
    stepped(decoder, sequences, [1, 2, 3, 4])
    assert batches == [4] * len(decoder.program.attention)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["qwen3", "gemma2"])
def test_who_comes_while_a_step_waits_meets_nobody(arch: str) -> None:
    model, decoder = model_of(arch), decoder_of(arch)
    prompts = [sample_ids(n, seed=n) for n in (9, 25, 40)]
    caches = [model(input_ids=ids, use_cache=True).past_key_values for ids in prompts]
    first, second = (opened(decoder, ids)[0] for ids in prompts[:2])
    step = decoder.step([first, second], [5, 6])
    for _ in range(len(step.run.schedule) // 2):
        step.run.step()
    third = opened(decoder, prompts[2])[0]
    while not step.run.done:
        step.run.step()
    rows = [*step.logits(), *stepped(decoder, [third], [7])]
    for row, cache, token in zip(rows, caches, (5, 6, 7), strict=True):
        assert relative_error(row, next_logits(model, cache, token)) < 1e-5
    del first, step
    rows = [*stepped(decoder, [third, second], [8, 9])]
    for row, cache, token in zip(rows, (caches[2], caches[1]), (8, 9), strict=True):
        assert relative_error(row, next_logits(model, cache, token)) < 1e-5


@torch.no_grad()
def test_a_step_that_was_dropped_holds_nothing_up() -> None:
    """Its members had ended; the next one on their rack takes their place."""
    decoder = decoder_of("qwen3")
    stays = opened(decoder, sample_ids(10))[0]
    others = [opened(decoder, sample_ids(10))[0] for _ in range(3)]
    step = decoder.step([*others], [1, 2, 3])
    step.run.step()
    step.run.release()
    del step, others
    stepped(decoder, [stays], [1])
    assert stays.place.slot == 0
    assert len(stays.place.rack.tenants) == 1


@torch.no_grad()
def test_heads_are_attended_apart_where_the_budget_asks() -> None:
    program = program_of("qwen3")
    assert isinstance(program, PackedProgram)
    decoder = PackedDecoder(program)
    prompts = [sample_ids(n, seed=n) for n in (20, 33, 50)]
    whole = [opened(decoder, ids)[0] for ids in prompts]
    tiled = [opened(decoder, ids)[0] for ids in prompts]
    expected = stepped(decoder, whole, [1, 2, 3])
    step = decoder.step(tiled, [1, 2, 3], [1e-6])
    assert any(launch.tiled and launch.head_stop for launch in step.run.schedule)
    while not step.run.done:
        step.run.step()
    assert relative_error(step.logits(), expected) < 2e-6


@torch.no_grad()
def test_what_was_read_while_a_cache_is_taken_out_stays_whole() -> None:
    """Another thread may count the bytes of the old one meanwhile."""
    decoder = PackedDecoder(decoder_of("qwen3").program, abreast=False)
    sequence, _ = opened(decoder, sample_ids(11))
    layers, seen = decoder.layers(sequence), sequence.kv
    held = kv_bytes([seen])
    assert held > 0
    decoder.take_out(sequence)
    assert (decoder.nbytes(sequence), kv_bytes([seen])) == (0, held)
    nothing = sequence.kv
    decoder.put_back(sequence, layers)
    assert not nothing
    assert decoder.nbytes(sequence) > 0


@torch.no_grad()
def test_attention_without_masks_is_called_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("qwen3")
    assert isinstance(program, PackedProgram)
    abreast, apart = PackedDecoder(program), PackedDecoder(program, abreast=False)
    prompts = [sample_ids(n, seed=n) for n in (20, 33)]
    rows = []
    for decoder in (abreast, apart):
        sequences = [opened(decoder, ids)[0] for ids in prompts]
        assert all(decoder.nbytes(sequence) > 0 for sequence in sequences)
        rows.append(stepped(decoder, sequences, [1, 2]))
        assert all((sequence.place is None) == (decoder is apart) for sequence in sequences)
    assert relative_error(*rows) < 2e-6
    alone = [stepped(decoder, [opened(decoder, prompts[0])[0]], [1]) for decoder in (abreast, apart)]
    assert same_bits(*alone)


@torch.no_grad()
def test_a_function_registered_as_sdpa_is_called_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take the model's bool masks only; a rack has additive ones."""

    def own(*args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", own)
    program = fpcompile.segment(tiny_model("qwen3"), verify=False)
    assert isinstance(program, PackedProgram)
    decoder = PackedDecoder(program)
    sequences = [opened(decoder, sample_ids(n, seed=n))[0] for n in (20, 33)]
    stepped(decoder, sequences, [1, 2])
    assert all(sequence.place is None for sequence in sequences)


@torch.no_grad()
def test_grouped_heads_are_rows_where_several_are_attended_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention without a mask is many times slower there: each head reads the keys by itself."""
    program = program_of("qwen3")
    assert isinstance(program, PackedProgram)
    (call, *_) = program.attention
    decoder = PackedDecoder(program, abreast=False)
    sequences = [opened(decoder, sample_ids(n, seed=n))[0] for n in (20, 33)]
    heads: list[int] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def recorded(q: Tensor, *rest: Any, **more: Any) -> Tensor:
        heads.append(int(q.shape[1]))
        return kernel(q, *rest, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    stepped(decoder, sequences, [1, 2])
    assert set(heads) == {call.kv_heads}
    assert call.heads > call.kv_heads

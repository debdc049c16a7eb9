"""The generic route on real architectures: one for each kind of state and each trap."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.models.generic_tree import flatten
from fpcompile.models.zoo import sample_ids, tiny_any, tiny_model
from fpcompile.serving.coverage_checks import preempted

pytestmark = pytest.mark.slow

ARCHS = {
    "roberta": "positions counted from ids",
    "bart": "learned positions, encoder-decoder class",
    "bloom": "ALiBi",
    "deepseek_v3": "a compressed cache",
    "lfm2": "convolution states",
    "mamba": "an opaque mixer",
    "big_bird": "a decision on ids",
    "xlnet": "relative positions, memories",
    "recurrent_gemma": "states inside the module",
    "dbrx": "experts that branch on values",
    "llama4_text": "chunks",
}
PADDED = ("roberta", "bloom", "deepseek_v3", "lfm2")
CLASSES = (
    "T5ForConditionalGeneration",
    "ViTModel",
    "Wav2Vec2Model",
    "CLIPModel",
    "DebertaV2Model",
    "Qwen2_5_VLForConditionalGeneration",
)
_CACHES = ("past_key_values", "cache_params")


@pytest.mark.parametrize("arch", ARCHS)
def test_causal_models_give_their_own_bits(arch: str) -> None:
    model: Any = tiny_model(arch)
    program: Any = fpcompile.segment(model, route="generic")
    with torch.no_grad():
        for length in (17, 40):
            ids = sample_ids(length, seed=length)
            assert torch.equal(model(input_ids=ids).logits, preempted(program, input_ids=ids).logits)


@pytest.mark.parametrize("arch", PADDED)
def test_padded_batches_give_their_own_bits(arch: str) -> None:
    model: Any = tiny_model(arch)
    program: Any = fpcompile.segment(model, route="generic", verify=False)
    ids = sample_ids(40, batch=2)
    for hidden in (slice(0, 9), slice(31, 40)):
        mask = torch.ones_like(ids)
        mask[0, hidden] = 0
        with torch.no_grad():
            own = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(own, program(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("arch", ["deepseek_v3", "lfm2", "mamba", "cohere2"])
def test_a_cache_continues_by_program_and_by_model(arch: str) -> None:
    model: Any = tiny_model(arch)
    program: Any = fpcompile.segment(model, route="generic")
    ids = sample_ids(42, seed=5)
    with torch.no_grad():
        own = model(input_ids=ids[:, :41], use_cache=True)
    got = program(input_ids=ids[:, :41], use_cache=True)
    key = next(k for k in _CACHES if getattr(own, k, None) is not None)
    ours, theirs = getattr(got, key), getattr(own, key)
    assert type(ours) is type(theirs)
    before = [t.clone() for t in flatten(ours).tensors]
    with torch.no_grad():
        expected = model(input_ids=ids[:, 41:], **{key: copy.deepcopy(theirs)}).logits
        assert torch.equal(model(input_ids=ids[:, 41:], **{key: copy.deepcopy(ours)}).logits, expected)
    assert torch.equal(program(input_ids=ids[:, 41:], **{key: ours}).logits, expected)
    for kept, now in zip(before, flatten(ours).tensors, strict=True):
        assert torch.equal(kept, now)


@pytest.mark.parametrize("name", CLASSES)
def test_other_classes_give_their_own_bits(name: str) -> None:
    case = tiny_any(name)
    program = fpcompile.segment(case.model, example_inputs=case.small)
    for inputs in (case.small, case.large):
        arguments: dict[str, Any] = dict(inputs)
        with torch.no_grad():
            own = flatten(case.model(**arguments)).tensors
        for a, b in zip(own, flatten(preempted(program, **arguments)).tensors, strict=True):
            assert torch.equal(a, b)


def test_a_program_continues_to_the_tokens_of_generate() -> None:
    for arch, route in (("cohere2", "packed"), ("deepseek_v3", "generic")):
        model: Any = tiny_model(arch)
        program: Any = fpcompile.segment(model)
        assert program.route == route
        ids = sample_ids(24, seed=3)
        options: dict[str, Any] = {"do_sample": False, "use_cache": True}
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=16, **options)
            cache = program(input_ids=ids, use_cache=True).past_key_values
            first = program(input_ids=ids, logits_to_keep=1).logits[:, -1:].argmax(-1)
            given = torch.cat([ids, first], dim=1)
            got = model.generate(given, past_key_values=cache, max_new_tokens=15, **options)
        assert torch.equal(got, whole), arch


def test_explain_says_what_blocked_the_packed_route() -> None:
    program = fpcompile.segment(tiny_model("bloom"))
    assert program.route == "generic"
    assert "the packed route was not taken" in program.explain()

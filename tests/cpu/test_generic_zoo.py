"""The generic route on real architectures: one for each kind of state and each trap."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.errors import UnsupportedModelError
from fpcompile.models.generic_tree import flatten
from fpcompile.models.zoo import sample_ids, tiny_any, tiny_model
from fpcompile.serving.coverage_checks import preempted

pytestmark = pytest.mark.slow

ARCHS = {
    "bloom": "ALiBi",
    "roberta": "positions counted from ids",
    "deepseek_v3": "a compressed cache",
    "lfm2": "convolution states",
    "mamba": "an opaque mixer",
    "qwen3_next": "linear attention",
    "big_bird": "a decision on ids",
    "dbrx": "experts that branch on values",
}
CLASSES = ("T5ForConditionalGeneration", "ViTModel", "Wav2Vec2Model", "CLIPModel", "DebertaV2Model")
_CACHES = ("past_key_values", "cache_params")


@pytest.mark.parametrize("arch", ARCHS)
def test_causal_models_give_their_own_bits(arch: str) -> None:
    model: Any = tiny_model(arch)
    program: Any = fpcompile.segment(model, route="generic")
    with torch.no_grad():
        for length in (1, 17, 40):
            ids = sample_ids(length, seed=length)
            assert torch.equal(model(input_ids=ids).logits, program(input_ids=ids).logits)
        ids = sample_ids(40, batch=2)
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        own = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(own, program(input_ids=ids, attention_mask=mask).logits)
    assert torch.equal(own, preempted(program, input_ids=ids, attention_mask=mask).logits)


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


def test_a_model_that_rewrites_its_weights_says_so() -> None:
    with pytest.raises(UnsupportedModelError, match="writes into its inputs or weights"):
        fpcompile.segment(tiny_model("rwkv"))


def test_explain_says_what_blocked_the_packed_route() -> None:
    program = fpcompile.segment(tiny_model("bloom"))
    assert program.route == "generic"
    assert "the packed route was not taken" in program.explain()

"""The route of real architectures: packed where it is proven, with the true reason where it is not."""

from __future__ import annotations

import pytest
import torch

import fpcompile
from fpcompile.errors import UnsupportedModelError
from fpcompile.executor.packed import PackedProgram
from fpcompile.models.capture import capture
from fpcompile.models.zoo import sample_ids, tiny_model

pytestmark = pytest.mark.slow

PACKED = (
    "gpt2",
    "bert",
    "opt",
    "cohere2",
    "stablelm",
    "phimoe",
    "gemma4_text",
    "ernie4_5_moe",
)

REASONS = {
    "roberta": "positions are counted from the token ids",
    "deepseek_v3": "the model's cache holds something else",
    "lfm2": "carries a state from token to token",
    "mamba": "number of tokens a constant",
    "biogpt": "combined with a padding mask",
    "hrm_text": "read before it is written",
    "xlm": "mixes tokens",
}


@pytest.mark.parametrize("arch", PACKED)
def test_packed_models_give_their_own_numbers(arch: str) -> None:
    model = tiny_model(arch)
    program = fpcompile.segment(model)
    if program.route != "packed":
        pytest.fail("\n".join(program.plan.notes))
    for length in (1, 2, 17, 40):
        ids = sample_ids(length, seed=length)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, program(input_ids=ids).logits)
    ids = sample_ids(50, batch=2)
    mask = torch.ones_like(ids)
    mask[0, 33:] = 0
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    got = program(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert float((own - got).abs().max() / own.abs().max()) < 2e-6


@pytest.mark.parametrize("arch", REASONS)
def test_the_packed_route_is_refused_for_the_true_reason(arch: str) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        fpcompile.segment(tiny_model(arch), route="packed", verify=False)
    assert REASONS[arch] in refused.value.reason


def test_shared_layers_add_nothing_to_the_cache() -> None:
    captured = capture(tiny_model("gemma4_text"))
    calls = captured.attention
    assert [c.writes for c in calls] == [True] * 4 + [False] * 2
    assert {c.layer for c in calls if not c.writes} <= {c.layer for c in calls if c.writes}


def test_attention_is_the_one_of_the_language_models_own_configuration() -> None:
    """The outer configuration says nothing; the inner one says sdpa, and that is what the model runs."""
    model = tiny_model("got_ocr2")
    program = fpcompile.segment(model)
    assert isinstance(program, PackedProgram)
    inner = model.config.get_text_config()._attn_implementation
    assert {call.implementation for call in program.attention} == {inner} == {"sdpa"}
    for length in (2, 40):
        ids = sample_ids(length)
        with torch.no_grad():
            assert torch.equal(program(ids).logits, model(ids).logits)

"""The tiny zoo: every architecture builds, runs, and behaves as its row of facts says."""

from __future__ import annotations

from collections import Counter
from inspect import signature
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fpcompile.errors import UnknownNameError, UnsupportedModelError
from fpcompile.models.zoo import (
    ANY_NAMES,
    CAUSAL_ARCHS,
    FACTS,
    MAIN_ARCHS,
    ROPE_THRESHOLD,
    ROPE_VARIANTS,
    UNBUILDABLE,
    arch_facts,
    dynamic_dims,
    sample_ids,
    tiny_any,
    tiny_config,
    tiny_model,
)
from fpcompile.models.zoo.beyond_cases import CASES

RUNNABLE = tuple(arch for arch in CAUSAL_ARCHS if arch not in UNBUILDABLE)

# The quickest of each state kind and oddity; the slow test runs all.
REPRESENTATIVE = (
    *("llama", "mistral", "gemma3_text", "gpt_oss", "mixtral", "bert", "bloom", "mamba", "falcon_h1", "rwkv"),
    *("xlnet", "cpmant", "xlm", "musicgen"),
)

MAX_PARAMETERS = 2_000_000

# Cache layer class of transformers -> the word for it in zoo facts.
WORDS = {
    "DynamicLayer": "kv",
    "DynamicSlidingWindowLayer": "window",
    "DynamicIndexedLayer": "indexed",
    "MiniMaxM3VLSparseCacheLayer": "indexed",
    "DeepseekV4HCACache": "compressed",
    "DeepseekV4CSACache": "compressed",
    "LinearAttentionLayer": "recurrent",
    "LinearAttentionAndFullAttentionLayer": "recurrent+kv",
    "LinearAttentionAndSlidingWindowAttentionLayer": "recurrent+window",
    "DummyLayer": "stateless",
}
STATE_NAMES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
OTHER_CARRIERS = {"mems": "hidden", "past_buckets_states": "hidden", "state": "recurrent"}


def changed(ids: torch.Tensor, position: int) -> torch.Tensor:
    """``ids`` with another plain token at ``position``."""
    other = ids.clone()
    other[0, position] = (other[0, position] - 8 + 1) % 100 + 8
    return other


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits
    return result


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Parameters, buffers and plain attributes of every module."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor | int | float | str | bool | None):
                found[f"{path}.{name}"] = value.clone() if isinstance(value, torch.Tensor) else value
    found |= {name: value.detach().clone() for name, value in model.named_parameters()}
    return found | {name: value.clone() for name, value in model.named_buffers()}


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(one: object, two: object) -> bool:
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
            return one.shape == two.shape and torch.equal(one, two)
        return type(one) is type(two) and one == two

    return sorted(name for name in before | after if not same(before.get(name), after.get(name)))


def states(output: Any) -> tuple[str, ...]:
    """The kinds of state that ``output`` carries, in order of first use."""
    for name, word in OTHER_CARRIERS.items():
        if output.get(name) is not None:
            return (word,)
    cache = output.get("past_key_values", output.get("cache_params"))
    if cache is None:
        return ()
    if type(cache).__name__ == "xLSTMCache":
        return ("recurrent",)
    if type(cache).__name__ == "EncoderDecoderCache":
        cache = cache.self_attention_cache
    words = [WORDS[type(layer).__name__] for layer in cache.layers]
    if type(cache).__name__ == "MiniMaxCache":  # keeps its linear states beside its layers
        words.insert(0, "recurrent")
    return tuple(dict.fromkeys(words))


def continued(model: PreTrainedModel, ids: torch.Tensor, cuts: list[int], *, positions: bool) -> torch.Tensor:
    """The last logits of ``ids``, in parts that end at ``cuts``, each from the state of the one before."""
    state: dict[str, Any] = {}
    start = 0
    for end in cuts:
        extra = {"position_ids": torch.arange(start, end)[None]} if positions else {}
        with torch.no_grad():
            output = model(input_ids=ids[:, start:end], use_cache=True, **state, **extra)
        state = {name: output[name] for name in STATE_NAMES if output.get(name) is not None}
        start = end
    result: torch.Tensor = output.logits[:, -1]
    return result


def continues(model: PreTrainedModel) -> str:
    """How the model goes on from its own state: the word of zoo facts."""
    ids = sample_ids(28)
    whole = logits(model, ids)
    ways = {
        "yes": ([7, 20, 28], False),
        "positions": ([7, 20, 28], True),
        "single": ([20, *range(21, 29)], False),
    }
    for word, (cuts, positions) in ways.items():
        if positions and "position_ids" not in signature(model.forward).parameters:
            continue
        try:
            last = continued(model, ids, cuts, positions=positions)
        except (RuntimeError, AssertionError):  # refuses more than one token
            continue
        if (last - whole[:, -1]).abs().max() < 2e-5 * whole.std():
            return word
    return "no"


def check_against_facts(arch: str) -> None:
    facts = arch_facts(arch)
    model = tiny_model(arch)
    before = snapshot(model)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < MAX_PARAMETERS
    for length in (1, 3, 17, 60):
        ids = sample_ids(length)
        out = logits(model, ids)
        assert out.shape[:2] == (1, length)
        assert out.isfinite().all()
        if length > 1:
            assert (out[:, 1:] - out[:, :-1]).abs().amax(-1).min() > 1e-3, f"positions alike at {length}"
            late = logits(model, changed(ids, -1))
            moved = (late[:, :-1] - out[:, :-1]).abs().max()
            assert facts.causal is False or moved < 1e-5, f"a later token moves earlier logits at {length}"
            assert (late[:, -1] - out[:, -1]).abs().max() > 1e-3
        if length == 3:
            assert (logits(model, changed(ids, 0))[:, -1] - out[:, -1]).abs().max() > 1e-3
    if not facts.causal:
        ids = sample_ids(60)
        assert (logits(model, changed(ids, -1))[:, :-1] - logits(model, ids)[:, :-1]).abs().max() > 1e-3
    with torch.no_grad():
        carried = states(model(input_ids=sample_ids(20), use_cache=True))
    assert continues(model) == facts.continues
    moved_names = differing(before, snapshot(model))
    assert facts.left_as_found == (not moved_names), moved_names
    assert (carried or facts.states) == facts.states
    assert carried or set(facts.states) <= {"module"}


@pytest.mark.parametrize("arch", REPRESENTATIVE)
def test_representative_architecture_behaves_as_its_facts_say(arch: str) -> None:
    check_against_facts(arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in RUNNABLE if arch not in REPRESENTATIVE])
def test_every_architecture_behaves_as_its_facts_say(arch: str) -> None:
    check_against_facts(arch)


def test_tables_name_known_architectures() -> None:
    assert set(FACTS) <= set(RUNNABLE)
    assert set(MAIN_ARCHS) <= set(RUNNABLE)
    assert len(RUNNABLE) == len(CAUSAL_ARCHS) - 2


@pytest.mark.parametrize("arch", sorted(UNBUILDABLE))
def test_draft_heads_are_refused_with_the_reason(arch: str) -> None:
    with pytest.raises(UnsupportedModelError, match="draft head"):
        tiny_model(arch)


def test_unknown_architecture_lists_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'llama'"):
        tiny_config("lama")


def test_same_seed_same_bits_and_global_generator_untouched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = tiny_model("mamba"), tiny_model("mamba"), tiny_model("mamba", seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert not differing(snapshot(one), snapshot(two))
    assert not torch.equal(logits(one, sample_ids(5)), logits(other, sample_ids(5)))


def test_reduced_precision_rounds_the_same_weights() -> None:
    full, half = tiny_model("llama"), tiny_model("llama", dtype=torch.bfloat16)
    rounded = {name: value.bfloat16() for name, value in full.state_dict().items()}
    assert not differing(rounded, dict(half.state_dict()))
    frequencies = dict(half.named_buffers())["model.rotary_emb.inv_freq"]
    assert frequencies.dtype == torch.float32


def test_modules_that_loading_keeps_in_fp32_are_kept() -> None:
    model = tiny_model("flint", dtype=torch.bfloat16)
    kept = {name for name, value in model.named_parameters() if value.dtype == torch.float32}
    assert any(name.endswith("gate.weight") for name in kept)
    assert not any("q_proj" in name for name in kept)


def test_sinks_biases_and_routing_biases_are_not_zero() -> None:
    for arch, suffix in (("gpt_oss", "sinks"), ("qwen2", "bias"), ("deepseek_v3", "correction_bias")):
        tensors = {**tiny_model(arch).state_dict()}
        named = [value for name, value in tensors.items() if name.endswith(suffix)]
        assert named
        assert all((value != 0).all() for value in named)


@pytest.mark.parametrize("arch", ["mistral", "phi3"])
def test_sliding_window_ends_the_reach(arch: str) -> None:
    model, ids = tiny_model(arch), sample_ids(60)
    reach = 2 * (16 - 1)  # two layers of a window of 16 positions
    base = logits(model, ids)[:, -1]
    assert torch.equal(logits(model, changed(ids, 59 - reach - 1))[:, -1], base)
    assert not torch.equal(logits(model, changed(ids, 59 - reach))[:, -1], base)


def test_overrides_reach_nested_configs() -> None:
    config = tiny_config("gemma3", overrides={"text_config": {"sliding_window": 8}, "image_token_id": 99})
    assert config.text_config.sliding_window == 8
    assert config.text_config.hidden_size == 64
    assert config.image_token_id == 99


@pytest.mark.parametrize("variant", ROPE_VARIANTS)
@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt_neox"])
def test_rope_variant_is_the_one_in_use(arch: str, variant: str) -> None:
    model = tiny_model(arch, rope=variant)
    ids = sample_ids(2 * ROPE_THRESHOLD)
    out = logits(model, ids)
    assert out.isfinite().all()
    assert variant == "default" or not torch.equal(out, logits(tiny_model(arch, rope="default"), ids))


def test_rope_entries_are_merged_over_the_defaults() -> None:
    config = tiny_config("llama", rope={"rope_type": "linear", "factor": 2.0})
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnknownNameError, match="rope variant"):
        tiny_config("llama", rope="spiral")


def test_sample_ids_avoid_special_tokens() -> None:
    ids = sample_ids(4000, batch=2, seed=3)
    config = tiny_config("gemma3")
    special = {config.image_token_id, config.text_config.pad_token_id, config.text_config.eos_token_id}
    assert ids.shape == (2, 4000)
    assert not special & set(ids.flatten().tolist())


@pytest.mark.slow
@pytest.mark.parametrize("arch", RUNNABLE)
def test_every_layer_type_appears_twice(arch: str) -> None:
    config = tiny_config(arch).get_text_config(decoder=True)
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        assert kinds is None or min(Counter(kinds).values()) >= 2


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor of a model output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [found for item in value for found in tensors(item)]
    return [found for item in value.values() for found in tensors(item)] if hasattr(value, "items") else []


def outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs))


def check_any(name: str) -> None:
    case = tiny_any(name)
    assert not case.model.training
    assert sum(p.numel() for p in case.model.parameters()) < MAX_PARAMETERS
    assert case.small.keys() == case.large.keys()
    assert any(dynamic_dims(case).values())
    for input_name, dims in dynamic_dims(case).items():
        small, large = case.small[input_name], case.large[input_name]
        assert small.dtype == large.dtype
        assert all(min(small.shape[dim], large.shape[dim]) >= 2 for dim in dims)
    for inputs in (case.small, case.large):
        first, again = outputs(case.model, inputs), outputs(case.model, inputs)
        assert first
        assert all(value.isfinite().all() for value in first if value.is_floating_point())
        equal = all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
        assert equal == CASES[name].repeatable
        for input_name, value in inputs.items():
            if value.is_floating_point():
                other = inputs | {input_name: value + 0.5 * value.flip(-1)}
            elif input_name.endswith("input_ids"):
                other = inputs | {input_name: changed(value, 1)}
            else:
                continue
            pairs = zip(outputs(case.model, other), first, strict=True)
            assert any((one - two).abs().max() > 1e-4 for one, two in pairs), (
                f"{input_name} reaches no output"
            )


@pytest.mark.parametrize("name", ANY_NAMES)
def test_class_beyond_causal_models_runs_at_two_sizes(name: str) -> None:
    check_any(name)


def test_unknown_class_lists_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'BertModel'"):
        tiny_any("BertModle")


def test_classes_beyond_causal_models_come_in_reduced_precision() -> None:
    case = tiny_any("ViTModel", dtype=torch.bfloat16)
    assert case.small["pixel_values"].dtype == torch.bfloat16
    assert outputs(case.model, case.small)[0].dtype == torch.bfloat16

"""Tokens are chosen as ``generate`` chooses them: greedy and drawn, with its processors and its defaults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import SuppressTokensLogitsProcessor

from fpcompile.errors import InvalidInputError
from fpcompile.executor.decode import PackedDecoder
from fpcompile.executor.sampling import Sampler, Wishes
from fpcompile.models.zoo import sample_ids
from tests.cpu.support import model_of, program_of
from tests.cpu.test_decode import decoder_of

PROMPT = sample_ids(9, seed=1)
NEW = 12


def config_of(**fields: Any) -> GenerationConfig:
    """A config of transformers."""
    return GenerationConfig(**fields)  # type: ignore[no-untyped-call]


def tokens_of(wishes: Wishes, prompt: Tensor = PROMPT) -> list[int]:
    """What decode steps and a sampler make of a prompt."""
    decoder = decoder_of(program_of("qwen3"))
    begun = decoder.begin(prompt)
    sampler = decoder.sampler(begun, wishes)
    while not begun.run.done:
        begun.run.step()
    sequence, logits = decoder.open(begun, begun.run.result())
    tokens: list[int] = []
    while True:
        tokens.append(int(sampler.choose(logits)))
        sampler.took(tokens[-1])
        if tokens[-1] in sampler.stops or len(tokens) == sampler.max_new_tokens:
            return tokens
        step = decoder.step([sequence], tokens[-1:])
        while not step.run.done:
            step.run.step()
        (logits,) = step.logits()


def own(config: GenerationConfig | None, seed: int = 0, prompt: Tensor = PROMPT, **more: Any) -> list[int]:
    """What ``generate`` makes of it after ``torch.manual_seed``."""
    model: Any = model_of("qwen3")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = model.generate(prompt, generation_config=config, **more)
    return [int(token) for token in whole[0, prompt.shape[1] :]]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 5},
    {"do_sample": True, "temperature": 1.5, "top_p": 0.8, "top_k": 0},
    {"do_sample": True, "min_p": 0.1},
    {"do_sample": True, "typical_p": 0.7, "repetition_penalty": 1.3},
    {"do_sample": True, "epsilon_cutoff": 0.01, "renormalize_logits": True},
    {"repetition_penalty": 2.0},
    {"no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 1.5},
    {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": list(range(40))},
    {"min_new_tokens": 8, "eos_token_id": list(range(0, 120, 2))},
    {"forced_eos_token_id": 3},
    {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 4},
]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_the_tokens_are_those_of_generate(fields: dict[str, Any]) -> None:
    config = config_of(max_new_tokens=NEW, **fields)
    seed = 17 if fields.get("do_sample") else None
    assert tokens_of(Wishes(config=config, seed=seed)) == own(config, seed or 0)


def test_draws_follow_the_seed() -> None:
    config = config_of(max_new_tokens=NEW, do_sample=True)
    first, again, other = (tokens_of(Wishes(config=config, seed=n)) for n in (1, 1, 2))
    assert first == again != other
    assert tokens_of(Wishes(config=config)) != tokens_of(Wishes(config=config)), "without one they differ"


def test_drawing_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    tokens_of(Wishes(config=config_of(max_new_tokens=3, do_sample=True), seed=5))
    assert torch.equal(state, torch.random.get_rng_state())


def test_draws_have_the_distribution_of_the_scores() -> None:
    model: Any = model_of("qwen3")
    config = config_of(do_sample=True, temperature=0.5, top_k=3, max_new_tokens=1)
    sampler = Sampler(model, Wishes(config=config, seed=0), PROMPT, limit=None)
    logits = torch.full((200,), -5.0)
    logits[[10, 20, 30, 40]] = torch.tensor([1.0, 0.5, 0.0, -0.5])
    drawn = torch.tensor([int(sampler.choose(logits)) for _ in range(4000)])
    counts = torch.stack([(drawn == token).sum() for token in (10, 20, 30)]) / 4000
    expected = torch.softmax(torch.tensor([2.0, 1.0, 0.0]), dim=0)
    assert torch.allclose(counts, expected, atol=0.03)
    assert float(counts.sum()) == 1, "the fourth is not among the top three"


def test_further_processors_come_as_in_generate() -> None:
    mine = [SuppressTokensLogitsProcessor(list(range(60)), device="cpu")]
    got = tokens_of(Wishes(NEW, processors=mine))
    assert got == own(None, max_new_tokens=NEW, do_sample=False, logits_processor=mine)
    assert min(got) >= 60


def test_processors_see_the_whole_sequence() -> None:
    seen: list[list[int]] = []

    def watch(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids[0].tolist())
        return scores

    tokens = tokens_of(Wishes(70, processors=[watch]))  # longer than the room that it begins with
    prompt = PROMPT[0].tolist()
    assert seen == [prompt + tokens[:n] for n in range(70)]


def test_lengths_and_stops_are_those_of_generate() -> None:
    model: Any = model_of("qwen3")

    def made(prompt: Tensor = PROMPT, limit: int | None = None, **fields: Any) -> Sampler:
        config = config_of(**fields) if fields else None
        return Sampler(model, Wishes(config=config), prompt, limit=limit)

    assert made().max_new_tokens == 20, "transformers' default"
    assert made(max_length=15).max_new_tokens == 6
    assert made(max_length=15, max_new_tokens=3).max_new_tokens == 3
    assert made(eos_token_id=[4, 5]).stops == {4, 5}
    assert Sampler(model, Wishes(7, config_of(max_new_tokens=3)), PROMPT, limit=None).max_new_tokens == 7
    with pytest.raises(InvalidInputError, match="max_length leaves no room"):
        made(max_length=9)
    assert made(max_new_tokens=4, limit=12).max_new_tokens == 4, "the last token is not fed back"
    with pytest.raises(InvalidInputError, match="longer than the model's positions"):
        made(max_new_tokens=5, limit=12)


def test_the_models_own_settings_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = model_of("qwen3", torch.float32, None)  # the very one that is compiled
    decoder = decoder_of(program_of("qwen3"))
    assert isinstance(decoder, PackedDecoder)
    begun = decoder.begin(PROMPT)
    assert decoder.sampler(begun, Wishes(3)).plain
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.5)
    assert not decoder.sampler(begun, Wishes(3)).plain, "as it is when somebody asks"
    assert not Sampler(model, Wishes(3, config_of(top_k=3)), PROMPT, limit=None).plain
    assert model.generation_config.max_new_tokens is None


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 4}, {"num_return_sequences": 2, "do_sample": True}, {"guidance_scale": 1.5},
        {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}, {"stop_strings": ["x"]},
        {"max_time": 3.0}, {"token_healing": True}, {"use_cache": False}, {"cache_implementation": "static"},
        {"output_scores": True, "return_dict_in_generate": True}, {"output_logits": True},
        {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "high"}, {"prefill_chunk_size": 8},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_named(fields: dict[str, Any]) -> None:
    config = config_of(max_new_tokens=3)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(InvalidInputError, match=f"generation_config.{next(iter(fields))} is not supported"):
        Sampler(model_of("qwen3"), Wishes(config=config), PROMPT, limit=None)


@pytest.mark.parametrize(
    "fields", [{"temperature": -1.0, "do_sample": True}, {"repetition_penalty": -1.0}], ids=str
)
def test_wrong_values_are_typed_errors(fields: dict[str, Any]) -> None:
    config = config_of(max_new_tokens=3)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(InvalidInputError, match="generation_config is wrong"):
        Sampler(model_of("qwen3"), Wishes(config=config), PROMPT, limit=None)

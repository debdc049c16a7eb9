"""Bad input to the compiler and to runs: a typed error that says what was expected, what came, what to do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import fpcompile
from fpcompile.errors import (
    CheckpointError,
    InvalidInputError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from fpcompile.models.zoo import sample_ids, tiny_model
from tests.cpu.support import differences, model_of, outcome, program_of, reference


@pytest.fixture(scope="module")
def program() -> fpcompile.Program:
    return program_of("llama")


def _complete(error: InvalidInputError) -> None:
    assert error.what
    assert error.expected
    assert error.got


@pytest.mark.parametrize("given", [None, "llama", 3, dict, nn.Linear, [nn.Linear(2, 2)]], ids=repr)
def test_not_a_model(given: Any) -> None:
    with pytest.raises(InvalidInputError, match="not a model") as caught:
        fpcompile.segment(given)
    _complete(caught.value)
    assert "PreTrainedModel" in str(caught.value.expected)


def test_a_model_in_training_mode() -> None:
    model = tiny_model("llama").train()
    with pytest.raises(InvalidInputError, match="training mode") as caught:
        fpcompile.segment(model)
    assert caught.value.expected == "a model in evaluation mode"
    assert "eval()" in str(caught.value.remedy)
    assert model.training, "left as found"


@pytest.mark.slow
def test_a_model_of_which_a_part_is_in_training_mode() -> None:
    """Its dropout would be traced and be random."""
    model: Any = tiny_model("gpt_neox", overrides={"hidden_dropout": 0.5})
    model.gpt_neox.layers[1].train()
    with pytest.raises(InvalidInputError, match="training mode"):
        fpcompile.segment(model)


@pytest.mark.parametrize("given", ["operators", "", "LAYER", 3, None])
def test_unknown_granularity_lists_the_legal_ones(given: Any) -> None:
    with pytest.raises(UnknownNameError, match="granularity") as caught:
        fpcompile.segment(model_of("llama"), granularity=given)
    assert caught.value.known == ("auto", "layer", "model", "operator")
    assert all(repr(name) in str(caught.value) for name in caught.value.known)
    if given == "operators":
        assert caught.value.remedy == "did you mean 'operator'?"


@pytest.mark.parametrize("route", ["packed", "auto"])
def test_a_module_that_is_no_transformers_model_needs_more(route: str) -> None:
    with pytest.raises((InvalidInputError, UnsupportedModelError)) as caught:
        fpcompile.segment(nn.Linear(2, 2).eval(), route=route)
    assert "example_inputs" in str(caught.value) or "no transformers model" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "known"), [("backend", "eager"), ("weights", "shared"), ("route", "packed")]
)
def test_unknown_options_list_the_legal_ones(option: str, known: str) -> None:
    with pytest.raises(UnknownNameError, match=option) as caught:
        fpcompile.segment(model_of("llama"), **{option: "nonsense"})  # type: ignore[arg-type]
    assert known in caught.value.known


@pytest.mark.parametrize("given", [0, -1.0, float("nan"), True, "2"])
def test_a_budget_that_is_none(given: Any, program: fpcompile.Program) -> None:
    with pytest.raises(InvalidInputError, match="max_blocking_ms") as caught:
        program.start(sample_ids(4), max_blocking_ms=given)
    _complete(caught.value)


def test_example_inputs_do_not_take_the_packed_route_away_silently() -> None:
    with pytest.raises(InvalidInputError, match="generic route") as caught:
        fpcompile.segment(model_of("llama"), route="packed", example_inputs=(sample_ids(4),))
    _complete(caught.value)


@pytest.mark.parametrize("tokens", [0, -3, 2.0, "16", True, None])
def test_a_plan_is_explained_at_a_number_of_tokens(tokens: Any, program: fpcompile.Program) -> None:
    with pytest.raises(InvalidInputError, match="tokens is wrong") as caught:
        program.explain(tokens)
    _complete(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": 0}, {"seconds": -1.0}, {"seconds": float("nan")}, {"seconds": "5"}, {"lengths": ()},
        {"lengths": 12}, {"lengths": "12"}, {"lengths": (0,)}, {"lengths": (16, 1.5)},
    ],
    ids=str,
)  # fmt: skip
def test_a_calibration_has_lengths_and_a_time(wrong: dict[str, Any], program: fpcompile.Program) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(wrong))) as caught:
        program.calibrate(**wrong)
    _complete(caught.value)


@pytest.mark.parametrize("path", [None, 3, ["a"]], ids=repr)
def test_a_path_that_is_none(path: Any, program: fpcompile.Program) -> None:
    checkpoint = program.start(sample_ids(4)).checkpoint()
    for call in (
        lambda: program.save(path),
        lambda: fpcompile.load(path, model_of("llama")),
        lambda: checkpoint.save(path),
        lambda: fpcompile.Checkpoint.load(path),
    ):
        with pytest.raises(InvalidInputError, match="path is wrong") as caught:
            call()
        _complete(caught.value)


VOCABULARY = 128
BAD_IDS: dict[str, Any] = {
    "empty": torch.zeros(1, 0, dtype=torch.long),
    "an empty list": [],
    "an empty batch": torch.zeros(0, 4, dtype=torch.long),
    "a negative id": torch.tensor([[3, -1, 4]]),
    "an id behind the vocabulary": torch.tensor([[3, VOCABULARY]]),
    "a large id": torch.tensor([[3, 2**40]]),
    "rank 0": torch.tensor(3),
    "rank 3": torch.zeros(1, 2, 3, dtype=torch.long),
    "floats": torch.zeros(1, 4),
    "booleans": torch.zeros(1, 4, dtype=torch.bool),
    "bytes": torch.zeros(1, 4, dtype=torch.uint8),
    "a list of floats": [[1.0, 2.0]],
    "a ragged list": [[1, 2], [3]],
    "text": "hello",
    "a list of texts": ["hello"],
    "none": None,
    "an array": torch.zeros(1, 4, dtype=torch.long).numpy(),
}


@pytest.mark.parametrize("name", BAD_IDS)
def test_bad_ids(name: str, program: fpcompile.Program) -> None:
    with pytest.raises(InvalidInputError, match="input_ids") as caught:
        program.start(BAD_IDS[name])
    _complete(caught.value)
    with pytest.raises(InvalidInputError, match="input_ids"):
        program(BAD_IDS[name])


def test_the_vocabulary_is_told(program: fpcompile.Program) -> None:
    with pytest.raises(InvalidInputError) as caught:
        program.start([[5, 1000]])
    assert caught.value.expected == "ids from 0 to 127"
    assert caught.value.got == "ids from 5 to 1000"
    assert "tokenizer" in str(caught.value.remedy)
    assert program([[0, 127]]).logits.shape == (1, 2, 128)


def test_more_tokens_than_the_model_has_positions(program: fpcompile.Program) -> None:
    with pytest.raises(InvalidInputError, match="longer than the model's positions") as caught:
        program.start(sample_ids(513))
    assert (caught.value.expected or "").startswith("at most 512 tokens")
    assert caught.value.got == "513 tokens"
    assert caught.value.remedy
    cache = program(sample_ids(510)).past_key_values
    with pytest.raises(InvalidInputError, match="longer than the model's positions") as caught:
        program.start(sample_ids(3), past_key_values=cache)
    assert caught.value.got == "513 tokens"
    assert program(sample_ids(2), past_key_values=cache).logits.shape[1] == 2


BAD_MASKS: dict[str, Any] = {
    "another width": torch.ones(2, 3),
    "another batch": torch.ones(1, 4),
    "rank 1": torch.ones(4),
    "rank 4": torch.ones(2, 1, 4, 4),
    "a list": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "a hidden sequence": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]),
    "a hole": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]),
    "both sides": torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]),
    "additive": torch.tensor([[0.0, 0.0, -1e9, -1e9], [0.0, 0.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks(name: str, program: fpcompile.Program) -> None:
    with pytest.raises(InvalidInputError, match="attention_mask") as caught:
        program.start(sample_ids(4, batch=2), attention_mask=BAD_MASKS[name])
    _complete(caught.value)


def test_a_padded_batch_cannot_continue(program: fpcompile.Program) -> None:
    cache = program(sample_ids(4, batch=2)).past_key_values
    mask = torch.ones(2, 7)
    mask[0, :2] = 0
    with pytest.raises(InvalidInputError, match="padded batch") as caught:
        program.start(sample_ids(3, batch=2), past_key_values=cache, attention_mask=mask)
    _complete(caught.value)
    assert caught.value.remedy


BAD_ROWS: dict[str, Any] = {
    "negative": -1,
    "a boolean": True,
    "a float": 1.5,
    "text": "1",
    "none": None,
    "a list": [1, 2],
    "rank 2": torch.tensor([[1]]),
    "a scalar tensor": torch.tensor(1),
    "an empty tensor": torch.tensor([], dtype=torch.long),
    "a float tensor": torch.tensor([1.0]),
    "behind the end": torch.tensor([0, 4]),
    "before the start": torch.tensor([-5]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(name: str, program: fpcompile.Program) -> None:
    with pytest.raises(InvalidInputError, match="logits_to_keep") as caught:
        program.start(sample_ids(4), logits_to_keep=BAD_ROWS[name])
    _complete(caught.value)


def test_more_rows_than_tokens_are_all_rows(program: fpcompile.Program) -> None:
    ids = sample_ids(4)
    expected = reference(model_of("llama"), ids, logits_to_keep=9)
    assert differences(outcome(program(ids, logits_to_keep=9)), expected) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs_embeds": torch.zeros(1, 4, 64)},
        {"labels": torch.zeros(1, 4, dtype=torch.long)},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"return_dict": True},
        {"logit_to_keep": 1},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_arguments_that_are_not_there(arguments: dict[str, Any], program: fpcompile.Program) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(arguments))) as caught:
        program.start(sample_ids(4), **arguments)
    _complete(caught.value)
    assert "past_key_values" in str(caught.value.expected)


@pytest.mark.parametrize(
    "position_ids",
    [
        [[0, 1, 2, 3]],
        torch.zeros(1, 4),
        torch.arange(5)[None],
        torch.arange(4),
        torch.tensor([[0, 1, 0, 1]]),
        torch.tensor([[0, 2, 4, 6]]),
        torch.arange(-1, 3)[None],
        torch.arange(10**6, 10**6 + 4)[None],
    ],
    ids=[
        "a list",
        "floats",
        "too many",
        "a vector",
        "two sequences",
        "steps of two",
        "negative",
        "too large",
    ],
)
def test_position_ids_that_the_model_does_not_have(position_ids: Any, program: fpcompile.Program) -> None:
    with pytest.raises(InvalidInputError, match="position_ids") as caught:
        program.start(sample_ids(4), position_ids=position_ids)
    _complete(caught.value)


def _static() -> StaticCache:
    cache = StaticCache(config=model_of("llama").config, max_cache_len=32)
    with torch.no_grad():
        model_of("llama")(input_ids=sample_ids(4), past_key_values=cache)
    return cache


BAD_CACHES: dict[str, Any] = {
    "a tuple": lambda: ((torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16)),) * 2,
    "a tensor": lambda: torch.zeros(1, 2, 4, 16),
    "a static cache": _static,
    "another batch size": lambda: program_of("llama")(sample_ids(4, batch=2)).past_key_values,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_CACHES)
def test_bad_caches(name: str, program: fpcompile.Program) -> None:
    with pytest.raises(InvalidInputError, match="past_key_values") as caught:
        program.start(sample_ids(3), past_key_values=BAD_CACHES[name]())
    _complete(caught.value)


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)


def _fewer_layers() -> DynamicCache:
    cache: DynamicCache = copy.deepcopy(program_of("llama")(sample_ids(4)).past_key_values)
    cache.layers.pop()
    return cache


def _more_layers() -> DynamicCache:
    cache: DynamicCache = copy.deepcopy(program_of("llama")(sample_ids(4)).past_key_values)
    cache.layers.append(copy.deepcopy(cache.layers[1]))
    return cache


def _uneven_layers() -> DynamicCache:
    cache: DynamicCache = copy.deepcopy(program_of("llama")(sample_ids(4)).past_key_values)
    layer = _layers(cache)[1]
    layer.keys, layer.values = layer.keys[:, :, :2], layer.values[:, :, :2]
    return cache


def _other_dtype() -> DynamicCache:
    cache: DynamicCache = copy.deepcopy(program_of("llama")(sample_ids(4)).past_key_values)
    for layer in _layers(cache):
        layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
    return cache


FOREIGN_CACHES: dict[str, Any] = {
    "fewer layers": _fewer_layers,
    "more layers": _more_layers,
    "layers of different lengths": _uneven_layers,
    "another dtype": _other_dtype,
    "another model's heads": lambda: program_of("gpt_neox")(sample_ids(4)).past_key_values,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOREIGN_CACHES)
def test_the_cache_of_another_model(name: str, program: fpcompile.Program) -> None:
    """Taken as it is, a layer without its past would attend to the new tokens alone: silently wrong."""
    with pytest.raises(InvalidInputError, match="past_key_values") as caught:
        program.start(sample_ids(3), past_key_values=FOREIGN_CACHES[name]())
    _complete(caught.value)


@pytest.mark.parametrize("given", [None, "run.ckpt", {}])
def test_what_is_no_checkpoint_does_not_resume(given: Any, program: fpcompile.Program) -> None:
    with pytest.raises(UsageError, match="Checkpoint"):
        program.resume(given)


def test_every_misuse_is_a_value_error() -> None:
    assert issubclass(InvalidInputError, ValueError)
    assert issubclass(CheckpointError, ValueError)


def test_nothing_is_executed_by_a_refused_call(program: fpcompile.Program) -> None:
    ids = sample_ids(9)
    before = outcome(program(ids))
    for given in BAD_IDS.values():
        with pytest.raises(InvalidInputError):
            program(given)
    assert differences(outcome(program(ids)), before) == []

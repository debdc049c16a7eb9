"""Bodies of requests: what is taken, what is refused, and that a long one has few mistakes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fpcompile.serving.server.bodies import ChatBody, CompletionBody, EmbeddingBody

MANY = 100_000


def completion(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"model": "m", "prompt": "x", **fields})


def chat(**message: Any) -> ChatBody:
    return ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": "x", **message}]})


# ---- one mistake is told, however many there are


@pytest.mark.parametrize(
    "prompt",
    [
        [-1] * MANY,
        [1] * (MANY - 1) + [-1],
        ["a"] * MANY,
        ["a", "b", 1],
        [[]] * MANY,
        [[1], "a"],
        [[-1] * MANY],
        [{}] * MANY,
        [1.0, True],
        [[1.0]],
        [True],
        {},
        1,
        None,
    ],
    ids=lambda value: f"{value!r:.12}",
)
def test_wrong_prompts_are_one_error_of_the_field(prompt: Any) -> None:
    for made, field in ((CompletionBody, "prompt"), (EmbeddingBody, "input")):
        with pytest.raises(ValidationError) as caught:
            made.model_validate({"model": "m", field: prompt})
        assert [error["loc"] for error in caught.value.errors()] == [(field,)]


@pytest.mark.parametrize("prompt", ["", "a", [], ["a", ""], [1, 2], [[1], [], [2, 3]]])
def test_right_prompts_are_as_they_came(prompt: Any) -> None:
    assert completion(prompt=prompt).prompt == prompt


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": [1] * MANY},
        {"metadata": dict.fromkeys(map(str, range(MANY)), 1)},
        {"logit_bias": dict.fromkeys(map(str, range(MANY)), "x")},
        {"logit_bias": dict.fromkeys(map(str, range(1000)), "x")},
        {"stream_options": dict.fromkeys(map(str, range(MANY)), 1)},
        dict.fromkeys(map(str, range(MANY)), 1),
    ],
    ids=["stop", "metadata", "biases", "wrong biases", "stream_options", "unknown fields"],
)
def test_other_long_fields_are_one_error(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        completion(**fields)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    "messages",
    [
        [1] * MANY,
        [{"role": "user", "content": "x"}] * MANY,
        [{"role": "user", "content": [1] * MANY}],
        [{"role": "user", "content": [{"type": "text"}] * 1000}],
        [{"role": "user", "content": "x", **dict.fromkeys(map(str, range(MANY)), 1)}],
    ],
    ids=["no messages", "too many", "no parts", "wrong parts", "unknown fields"],
)
def test_long_conversations_are_one_error(messages: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate({"model": "m", "messages": messages})
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u" * 513},
        {"safety_identifier": "s" * 513},
        {"metadata": dict.fromkeys(map(str, range(17)), "v")},
        {"metadata": {"k" * 65: "v"}},
        {"metadata": {"k": "v" * 513}},
    ],
    ids=["user", "safety identifier", "pairs", "key", "value"],
)
def test_what_says_something_about_the_caller_is_short(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        completion(**fields)
    assert {error["loc"][0] for error in caught.value.errors()} == set(fields)
    assert caught.value.error_count() == 1


def test_what_others_take_about_the_caller_is_taken() -> None:
    pairs = {f"{number:064}": "v" * 512 for number in range(16)}
    made = completion(user="u" * 512, safety_identifier="s" * 512, metadata=pairs)
    assert (made.metadata, made.user) == (pairs, "u" * 512)


# ---- numbers that leave the range of floats


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", t) for t in (5e-324, 1e-300, 1e-38, 9e-4)]
    + [("repetition_penalty", p) for p in (1e-320, 1e-300, 9e-3)],
)
def test_numbers_next_to_zero_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValidationError) as caught:
        completion(**{field: value})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


def test_numbers_of_use_are_taken() -> None:
    assert [completion(temperature=t).temperature for t in (0, 1e-3, 2)] == [0, 1e-3, 2]
    assert [completion(repetition_penalty=p).repetition_penalty for p in (0.01, 10)] == [0.01, 10]


# ---- what asks for nothing, and what is spelt in one way


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "none"}, {"suffix": ""}, {"echo": "none"}, {"echo": True}, {"echo": []}, {"store": "none"},
        {"logprobs": False}, {"best_of": True}, {"best_of": 1.0}, {"logit_bias": {"065": 1}},
        {"logit_bias": {"²": 1}}, {"logit_bias": {"65": True}}, {"logit_bias": {"65": 10**400}},
        {"logit_bias": {"65": 101}},
    ],
)  # fmt: skip
def test_what_asks_for_something_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        completion(**fields)


def test_what_asks_for_nothing_is_taken() -> None:
    made = completion(suffix=None, echo=False, store=False, best_of=1, logit_bias={"65": 1, "0": -100.0})
    assert made.logit_bias == {"65": 1, "0": -100}
    talk = {"messages": [{"role": "user", "content": "x"}], "tools": [], "tool_choice": "none"}
    ChatBody.model_validate(
        {"model": "m", "logprobs": False, "functions": [], "function_call": "none", **talk}
    )


@pytest.mark.parametrize("value", [[], [[[]]], {}, "both", 2])
def test_parallel_tool_calls_are_yes_or_no(value: Any) -> None:
    talk = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    for right in (True, False, None):
        assert ChatBody.model_validate({**talk, "parallel_tool_calls": right}).parallel_tool_calls is right
    with pytest.raises(ValidationError):
        ChatBody.model_validate({**talk, "parallel_tool_calls": value})


# ---- messages


def test_an_answer_can_be_sent_back() -> None:
    empty = {"refusal": None, "tool_calls": None, "function_call": None, "audio": None, "annotations": None}
    assert chat(role="assistant", **empty).messages[0].plain == {"role": "assistant", "content": "x"}
    others = {"refusal": "", "tool_calls": [], "function_call": {}, "audio": {}, "annotations": []}
    assert chat(role="assistant", content=None, **others).messages[0].plain["content"] == ""
    for name, value in (("tool_calls", [{"id": "1"}]), ("refusal", "no"), ("annotations", [1])):
        with pytest.raises(ValidationError):
            chat(role="assistant", **{name: value})


def test_messages_reach_the_template_with_names_and_joined_parts() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert chat(content=parts, name="ann").messages[0].plain == {
        "role": "user",
        "name": "ann",
        "content": "Hello",
    }


@pytest.mark.parametrize("content", [1, {}, [1], [{"type": "text"}], [{"type": "image_url", "text": "x"}]])
def test_other_contents_are_an_error_of_the_field(content: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        chat(content=content)
    assert [error["loc"] for error in caught.value.errors()] == [("messages", 0, "content")]

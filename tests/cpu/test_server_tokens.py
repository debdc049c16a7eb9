"""Tokenising does not hold up the front: not by a long text, not by many, not by a long conversation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from fpcompile.serving.server.failures import ApiError
from fpcompile.serving.server.tiny import byte_tokenizer
from fpcompile.serving.server.tokens import Tokenizer
from tests.cpu.server_support import PATIENCE

TALK = [{"role": "user", "content": "x"}]


class Waiting:
    """A tokenizer that gives nothing before the event loop has gone on."""

    chat_template = "there is one"

    def __init__(self) -> None:
        self.backend_tokenizer, self.padding, self.truncation = self, None, None
        self.went_on = threading.Event()

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}

    def encode_batch_fast(self, texts: list[str], **_: Any) -> list[Any]:
        assert self.went_on.wait(PATIENCE), "the event loop is held"
        return [self for _ in texts]

    encode = encode_batch_fast
    ids = (0,)

    def apply_chat_template(self, messages: list[Any], **_: Any) -> str:
        assert self.went_on.wait(PATIENCE), "the event loop is held"
        return str(len(messages))


@pytest.mark.parametrize("case", ["long text", "many texts", "long message", "many messages"])
def test_the_loop_goes_on_while_long_things_are_worked_on(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cpu.test_server_tokens.PATIENCE", 5.0)
    waiting = Waiting()
    tokenizer = Tokenizer(waiting)
    work: dict[str, Coroutine[Any, Any, Any]] = {
        "long text": tokenizer.encode("a" * 10_000),
        "many texts": tokenizer.encode_all(["a"] * 256),
        "long message": tokenizer.chat([{"role": "user", "content": "a" * 10_000}]),
        "many messages": tokenizer.chat(TALK * 1024),
    }

    async def scene() -> None:
        asyncio.get_running_loop().call_soon(waiting.went_on.set)
        await work.pop(case)

    asyncio.run(scene())
    for other in work.values():
        other.close()


def test_other_threads_run_while_a_long_text_is_tokenised() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    over, turns = threading.Event(), 0

    def count() -> None:
        nonlocal turns
        while not over.wait(1e-3):
            turns += 1

    other = threading.Thread(target=count)
    other.start()
    before = turns
    ids = asyncio.run(tokenizer.encode("hello world " * 20_000))
    made = turns - before
    over.set()
    other.join()
    assert len(ids) == 240_000
    assert made > 10, "the interpreter's lock was held"


def test_what_is_surely_too_long_is_not_tokenised() -> None:
    waiting = Waiting()  # would wait for ever
    tokenizer = Tokenizer(waiting)
    for given in ("a" * 70_000, ["a", "a" * 70_000]):
        with pytest.raises(ApiError) as caught:
            asyncio.run(tokenizer.encode_all(given, most=8))
        assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    waiting.went_on.set()
    assert list(asyncio.run(tokenizer.encode("a" * 70_000, most=70_000))) == [0]
    assert list(asyncio.run(tokenizer.encode("a" * 10_000, most=8))) == [0], (
        "counted, as it may be fewer tokens"
    )


def test_ids_are_as_given() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    for given, got in (([1, 2], [[1, 2]]), ([[1], [], [2]], [[1], [], [2]]), (["", "x"], None), ("x", None)):
        found = asyncio.run(tokenizer.encode_all(given))
        assert found == (got or [byte_tokenizer()(one)["input_ids"] for one in given])

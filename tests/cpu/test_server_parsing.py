"""Long bodies are parsed beside the event loop: with the same answers as short ones, and within a bound."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from fpcompile.serving.server.app import make_app
from fpcompile.serving.server.bodies import ChatBody, CompletionBody
from fpcompile.serving.server.gate import Gate
from fpcompile.serving.server.models import parse_models
from fpcompile.serving.server.parsing import (
    BODIES,
    SHORT,
    Mistake,
    Parser,
    ParserGoneError,
    WrongBodyError,
    _answer,
    parsed,
)
from fpcompile.serving.server.settings import EngineSettings, ServerSettings
from tests.cpu.server_support import PATIENCE

pytestmark = pytest.mark.timeout(120)

COMPLETIONS, CHAT, EMBEDDINGS = BODIES
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def parser() -> Iterator[Parser]:
    made = Parser()
    yield made
    made.close()


def written(**fields: Any) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


# ---- what is found


def test_bodies_come_back_as_they_are(parser: Parser) -> None:
    talk = [{"role": "user", "content": [{"type": "text", "text": "é" * SHORT}], "name": "ann"}] * 3
    bodies = {
        COMPLETIONS: written(prompt=list(range(SHORT)), stop=["a"], temperature=0.5, logit_bias={"1": 2}),
        CHAT: written(messages=talk, stream=True, stream_options={"include_usage": True}),
        EMBEDDINGS: written(input=["x" * SHORT, ""]),
    }
    for path, body in bodies.items():
        assert asyncio.run(parser.parse(path, body)) == BODIES[path].model_validate_json(body)


@pytest.mark.parametrize(
    ("path", "body", "mistake"),
    [
        (COMPLETIONS, b"{", ("json_invalid", ())),
        (COMPLETIONS, b"[" * 100_000, ("json_invalid", ())),
        (COMPLETIONS, b'{"model": "\xff"}', ("json_invalid", ())),
        (COMPLETIONS, b"[]", ("model_attributes_type", ())),
        (COMPLETIONS, written(prompt="x", temprature=1), ("extra_forbidden", ("temprature",))),
        (
            CHAT,
            written(messages=[{"role": "user", "content": 1}]),
            ("value_error", ("messages", 0, "content")),
        ),
    ],
)
def test_the_first_mistake_is_told(path: str, body: bytes, mistake: tuple[str, tuple[Any, ...]]) -> None:
    found = parsed(path, body)
    assert isinstance(found, Mistake)
    assert (found.kind, found.where) == mistake


@pytest.mark.slow
def test_a_long_body_is_answered_as_a_short_one() -> None:
    """The same bodies, with spaces behind them. Right ones come as far as the engine, which is not there."""
    app = make_app(ServerSettings(EngineSettings(parse_models([], ["tiny"]))))
    client = TestClient(app)  # not entered: no worker is started
    wrong = [
        (COMPLETIONS, b"{"), (COMPLETIONS, b"[1]"), (COMPLETIONS, b'"x"'),
        (COMPLETIONS, written(prompt=1)), (COMPLETIONS, written(prompt="x", suffix="y")),
        (COMPLETIONS, written(prompt="x", **{"\ud800": 1})), (CHAT, written(messages=[])),
        (CHAT, written(messages=[{"role": "user", "content": "x", "tool_calls": [1]}])),
        (EMBEDDINGS, written(input={})), (EMBEDDINGS, written()),
    ]  # fmt: skip
    right = [
        (COMPLETIONS, written(prompt="x")), (CHAT, written(messages=[{"role": "user", "content": "x"}])),
        (EMBEDDINGS, written(input="x")),
    ]  # fmt: skip
    try:
        for path, body in wrong + right:
            short = client.post(path, content=body, headers=JSON)
            long = client.post(path, content=body + b" " * SHORT, headers=JSON)
            assert short.status_code == (503 if (path, body) in right else 400)
            assert (long.status_code, long.json()) == (short.status_code, short.json())
        unsaid = client.post(COMPLETIONS, content=right[0][1] + b" " * SHORT)
        assert unsaid.status_code == 400
    finally:
        app.state.front.parser.close()


# ---- how it is done


async def _turns(parser: Parser, body: bytes) -> int:
    """Of the event loop, while ``body`` is parsed."""
    turns = 0
    parsing = asyncio.create_task(parser.parse(COMPLETIONS, body))
    while not parsing.done():
        await asyncio.sleep(0.001)
        turns += 1
    with pytest.raises(WrongBodyError):
        await parsing
    return turns


def test_the_event_loop_goes_on_while_a_long_body_is_parsed(parser: Parser) -> None:
    body = b'{"model":"m","prompt":[' + b"[]," * 1_300_000 + b"[]]}"
    with pytest.raises(WrongBodyError):
        asyncio.run(parser.parse(COMPLETIONS, b""))  # the process is there
    assert asyncio.run(_turns(parser, body)) > 10


def test_a_process_that_is_lost_is_replaced() -> None:
    parser = Parser()
    try:
        assert isinstance(asyncio.run(parser.parse(COMPLETIONS, written(prompt="x"))), CompletionBody)
        os.kill(parser._process.pid, signal.SIGKILL)
        with pytest.raises(ParserGoneError):
            asyncio.run(parser.parse(COMPLETIONS, written(prompt="x")))
        assert isinstance(
            asyncio.run(parser.parse(CHAT, written(messages=[{"role": "u", "content": ""}]))), ChatBody
        )
    finally:
        parser.close()
    assert parser._process is None


def test_a_process_that_does_not_go_on_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped: what is sent fills the pipe, and nothing takes it out."""
    parser = Parser()
    try:
        assert isinstance(asyncio.run(parser.parse(COMPLETIONS, written(prompt="x"))), CompletionBody)
        stopped = parser._process
        os.kill(stopped.pid, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr("fpcompile.serving.server.parsing._ANSWERS_S", 0.05)
            with pytest.raises(ParserGoneError):
                asyncio.run(parser.parse(COMPLETIONS, written(prompt="x" * (8 << 20))))
        assert not stopped.is_alive()
        assert isinstance(asyncio.run(parser.parse(COMPLETIONS, written(prompt="x"))), CompletionBody)
    finally:
        parser.close()


def test_what_cannot_be_sent_back_does_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    monkeypatch.setattr("fpcompile.serving.server.parsing.parsed", lambda path, body: deep)
    assert pickle.loads(_answer(CHAT, b"")) == Mistake("json_invalid", (), "JSON decode error")


# ---- bytes that are held


def test_bodies_together_have_a_limit() -> None:
    """Two of 60 bytes at once are too many; one after the other they are not."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def scene() -> list[int]:
        gate = Gate(app, body_bytes=100, held_bytes=100)
        going_on = asyncio.Event()
        statuses: list[int] = []

        async def ask(slowly: bool) -> None:
            parts = [b"x" * 60, b""]

            async def receive() -> Any:
                if len(parts) == 1 and slowly:
                    await going_on.wait()
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": [], "client": ("c", 1)}
            await gate(scope, receive, send)

        slow = asyncio.create_task(ask(True))
        await asyncio.sleep(0)
        while not gate._held:
            await asyncio.sleep(0)
        await ask(False)
        going_on.set()
        await slow
        await ask(False)
        assert gate._held == 0
        return statuses

    assert asyncio.run(asyncio.wait_for(scene(), PATIENCE)) == [503, 200, 200]


def test_one_body_can_always_be_read() -> None:
    """However long bodies may be, and however little all of them may have together."""
    statuses: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"x" * 100
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * 100, "more_body": False}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    gate = Gate(app, body_bytes=100, held_bytes=99)
    scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": [], "client": ("c", 1)}
    asyncio.run(gate(scope, receive, send))
    assert statuses[0] == 200


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpcompile.serving.server.gate._BODY_S", 0.01)
    sent: list[Any] = []

    async def scene() -> None:
        parts = [b"x" * 10]

        async def receive() -> Any:
            if not parts:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": parts.pop(0), "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError("nobody sees it")

        gate = Gate(app, body_bytes=100)
        scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": [], "client": ("c", 1)}
        await gate(scope, receive, send)
        assert gate._held == 0

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]

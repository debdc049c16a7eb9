"""What a server takes at once: requests, bodies without a key, connections that say nothing."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from fpcompile.serving.server.app import make_app
from fpcompile.serving.server.bodies import CompletionBody, EmbeddingBody
from fpcompile.serving.server.failures import ApiError
from fpcompile.serving.server.front import Front
from fpcompile.serving.server.generation import answer
from fpcompile.serving.server.messages import Ended, Facts, Record
from fpcompile.serving.server.models import parse_models
from fpcompile.serving.server.parsing import SHORT, Parser, parsed
from fpcompile.serving.server.promises import Account
from fpcompile.serving.server.routes import _embed
from fpcompile.serving.server.settings import EngineSettings, Limits, ServerSettings
from fpcompile.serving.server.streams import Stream, Watch
from fpcompile.serving.server.tiny import byte_tokenizer
from tests.cpu.server_support import PATIENCE

TINY = EngineSettings(parse_models([], ["tiny"]))
RECORD = Record("completed", 0.0, 1.0, 0.1, 0.2, 0.0, 0.1, 0.1, 0, None, "bits")


class Engines:
    """Ends nothing before it is told to; ``most``: how many were live at once."""

    state, reason, unready, paused = "ready", "", None, False

    def __init__(self) -> None:
        self.facts = {"tiny": Facts("generate", 260, 4096), "tiny-embed": Facts("embed", 260, 4096, 4)}
        self.streams: list[Stream] = []
        self.most = 0

    @property
    def live(self) -> int:
        return sum(not stream.over for stream in self.streams)

    def submit(self, ask: Any, watch: Watch | None = None) -> Stream:
        self.streams.append(Stream(ask.id, bound=64, cancel=lambda name: None, watch=watch))
        self.most = max(self.most, self.live)
        return self.streams[-1]

    def finish(self) -> None:
        for stream in self.streams:
            stream.finish(Ended(stream.id, "stop", RECORD, b"\0" * 16))


async def _never() -> Any:
    await asyncio.Event().wait()


def _request(number: int) -> Any:
    state = SimpleNamespace(
        unique=f"u{number}", request_id=f"r{number}", facts={}, arrival=time.monotonic(), account=Account()
    )
    return SimpleNamespace(headers={}, state=state, receive=_never)


def _outcomes(live: int, bodies: list[dict[str, Any]]) -> tuple[list[int], Front]:
    """Statuses of these bodies when they come together."""

    async def scene() -> tuple[list[int], Front]:
        engines: Any = Engines()
        tokenizers = {"tiny": byte_tokenizer(), "tiny-embed": byte_tokenizer()}
        front = Front(ServerSettings(TINY, limits=Limits(live=live)), tokenizers, engines)

        async def ask(number: int, fields: dict[str, Any]) -> int:
            try:
                if "input" in fields:
                    vectors = EmbeddingBody.model_validate({"model": "tiny-embed", **fields})
                    return (await _embed(front, _request(number), Account(), vectors)).status_code
                body = CompletionBody.model_validate({"model": "tiny", **fields})
                return (await answer(front, _request(number), Account(), body)).status_code
            except ApiError as error:
                return error.status

        asking = [asyncio.create_task(ask(number, fields)) for number, fields in enumerate(bodies)]
        async with asyncio.timeout(PATIENCE):
            while waiting := {f"u{n}" for n, task in enumerate(asking) if not task.done()}:
                if waiting <= {stream.id.partition("-")[0] for stream in engines.streams}:
                    engines.finish()
                await asyncio.sleep(0.001)
        return [task.result() for task in asking], front

    return asyncio.run(scene())


LONG = "a" * 3000  # tokenised in a thread: others come in between


@pytest.mark.parametrize(
    ("live", "bodies", "statuses"),
    [
        (4, [{"prompt": LONG, "n": 4}, {"prompt": LONG}], [200, 429]),
        (4, [{"prompt": [LONG] * 3}, {"prompt": "a", "n": 2}, {"prompt": "a"}], [200, 429, 200]),
        (4, [{"prompt": LONG}] * 6, [200] * 4 + [429] * 2),
        (4, [{"input": [LONG] * 4}, {"input": LONG}], [200, 429]),
        (4, [{"input": [LONG] * 3}, {"input": "a"}, {"prompt": "a"}], [200, 200, 429]),
        (4, [{"prompt": "a", "n": 5}, {"prompt": "a", "n": 4}], [400, 200]),
        (2, [{"prompt": "", "n": 2}, {"prompt": LONG, "n": 2}], [400, 200]),
    ],
)
def test_no_more_are_live_than_allowed_however_they_come(
    live: int, bodies: list[dict[str, Any]], statuses: list[int]
) -> None:
    got, front = _outcomes(live, bodies)
    engines: Any = front.link
    assert got == statuses
    assert engines.most <= live


def test_tokens_of_a_prompt_are_counted_once() -> None:
    _, front = _outcomes(16, [{"prompt": ["abc", "de"], "n": 3}])
    assert 'prompt_tokens_total{model_name="tiny"} 5.0' in front.metrics.text().decode()


# ---- what a long body says


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": "a"}),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "stream": True}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}),
        ("/v1/embeddings", {"model": "tiny-embed", "input": "a"}),
    ],
)
def test_it_is_not_held_while_its_answer_is_made(
    path: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[weakref.ref[Any]] = []

    async def parse(self: Parser, path: str, body: bytes) -> Any:
        found = parsed(path, body)
        said.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Parser, "parse", parse)
    sent: list[Any] = []

    async def scene() -> None:
        engines: Any = Engines()
        tokenizers = {"tiny": byte_tokenizer(), "tiny-embed": byte_tokenizer()}
        app = make_app(ServerSettings(TINY), tokenizers, engines)
        bodies = [json.dumps(fields).encode() + b" " * SHORT]

        async def receive() -> Any:
            return {"type": "http.request", "body": bodies.pop()} if bodies else await _never()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": path, "query_string": b"", "client": ("c", 1),
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        async with asyncio.timeout(PATIENCE):
            answering = asyncio.create_task(app(scope, receive, send))
            while not engines.streams:
                assert not answering.done(), sent
                await asyncio.sleep(0.001)
            if "stream" in fields:
                engines.streams[0].put((36,))
                while not sent:
                    await asyncio.sleep(0.001)
            gc.collect()
            assert [ref() for ref in said] == [None]
            assert not answering.done()
            engines.finish()
            await answering

    asyncio.run(scene())
    assert sent[0]["status"] == 200

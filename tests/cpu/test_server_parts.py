"""The parts of the server that need no engine: text as it comes, promises, configuration, slow readers."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpcompile.errors import InvalidInputError, UnknownNameError, UsageError
from fpcompile.serving.server.answers import embedding_answer
from fpcompile.serving.server.config_file import read_config
from fpcompile.serving.server.failures import api_error, ascii_json
from fpcompile.serving.server.gate import Gate, trace_of
from fpcompile.serving.server.messages import Ended, Record, Refused
from fpcompile.serving.server.metrics import newer
from fpcompile.serving.server.models import parse_models
from fpcompile.serving.server.promises import Account, Accounts, BelowFloorError, SloClass, digest_of
from fpcompile.serving.server.settings import EngineSettings, ServerSettings
from fpcompile.serving.server.sse import SseResponse
from fpcompile.serving.server.streams import EngineGoneError, RefusedError, SlowReaderError, Stream
from fpcompile.serving.server.text import Detokenizer, Stops
from fpcompile.serving.server.tiny import byte_tokenizer
from fpcompile.serving.server.tokens import Tokenizer

RECORD = Record("completed", 0.0, 1.0, 0.1, 0.2, 0.0, 0.1, 0.1, 0, None, "bits")
TOKENIZER = Tokenizer(byte_tokenizer())
TINY = EngineSettings(parse_models([], ["tiny"]))


# ---- text


@given(st.lists(st.integers(0, 259), max_size=200))
def test_pieces_joined_are_the_text_of_all_tokens(ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER.decode)
    pieces = [detokenizer.push(token) for token in ids] + [detokenizer.flush()]
    assert "".join(pieces) == TOKENIZER.decode(ids)


@given(st.text(max_size=80))
def test_bytes_of_a_text_come_back_a_character_at_a_time(text: str) -> None:
    ids = asyncio.run(TOKENIZER.encode(text))
    detokenizer = Detokenizer(TOKENIZER.decode)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)


def test_leading_spaces_depend_on_the_token_before() -> None:
    """As with sentencepiece: the first token of what is decoded loses its space."""
    words = ["▁a", "▁b", "c"]

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    detokenizer = Detokenizer(decode)
    assert [detokenizer.push(token) for token in (0, 1, 2, 0)] == ["a", " b", "c", " a"]


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
)
def test_a_stop_string_ends_the_text_wherever_it_is_cut(pieces: list[str], strings: list[str]) -> None:
    stops = Stops(strings)
    given_out = ""
    for piece in pieces:
        given_out += stops.push(piece)
        if stops.found:
            break
    given_out += stops.flush()
    text = "".join(pieces)
    places = [text.find(string) for string in strings if string in text]
    assert stops.found == bool(places)
    if places:
        whole = "".join(pieces)[: len(text)]
        assert any(whole[len(given_out) :].startswith(string) for string in strings)
        assert all(string not in given_out for string in strings)
    else:
        assert given_out == text


# ---- promises

CLASSES = {"fast": SloClass("fast", 0.2, 0.05), "slow": SloClass("slow", 10.0)}


def test_a_request_gets_what_it_asks_for_over_its_class() -> None:
    accounts = Accounts(CLASSES)
    promise = accounts.promise(Account(), slo_class="fast", ttft=0.5, tbt=None)
    assert (promise.ttft, promise.tbt, promise.slo_class) == (0.5, 0.05, "fast")
    nothing = accounts.promise(Account(), slo_class=None, ttft=None, tbt=None)
    assert (nothing.ttft, nothing.tbt, nothing.slo_class) == (None, None, None)


def test_nobody_gets_below_the_floor() -> None:
    account = Account("t", min_ttft=1.0, min_tbt=0.1, default_class="slow")
    accounts = Accounts(CLASSES, {digest_of("k"): account})
    assert accounts.promise(account, slo_class=None, ttft=None, tbt=None).ttft == 10.0
    with pytest.raises(BelowFloorError, match="ttft_slo"):
        accounts.promise(account, slo_class=None, ttft=0.9, tbt=None)
    with pytest.raises(BelowFloorError, match="ttft_slo"):
        accounts.promise(account, slo_class="fast", ttft=None, tbt=None)
    with pytest.raises(BelowFloorError, match="tbt_slo"):
        accounts.promise(account, slo_class=None, ttft=None, tbt=0.01)
    with pytest.raises(BelowFloorError):
        Accounts(CLASSES, {digest_of("k"): Account(min_ttft=1.0, default_class="fast")})


def test_a_class_that_is_not_the_keys_is_unknown() -> None:
    account = Account(classes=("slow",))
    with pytest.raises(UnknownNameError, match="'slow'"):
        Accounts(CLASSES).promise(account, slo_class="fast", ttft=None, tbt=None)


def test_the_tenant_follows_from_the_key() -> None:
    accounts = Accounts(CLASSES, {digest_of("k1"): Account("a"), digest_of("k2"): Account("b")}, None)
    assert [accounts.account(key) for key in ("k1", "k2", "k3", None)] == [
        Account("a"),
        Account("b"),
        None,
        None,
    ]
    assert Accounts().account("whatever the client must send") == Account()


def test_a_configuration_is_read_from_both_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALICE", "k-alice")
    toml = tmp_path / "c.toml"
    toml.write_text(
        '[classes.fast]\nttft = 0.2\ntbt = 0.05\n[[keys]]\nenv = "ALICE"\ntenant = "alice"\nmin_ttft = 0.1\n'
        f'classes = ["fast"]\n[[keys]]\nsha256 = "{digest_of("k-bob")}"\ntenant = "bob"\n'
        '[admin]\nkey = "k-admin"\n'
    )
    yaml = tmp_path / "c.yaml"
    yaml.write_text(
        "classes: {fast: {ttft: 0.2, tbt: 0.05}}\nadmin: {key: k-admin}\nkeys:\n"
        "- {env: ALICE, tenant: alice, min_ttft: 0.1, classes: [fast]}\n"
        f"- {{sha256: {digest_of('k-bob')}, tenant: bob}}\n"
    )
    accounts, admin = read_config(toml)
    assert (accounts, admin) == read_config(yaml)
    assert accounts.account("k-alice") == Account("alice", min_ttft=0.1, classes=("fast",))
    assert accounts.account("k-bob") == Account("bob")
    assert accounts.account("k-mallory") is accounts.account(None) is None
    assert admin == digest_of("k-admin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[clases.fast]\nttft = 1", "did you mean 'classes'"),
        ("[classes.fast]\ntttft = 1", "did you mean 'ttft'"),
        ("[classes.fast]\nttft = -1", "seconds > 0"),
        ('[classes.fast]\nttft = "1"', "seconds"),
        ("[[keys]]\ntenant = 'a'", "key, env, sha256"),
        ("[[keys]]\nkey = 'a'\ndefault_class = 'fast'", "SLO class"),
        ("[[keys]]\nkey = 'a'\n[[keys]]\nkey = 'a'", "twice"),
        ("[[keys]]\nenv = 'SURELY_NOT_SET'", "SURELY_NOT_SET"),
        ("= 1", "cannot be read"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_config(path)


def test_an_address_that_others_reach_needs_keys() -> None:
    with pytest.raises(UsageError, match="API key"):
        ServerSettings(TINY, host="0.0.0.0")
    assert not ServerSettings(TINY, host="0.0.0.0", open=True).loopback
    assert all(ServerSettings(TINY, host=host).loopback for host in ("127.0.0.2", "::1", "localhost"))


def test_models_have_names_of_their_own() -> None:
    specs = parse_models(["chat=org/model", "/path"], ["tiny"], ["/path"])
    assert [(s.name, s.source, s.kind, s.random_weights) for s in specs] == [
        ("chat", "org/model", None, False),
        ("/path", "/path", "embed", False),
        ("tiny", "tiny", None, True),
        ("tiny-embed", "tiny-embed", None, True),
    ]
    with pytest.raises(InvalidInputError, match="two models"):
        EngineSettings(parse_models(["a=x", "a=y"]))
    with pytest.raises(UnknownNameError):
        parse_models(["a=x"], embed=["b"])


# ---- streams and answers


def test_a_slow_reader_is_ended_and_its_request_cancelled() -> None:
    async def scene() -> None:
        cancelled: list[str] = []
        stream = Stream("r", bound=4, cancel=cancelled.append)
        stream.put((1, 2, 3, 4))
        assert not cancelled
        stream.put((5,))
        stream.put((6,))
        assert cancelled == ["r"]
        got: list[int] = []

        async def read() -> None:
            async for token in stream:
                got.append(token)

        with pytest.raises(SlowReaderError):
            await read()
        assert got == [1, 2, 3, 4, 5], "what was there is not lost, and nothing comes behind the end"

    asyncio.run(scene())


def test_a_stream_ends_once() -> None:
    async def scene() -> None:
        stream = Stream("r", bound=4, cancel=lambda name: pytest.fail("it has ended"))
        stream.put((1,))
        stream.finish(Ended("r", "stop", RECORD))
        stream.fail(EngineGoneError("too late"))
        assert [token async for token in stream] == [1]
        assert (await stream.end()).finish_reason == "stop"
        stream.cancel()

    asyncio.run(scene())


class Client:
    """The other side of an ASGI application; ``stuck``: takes so many pieces, and then none."""

    def __init__(self, stuck: int | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self._stuck = stuck

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if len(self.sent) == self._stuck:
            await asyncio.Event().wait()
        self.sent.append(message)


async def _counting(count: int) -> AsyncGenerator[bytes, None]:
    for number in range(count):
        yield str(number).encode()
        await asyncio.sleep(0)


def test_events_are_sent_and_closed() -> None:
    async def scene() -> None:
        closed: list[bool] = []
        client = Client()
        response = SseResponse(_counting(3), write_s=1.0, ended=lambda: closed.append(True))
        await response({"type": "http"}, client.receive, client.send)
        assert [m.get("body") for m in client.sent[1:]] == [b"0", b"1", b"2", b""]
        assert closed == [True]
        assert dict(client.sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")

    asyncio.run(scene())


@pytest.mark.parametrize("stuck", [2, 0])
def test_a_client_that_takes_nothing_ends_its_stream(stuck: int) -> None:
    async def scene() -> None:
        closed: list[bool] = []
        client = Client(stuck)
        response = SseResponse(_counting(5), write_s=0.01, ended=lambda: closed.append(True))
        if stuck == 0:
            asyncio.get_running_loop().call_later(0.01, client.gone.set)
        await response({"type": "http"}, client.receive, client.send)
        assert len(client.sent) == stuck
        assert closed == [True]

    asyncio.run(scene())


def test_a_client_that_goes_away_ends_its_stream() -> None:
    async def scene() -> None:
        closed: list[bool] = []
        client = Client()
        asyncio.get_running_loop().call_later(0.01, client.gone.set)
        response = SseResponse(_counting(10**9), write_s=1.0, ended=lambda: closed.append(True))
        await response({"type": "http"}, client.receive, client.send)
        assert closed == [True]

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("because", "status"),
    [("invalid", 400), ("full", 429), ("rejected", 429), ("timeout", 504), ("closed", 503), ("failed", 500)],
)
def test_what_the_engine_refuses_has_a_status(because: Any, status: int) -> None:
    error = api_error(RefusedError(Refused("r", because, "why", 2.5 if because == "full" else None)))
    assert error.status == status
    assert set(error.body["error"]) == {"message", "type", "param", "code"}
    if status in (429, 503):
        assert int(error.headers["Retry-After"]) == {"full": 3, "rejected": 1, "closed": 5}[because]


def test_no_text_breaks_the_encoding() -> None:
    assert json.loads(ascii_json({"a": "\ud800\n\u2028"})) == {"a": "\ud800\n\u2028"}


@given(st.lists(st.floats(0, 1), max_size=30), st.integers(0, 30), st.integers(1, 8))
def test_newer_values_of_a_series_are_counted_once(series: list[float], cut: int, kept: int) -> None:
    series = [value + n for n, value in enumerate(series)]  # distinct, as measured times are
    cut = min(cut, len(series))
    before, now = series[:cut][-kept:], series[-kept:]
    if len(series) - cut <= kept:
        assert list(newer(before, now)) == series[cut:]
    else:
        assert list(newer(before, now)) == now, "what was never seen is lost, nothing is counted twice"


def test_traceparent() -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    assert trace_of(f"00-{trace}-00f067aa0ba902b7-01") == trace
    for wrong in (
        None,
        "",
        "00",
        f"ff-{trace}-00f067aa0ba902b7-01",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        "00-x\n",
    ):
        assert trace_of(wrong) is None


def test_the_gate_refuses_large_bodies_and_stamps_arrivals_behind_them() -> None:
    async def scene(parts: list[bytes], length: bytes | None) -> tuple[int, dict[str, Any]]:
        seen: dict[str, Any] = {}
        sent: list[Any] = []
        queue = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        queue.append({"type": "http.request", "body": b"", "more_body": False})

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.update(scope["state"], body=(await receive())["body"])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def receive() -> Any:
            return queue.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"x-request-id", b"mine")] + ([] if length is None else [(b"content-length", length)])
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "client": ("c", 1)}
        await Gate(app, body_bytes=10)(scope, receive, send)
        assert (b"x-request-id", b"mine") in sent[0]["headers"]
        assert ((b"connection", b"close") in sent[0]["headers"]) == (sent[0]["status"] == 413)
        return sent[0]["status"], seen

    status, seen = asyncio.run(scene([b"12345", b"67890"], None))
    assert status == 200
    assert seen["body"] == b"1234567890"
    assert seen["request_id"] == "mine" != seen["unique"]
    for parts, length in (([b"12345", b"678901"], None), ([b"1"], b"11"), ([b"1"], b"9" * 5000)):
        status, seen = asyncio.run(scene(parts, length))
        assert (status, seen) == (413, {}), "nobody else sees it"


@pytest.mark.parametrize("form", ["float", "base64"])
def test_long_answers_are_written_with_turns_between_the_vectors(form: Any) -> None:
    vectors = [struct.pack("<4f", n, 0.5, -1.0, 1e-9) for n in range(50)]

    async def scene() -> tuple[bytes, int]:
        turns = 0
        writing = asyncio.create_task(embedding_answer("m", vectors, 7, form))
        while not writing.done():
            await asyncio.sleep(0)
            turns += 1
        return await writing, turns

    written, turns = asyncio.run(scene())
    answer = json.loads(written)
    assert turns >= len(vectors)
    assert list(answer) == ["object", "data", "model", "usage"]
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    for number, one in enumerate(answer["data"]):
        found = one["embedding"]
        raw = base64.b64decode(found) if form == "base64" else struct.pack("<4f", *found)
        assert (one["index"], raw) == (number, vectors[number])

"""The doors of the front: connections, heads of requests, keys, defects, and lines of the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from fpcompile.errors import UsageError
from fpcompile.serving.server.app import make_app
from fpcompile.serving.server.connections import HEAD_BYTES, protocol_for
from fpcompile.serving.server.failures import ApiError
from fpcompile.serving.server.gate import Gate
from fpcompile.serving.server.link import Link
from fpcompile.serving.server.models import parse_models
from fpcompile.serving.server.promises import Account, Accounts, digest_of
from fpcompile.serving.server.run import bound, serve
from fpcompile.serving.server.settings import EngineSettings, ServerSettings
from tests.cpu.server_support import PATIENCE

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"


# ---- connections


async def _hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


Open = Callable[[], Any]


@contextlib.asynccontextmanager
async def _listening(most: int, head_s: float) -> AsyncIterator[Open]:
    """How to connect to a server."""
    config = uvicorn.Config(_hello, http=protocol_for(most, head_s, 600.0), lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            while not server.started:
                await asyncio.sleep(0.001)
            yield lambda: asyncio.open_connection("127.0.0.1", port)
        finally:
            server.should_exit = True
            await serving


def test_a_head_that_does_not_come_ends_its_connection() -> None:
    async def scene() -> None:
        async with asyncio.timeout(PATIENCE), _listening(100, 0.05) as connect:
            for said in (b"", b"GET", HEAD + b"X-Slow: 1"):
                reader, writer = await connect()
                writer.write(said)
                assert await reader.read() == b""
                writer.close()
            reader, writer = await connect()  # also behind an answer
            writer.write(HEAD + b"\r\n")
            assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200")
            writer.write(HEAD)
            assert await reader.read() == b""
            writer.close()

    asyncio.run(scene())


def test_a_head_in_time_is_answered_however_long_the_answer_takes() -> None:
    async def scene() -> None:
        async with asyncio.timeout(PATIENCE), _listening(100, 600.0) as connect:
            reader, writer = await connect()
            for part in (HEAD[:5], HEAD[5:], b"\r\n", HEAD, b"\r\n"):
                writer.write(part)
                await asyncio.sleep(0.001)
            for _ in range(2):
                assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200")
            writer.close()

    asyncio.run(scene())


def test_one_connection_too_many_is_told_so_and_the_others_go_on() -> None:
    async def scene() -> None:
        async with asyncio.timeout(PATIENCE), _listening(2, 600.0) as connect:
            taken = [await connect() for _ in range(2)]
            for reader, writer in taken:
                writer.write(HEAD + b"\r\n")
                assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200")
            reader, writer = await connect()
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503")
            assert b"Retry-After: 1" in head
            assert json.loads(body)["error"]["code"] == "too_many_connections"
            writer.close()
            reader, writer = taken[0]
            writer.write(HEAD + b"\r\n")
            assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200")
            for _, writer in taken:
                writer.close()

    asyncio.run(scene())


LINES = [b"X-%d: " % number + b"a" * 1000 + b"\r\n" for number in range(66)]  # the last one is too much
POST = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([HEAD, *LINES[:50], b"\r\n"], 200, None),
        ([HEAD, *LINES], 431, None),
        ([b"\x16\x03\x01 no HTTP\r\n\r\n"], 400, "invalid_http"),
        ([b"GET / HTTP/1.1\r\n\r\n"], 400, "invalid_http"),  # without a host
        ([POST + b"no length\r\n"], 400, "invalid_http"),
    ],
    ids=["long", "too long", "no HTTP", "no host", "no chunk"],
)
def test_heads_in_parts_are_taken_or_refused_in_openais_words(
    parts: list[bytes], status: int, code: str | None
) -> None:
    assert (sum(map(len, parts)) > HEAD_BYTES) is (status == 431)

    async def scene() -> tuple[bytes, bytes]:
        async with asyncio.timeout(PATIENCE), _listening(100, 600.0) as connect:
            reader, writer = await connect()
            with contextlib.suppress(ConnectionError):  # refused before its end
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.001)
            head = await reader.readuntil(b"\r\n\r\n")
            body = await (reader.readexactly(2) if status == 200 else reader.read())
            writer.close()
            return head, body

    head, body = asyncio.run(scene())
    assert head.startswith(b"HTTP/1.1 %d " % status)
    if status != 200:
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("invalid_request_error", code)


# ---- beginnings


def test_a_port_in_use_is_told_before_anything_is_loaded() -> None:
    nothing = EngineSettings(parse_models(["/no/such/model"]))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1, port {port}"):
            serve(ServerSettings(nothing, port=port))
    with pytest.raises(UsageError, match="cannot listen"):
        bound("no.such.host.invalid", 0)


def test_a_name_with_several_addresses_has_one_port_on_all() -> None:
    sockets = bound("localhost", 0)
    assert len({sock.getsockname()[1] for sock in sockets}) == 1
    for sock in sockets:
        sock.close()


@pytest.mark.slow
def test_an_engine_that_has_not_started_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    settings = EngineSettings(parse_models([], ["tiny"]), factory="tests.cpu.server_scripted:never")

    async def scene() -> Link:
        link = Link(settings, buffered=1)
        link.start()
        await link.close(timeout=0.5)
        return link

    link = asyncio.run(scene())
    assert link.process.exitcode == -signal.SIGKILL
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# ---- the gate


async def _unread() -> Any:
    raise AssertionError("nobody reads this body")


def _through(gate: Gate, path: str, receive: Any = _unread, **headers: str) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": named, "client": ("c", 1)}
    asyncio.run(gate(scope, receive, send))
    return sent


def test_a_body_without_a_key_is_not_read() -> None:
    def admit(request: Any) -> None:
        if request.headers.get("authorization") != "Bearer k":
            raise ApiError(401, "no key")

    async def whole() -> Any:
        return {"type": "http.request", "body": b"12345", "more_body": False}

    gate = Gate(_hello, body_bytes=10, admit=admit)
    refused = _through(gate, "/v1/completions")
    assert refused[0]["status"] == 401
    assert (b"connection", b"close") in refused[0]["headers"]
    assert _through(gate, "/v1/completions", whole, authorization="Bearer k")[0]["status"] == 200


def test_what_has_no_body_gets_no_large_one() -> None:
    async def large() -> Any:
        return {"type": "http.request", "body": b"x" * 5000, "more_body": False}

    gate = Gate(_hello, body_bytes=10_000)
    assert _through(gate, "/v1/completions", large)[0]["status"] == 200
    assert _through(gate, "/pause", large)[0]["status"] == 413


@pytest.mark.slow
def test_the_front_looks_at_the_key_before_the_body() -> None:
    settings = ServerSettings(
        EngineSettings(parse_models([], ["tiny"])), accounts=Accounts({}, {digest_of("k"): Account()}, None)
    )
    client = TestClient(make_app(settings))  # not entered: no worker is started
    for key, status in (("wrong", 401), ("k", 400)):
        got = client.post(
            "/v1/completions",
            content=b"{",
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        assert got.status_code == status
    large = client.post("/v1/completions", content=b" " * (5 << 20))
    assert large.status_code == 401, "not 413: it is not looked at"


def test_a_defect_has_an_id_and_a_line(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(ServerSettings(EngineSettings(parse_models([], ["tiny"]))))

    @app.get("/v1/defect")
    async def defect() -> None:
        raise ZeroDivisionError("a defect")

    with caplog.at_level(logging.INFO, "fpcompile.server.access"):
        got = TestClient(app).get("/v1/defect", headers={"x-request-id": "mine"})
    assert (got.status_code, got.json()["error"]["code"]) == (500, "internal_error")
    assert got.headers["x-request-id"] == "mine"
    assert "a defect" not in got.text
    assert any("500" in line and "id=mine" in line for line in caplog.messages)


def test_no_path_moves_the_cursor_of_who_reads_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def empty() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    with caplog.at_level(logging.INFO, "fpcompile.server.access"):
        _through(Gate(_hello, body_bytes=10), "/a\r\x1b[31mFAKE\n\x00\x7f\x9b\u2028\\é", empty)
    (line,) = caplog.messages
    assert line.isascii()
    assert line.isprintable()
    assert r"/a\r\x1b[31mFAKE\n\x00\x7f\x9b\u2028\\\xe9" in line

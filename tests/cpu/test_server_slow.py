"""Readers that do not read, and writers that do not end: raw sockets against the front's connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvicorn

from fpcompile.serving.server.connections import SLOWEST, protocol_for, too_slow
from fpcompile.serving.server.sse import SseResponse
from tests.cpu.server_support import PATIENCE

LARGE = 32 << 20  # bytes: more than the system keeps for a connection
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@contextlib.asynccontextmanager
async def _listening(app: Any, write_s: float) -> AsyncIterator[tuple[uvicorn.Server, Callable[[], Any]]]:
    """A server, and how to connect to it: a socket that keeps little, asks, and has read nothing."""
    config = uvicorn.Config(app, http=protocol_for(100, 600.0, write_s), lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with contextlib.ExitStack() as ends, socket.create_server(("127.0.0.1", 0)) as sock:
        serving = asyncio.create_task(server.serve(sockets=[sock]))

        async def connect() -> socket.socket:
            made = ends.enter_context(socket.socket())
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            made.setblocking(False)
            await asyncio.get_running_loop().sock_connect(made, sock.getsockname())
            return made

        try:
            while not server.started:
                await asyncio.sleep(0.001)
            yield server, connect
        finally:
            server.force_exit = server.should_exit = True
            await serving


async def _none_left(server: uvicorn.Server) -> None:
    while server.server_state.connections:
        await asyncio.sleep(0.005)


async def _large(scope: Any, receive: Any, send: Any) -> None:
    """An answer that is not streamed: written at once, and the handler has ended."""
    length = (b"content-length", str(LARGE).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": b"x" * LARGE})


def test_an_answer_that_nobody_reads_is_dropped_with_its_connection() -> None:
    async def scene() -> None:
        async with asyncio.timeout(PATIENCE), _listening(_large, 0.1) as (server, connect):
            client = await connect()
            await asyncio.get_running_loop().sock_sendall(client, GET)
            while not server.server_state.connections:
                await asyncio.sleep(0.001)
            await _none_left(server)
            assert server.server_state.total_requests == 1, "it had been answered"

    asyncio.run(scene())


def test_a_stream_that_nobody_reads_ends_what_makes_it() -> None:
    ended: list[str] = []

    async def events() -> Any:
        while True:
            await asyncio.sleep(0)  # as a stream waits for its tokens
            yield b"x" * 65536

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        answer = SseResponse(events(), write_s=600.0, ended=lambda: ended.append("stream"))
        await answer(scope, receive, send)

    async def scene() -> None:
        async with asyncio.timeout(PATIENCE), _listening(stream, 0.1) as (server, connect):
            client = await connect()
            await asyncio.get_running_loop().sock_sendall(client, GET)
            while not ended:
                await asyncio.sleep(0.005)
            await _none_left(server)

    asyncio.run(scene())
    assert ended == ["stream"]


def test_who_reads_in_parts_gets_everything() -> None:
    async def scene() -> int:
        async with asyncio.timeout(PATIENCE), _listening(_large, 20.0) as (_, connect):
            client = await connect()
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, GET)
            got = b""
            while b"\r\n\r\n" not in got:
                got += await loop.sock_recv(client, 4096)
            count = len(got.partition(b"\r\n\r\n")[2])
            while count < LARGE:
                part = await loop.sock_recv(client, 1 << 20)
                assert part, "the connection was cut"
                count += len(part)
            return count

    assert asyncio.run(scene()) == LARGE


def test_the_system_keeps_little_for_who_does_not_read() -> None:
    """What it keeps it gives room for in steps, and who reads slowly has to be seen to read."""

    async def scene() -> int:
        async with asyncio.timeout(PATIENCE), _listening(_large, 600.0) as (server, connect):
            client = await connect()
            await asyncio.get_running_loop().sock_sendall(client, GET)
            while not server.server_state.total_requests:
                await asyncio.sleep(0.001)
            for _ in range(20):
                await asyncio.sleep(0.005)
            (connection,) = server.server_state.connections
            size: int = connection.transport.get_write_buffer_size()
            return LARGE - size

    assert asyncio.run(scene()) < 30 * SLOWEST, "what a reader takes in the time that is looked at"


@pytest.mark.parametrize("line", [b"X-Long: " + b"a" * 1000, b"X-" + b"b" * 100_000])
def test_a_head_without_an_end_is_refused(line: bytes) -> None:
    """Of many headers, and of one."""

    async def scene() -> int:
        async with asyncio.timeout(PATIENCE), _listening(_large, 600.0) as (server, connect):
            client = await connect()
            loop = asyncio.get_running_loop()
            sent = 0
            await loop.sock_sendall(client, GET[:-2])
            with contextlib.suppress(OSError):
                while True:
                    await loop.sock_sendall(client, line + b"\r\n")
                    sent += len(line)
            await _none_left(server)
            return sent

    assert asyncio.run(scene()) < 16 << 20, "what the system keeps, not what is sent"


@pytest.mark.parametrize(
    ("before", "now", "slow"),
    [
        (100, 100, True), (100, 1, True), (100, 0, False), (1, 1, True),
        (10 * SLOWEST, 9 * SLOWEST, False), (10 * SLOWEST, 9 * SLOWEST + 1, True), (SLOWEST, 0, False),
    ],
)  # fmt: skip
def test_how_slow_a_reader_may_be(before: int, now: int, slow: bool) -> None:
    assert too_slow(before, now, 1.0) is slow

"""Connections: how many there may be, and how long each may take to ask, and to hear the answer.

uvicorn closes a connection that is idle behind an answer, and the gate one whose body does not come. Here is
the rest: a head of a request that does not come, or does not end, or is none; an answer that nobody reads;
and one connection too many. Heads are parsed by h11 whatever else is installed: what is tested is what runs.

An answer that the system does not take is kept by the connection. In each ``write_s`` seconds it must get
smaller by :data:`SLOWEST` bytes for each of them, or be gone; else the connection is cut, whether or not the
request behind it has ended. So nobody holds memory, or one of the connections, by not reading.

The system says in steps what it can take, up to a third of what it keeps; left alone it keeps megabytes, and
whoever reads well above the limit may be seen to take nothing for the whole time. So it is told what to keep.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fpcompile.serving.server.failures import ApiError, ascii_json

__all__ = ["HEAD_BYTES", "SLOWEST", "protocol_for", "too_slow"]

HEAD_BYTES: Final = 1 << 16
"""Of a request's line and headers."""
SLOWEST: Final = 16 << 10
"""Bytes of an answer that a reader takes per second, at least."""
_SYSTEMS: Final = 1 << 17  # bytes of an answer that the system keeps for a reader; Linux doubles it

_Base: Any = H11Protocol
_NO_HTTP: Final = ApiError(400, "this is no HTTP request", code="invalid_http")


def too_slow(before: int, now: int, seconds: float) -> bool:
    """Whether too little went out of a buffer that had ``before`` bytes ``seconds`` ago, and has ``now``."""
    return before - now < min(before, SLOWEST * seconds)


class _Connection(_Base):  # type: ignore[misc]
    """One connection of at most ``most``; seconds for a head, and for a part of an answer."""

    most: int
    head_s: float
    write_s: float

    _timer: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None
    _unsent = 0

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.conn = h11.Connection(h11.SERVER, HEAD_BYTES)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # whatever the system does not take is known here
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SYSTEMS)
        if len(self.connections) > self.most:
            self._refuse(ApiError(503, "too many connections", code="too_many_connections", retry_after=1))
            return
        self._wait()

    def data_received(self, data: bytes) -> None:
        if not self._asked and self._timer is None:
            self._wait()
        super().data_received(data)
        if self._asked:
            self._stop()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP, or a head without an end. (uvicorn answers with a line of text.)"""
        if not self._asked:
            long = len(self.conn.trailing_data[0]) > HEAD_BYTES
            limit = f"the head of a request has at most {HEAD_BYTES} bytes"
            self._refuse(ApiError(431, limit) if long else _NO_HTTP)
            return
        if not self.cycle.response_started:  # else: amid an answer nothing can be said
            self._refuse(_NO_HTTP)
        self.cycle.disconnected = True
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_again()

    def resume_writing(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        if self._stuck is not None:
            self._stuck.cancel()
        super().connection_lost(exc)

    @property
    def _asked(self) -> bool:
        """Whether a request is complete up to its body, and not answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.head_s, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: ApiError) -> None:
        self.transport.write(_whole(error))
        self.transport.close()

    def _look_again(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._stuck = asyncio.get_running_loop().call_later(self.write_s, self._look)

    def _look(self) -> None:
        if too_slow(self._unsent, self.transport.get_write_buffer_size(), self.write_s):
            self.transport.abort()
        else:
            self._look_again()


def protocol_for(most: int, head_s: float, write_s: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol for at most ``most`` connections; a request's head has to come in ``head_s`` s."""
    return type("Connection", (_Connection,), {"most": most, "head_s": head_s, "write_s": write_s})


def _whole(error: ApiError) -> bytes:
    """An answer without a request."""
    body = ascii_json(error.body)
    headers = {
        **error.headers,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    phrases = {400: "Bad Request", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}
    lines = [f"HTTP/1.1 {error.status} {phrases[error.status]}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body

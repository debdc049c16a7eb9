"""Connections: how many there may be, and how long each may take to say what it wants.

uvicorn closes a connection that is idle behind an answer, and the gate one whose body does not come. Here are
the two that are left: one that does not finish the head of a request, and one too many.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fpcompile.serving.server.failures import ApiError, ascii_json

__all__ = ["protocol_for"]

_Base: Any = AutoHTTPProtocol


def protocol_for(most: int, head_s: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol for at most ``most`` connections; a request's head has to come in ``head_s`` s."""

    class Connection(_Base):  # type: ignore[misc]
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.write(_one_too_many())
                transport.close()
                return
            self._wait()

        def data_received(self, data: bytes) -> None:
            if self._timer is None and not self._asked:
                self._wait()
            super().data_received(data)
            if self._asked:
                self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        @property
        def _asked(self) -> bool:
            """Whether a request is complete up to its body, and not answered."""
            return self.cycle is not None and not self.cycle.response_complete

        def _wait(self) -> None:
            self._timer = asyncio.get_running_loop().call_later(head_s, self.transport.close)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Connection


def _one_too_many() -> bytes:
    error = ApiError(503, "too many connections", code="too_many_connections", retry_after=1)
    body = ascii_json(error.body)
    headers = {
        **error.headers,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body

"""A streamed answer: server-sent events, which end when the events end or the client is gone.

Two tasks: one writes, one waits for the client to go. When the first of them ends, the other is ended, and
the events are closed: whoever makes them frees the device. A write that takes longer than the limit ends the
answer as well; then it is not complete, and the connection is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Final, final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["DONE", "SseResponse", "event", "gone"]

logger = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"


def event(data: bytes) -> bytes:
    """One event; ``data`` has no line breaks."""
    return b"data: " + data + b"\n\n"


async def gone(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


@final
class SseResponse(Response):
    """Sends what ``events`` yields, each piece at once.

    ``ended`` is called in any case, also when the client went away before the first event was asked for.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, write_s: float, ended: Callable[[], object]
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events, self._write_s, self._ended = events, write_s, ended
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        writing = asyncio.create_task(self._write(send))
        watching = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait((writing, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            writing.cancel()
            results = await asyncio.gather(writing, watching, return_exceptions=True)
            self._ended()
            await self._events.aclose()
        if isinstance(results[0], Exception):
            logger.info("a stream ended early: %s", repr(results[0]))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._events:
            async with asyncio.timeout(self._write_s):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

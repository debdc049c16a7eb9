"""The front's end of one request: what the worker sends, until it ends, for one reader.

A stream holds at most ``bound`` tokens that nobody has read. Beyond, the reader is too slow: the request is
cancelled, and the reader finds :class:`SlowReaderError` behind what is held. A stream with a time limit ends
when that is over, whether or not the engine comes to a cut.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol, final

from fpcompile.errors import FpcompileError
from fpcompile.serving.server.messages import Ended, Refused

__all__ = ["EngineGoneError", "RefusedError", "SlowReaderError", "Stream", "Watch"]


class Watch(Protocol):
    """Who counts what a stream sees, at the moment that it comes."""

    def tokens(self, count: int) -> None:
        """So many have come together."""

    def left(self, reason: str | None) -> None:
        """The reader has had enough, and goes; ``reason``: why this is a good end, None when it is none."""

    def ended(self, ended: Ended) -> None:
        """A good end, or a cancelled request."""

    def failed(self, error: Exception) -> None:
        """Another end."""


class RefusedError(FpcompileError, RuntimeError):
    """The engine ended the request without a result; ``refused`` says why."""

    def __init__(self, refused: Refused) -> None:
        self.refused = refused
        super().__init__(refused.message)


class EngineGoneError(FpcompileError, RuntimeError):
    """The engine's process has ended, or is about to."""


class SlowReaderError(FpcompileError, RuntimeError):
    """More tokens than the limit wait for this reader."""


@final
class Stream:
    """Tokens of one request in batches as they came, then its end. Belongs to one event loop."""

    def __init__(
        self, request_id: str, *, bound: int, cancel: Callable[[str], object], watch: Watch | None = None
    ) -> None:
        self.id = request_id
        self._watch = watch
        self.ended: Ended | None = None
        self._bound, self._cancel = bound, cancel
        self._tokens: deque[int] = deque()
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._left = False
        self._timer: asyncio.TimerHandle | None = None

    # ---- for the reader

    async def started(self) -> None:
        """Return when there is a token, or a good end; raise what ended it otherwise."""
        while not self._tokens and self.ended is None:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()

    async def __aiter__(self) -> AsyncIterator[int]:
        """Every token once, in order; raises what ended the request, if it was no good end."""
        while True:
            while self._tokens:
                yield self._tokens.popleft()
            if self._error is not None:
                raise self._error
            if self.ended is not None:
                return
            self._news.clear()
            await self._news.wait()

    async def end(self) -> Ended:
        """How it ended; raises what ended it otherwise."""
        while self.ended is None:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        return self.ended

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.ended is not None or self._error is not None

    def cancel(self, reason: str | None = None) -> None:
        """The reader goes: end the request at the next cut. Void when it has ended.

        ``reason``: the finish reason, where the reader has all that it wants.
        """
        if self.over or self._left:
            return
        self._left = True
        self._stop_timer()
        if self._watch is not None:
            self._watch.left(reason)
        self._cancel(self.id)

    # ---- for the link

    def limit(self, seconds: float, message: str) -> None:
        """End it with ``message`` unless it is over in so many seconds."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(seconds, 0.0), self._late, message)

    def _late(self, message: str) -> None:
        if not self.over:
            self._cancel(self.id)
            self.fail(RefusedError(Refused(self.id, "timeout", message)))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def put(self, tokens: tuple[int, ...]) -> None:
        """Tokens have come."""
        if self.over:
            return
        if self._watch is not None:
            self._watch.tokens(len(tokens))
        self._tokens.extend(tokens)
        if len(self._tokens) > self._bound:
            self._cancel(self.id)
            self.fail(
                SlowReaderError("the reader is too slow", expected=f"at most {self._bound} tokens unread")
            )
        self._news.set()

    def finish(self, ended: Ended) -> None:
        """It has ended well."""
        if not self.over:
            self._stop_timer()
            self.ended = ended
            if self._watch is not None:
                self._watch.ended(ended)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """It has ended otherwise; the first error counts."""
        if not self.over:
            self._stop_timer()
            self._error = error
            if self._watch is not None:
                self._watch.failed(error)
        self._news.set()

"""The caller's end of a request: a result for threads and for event loops, tokens, and ``cancel``.

Typical use
    ``handle.result(timeout=1.0)`` in a thread; ``await handle`` in any number of event loops at once.
    ``for token in handle.tokens()`` and ``async for token in handle``, where the request generates.

Invariants
    A handle ends exactly once, with a result or with the original typed exception.
    ``cancel()`` answers True if and only if the request ends as cancelled: what has been promised is kept
    even when the run completes at the same moment. It takes effect at the next cut; once ``done()``, the
    request holds no memory but the result.
    Nothing blocks an event loop: awaiting only registers a callback.
    Tokens stay in a list, which readers go through by index: any number of them, at any pace, from the first
    token; nobody who is slow holds anything up. Leaving a loop over tokens early ends nothing.

How an end is decided, by the driver alone: ``seal`` closes the race with ``cancel`` and says whether it was
asked for; then the books are closed; then ``resolve`` or ``fail`` wakes those who wait. So who has seen the
end of a request sees it in ``metrics`` and in the engine's statistics as well.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from fpcompile.engine.errors import Home
from fpcompile.errors import InternalError, UsageError

if TYPE_CHECKING:
    from fpcompile.engine.metrics import RequestMetrics

__all__ = ["Handle"]

logger = logging.getLogger(__name__)


class Handle:
    """One submitted request. Made by ``Engine.submit``."""

    __slots__ = (
        "_ask", "_callbacks", "_cancelled", "_done", "_error", "_followers", "_home", "_lock", "_readers",
        "_sealed", "_snapshot", "_tokens", "_value", "request_id",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        *,
        ask_cancel: Callable[[str], object],
        home: Home,
        generates: bool = False,
    ) -> None:
        self.request_id = request_id
        self._ask: Callable[[str], object] | None = ask_cancel
        self._home = home
        self._lock = threading.RLock()  # a finalizer may cancel in the middle of anything
        self._done = threading.Event()
        self._sealed = False
        self._cancelled = False
        self._callbacks: list[Callable[[], object]] = []
        self._tokens: list[int] | None = [] if generates else None
        self._readers: list[Callable[[], object]] = []
        self._followers: list[Callable[[int], object]] = []
        self._value: Any = None
        self._error: BaseException | None = None
        self._snapshot: Callable[[], RequestMetrics] | None = None

    def __repr__(self) -> str:
        return f"<Handle {self.request_id!r}: {self.metrics.state if self._snapshot else 'new'}>"

    # ---- for callers

    def done(self) -> bool:
        """Whether the request has ended, in whatever way."""
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end; the model's output, on the device, complete.

        Raises ``TimeoutError`` after ``timeout`` seconds (the request goes on), or what ended the request:
        :class:`SegmentError`, :class:`RequestCancelledError`, :class:`RequestRejectedError`, or another.
        """
        self._home.check()
        if not self._done.wait(timeout):
            raise TimeoutError(f"request {self.request_id!r} has not ended within {timeout} s")
        if self._error is not None:
            raise self._error
        return self._value

    def cancel(self) -> bool:
        """Ask for the end of the request at the next cut.

        True when it will end, or has ended, as cancelled; so asking twice is no mistake. False when it has
        ended otherwise.
        """
        self._home.check()
        with self._lock:
            if self._sealed or self._cancelled:
                return self._cancelled
            self._cancelled = True
            ask = self._ask
        if ask is not None:
            ask(self.request_id)
        return True

    @property
    def metrics(self) -> RequestMetrics:
        """What is known about the request now; see :class:`RequestMetrics`."""
        if self._snapshot is None:
            raise InternalError("a handle was used before it was bound", got=self.request_id)
        return self._snapshot()

    def add_done_callback(self, callback: Callable[[Handle], object]) -> None:
        """Call ``callback(handle)`` once the request has ended, on the thread that ended it: be brief.

        At once when it has ended already. What it raises is logged.
        """
        if not self._listen(lambda: callback(self)):
            _call(lambda: callback(self))

    def tokens(self, timeout: float | None = None) -> Iterator[int]:
        """Token ids as they are made, from the first one; ends when the request has completed.

        Raises what ended the request otherwise, behind the tokens that were made, ``TimeoutError`` when one
        does not come within ``timeout`` seconds, and :class:`UsageError` if the request does not generate.
        """
        self._home.check()
        self._generated()
        return self._read(timeout)

    def add_token_callback(self, callback: Callable[[int], object]) -> None:
        """Call ``callback(token)`` for each token, those that are there at once; on the thread that makes it.

        For who passes many streams on: no future and no task is woken for each token. Be brief; what it
        raises is logged. Raises :class:`UsageError` if the request does not generate.
        """
        self._home.check()
        with self._lock:
            for token in self._generated():
                _call(functools.partial(callback, token))
            self._followers.append(callback)

    def next_token(self, index: int, timeout: float | None = None) -> int | None:
        """Wait for token ``index``, from 0; None when the request completed before. Raises as ``tokens``."""
        self._home.check()
        self._generated()
        there = threading.Event()
        while self._listen_for_token(index, there.set):
            if not there.wait(timeout):
                self._forget(there.set)
                raise TimeoutError(f"request {self.request_id!r} made no token within {timeout} s")
            there.clear()
        return self._token(index)

    def _read(self, timeout: float | None) -> Iterator[int]:
        index = 0
        while (token := self.next_token(index, timeout)) is not None:
            yield token
            index += 1

    async def __aiter__(self) -> AsyncIterator[int]:
        """As ``tokens()``, without blocking the event loop; cancelling who waits cancels the request."""
        self._home.check()
        self._generated()
        index = 0
        while True:
            await self._until(lambda wake, i=index: self._listen_for_token(i, wake))  # type: ignore[misc]
            if (token := self._token(index)) is None:
                return
            yield token
            index += 1

    def _generated(self) -> list[int]:
        if self._tokens is None:
            raise UsageError(
                f"request {self.request_id!r} makes no tokens",
                expected="a request that generates",
                got="one forward pass",
                remedy="submit(..., max_new_tokens=...)",
            )
        return self._tokens

    def _token(self, index: int) -> int | None:
        """Token ``index`` if it is there; else the request has ended: None, or what ended it."""
        tokens = self._generated()
        if index < len(tokens):
            return tokens[index]
        if self._error is not None:
            raise self._error
        return None

    def __await__(self) -> Generator[Any, None, Any]:
        """As ``result()``, without blocking the event loop. Cancelling the awaiting task cancels the request.

        (``asyncio.shield(handle)`` keeps the request alive when only the waiting is to end.)
        """
        return self._wait().__await__()

    async def _wait(self) -> Any:
        self._home.check()
        await self._until(self._listen)
        return self.result(0)

    async def _until(self, listen: Callable[[Callable[[], object]], bool]) -> None:
        """Wait until what is listened for is there; cancelling that cancels the request."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def wake_from_afar() -> None:
            try:
                loop.call_soon_threadsafe(wake)
            except RuntimeError:  # the loop is closed: nobody waits there any more
                logger.debug("the loop that awaited %r is closed", self.request_id)

        if listen(wake_from_afar):
            try:
                await waiter
            except asyncio.CancelledError:
                self._forget(wake_from_afar)
                self.cancel()
                raise

    def _listen(self, callback: Callable[[], object]) -> bool:
        """Register for the end; False when it is there already."""
        with self._lock:
            if self._done.is_set():
                return False
            self._callbacks.append(callback)
            return True

    def _listen_for_token(self, index: int, callback: Callable[[], object]) -> bool:
        """Register for the next token or the end; False when token ``index`` or the end is there already."""
        with self._lock:
            if index < len(self._generated()) or self._done.is_set():
                return False
            self._readers.append(callback)
            return True

    def _forget(self, callback: Callable[[], object]) -> None:
        with self._lock:
            for waiting in (self._callbacks, self._readers):
                if callback in waiting:
                    waiting.remove(callback)

    # ---- for the driver

    def bind(self, snapshot: Callable[[], RequestMetrics]) -> None:
        """Say where the metrics come from."""
        self._snapshot = snapshot

    def put(self, token: int) -> None:
        """One more token: wake those who wait for it."""
        with self._lock:
            self._generated().append(token)
            readers, self._readers = self._readers, []
            for follower in self._followers:
                _call(functools.partial(follower, token))
        for reader in readers:
            _call(reader)

    def seal(self) -> bool:
        """Decide: from now on ``cancel`` comes too late. Whether it came before."""
        with self._lock:
            self._sealed = True
            ask, self._ask = self._ask, None
        del ask  # perhaps the last reference to the engine: not under the lock
        return self._cancelled

    def resolve(self, value: Any) -> None:
        """End with a result."""
        self._end(value, None)

    def fail(self, error: BaseException) -> None:
        """End with an exception."""
        self._end(None, error)

    def _end(self, value: Any, error: BaseException | None) -> None:
        with self._lock:
            if self._done.is_set() or not self._sealed:
                raise InternalError(
                    f"request {self.request_id!r} ended {'twice' if self._sealed else 'unsealed'}",
                    expected="one end, after seal()",
                )
            self._value, self._error = value, error
            self._done.set()
            callbacks, self._callbacks = self._callbacks + self._readers, []
            self._readers = []
        for callback in callbacks:
            _call(callback)


def _call(callback: Callable[[], object]) -> None:
    try:
        callback()
    except (Exception, SystemExit):  # as for hooks: the thread that calls is the engine's
        logger.exception("a callback of a handle raised")

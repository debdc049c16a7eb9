"""The caller's end of a request: a result for threads and for event loops, and ``cancel``.

Typical use
    ``handle.result(timeout=1.0)`` in a thread; ``await handle`` in any number of event loops at once.

Invariants
    A handle ends exactly once, with a result or with the original typed exception.
    ``cancel()`` answers True if and only if the request ends as cancelled: what has been promised is kept
    even when the run completes at the same moment. It takes effect at the next cut; once ``done()``, the
    request holds no memory but the result.
    Nothing blocks an event loop: awaiting only registers a callback.

How an end is decided, by the driver alone: ``seal`` closes the race with ``cancel`` and says whether it was
asked for; then the books are closed; then ``resolve`` or ``fail`` wakes those who wait. So who has seen the
end of a request sees it in ``metrics`` and in the engine's statistics as well.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from fpcompile.engine.errors import Home
from fpcompile.errors import InternalError

if TYPE_CHECKING:
    from fpcompile.engine.metrics import RequestMetrics

__all__ = ["Handle"]

logger = logging.getLogger(__name__)


class Handle:
    """One submitted request. Made by ``Engine.submit``."""

    __slots__ = (
        "_ask", "_callbacks", "_cancelled", "_done", "_error", "_home", "_lock", "_sealed", "_snapshot",
        "_value", "request_id",
    )  # fmt: skip

    def __init__(self, request_id: str, *, ask_cancel: Callable[[str], object], home: Home) -> None:
        self.request_id = request_id
        self._ask: Callable[[str], object] | None = ask_cancel
        self._home = home
        self._lock = threading.RLock()  # a finalizer may cancel in the middle of anything
        self._done = threading.Event()
        self._sealed = False
        self._cancelled = False
        self._callbacks: list[Callable[[], object]] = []
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

    def __await__(self) -> Generator[Any, None, Any]:
        """As ``result()``, without blocking the event loop. Cancelling the awaiting task cancels the request.

        (``asyncio.shield(handle)`` keeps the request alive when only the waiting is to end.)
        """
        return self._wait().__await__()

    async def _wait(self) -> Any:
        self._home.check()
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

        if self._listen(wake_from_afar):
            try:
                await waiter
            except asyncio.CancelledError:
                self._forget(wake_from_afar)
                self.cancel()
                raise
        return self.result(0)

    def _listen(self, callback: Callable[[], object]) -> bool:
        """Register for the end; False when it is there already."""
        with self._lock:
            if self._done.is_set():
                return False
            self._callbacks.append(callback)
            return True

    def _forget(self, callback: Callable[[], object]) -> None:
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

    # ---- for the driver

    def bind(self, snapshot: Callable[[], RequestMetrics]) -> None:
        """Say where the metrics come from."""
        self._snapshot = snapshot

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
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            _call(callback)


def _call(callback: Callable[[], object]) -> None:
    try:
        callback()
    except (Exception, SystemExit):  # as for hooks: the thread that calls is the engine's
        logger.exception("a callback of a handle raised")

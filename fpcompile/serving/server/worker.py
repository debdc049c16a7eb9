"""The worker: a process with the engine, an event loop that reads messages, and nothing else.

Each request is a task that waits for its handle. Tokens come from the engine's thread to one list, and what
has gathered there goes out as one message: a step of a hundred streams wakes the loop once. When the front is
gone, the engine is closed and the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol, final

from fpcompile.errors import (
    EngineClosedError,
    FpcompileError,
    QueueFullError,
    RequestCancelledError,
    RequestRejectedError,
    RequestTimeoutError,
    UsageError,
)
from fpcompile.serving.server.channel import Channel
from fpcompile.serving.server.messages import (
    Answer,
    Ask,
    Cancel,
    Close,
    Embed,
    Ended,
    Facts,
    Fresh,
    Generate,
    Ready,
    Record,
    Refused,
    RefusedBecause,
    Unready,
)
from fpcompile.serving.server.settings import EngineSettings

__all__ = ["Backend", "record_of", "refusal_of", "run_worker"]

logger = logging.getLogger(__name__)

_SWITCH = 5e-4  # seconds that this thread may go on while the engine's waits between two kernels

_CAUSES: tuple[tuple[type[BaseException], RefusedBecause], ...] = (
    (QueueFullError, "full"),
    (RequestRejectedError, "rejected"),
    (RequestTimeoutError, "timeout"),
    (EngineClosedError, "closed"),
    (UsageError, "invalid"),
)
"""The first class that fits names the cause; anything else has failed."""


class Backend(Protocol):
    """What the worker serves from; see :class:`fpcompile.serving.server.build.EngineBackend`."""

    @property
    def facts(self) -> Mapping[str, Facts]:
        """The models by name."""

    def generate(self, ask: Generate) -> Any:
        """A handle that tells its tokens; typed errors when it is refused."""

    def embed(self, ask: Embed) -> Any:
        """A handle that can be awaited."""

    def vector(self, program: str, output: Any) -> bytes:
        """Of an embed handle's result."""

    def statistics(self) -> dict[str, Any]:
        """Plain data."""

    def health(self) -> tuple[bool, str]:
        """Whether all is well, and what is not."""

    def pause(self) -> None:
        """Hold the device."""

    def resume(self) -> None:
        """Go on."""

    def close(self) -> None:
        """End."""


def run_worker(settings: EngineSettings, connection: Connection[Any, Any]) -> None:
    """The main function of the process: serve over ``connection`` until its other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they go to the whole group; the front says when to end
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    module, _, function = settings.factory.partition(":")
    try:
        backend: Backend = getattr(importlib.import_module(module), function)(settings)
    except Exception as error:
        if not isinstance(error, FpcompileError):
            logger.exception("the engine cannot be made")
        connection.send([Unready(f"{type(error).__name__}: {error}")])
        connection.close()
        return
    try:
        asyncio.run(_Worker(backend, connection).serve())
    finally:
        backend.close()


@final
class _Worker:
    def __init__(self, backend: Backend, connection: Connection[Any, Any]) -> None:
        self._backend, self._connection = backend, connection
        self._handles: dict[str, Any] = {}
        """By request; None until it is submitted."""
        self._withdrawn: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._fresh: deque[tuple[str, int]] = deque()
        self._flushing = False

    async def serve(self) -> None:
        """Until the front closes, or is gone."""
        loop = asyncio.get_running_loop()
        self._loop, self._over = loop, asyncio.Event()
        self._channel = Channel(self._connection, loop, self._hear, self._over.set)
        self._channel.start()
        self._channel.send(Ready(dict(self._backend.facts)))
        await self._over.wait()
        for name in list(self._handles):
            self._cancel(name)
        self._channel.close()

    def _hear(self, messages: Sequence[Any]) -> None:
        for message in messages:
            match message:
                case Generate() | Embed():
                    self._begin(message)
                case Cancel(name):
                    self._cancel(name)
                case Ask():
                    self._channel.send(self._answer(message))
                case Close():
                    self._over.set()

    def _answer(self, ask: Ask) -> Answer:
        try:
            return Answer(ask.number, getattr(self._backend, ask.about)())
        except Exception as error:  # the other messages of the batch do not depend on it
            logger.exception("no answer about %s", ask.about)
            return Answer(ask.number, None, f"{type(error).__name__} about {ask.about}")

    def _begin(self, ask: Generate | Embed) -> None:
        self._handles[ask.id] = None
        task = self._loop.create_task(self._serve(ask))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, ask: Generate | Embed) -> None:
        try:
            if isinstance(ask, Generate):
                handle = self._backend.generate(ask)
            else:  # inputs of a new kind compile a graph, which takes seconds
                handle = await asyncio.to_thread(self._backend.embed, ask)
        except Exception as error:
            del self._handles[ask.id]
            self._withdrawn.discard(ask.id)
            self._channel.send(refusal_of(ask.id, error, None, self._backlog))
            return
        if ask.id in self._withdrawn:
            handle.cancel()
        self._handles[ask.id] = handle
        await self._follow(ask, handle)
        self._withdrawn.discard(ask.id)

    def _cancel(self, name: str) -> None:
        if name in self._handles:
            if (handle := self._handles[name]) is not None:
                handle.cancel()
            else:  # not submitted yet
                self._withdrawn.add(name)

    async def _follow(self, ask: Generate | Embed, handle: Any) -> None:
        """Pass on what the handle gives, then how it ends."""
        last: Ended | Refused
        try:
            if isinstance(ask, Generate):
                handle.add_token_callback(functools.partial(self._token, ask.id))
                await handle
                vector = None
            else:
                vector = self._backend.vector(ask.program, await handle)
            metrics = handle.metrics
            reason = metrics.finish_reason if isinstance(ask, Generate) else "stop"
            last = Ended(ask.id, reason, record_of(metrics), vector)
        except RequestCancelledError:
            last = Ended(ask.id, None, record_of(handle.metrics))
        except Exception as error:
            last = refusal_of(ask.id, error, record_of(handle.metrics), self._backlog)
        self._flush()
        del self._handles[ask.id]
        self._channel.send(last)

    def _backlog(self) -> float:
        """Predicted seconds until those who wait now have their first tokens."""
        seconds = 0.0
        for handle in self._handles.values():
            if handle is not None and (now := handle.metrics).ended is None and now.ttft is None:
                seconds += max(now.predicted_ttft - now.executed, 0.0)
        return seconds

    def _token(self, name: str, token: int) -> None:
        """One more, on the engine's thread."""
        self._fresh.append((name, token))
        if not self._flushing:
            self._flushing = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._flushing = False  # before looking: who comes behind it calls again
        made: dict[str, list[int]] = {}
        while self._fresh:
            name, token = self._fresh.popleft()
            made.setdefault(name, []).append(token)
        if made:
            self._channel.send(Fresh(tuple((name, tuple(tokens)) for name, tokens in made.items())))


def record_of(metrics: Any) -> Record:
    """What the front is told of a handle's metrics."""
    return Record(
        state=metrics.state,
        arrival=metrics.arrival,
        ended=metrics.ended,
        queued=metrics.queued,
        ttft=metrics.ttft,
        suspended=metrics.suspended,
        executed=metrics.executed,
        predicted=metrics.predicted_ttft,
        preemptions=metrics.preemptions,
        slo_met=metrics.slo_met,
        numerics=metrics.numerics,
    )


def refusal_of(
    name: str, error: Exception, record: Record | None, backlog: Callable[[], float] = float
) -> Refused:
    """What the front is told when ``error`` ended a request; defects are logged here.

    ``backlog``: predicted seconds of what is before whoever was rejected.
    """
    because: RefusedBecause = next((cause for kind, cause in _CAUSES if isinstance(error, kind)), "failed")
    if because == "failed":
        logger.error("request %s failed", name, exc_info=error)
    after = error.retry_after if isinstance(error, QueueFullError) else None
    if because == "rejected":
        after = backlog()
    text = " ".join(str(error).split())
    return Refused(name, because, text, after, record)

"""The front's side of the worker: starts its process, sends asks, hands what comes to the streams.

States: ``starting`` until the worker is warm, ``ready``, ``gone`` when its process has ended or could not
start. When it is gone every stream fails at once; nobody waits for a process that is not there.

A stream whose reader has gone, or whose time is over, is *departed*: not live any more, whenever the worker
comes to say how its request ended.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import logging
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from typing import Any, final

from fpcompile.errors import InternalError
from fpcompile.serving.server.channel import Channel
from fpcompile.serving.server.engines import State
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
    Refused,
    Subject,
    Unready,
)
from fpcompile.serving.server.settings import EngineSettings
from fpcompile.serving.server.streams import EngineGoneError, RefusedError, Stream, Watch
from fpcompile.serving.server.worker import run_worker

__all__ = ["Link"]

logger = logging.getLogger(__name__)


@final
class Link:
    """One worker. All methods belong to one event loop."""

    def __init__(self, settings: EngineSettings, *, buffered: int) -> None:
        self.state: State = "starting"
        self.reason = "the engine is starting"
        self.facts: Mapping[str, Facts] = {}
        self.paused = False
        self.unready: str | None = None
        """Why the worker could not start."""
        self._settings, self._buffered = settings, buffered
        self._streams: dict[str, Stream] = {}
        self._departed: dict[str, Stream] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Start the process; does not wait for it to be ready."""
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        self.process = context.Process(
            target=run_worker, args=(self._settings, theirs), name="fpcompile-engine", daemon=True
        )
        self.process.start()
        logger.info("the engine's process is %d", self.process.pid)
        atexit.register(self.process.kill)  # no signal ends it: not even multiprocessing's own at the exit
        theirs.close()
        loop = asyncio.get_running_loop()
        self._channel = Channel(mine, loop, self._hear, self._lost)
        self._channel.start()

    async def settled(self) -> None:
        """Wait until the worker is ready, or will never be."""
        while self.state == "starting":
            self._changed.clear()
            await self._changed.wait()

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def submit(self, ask: Generate | Embed, watch: Watch | None = None) -> Stream:
        """Send it; the stream tells the rest. Raises :class:`EngineGoneError`."""
        if self.state != "ready":
            raise EngineGoneError(self.reason)
        if ask.id in self._streams or ask.id in self._departed:
            raise InternalError("two requests have one id", got=ask.id)
        stream = Stream(ask.id, bound=self._buffered, cancel=self.cancel, watch=watch)
        self._streams[ask.id] = stream
        self._channel.send(ask)
        if (seconds := ask.terms.timeout) is not None:
            left = ask.terms.arrival + seconds - time.monotonic()
            stream.limit(left, f"the request has not ended within {seconds:g} s of its arrival")
        return stream

    def cancel(self, request_id: str) -> None:
        """End a request at the next cut; it is not live any more."""
        if self.state == "ready" and (stream := self._streams.pop(request_id, None)) is not None:
            self._departed[request_id] = stream
            self._channel.send(Cancel(request_id))

    def cancel_all(self, reason: str) -> None:
        """End everything: who waits is told ``reason``."""
        for stream in list(self._streams.values()):
            self.cancel(stream.id)
            stream.fail(EngineGoneError(reason))

    async def ask(self, about: Subject, timeout: float = 2.0) -> Any:
        """The worker's answer. Raises :class:`EngineGoneError`, ``TimeoutError`` after seconds."""
        if self.state != "ready":
            raise EngineGoneError(self.reason)
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        self._channel.send(Ask(number, about))
        try:
            async with asyncio.timeout(timeout):
                return await future
        finally:
            self._answers.pop(number, None)

    async def pause(self) -> None:
        """Hold the device at the next cut."""
        await self.ask("pause")
        self.paused = True

    async def resume(self) -> None:
        """Let it go on."""
        await self.ask("resume")
        self.paused = False

    async def close(self, timeout: float = 15.0) -> None:
        """End the process; kill it when it does not end within ``timeout`` seconds, or has not begun."""
        if self.state == "starting":
            self.process.kill()  # it does not listen before it is ready, and nothing is live
        elif self.state != "gone":
            self._channel.send(Close())
        self._gone("the server has ended")
        await asyncio.to_thread(self._end, timeout)

    def _end(self, timeout: float) -> None:
        self.process.join(timeout)
        if self.process.is_alive():
            logger.error("the engine's process does not end: it is killed")
            self.process.kill()
            self.process.join(5.0)
        self._channel.close(1.0)

    def _hear(self, messages: Sequence[Any]) -> None:
        for message in messages:
            match message:
                case Fresh(tokens):
                    for name, made in tokens:
                        if (stream := self._streams.get(name)) is not None:
                            stream.put(made)
                case Ended():
                    if (stream := self._last(message.id)) is not None:
                        stream.finish(message)
                case Refused():
                    if (stream := self._last(message.id)) is not None:
                        stream.fail(RefusedError(message))
                case Answer():
                    self._answered(message)
                case Ready(models):
                    self.facts, self.state, self.reason = models, "ready", ""
                    self._changed.set()
                case Unready(reason):
                    self.unready = reason
                    self._gone(reason)

    def _last(self, request_id: str) -> Stream | None:
        return self._streams.pop(request_id, None) or self._departed.pop(request_id, None)

    def _answered(self, answer: Answer) -> None:
        future = self._answers.get(answer.number)
        if future is None or future.done():
            return
        if answer.error is None:
            future.set_result(answer.value)
        else:
            future.set_exception(EngineGoneError(f"the engine does not answer: {answer.error}"))

    def _lost(self) -> None:
        """The pipe has ended."""
        code = None
        with contextlib.suppress(ValueError):
            code = self.process.exitcode
        self._gone("the engine's process has ended" + (f" with exit code {code}" if code else ""))

    def _gone(self, reason: str) -> None:
        if self.state == "gone":
            return
        self.state, self.reason = "gone", reason
        logger.log(logging.INFO if reason == "the server has ended" else logging.CRITICAL, "%s", reason)
        streams = [*self._streams.values(), *self._departed.values()]
        self._streams, self._departed = {}, {}
        for stream in streams:
            stream.fail(EngineGoneError(reason))
        for future in self._answers.values():
            if not future.done():
                future.set_exception(EngineGoneError(reason))
        self._changed.set()

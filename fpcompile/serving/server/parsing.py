"""Long bodies: parsed and checked in a process of their own, so that no body holds up the event loop.

JSON of a few megabytes is hundreds of thousands of objects, which take a tenth of a second to make and to
look at, with the interpreter's lock held: no thread of the front would go on meanwhile. So a body beyond
:data:`SHORT` bytes goes to a process that does nothing else, and comes back as what it says, or as its first
mistake. What comes back has few objects: texts, and one list of numbers at most.

One long body at a time: those who send them wait for each other, and for nobody else. The process ends when
the front does, in whatever way; when it is lost, or gives no answer in a minute, the next body has a new one.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import logging
import multiprocessing
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final, final

from pydantic import ValidationError

from fpcompile.errors import FpcompileError
from fpcompile.serving.server.bodies import Body, ChatBody, CompletionBody, EmbeddingBody

__all__ = ["BODIES", "SHORT", "Mistake", "Parser", "ParserGoneError", "WrongBodyError", "parsed"]

logger = logging.getLogger(__name__)

SHORT: Final = 16 << 10
"""Bytes of a body that is parsed at once, where it is: a few milliseconds at most."""

BODIES: Final[dict[str, type[Body]]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/embeddings": EmbeddingBody,
}
"""What is sent to each path."""

_ANSWERS_S: Final = 60.0  # seconds in which a body has been sent and answered, or its process is killed


@dataclass(frozen=True, slots=True)
class Mistake:
    """The first one of a body, in pydantic's words; ``kind`` ``json_invalid``: it is not JSON."""

    kind: str
    where: tuple[str | int, ...]
    message: str


_NO_JSON: Final = Mistake("json_invalid", (), "JSON decode error")


class WrongBodyError(FpcompileError, ValueError):
    """The body is not what its path takes."""

    def __init__(self, mistake: Mistake) -> None:
        self.mistake = mistake
        super().__init__("the body is wrong", got=mistake.message)


class ParserGoneError(FpcompileError, RuntimeError):
    """The process has ended in the middle of a body."""


def parsed(path: str, body: bytes) -> Body | Mistake:
    """What ``body`` says to ``path`` (a key of :data:`BODIES`), or its first mistake."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return _NO_JSON
    try:
        return BODIES[path].model_validate(value, from_attributes=True)  # as FastAPI does: for its words
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return Mistake(first["type"], first["loc"], first["msg"])


@final
class Parser:
    """The process, and the thread that speaks to it. ``parse`` belongs to event loops, any number of them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fpcompile-parser")
        self._process: Any = None
        self._pipe: Connection[Any, Any] | None = None

    def start(self) -> None:
        """Start the process; does not wait for it. Without this the first body does."""
        self._thread.submit(self._connected)

    async def parse(self, path: str, body: bytes) -> Body:
        """What ``body`` says to ``path``. Raises :class:`WrongBodyError`, :class:`ParserGoneError`."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, self._ask, path, body)
        if isinstance(found, Mistake):
            raise WrongBodyError(found)
        return found

    def close(self) -> None:
        """End the process; what is under way ends with it. Waits for that: not for an event loop."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if (process := self._process) is not None:
            process.kill()
        self._thread.shutdown(wait=True)
        self._end()

    def _connected(self) -> Connection[Any, Any]:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), name="fpcompile-parser", daemon=True)
            process.start()
            atexit.register(process.kill)  # no signal ends it: not even multiprocessing's own at the exit
            theirs.close()
            self._process, self._pipe = process, mine
        return self._pipe

    def _ask(self, path: str, body: bytes) -> Body | Mistake:
        try:
            pipe = self._connected()
            late = threading.Timer(_ANSWERS_S, self._process.kill)  # which ends whatever is waited for here
            late.daemon = True
            late.start()
            try:
                pipe.send_bytes(path.encode("ascii"))
                pipe.send_bytes(body)
                answer = pipe.recv_bytes()
            finally:
                late.cancel()
        except (OSError, EOFError) as error:
            logger.error("the process that parses long bodies is lost: %r", error)
            self._end()
            raise ParserGoneError("the body could not be parsed; another attempt may succeed") from error
        found: Body | Mistake = pickle.loads(answer)
        return found

    def _end(self) -> None:
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
        if process is not None:
            process.kill()
            process.join(5.0)
            atexit.unregister(process.kill)


def _answer(path: str, body: bytes) -> bytes:
    """What is sent back, whatever becomes of ``body``: one must not end the process for all who wait."""
    try:
        return pickle.dumps(parsed(path, body), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # too deep, or too large; its words may be the body's
        logger.error("a long body could not be read: %s", type(error).__name__)
        return pickle.dumps(_NO_JSON, pickle.HIGHEST_PROTOCOL)


def _serve(connection: Connection[Any, Any]) -> None:
    """The main function of the process: until the other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they go to the whole group; the front says when to end
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            path, body = connection.recv_bytes().decode("ascii"), connection.recv_bytes()
            connection.send_bytes(_answer(path, body))

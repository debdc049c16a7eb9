"""One end of the pipe between front and worker: a reading and a writing thread around an event loop.

``send`` never waits: what is to be sent is queued, and the writing thread sends all that has gathered as one
pickle. What arrives is handed to the loop in order. When the other side is gone, or what was sent or received
is no message, ``on_end`` is called, perhaps twice.
The pipe is private to two processes of one program, so that pickles on it are trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, final

__all__ = ["Channel"]

logger = logging.getLogger(__name__)


@final
class Channel:
    """Messages over ``connection``; the callbacks run in ``loop``."""

    def __init__(
        self,
        connection: Connection[Any, Any],
        loop: asyncio.AbstractEventLoop,
        on_messages: Callable[[Sequence[Any]], object],
        on_end: Callable[[], object],
    ) -> None:
        self._connection, self._loop = connection, loop
        self._on_messages, self._on_end = on_messages, on_end
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._closing = False
        self._reader = threading.Thread(target=self._read, name="fpcompile-pipe-in", daemon=True)
        self._writer = threading.Thread(target=self._write, name="fpcompile-pipe-out", daemon=True)

    def start(self) -> None:
        """From now on messages come and go."""
        self._reader.start()
        self._writer.start()

    def send(self, message: object) -> None:
        """Queue ``message`` (not None); from any thread."""
        self._out.put(message)

    def close(self, timeout: float = 5.0) -> None:
        """Send what is queued, then end this side. Not from the loop's callbacks while the peer is stuck."""
        self._closing = True
        self._out.put(None)
        self._writer.join(timeout)
        with contextlib.suppress(OSError):
            self._connection.close()

    def _read(self) -> None:
        try:
            while True:
                self._call(self._on_messages, self._connection.recv())
        except (EOFError, OSError):
            pass
        except Exception:
            if not self._closing:
                logger.exception("what came over the pipe cannot be read")
        finally:
            self._call(self._on_end)

    def _call(self, what: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(what, *arguments)

    def _write(self) -> None:
        try:
            self._write_all()
        except OSError:
            pass
        except Exception:
            logger.exception("a message cannot be sent")
        if not self._closing:
            self._call(self._on_end)

    def _write_all(self) -> None:
        while True:
            batch = [self._out.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._out.get_nowait())
            last = None in batch
            if messages := [message for message in batch if message is not None]:
                self._connection.send(messages)
            if last:
                return

"""Run the server: an address, uvicorn around the application, and a graceful end.

The address is taken before anything is loaded: a port that is in use is told at once.
On SIGTERM or SIGINT no connection is taken any more, and what is live may finish within ``drain_timeout``
seconds; what is live then is told that the server ends. A second SIGINT ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any, final

import uvicorn

from fpcompile.errors import UsageError
from fpcompile.serving.server.app import make_app
from fpcompile.serving.server.connections import protocol_for
from fpcompile.serving.server.front import Front
from fpcompile.serving.server.settings import ServerSettings

__all__ = ["Server", "bound", "serve"]

logger = logging.getLogger("fpcompile.server")


@final
class Server(uvicorn.Server):
    """uvicorn's server that drains the front before it ends."""

    def __init__(self, settings: ServerSettings, app: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=protocol_for(
                    settings.limits.connections, settings.limits.head_s, settings.limits.write_s
                ),
                ws="none",  # whatever is installed: their connections would have no limits
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=round(settings.drain_timeout) + 5,
            )
        )
        self.front: Front = app.state.front
        self._drain_s = settings.drain_timeout
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Bind, then say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for server in self.servers if self.started else []:
            for sock in server.sockets:
                host, port = sock.getsockname()[:2]
                logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: begin to drain; another SIGINT: end at once.

        Unlike uvicorn's, the process does not then kill itself with the signal: a drained server ends well.
        """
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True
        if not self.front.draining:
            self.front.draining, self.front.drained_by = True, time.monotonic() + self._drain_s
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        logger.info("draining: %d requests are live, at most %g s", self.front.link.live, self._drain_s)
        assert self._loop is not None
        self._loop.call_later(self._drain_s, self.front.drain_is_over)


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets on every address that ``host`` has, all on one port. Raises :class:`UsageError`."""
    sockets: list[socket.socket] = []
    error: OSError | None = None
    with contextlib.ExitStack() as undo:
        try:
            found = socket.getaddrinfo(
                host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, kind, protocol, _, address in dict.fromkeys(found):
                try:
                    sock = socket.socket(family, kind, protocol)
                    undo.callback(sock.close)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    taken = sockets[0].getsockname()[1] if sockets else port
                    sock.bind((address[0], taken, *address[2:]))
                except OSError as one:
                    if one.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                    error = one  # a machine without IPv6 may still have a name for it
                    continue
                sockets.append(sock)
        except OSError as other:
            error, sockets = other, []
        if not sockets:
            raise UsageError(
                f"cannot listen on {host}, port {port}", got=str(error), remedy="--port 0 takes a free one"
            ) from error
        undo.pop_all()
    return sockets


async def _run(settings: ServerSettings, sockets: list[socket.socket]) -> str | None:
    """Serve until a signal; why the engine could not start, if it could not."""
    app = make_app(settings)
    server = Server(settings, app)
    front: Front = app.state.front

    async def watch() -> None:
        await asyncio.sleep(0)
        while not server.started:
            await asyncio.sleep(0.02)
        await front.link.settled()
        if front.link.state == "ready":
            logger.info("ready: %s", ", ".join(f"{n} ({f.kind})" for n, f in front.link.facts.items()))
        elif not front.draining:
            server.handle_exit(signal.SIGTERM, None)

    watching = asyncio.create_task(watch())
    try:
        await server.serve(sockets)
    finally:
        watching.cancel()
    return front.link.unready


def serve(settings: ServerSettings) -> None:
    """Serve until a signal says otherwise.

    Raises :class:`UsageError` when the address cannot be had, or the engine cannot be made.
    """
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for told in ("fpcompile", "uvicorn"):  # what torch and others say besides is for their developers
        logging.getLogger(told).setLevel(logging.INFO)
    with contextlib.ExitStack() as sockets:
        taken = [sockets.enter_context(sock) for sock in bound(settings.host, settings.port)]
        reason = asyncio.run(_run(settings, taken))
    if reason is not None:
        raise UsageError("the engine cannot be made", got=reason)

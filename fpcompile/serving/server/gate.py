"""What every request passes first: its id and trace, its key, its size, its line in the log.

An ASGI middleware, outside of everything else. Who may not ask is told so before a body is read; then it is
read here, up to the limit, and passed on whole. The time of arrival, which deadlines count from, is when it
is complete: a client that sends slowly gains nothing. A defect behind the gate is answered here, so that
every answer has an id. The log has no prompts, and no character that a terminal would obey.

A long body is parsed here as well (see :mod:`fpcompile.serving.server.parsing`): handlers find what it says
in ``request.state.body``, and a short stand-in where it was. So no more than ``held_bytes`` are held of the
bodies that are being read or parsed. What a long one says is not counted in that: its handler takes it out of
the state, and holds it until it is tokenised and submitted. While an answer is made, nothing of a long body
is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final, final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fpcompile.serving.server.failures import ApiError, api_error, error_response
from fpcompile.serving.server.parsing import BODIES, SHORT

__all__ = ["Gate", "trace_of"]

access = logging.getLogger("fpcompile.server.access")

_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACE: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
_CONTROL: Final = re.compile(r"[^ -~]|\\")
_OTHERS: Final = 4096  # bytes of a body for what is not under /v1/: nothing there has one
_BODY_S: Final = 60.0  # seconds in which a body must have come
_STAND_IN: Final = {
    "/v1/completions": b'{"model":"-","prompt":""}',
    "/v1/chat/completions": b'{"model":"-","messages":[{"role":"-","content":""}]}',
    "/v1/embeddings": b'{"model":"-","input":""}',
}

Parse = Callable[[str, bytes], Awaitable[Any]]
"""(path, body) -> what it says; see :class:`fpcompile.serving.server.parsing.Parser`."""


def trace_of(header: str | None) -> str | None:
    """The trace id of a W3C ``traceparent`` header; None when there is none or it is not valid."""
    found = _TRACE.fullmatch(header or "")
    return found.group(1) if found else None


@final
class Gate:
    """The middleware. ``request.state`` gets ``request_id`` (the client's, if it names one), ``unique``
    (ours), ``arrival``, ``facts`` (for the log), and ``body`` where ``parse`` has parsed it. ``admit`` raises
    :class:`ApiError` for a request whose body is not worth reading. ``held_bytes`` are ``body_bytes`` at
    least: one body can always be read."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        body_bytes: int,
        held_bytes: int = 1 << 28,
        admit: Callable[[Request], object] = lambda request: None,
        parse: Parse | None = None,
    ) -> None:
        self._app, self._limit, self._most = app, body_bytes, max(held_bytes, body_bytes)
        self._admit, self._parse = admit, parse
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id") or ""
        name = given if _ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {"trace": trace_of(headers.get("traceparent"))}
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        scope.setdefault("state", {}).update(request_id=name, unique=uuid.uuid4().hex, facts=facts)
        try:
            try:
                self._admit(Request(scope))
                replay = _Replay(await self._body(scope, headers, receive), receive)
            except ApiError as error:  # the rest of the body may still come: no request can follow it
                response = error_response(error)
                response.headers["Connection"] = "close"
                await response(scope, receive, answer)
                return
            await self._app(scope, replay, answer)
        except asyncio.CancelledError:
            facts["gone"] = True
            raise
        except Exception as error:
            failed = error_response(api_error(error))
            if status:  # too late for another
                raise
            await failed(scope, receive, answer)
        finally:
            _log(scope, name, status, time.monotonic() - begun, facts)

    async def _body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        """The whole body, or what stands for one that is parsed. Raises :class:`ApiError`."""
        limit = self._limit if scope["path"].startswith("/v1/") else min(self._limit, _OTHERS)
        too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(_BODY_S), contextlib.aclosing(_parts(receive)) as coming:
                async for part in coming:
                    size += len(part)
                    self._held += len(part)
                    if size > limit:
                        raise too_large
                    if self._held > self._most:
                        raise ApiError(503, "too many bytes are being read", code="busy", retry_after=1)
                    parts.append(part)
            scope["state"]["arrival"] = time.monotonic()
            body = b"".join(parts)
            parts.clear()
            return await self._short(scope, headers, body)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {_BODY_S:g} s", code="timeout") from None
        finally:
            self._held -= size

    async def _short(self, scope: Scope, headers: Headers, body: bytes) -> bytes:
        path = scope["path"]
        if len(body) <= SHORT or self._parse is None or path not in BODIES or scope["method"] != "POST":
            return body
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
            raise ApiError(400, "the body is not JSON, or its Content-Type does not say so")
        scope["state"]["body"] = await self._parse(path, body)
        return _STAND_IN[path]


async def _parts(receive: Receive) -> AsyncGenerator[bytes, None]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client went away before the body was complete")
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


@final
class _Replay:
    """Gives the body once, then what the server gives: the news that the client is gone."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self._receive()


def _escaped(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode("ascii")


def _log(scope: Scope, name: str, status: int, seconds: float, facts: dict[str, Any]) -> None:
    if not access.isEnabledFor(logging.INFO):
        return
    path = _CONTROL.sub(_escaped, scope["path"])[:200]
    known = " ".join(f"{key}={value}" for key, value in facts.items() if value is not None)
    client = (scope.get("client") or ("-",))[0]
    access.info("%s %s %s %d %.3f s id=%s %s", client, scope["method"], path, status, seconds, name, known)

"""Errors as OpenAI's API has them: ``{"error": {"message", "type", "param", "code"}}`` and a status.

A client's mistake is a 4xx, a moment that is not right a 429 or 503 with Retry-After, and a 500 is a defect.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fpcompile.errors import FpcompileError, UsageError
from fpcompile.serving.server.messages import Refused
from fpcompile.serving.server.parsing import ParserGoneError, WrongBodyError
from fpcompile.serving.server.promises import BelowFloorError
from fpcompile.serving.server.streams import EngineGoneError, RefusedError, SlowReaderError

__all__ = ["ApiError", "api_error", "ascii_json", "error_response", "install_handlers", "one_line"]

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_LONGEST = 500  # characters of a message
_JSON = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))  # made once


class ApiError(Exception):
    """What a client is told. ``retry_after`` in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
        self.message = message if len(message) <= _LONGEST else message[: _LONGEST - 1] + "…"

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, at least one."""
        headers = (
            {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        )
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def ascii_json(value: object) -> bytes:
    """JSON without a byte beyond ASCII, so that no text that a client sent can break the encoding."""
    return _JSON.encode(value).encode("ascii")


def error_response(error: ApiError) -> Response:
    """The whole answer."""
    return Response(ascii_json(error.body), error.status, error.headers, "application/json")


def one_line(error: FpcompileError) -> str:
    """The facts of a typed error as a sentence."""
    facts = [
        f"{label} {value}" for label, value in (("expected", error.expected), ("got", error.got)) if value
    ]
    text = (error.what or type(error).__name__) + (f" ({'; '.join(facts)})" if facts else "")
    return " ".join(text.split())


def api_error(error: Exception) -> ApiError:
    """What a client is told about ``error``, whatever raised it."""
    match error:
        case ApiError():
            return error
        case RefusedError():
            return _refused(error.refused)
        case WrongBodyError():
            wrong = error.mistake
            return _of_validation([{"type": wrong.kind, "loc": wrong.where, "msg": wrong.message}])
        case ParserGoneError():
            return ApiError(503, error.what or "", code="busy", retry_after=1)
        case EngineGoneError():
            return ApiError(503, error.what or str(error), code="engine_unavailable", retry_after=5)
        case SlowReaderError():
            return ApiError(408, one_line(error), code="slow_reader")
        case BelowFloorError():
            return ApiError(403, one_line(error), param=error.field, code="slo_below_floor")
        case UsageError():
            return ApiError(400, one_line(error))
        case _:
            logger.error("a request failed", exc_info=error)
            return ApiError(500, "the server failed to answer; its log says why", code="internal_error")


def _refused(refused: Refused) -> ApiError:
    match refused.because:
        case "invalid":
            return ApiError(400, refused.message)
        case "full":
            return ApiError(429, refused.message, code="queue_full", retry_after=refused.retry_after or 1)
        case "rejected":
            return ApiError(429, refused.message, code="overloaded", retry_after=refused.retry_after or 1)
        case "timeout":
            return ApiError(504, refused.message, code="timeout")
        case "closed":
            return ApiError(503, refused.message, code="engine_unavailable", retry_after=5)
        case "failed":
            return ApiError(500, "the model failed on this request; the server's log says why", code="failed")


def install_handlers(app: FastAPI) -> None:
    """Every error that leaves a handler has this form."""

    async def known(request: Request, error: Exception) -> Response:
        found = api_error(error)
        request.state.code = found.code or found.message
        return error_response(found)

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found = ApiError(error.status_code, str(error.detail))
        response = error_response(found)
        response.headers.update(error.headers or {})
        return response

    async def of_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_of_validation(error.errors()))

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(FpcompileError, known)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_validation)


def _of_validation(errors: Any) -> ApiError:
    """The first mistake; what the client sent is not repeated."""
    first: Mapping[str, Any] = errors[0] if errors else {"msg": "the request is wrong", "loc": ()}
    if first.get("type") == "json_invalid":
        return ApiError(400, "the body is not JSON")
    path = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(path)[:100] or None
    message = str(first["msg"]).removeprefix("Value error, ")
    if first.get("type") == "extra_forbidden":
        message = f"unknown field {path[-1][:60]!r}"
    return ApiError(400, f"{param}: {message}" if param else message, param=param)

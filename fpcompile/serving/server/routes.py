"""The endpoints: OpenAI's, and those of whoever runs the server."""

from __future__ import annotations

from array import array
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.responses import Response

from fpcompile.serving.server.answers import embedding_answer, model_list
from fpcompile.serving.server.bodies import Body, ChatBody, CompletionBody, EmbeddingBody
from fpcompile.serving.server.failures import ApiError
from fpcompile.serving.server.front import Front
from fpcompile.serving.server.generation import answer, or_gone
from fpcompile.serving.server.messages import Embed
from fpcompile.serving.server.metrics import RequestWatch
from fpcompile.serving.server.promises import Account
from fpcompile.serving.server.streams import EngineGoneError, Stream

__all__ = ["add_routes"]

Said = TypeVar("Said", bound=Body)


class ErrorFields(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorFields


_MISTAKES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 413, 422, 429, 503, 504)
}


def add_routes(app: FastAPI, front: Front) -> None:
    """All endpoints of ``front``."""
    app.include_router(_openai(front))
    app.include_router(_operations(front))


def _openai(front: Front) -> APIRouter:
    def know(request: Request) -> None:
        request.state.account = front.account(request)

    router = APIRouter(prefix="/v1", responses=_MISTAKES, dependencies=[Depends(know)])

    @router.post("/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await answer(front, request, request.state.account, _said(request, body))

    @router.post("/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await answer(front, request, request.state.account, _said(request, body))

    @router.post("/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        return await _embed(front, request, request.state.account, _said(request, body))

    @router.get("/models")
    async def models() -> Response:
        return JSONResponse(model_list(list(front.tokenizers), front.created))

    @router.get("/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in front.tokenizers:
            raise ApiError(404, f"there is no model {name!r}", param="model", code="model_not_found")
        return JSONResponse(model_list([name], front.created)["data"][0])

    return router


def _said(request: Request, body: Said) -> Said:
    """What the request says: of a long body, what the gate has found in it, which is taken from the state."""
    found: Said = request.scope["state"].pop("body", body)
    return found


async def _embed(front: Front, request: Request, account: Account, body: EmbeddingBody) -> Response:
    """All inputs of one request at once; their vectors in their order."""
    model, form = body.model, body.encoding_format
    streams: list[Stream] = []
    try:
        tokens = await _submit(front, request, account, body, streams)
        del body  # it may be long, and so may be the time to the last vector
        vectors = await or_gone(request, _vectors(streams))
    finally:
        for stream in streams:
            stream.cancel()
    request.state.facts.update(prompt_tokens=tokens, outcome="complete")
    return Response(await embedding_answer(model, vectors, tokens, form), media_type="application/json")


async def _submit(
    front: Front, request: Request, account: Account, body: EmbeddingBody, streams: list[Stream]
) -> int:
    """Every input gets one of ``streams``; how many tokens they have. Raises :class:`ApiError`."""
    front.check_open()
    facts = front.facts(body.model, "embed")
    if body.dimensions not in (None, facts.width):
        raise ApiError(400, f"this model's vectors have {facts.width} dimensions", param="dimensions")
    limit = front.settings.limits.inputs
    several = isinstance(body.input, list) and not (body.input and isinstance(body.input[0], int))
    if several and not 0 < len(body.input) <= limit:
        raise ApiError(400, f"1 to {limit} inputs are taken", param="input")
    terms = front.terms(request, account, body, None)
    with front.seats(len(body.input) if several else 1):
        inputs = await front.tokenizers[body.model].encode_all(body.input, most=front.longest(facts))
        for ids in inputs:
            front.check_length(facts, ids, None)
        for number, ids in enumerate(inputs):
            ask = Embed(f"{request.state.unique}-{number}", body.model, array("q", ids), terms)
            watch = RequestWatch(front.metrics, body.model, terms, len(ids), vector=True)
            streams.append(front.link.submit(ask, watch))
    return sum(map(len, inputs))


async def _vectors(streams: list[Stream]) -> list[bytes]:
    vectors = []
    for stream in streams:
        vector = (await stream.end()).vector
        if vector is None:
            raise EngineGoneError("the request was cancelled by the server")
        vectors.append(vector)
    return vectors


def _operations(front: Front) -> APIRouter:
    router = APIRouter(responses={status: _MISTAKES[status] for status in (401, 403, 503)})

    @router.get("/health")
    async def health() -> Response:
        """200 while the engine's process lives and its watchdog is content; not ready yet is well, too."""
        well, reason = await front.healthy()
        status = "ok" if well else "unhealthy"
        return JSONResponse({"status": status, "reason": reason}, 200 if well else 503)

    @router.get("/ready")
    async def ready() -> Response:
        """200 when models are warm, requests are taken, and the engine is well."""
        taken, reason = await front.ready()
        return JSONResponse({"ready": taken, "reason": reason}, 200 if taken else 503)

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        front.check_admin(request, reading=True)
        front.metrics.live.set(front.link.live)
        if front.link.state == "ready":
            try:
                front.metrics.update(await front.link.ask("statistics"))
            except (TimeoutError, EngineGoneError):
                front.metrics.stale.inc()
        return Response(front.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def order(request: Request, *, pause: bool) -> Response:
        front.check_admin(request, reading=False)
        try:
            await (front.link.pause() if pause else front.link.resume())
        except TimeoutError:
            raise ApiError(503, "the engine's process does not answer", retry_after=5) from None
        return JSONResponse({"paused": front.link.paused})

    @router.post("/pause")
    async def pause(request: Request) -> Response:
        """The device is held at the next cut; what is live is kept, and new requests wait."""
        return await order(request, pause=True)

    @router.post("/resume")
    async def resume(request: Request) -> Response:
        return await order(request, pause=False)

    return router

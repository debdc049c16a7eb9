"""The application: a :class:`Front` behind FastAPI, with the gate outside of everything."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request

from fpcompile.serving.server.engines import Engines
from fpcompile.serving.server.failures import install_handlers
from fpcompile.serving.server.front import Front
from fpcompile.serving.server.gate import Gate
from fpcompile.serving.server.models import load_tokenizer
from fpcompile.serving.server.routes import add_routes
from fpcompile.serving.server.settings import ServerSettings

__all__ = ["make_app"]


def make_app(
    settings: ServerSettings,
    tokenizers: Mapping[str, Any] | None = None,
    engines: Engines | None = None,
) -> FastAPI:
    """The application, which starts the worker when it starts and ends it when it ends.

    ``tokenizers`` by model name: given, or loaded here. ``engines``: who runs the models; else a worker
    of its own. ``app.state.front`` is the state of the server.
    """
    if tokenizers is None:
        tokenizers = {spec.name: load_tokenizer(spec) for spec in settings.engine.models}
    front = Front(settings, tokenizers, engines)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        front.start()
        try:
            yield
        finally:
            await front.close()

    app = FastAPI(title="fpcompile", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.front = front
    install_handlers(app)

    def admit(request: Request) -> None:
        if request.scope["path"].startswith("/v1/"):
            front.account(request)

    app.add_middleware(
        Gate,
        body_bytes=settings.limits.body_bytes,
        held_bytes=settings.limits.held_bytes,
        admit=admit,
        parse=front.parser.parse,
    )
    add_routes(app, front)
    return app

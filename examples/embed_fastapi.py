"""Embed the engine in a FastAPI application's own event loop.

    pip install 'fpcompile[serve]'
    python examples/embed_fastapi.py

The application makes the engine when it starts and closes it when it ends. A handler awaits its handle, so
that one event loop serves any number of requests while the device thread computes; a client that goes away
cancels its request, and the device is free at the next cut. Started as a script, it serves on a free loopback
port, sends itself a long prompt, three urgent ones and an impatient client, and shows what happened.

An engine computes in this process: Python work in handlers takes the interpreter from its device thread (see
docs/embedding.md). Keep handlers short.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import urllib.request
from collections.abc import AsyncIterator

import torch
import uvicorn
from embed_threads import prompt, small_model
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

import fpcompile
from fpcompile.errors import InvalidInputError, QueueFullError


class Prompt(BaseModel):
    """One request: token ids, and the promised time to the answer in seconds."""

    input_ids: list[int]
    ttft_slo: float | None = None


class Answer(BaseModel):
    """The most likely next token, and how long it took on the engine's clock, in seconds."""

    token: int
    ttft: float


def make_app(program: fpcompile.Program) -> FastAPI:
    """An application with ``POST /next-token`` and ``GET /statistics``."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = fpcompile.Engine(program)
        try:
            yield
        finally:
            await asyncio.to_thread(app.state.engine.close, drain=False)

    app = FastAPI(lifespan=lifespan)

    @app.post("/next-token")
    async def next_token(body: Prompt, request: Request) -> Answer:
        try:
            ids = torch.tensor([body.input_ids])
            handle = app.state.engine.submit(ids, ttft_slo=body.ttft_slo, logits_to_keep=1)
        except QueueFullError as error:
            after = {"Retry-After": f"{error.retry_after:.0f}"}
            raise HTTPException(429, str(error), headers=after) from error
        except InvalidInputError as error:
            raise HTTPException(400, str(error)) from error
        watching = asyncio.create_task(_cancel_when_gone(request, handle))
        try:
            output = await handle
        except fpcompile.errors.RequestCancelledError as error:
            raise HTTPException(499, "the client went away") from error
        finally:
            watching.cancel()
        return Answer(token=int(output.logits[0, -1].argmax()), ttft=handle.metrics.ttft or 0.0)

    @app.get("/statistics")
    async def statistics() -> dict[str, int]:
        s = app.state.engine.statistics()
        return {"completed": s.completed, "cancelled": s.cancelled, "preemptions": s.preemptions}

    return app


async def _cancel_when_gone(request: Request, handle: fpcompile.Handle) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.02)
    handle.cancel()


def _ask(port: int, path: str, body: object = None, timeout: float = 60.0) -> dict[str, float]:
    """A blocking client; nothing of it is special to fpcompile."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=timeout) as answer:
        got: dict[str, float] = json.load(answer)
    return got


async def main() -> None:
    """Serve, and be the clients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = make_app(fpcompile.segment(small_model()))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)

    def body(length: int, slo: float) -> dict[str, object]:
        return {"input_ids": prompt(length)[0].tolist(), "ttft_slo": slo}

    begun = time.monotonic()
    long = asyncio.create_task(asyncio.to_thread(_ask, port, "/next-token", body(3000, 30.0)))
    await asyncio.sleep(0.2)
    urgent = [asyncio.to_thread(_ask, port, "/next-token", body(32, 2.0)) for _ in range(3)]
    for answer in await asyncio.gather(*urgent):
        print(f"urgent: token {answer['token']}, engine's TTFT {answer['ttft'] * 1e3:.0f} ms")
    overtaken = not long.done()
    with contextlib.suppress(TimeoutError, OSError):  # it hangs up after 50 ms
        await asyncio.to_thread(_ask, port, "/next-token", body(3000, 30.0), 0.05)
    answer = await long
    print(f"long: token {answer['token']}, after {time.monotonic() - begun:.1f} s, overtaken: {overtaken}")
    for _ in range(500):
        counts = await asyncio.to_thread(_ask, port, "/statistics")
        if counts["cancelled"]:
            break
        await asyncio.sleep(0.02)
    print(f"engine: {counts}")
    server.should_exit = True
    await serving


if __name__ == "__main__":
    asyncio.run(main())

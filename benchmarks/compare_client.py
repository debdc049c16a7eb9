"""The client of `fpcompile bench serve`, told what each server wants to hear, and when to stop waiting.

Invariants
    Every server gets the same prompts at the same times. Times count from when a request was due. A request
    that has not ended when a cell ends is closed, and counts as unfinished. Nothing is retried.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from benchmarks.compare_model import prompt_of
from fpcompile.scheduler.events import Request
from fpcompile.serving.bench_client import Endpoint, Sent, ask

__all__ = ["Extra", "PeerEndpoint", "is_ready", "offer", "text_of", "unfinished"]

Extra = Callable[[Request, float | None], Mapping[str, Any]]
"""(request, TBT SLO) -> fields of the body that only this server knows."""

unfinished = "unfinished"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class PeerEndpoint(Endpoint):
    """An endpoint whose prompts are letters, one token each; ``extra``: what is added to the body."""

    extra: Extra = lambda request, tbt_slo: {}

    def body(self, request: Request, seed: int, tbt_slo: float | None) -> dict[str, Any]:
        """What is sent: greedy, as many tokens as wanted."""
        return {
            "model": self.model,
            "prompt": prompt_of(request.tokens, f"{seed} {request.id}"),
            "max_tokens": max(request.decode_tokens, 1),
            "temperature": 0,
            "stream": True,
            **self.extra(request, tbt_slo),
        }


async def offer(
    endpoint: Endpoint,
    requests: Sequence[Request],
    tbt_slos: Mapping[str, float],
    seed: int,
    patience: float,
) -> list[Sent]:
    """Send each request at its arrival; what has not ended ``patience`` seconds behind the last is closed."""
    seen = [Sent(request) for request in requests]
    bodies = [endpoint.body(request, seed, tbt_slos.get(request.klass)) for request in requests]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=endpoint.url, timeout=endpoint.timeout, limits=limits, trust_env=False
    ) as client:
        start = time.monotonic() + 0.05

        async def one(number: int) -> None:
            due = start + requests[number].arrival
            await asyncio.sleep(max(due - time.monotonic(), 0))
            await ask(client, endpoint, bodies[number], seen[number], due)

        tasks = [asyncio.create_task(one(number)) for number in range(len(requests))]
        end = start + max(request.arrival for request in requests) + patience
        _, late = await asyncio.wait(tasks, timeout=max(0.0, end - time.monotonic()))
        for task in late:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
    for sent in seen:
        if not sent.completed and not sent.error:
            sent.error = unfinished
        elif sent.completed and sent.output_tokens != max(sent.request.decode_tokens, 1):
            sent.error = f"{sent.output_tokens} tokens instead of {sent.request.decode_tokens}"
    return seen


def text_of(endpoint: Endpoint, request: Request, seed: int, seconds: float) -> str:
    """The whole answer to one request, not streamed. Raises OSError."""
    body = {**endpoint.body(request, seed, None), "stream": False}
    body.pop("stream_options", None)
    asked = urllib.request.Request(
        endpoint.url + endpoint.path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with _DIRECT.open(asked, timeout=seconds) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def is_ready(url: str) -> bool:
    """Whether ``GET url`` says 200 within seconds."""
    try:
        with _DIRECT.open(url, timeout=5.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False

"""An open-loop load generator: each request is sent when its time has come, whatever became of those before.

It speaks to any server with OpenAI's ``/v1/completions`` or ``/v1/chat/completions``, streaming. Times are
the client's, in seconds: TTFT and deadlines count from when a request was *due*, so that a generator or a
server that falls behind cannot hide it.

Prompts are drawn per request from a seed. As token ids their length is exact; as text (words of the language,
for chats and for servers that take no ids) the server's own count is what is reported.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx2 as httpx

from fpcompile.errors import UsageError
from fpcompile.scheduler.events import Request

__all__ = ["Endpoint", "Sent", "ask", "run_load"]

_WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "night", "point", "home", "water", "room", "area",
    "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business",
    "issue", "side", "kind", "head", "house", "service",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how to ask. ``form``: what prompts are. ``slo``: whether promises are told to the server.
    ``ignore_eos``: answers go on to their length; not every server takes the field.

    ``tokens``: the range [low, high) that ids are drawn from.
    """

    url: str
    model: str
    api: Literal["completions", "chat"] = "completions"
    form: Literal["ids", "text"] = "ids"
    tokens: tuple[int, int] = (16, 256)
    slo: bool = False
    key: str = "none"
    timeout: float = 600.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise UsageError(
                "the server's address cannot be read", expected="http://HOST:PORT", got=repr(self.url)
            )

    @property
    def path(self) -> str:
        """Of the endpoint, behind the server's address."""
        return "/v1/chat/completions" if self.api == "chat" else "/v1/completions"

    def body(self, request: Request, seed: int, tbt_slo: float | None) -> dict[str, Any]:
        """What is sent: greedy, as many tokens as wanted, counted at the end."""
        draw = random.Random(f"{seed} {request.id}")
        prompt: str | list[int]
        if self.form == "ids" and self.api == "completions":
            low, high = self.tokens
            prompt = [draw.randrange(low, high) for _ in range(request.tokens)]
        else:
            prompt = " ".join(draw.choices(_WORDS, k=request.tokens))
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max(request.decode_tokens, 1),
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.slo and tbt_slo is not None:
            body["tbt_slo"] = tbt_slo
        if self.api == "chat":
            return {**body, "messages": [{"role": "user", "content": prompt}]}
        return {**body, "prompt": prompt}


@dataclass(slots=True)
class Sent:
    """What the client saw of one request. Times in seconds from when it was due; None: did not happen."""

    request: Request
    late: float = 0.0
    """How long after it was due it was sent."""
    status: int | None = None
    error: str = ""
    ttft: float | None = None
    latency: float | None = None
    gaps: tuple[float, ...] = ()
    """Times between chunks."""
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def completed(self) -> bool:
        """Whether the answer came to its end."""
        return self.latency is not None

    def tbt_met(self, ttft_slo: float, tbt_slo: float | None) -> bool:
        """Whether every token behind the first came by min(due + TTFT + j x TBT, last + 3 x TBT)."""
        if tbt_slo is None or self.ttft is None:
            return tbt_slo is None
        now = self.ttft
        for number, gap in enumerate(self.gaps, 1):
            now += gap
            if gap > 3 * tbt_slo or now > max(ttft_slo, self.ttft) + number * tbt_slo:
                return False
        return True


async def ask(
    client: httpx.AsyncClient, endpoint: Endpoint, body: Mapping[str, Any], sent: Sent, due: float
) -> None:
    """Send one request and read its answer; what goes wrong is noted in ``sent``."""
    headers = {"Authorization": f"Bearer {endpoint.key}"}
    if endpoint.slo and sent.request.slo < float("inf"):
        headers["x-slo-ttft-ms"] = f"{sent.request.slo * 1e3:.3f}"
    sent.late = time.monotonic() - due
    gaps: list[float] = []
    last = 0.0
    done = False
    try:
        async with client.stream("POST", endpoint.path, json=body, headers=headers) as response:
            sent.status = response.status_code
            if response.status_code != 200:
                sent.error = (await response.aread()).decode(errors="replace")[:200]
                return
            async for event in _events(response):
                now = time.monotonic() - due
                if event == b"[DONE]":
                    done = True
                    break
                fields = json.loads(event)
                if not isinstance(fields, dict):
                    raise ValueError(f"an event is no object: {event[:80]!r}")
                if "error" in fields:
                    error = fields["error"]
                    sent.error = str(error.get("message", error) if isinstance(error, dict) else error)[:200]
                    return
                if (usage := fields.get("usage")) is not None:
                    sent.input_tokens = usage["prompt_tokens"]
                    sent.output_tokens = usage["completion_tokens"]
                done = done or _ends(fields)  # `transformers serve` sends no [DONE]
                if not _has_token(fields):
                    continue
                if sent.ttft is None:
                    sent.ttft = now
                else:
                    gaps.append(now - last)
                last = now
    except (httpx.HTTPError, ValueError, KeyError) as error:
        sent.error = f"{type(error).__name__}: {error}"[:200]
        return
    finally:
        sent.gaps = tuple(gaps)
    if done and sent.ttft is not None:
        sent.latency = last
        sent.output_tokens = sent.output_tokens or len(gaps) + 1
    else:
        sent.error = "the answer broke off"


def _has_token(fields: Mapping[str, Any]) -> bool:
    """Whether a chunk stands for a token, perhaps one with no text yet.

    Those that name the role, have the counts, or only say why the answer ended, do not.
    """
    if not fields.get("choices"):
        return False
    choice = fields["choices"][0]
    delta = choice.get("delta") or {}
    if choice.get("text") or delta.get("content"):
        return True
    return "role" not in delta and choice.get("finish_reason") is None


def _ends(fields: Mapping[str, Any]) -> bool:
    """Whether a chunk says why the answer ended."""
    return any(choice.get("finish_reason") is not None for choice in fields.get("choices") or ())


async def _events(response: httpx.Response) -> Any:
    """The data of each event."""
    rest = b""
    async for part in response.aiter_raw():
        *lines, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def run_load(
    endpoint: Endpoint,
    requests: Sequence[Request],
    *,
    seed: int = 0,
    tbt_slos: Mapping[str, float | None] | None = None,
    max_concurrency: int | None = None,
    progress: Callable[[], object] | None = None,
) -> tuple[list[Sent], float]:
    """Send all requests at their arrivals (seconds from now); what became of each, and seconds altogether.

    ``max_concurrency``: as `vllm bench serve` has it, requests beyond it wait in the client, and it counts.
    """
    results = [Sent(request) for request in requests]
    bodies = [endpoint.body(r, seed, (tbt_slos or {}).get(r.klass)) for r in requests]
    free = asyncio.Semaphore(max_concurrency or len(requests) or 1)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=endpoint.url, timeout=endpoint.timeout, limits=limits, trust_env=False
    ) as client:
        await _warm(client, endpoint)
        start = time.monotonic() + 0.05

        async def one(number: int) -> None:
            due = start + requests[number].arrival
            await asyncio.sleep(max(due - time.monotonic(), 0))
            async with free:
                await ask(client, endpoint, bodies[number], results[number], due)
            if progress is not None:
                progress()

        await asyncio.gather(*(one(number) for number in range(len(requests))))
        return results, time.monotonic() - start


async def _warm(client: httpx.AsyncClient, endpoint: Endpoint) -> None:
    """One request ahead, whose failure is an error of the user's: a wrong address, model or key."""
    sent = Sent(Request("warm", 0.0, float("inf"), 4, 0.0, slo=float("inf"), decode_tokens=1))
    await ask(client, endpoint, endpoint.body(sent.request, 0, None), sent, time.monotonic())
    if not sent.completed:
        raise UsageError(
            "the server does not answer as it should",
            expected=f"a streamed answer of {endpoint.url}{endpoint.path}",
            got=f"{sent.status or 'no status'}: {sent.error}",
            remedy="check --base-url, --model and --api-key",
        )

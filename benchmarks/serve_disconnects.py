"""Many streams, some of whose clients go away: blocking, tokens and memory beside those of streams that stay.

    python benchmarks/serve_disconnects.py                    200 streams, of which 30 % go away
    python benchmarks/serve_disconnects.py --streams 40 --rounds 1

Starts `fpcompile serve` with the tiny model. Rounds alternate: all stay, and some leave in the middle, at a
random token or before the first. Prompts have random lengths and promises, so that they preempt each other.
Blocking times are those of `/metrics`, by round: percentiles are the upper edges of its buckets (26 % apart).
The exit code is 1 when

    a stream that stayed has another text than the same request alone;
    something is live, or memory is held, when all have gone;
    resident memory of the server's processes grew by more than ``--growth`` MB after the first rounds.

That the blocking p99 is the same with and without disconnects is printed, and not judged: it needs a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serve_mixed import served

TOKENS = 30
LENGTHS = (8, 8, 40, 40, 40, 2000)  # drawn from: a few long ones, which the others overtake
SLOS = (0.05, 0.5, 5.0, None)
HELD = (
    "num_requests_live", "num_requests_running", "num_requests_waiting", "num_requests_paused",
    "num_requests_decoding", "paused_kv_bytes", "decoding_kv_bytes", "host_kv_bytes",
)  # fmt: skip


def bodies(count: int, seed: int) -> list[dict[str, Any]]:
    """One request of each stream; no two prompts are the same."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        prompt = [number % 256, number // 256, *(draw.randrange(256) for _ in range(draw.choice(LENGTHS)))]
        body = {
            "model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
            "stream": True,
        }  # fmt: skip
        slo = draw.choice(SLOS)
        made.append(body if slo is None else {**body, "ttft_slo": slo})
    return made


async def stream(client: httpx.AsyncClient, body: Mapping[str, Any], leaves: int | None) -> str | None:
    """The text; None of a stream that was left behind so many tokens."""
    text, seen = "", 0
    if leaves == 0:
        with contextlib.suppress(httpx.TimeoutException):
            await client.post("/v1/completions", json=body, timeout=random.Random(len(body)).random() * 0.2)
        return None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            fields = json.loads(line[6:])
            if "error" in fields:
                raise SystemExit(f"a stream failed: {fields['error']}")
            text += fields["choices"][0]["text"]
            seen += 1
            if seen == leaves:
                return None
    return text


async def together(
    client: httpx.AsyncClient, asked: Sequence[Mapping[str, Any]], leaves: Mapping[int, int], seconds: float
) -> list[str | None]:
    """All of them, begun within ``seconds``."""

    async def one(number: int) -> str | None:
        await asyncio.sleep(seconds * number / len(asked))
        return await stream(client, asked[number], leaves.get(number))

    return list(await asyncio.gather(*(one(number) for number in range(len(asked)))))


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """Sample -> value."""
    text = (await client.get("/metrics")).text
    found = re.findall(r"^fpcompile:(\S+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def blocking(before: Mapping[str, float], after: Mapping[str, float]) -> dict[float, int]:
    """Upper edge of a bucket in seconds -> blocking times in it, of what came between two readings."""
    edges = [
        (float(found.group(1)), after[name] - before.get(name, 0.0))
        for name in after
        if (found := re.fullmatch(r'blocking_time_seconds_bucket{le="(.+)"}', name))
    ]
    edges.sort()
    below = [0.0, *(count for _, count in edges)]
    return {edge: round(count - low) for (edge, count), low in zip(edges, below, strict=False)}


def percentile(buckets: Mapping[float, int], percent: float) -> float | None:
    """Nearest rank: the upper edge of the bucket that it is in; None of nothing."""
    rank = ceil(percent / 100 * sum(buckets.values()))
    seen = 0
    for edge in sorted(buckets):
        seen += buckets[edge]
        if seen >= rank > 0:
            return edge
    return None


def resident(process: int) -> float:
    """MB of a process and all that it started."""
    front = psutil.Process(process)
    return float(sum(one.memory_info().rss for one in (front, *front.children(recursive=True)))) / 1e6


async def at_rest(client: httpx.AsyncClient) -> list[str]:
    """What is held although nobody is there any more."""
    until = time.monotonic() + 30
    while True:
        now = await metrics(client)
        held = [f"{name} is {now[name]:g}" for name in HELD if now[name]]
        if not held or time.monotonic() > until:
            return held
        await asyncio.sleep(0.05)


async def measure(url: str, process: int, options: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    draw = random.Random(options.seed)
    asked = bodies(options.streams, options.seed)
    problems: list[str] = []
    found: dict[str, dict[float, int]] = {"all stay": {}, "some leave": {}}
    memory: list[float] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as client:
        alone = [await stream(client, body, None) for body in asked]
        print(f"{len(alone)} requests alone", flush=True)
        for number in range(2 * (options.rounds + 1)):
            name = "some leave" if number % 2 else "all stay"
            count = round(options.share * options.streams) if number % 2 else 0
            leaves = {one: draw.randrange(TOKENS - 2) for one in draw.sample(range(options.streams), count)}
            before = await metrics(client)
            texts = await together(client, asked, leaves, options.within)
            problems += [f"{name}: {what}" for what in await at_rest(client)]
            after = await metrics(client)
            for index, (text, expected) in enumerate(zip(texts, alone, strict=True)):
                if index not in leaves and text != expected:
                    problems.append(f"{name}: stream {index} has other tokens than alone")
            print(
                f"round {number}: {name}, {sum(text is not None for text in texts)} streams ended", flush=True
            )
            memory.append(resident(process))
            if number >= 2:  # the first two warm up
                for edge, times in blocking(before, after).items():
                    found[name][edge] = found[name].get(edge, 0) + times
    grown = memory[-1] - memory[1]
    if grown > options.growth:
        problems.append(f"resident memory grew by {grown:.0f} MB")
    return {
        "blocking": {
            name: {"count": sum(buckets.values()), **{f"p{p}": percentile(buckets, p) for p in (50, 90, 99)}}
            for name, buckets in found.items()
        },
        "resident_mb": memory,
        "problems": problems,
    }


def main() -> None:
    """Measure, print, write."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--streams", type=int, default=200)
    made.add_argument("--share", type=float, default=0.3, help="of the streams that go away")
    made.add_argument("--rounds", type=int, default=3, help="of each kind, behind one that warms up")
    made.add_argument("--within", type=float, default=2.0, help="seconds in which a round's streams begin")
    made.add_argument("--growth", type=float, default=64.0, help="MB of resident memory that may be added")
    made.add_argument("--max-blocking-ms", type=float, default=20.0)
    made.add_argument("--policy", default="fpcompile")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path)
    options = made.parse_args()
    flags = ["--max-blocking-ms", str(options.max_blocking_ms), "--policy", options.policy, "--threads", "1"]
    with served("tiny", *flags) as (url, process):
        report = asyncio.run(measure(url, process, options))
    for name, times in report["blocking"].items():
        edges = ", ".join(
            f"p{p} {'–' if times[f'p{p}'] is None else format(1e3 * times[f'p{p}'], '.2f')} ms"
            for p in (50, 90, 99)
        )
        print(f"{name}: {times['count']} preemptions, blocking {edges}")
    print(
        "resident memory behind each round: " + ", ".join(f"{mb:.0f}" for mb in report["resident_mb"]) + " MB"
    )
    if options.json is not None:
        arguments = {name: str(value) for name, value in vars(options).items()}
        report |= {"arguments": arguments, "load_average": list(os.getloadavg())}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    for problem in report["problems"]:
        print(f"PROBLEM: {problem}")
    if report["problems"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

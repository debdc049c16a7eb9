"""Time between tokens of running streams while long prompts are processed, over HTTP.

    python benchmarks/serve_mixed.py --streams 8 --prompt 4096                  streams that ask for nothing
    python benchmarks/serve_mixed.py --streams 8 --prompt 4096 --tbt-slo 0.05   streams that ask

Starts `fpcompile serve` with a demo model, keeps streams running, and sends long prompts from time to time.
Each gap between two tokens counts as *quiet* or, when a long prompt was live at its end, as *under prefill*:
both come from one run. The promise: p99 under prefill is at most twice the quiet p99 plus one budget.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

import httpx2 as httpx

from fpcompile.scheduler.events import Request
from fpcompile.scheduler.goodput import percentile
from fpcompile.serving.bench_client import Endpoint, Sent, run_load


@contextlib.contextmanager
def served(model: str, *flags: str) -> Iterator[tuple[str, int]]:
    """The address and the process of a warm server of a demo model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-c", "from fpcompile.cli import main; main()", "serve", "--port", str(port),
        "--random-weights", model, *flags,
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 300
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the server has not started: run `fpcompile serve` by hand to see why")
            time.sleep(0.5)
        yield url, process.pid
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def requests(arguments: argparse.Namespace) -> list[Request]:
    """Streams from the beginning, long prompts every ``every`` seconds."""

    def one(name: str, arrival: float, tokens: int, output: int, slo: float, klass: str) -> Request:
        return Request(name, arrival, inf, tokens, 0.0, slo=slo, klass=klass, decode_tokens=output)

    streams = [one(f"s{n}", 0.05 * n, 32, arguments.tokens, inf, "stream") for n in range(arguments.streams)]
    prompts = [
        one(f"p{n}", arguments.every * (n + 1), arguments.prompt, 1, arguments.ttft_slo, "prompt")
        for n in range(arguments.prompts)
    ]
    return sorted(streams + prompts, key=lambda request: request.arrival)


def split(sent: Sequence[Sent]) -> tuple[list[float], list[float]]:
    """Gaps between tokens of streams: (quiet, under prefill)."""
    windows = [
        (one.request.arrival, one.request.arrival + one.ttft)
        for one in sent
        if one.request.klass == "prompt" and one.ttft is not None
    ]
    quiet: list[float] = []
    under: list[float] = []
    for one in sent:
        if one.request.klass != "stream" or one.ttft is None:
            continue
        now = one.request.arrival + one.ttft
        for gap in one.gaps:
            now += gap
            (under if any(a <= now <= b for a, b in windows) else quiet).append(gap)
    return quiet, under


def figures(gaps: Sequence[float]) -> dict[str, Any]:
    """Milliseconds."""
    found = {f"p{p}_ms": percentile(gaps, p) for p in (50, 90, 99)}
    return {"count": len(gaps), **{name: None if v is None else 1e3 * v for name, v in found.items()}}


def main() -> None:
    """Measure, print, write."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--model", default="qwen3-110m", help="demo model, or tiny")
    made.add_argument("--streams", type=int, default=8)
    made.add_argument("--tokens", type=int, default=600, help="of each stream")
    made.add_argument("--prompt", type=int, default=4096, help="tokens of a long prompt")
    made.add_argument("--prompts", type=int, default=3)
    made.add_argument("--every", type=float, default=8.0, help="seconds between long prompts")
    made.add_argument(
        "--tbt-slo", type=float, help="that the streams ask for, seconds; else the server's own"
    )
    made.add_argument("--ttft-slo", type=float, default=600.0, help="that the long prompts ask for, seconds")
    made.add_argument("--max-blocking-ms", type=float, default=20.0)
    made.add_argument("--policy", default="fpcompile")
    made.add_argument("--weights", default="packed")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--json", type=Path)
    arguments = made.parse_args()
    flags = [
        "--max-blocking-ms", str(arguments.max_blocking_ms), "--policy", arguments.policy,
        "--weights", arguments.weights, "--threads", str(arguments.threads),
    ]  # fmt: skip
    with served(arguments.model, *flags) as (url, _):
        endpoint = Endpoint(url, arguments.model, slo=True, ignore_eos=True)
        sent, seconds = asyncio.run(
            run_load(endpoint, requests(arguments), tbt_slos={"stream": arguments.tbt_slo})
        )
    failed = [one.error for one in sent if not one.completed]
    quiet, under = split(sent)
    report = {
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "load_average": list(os.getloadavg()),
        "seconds": seconds,
        "failed": failed,
        "quiet": figures(quiet),
        "under_prefill": figures(under),
        "ttft_of_prompts_s": [one.ttft for one in sent if one.request.klass == "prompt"],
    }
    q, u = report["quiet"]["p99_ms"], report["under_prefill"]["p99_ms"]  # type: ignore[index]
    print(json.dumps(report, indent=1))
    if q is not None and u is not None:
        allowed = 2 * q + arguments.max_blocking_ms
        print(f"p99 between tokens: quiet {q:.1f} ms, under prefill {u:.1f} ms, allowed {allowed:.1f} ms")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How long one request can hold up the server's event loop, and so everybody's streams.

    python benchmarks/serve_stalls.py             # the worst bodies that are permitted
    python benchmarks/serve_stalls.py --inline    # what it would be if they were parsed where they come

The front of `fpcompile serve` runs in this process, its worker beside it. A task of the front's event loop
sleeps for half a millisecond again and again: what it oversleeps is a stall, of which each kind of body is
charged with the longest while it is sent, refused or answered. *nothing* is the noise of the machine.
Processes of this benchmark begin by importing this file: what is heavy is imported in functions. Bodies are
just under the limit of `--max-body-bytes`, or just short enough to be parsed in place.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import http.client
import json
import multiprocessing
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
MESSAGE = '{"role":"user","content":""},'


def bodies(size: int) -> dict[str, tuple[str, bytes]]:
    """Name -> (path, body) of at most ``size`` bytes each."""

    def filled(before: str, piece: str, after: str, most: int = 1 << 30) -> bytes:
        count = min((size - len(before) - len(after)) // len(piece), most)
        return (before + (piece * count).rstrip(",") + after).encode()

    prompt = '{"model":"tiny","max_tokens":1,"prompt":'
    return {
        "lists": (COMPLETIONS, filled(prompt + "[", "[],", "]}")),
        "objects": (COMPLETIONS, filled(prompt + "[", "{},", "]}")),
        "token ids": (COMPLETIONS, filled(prompt + "[", "1,", "]}", 1 << 20)),
        "lists of ids": (COMPLETIONS, filled(prompt + "[", "[1],", "]}", 4096)),
        "texts": (COMPLETIONS, filled(prompt + "[", '"' + "a" * 900 + '",', "]}", 4096)),
        "one text": (COMPLETIONS, filled(prompt + '"', "a", '"}')),
        "a text to tokenise": (COMPLETIONS, filled(prompt + '"', "a", '"}', 65_536)),
        "messages": (CHAT, filled('{"model":"tiny","messages":[', MESSAGE, "]}", 4096)),
        "parts": (
            CHAT,
            filled(
                '{"model":"tiny","messages":[{"role":"user","content":[', '{"type":"text","text":""},',
                "]}]}", 4096,
            ),
        ),
        "unknown fields": (
            COMPLETIONS,
            ("{" + ",".join(f'"{n:x}":0' for n in range(size // 12)) + "}").encode(),
        ),
    }  # fmt: skip


def answers() -> dict[str, tuple[str, bytes]]:
    """Requests whose answers are long."""
    texts = json.dumps(["ab"] * 256)
    return {
        "256 vectors": (EMBEDDINGS, f'{{"model":"tiny-embed","input":{texts}}}'.encode()),
        "a conversation": (
            CHAT,
            f'{{"model":"tiny","max_tokens":1,"messages":[{MESSAGE * 64}'.encode()[:-1] + b"]}",
        ),
    }


def ask(port: int, path: str, body: bytes) -> int:
    """The status; runs in a process of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


class Heart:
    """Beats in the event loop; ``worst``: seconds by which a beat was late, since it was last asked."""

    def __init__(self) -> None:
        self._worst = 0.0

    async def beat(self) -> None:
        """For ever."""
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.0005)
            self._worst = max(self._worst, time.perf_counter() - begun - 0.0005)

    def worst(self) -> float:
        """And begin again."""
        worst, self._worst = self._worst, 0.0
        return worst


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    from fpcompile.serving.server.app import make_app
    from fpcompile.serving.server.models import parse_models
    from fpcompile.serving.server.parsing import SHORT
    from fpcompile.serving.server.run import Server
    from fpcompile.serving.server.settings import EngineSettings, Limits, ServerSettings

    limits = Limits()
    settings = ServerSettings(EngineSettings(parse_models([], ["tiny"]), threads=1), limits=limits)
    server = Server(settings, app := make_app(settings))
    heart = Heart()
    found: dict[str, Any] = {}
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        serving = asyncio.create_task(server.serve([sock]))
        while not server.started:
            await asyncio.sleep(0.01)
        await app.state.front.link.settled()
        beating = asyncio.create_task(heart.beat())
        cases: dict[str, tuple[str, bytes] | None] = {"nothing": None}
        cases |= {
            f"{name}, {limits.body_bytes >> 20} MiB": case for name, case in bodies(limits.body_bytes).items()
        }
        cases |= {f"{name}, {SHORT >> 10} KiB": case for name, case in bodies(SHORT).items()}
        cases |= answers()
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as client:
            for name, case in cases.items():
                worst: list[float] = []
                status: int | None = None
                for number in range(options.repeats + 1):  # the first one warms up
                    await asyncio.sleep(0.05)
                    heart.worst()
                    if case is None:
                        await asyncio.sleep(0.3)
                    else:
                        status = await loop.run_in_executor(client, ask, sock.getsockname()[1], *case)
                    if number:
                        worst.append(heart.worst())
                found[name] = {
                    "status": status, "bytes": 0 if case is None else len(case[1]),
                    "worst_ms": 1e3 * max(worst), "median_ms": 1e3 * statistics.median(worst),
                }  # fmt: skip
                print(f"{name:<28} {status or '':>4} worst {1e3 * max(worst):7.1f} ms, "
                      f"median {1e3 * statistics.median(worst):7.1f} ms", flush=True)  # fmt: skip
        beating.cancel()
        server.should_exit = True
        await serving
    return found


def main() -> None:
    """Measure, print, write."""
    made = argparse.ArgumentParser(description="The longest stall of the server's event loop by body.")
    made.add_argument("--inline", action="store_true", help="parse every body where it comes")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--json", type=Path)
    options = made.parse_args()
    import torch

    from benchmarks import common
    from fpcompile.serving.server import gate

    common.warn_if_busy()
    if options.inline:
        changed: Any = gate
        changed.SHORT = 1 << 40
    found = asyncio.run(measure(options))
    if options.json is not None:
        machine = common.machine(torch.device("cpu"))
        content = {"benchmark": "serve_stalls", "inline": options.inline, "cases": found, "machine": machine}
        common.write_json(options.json, content)


if __name__ == "__main__":
    main()

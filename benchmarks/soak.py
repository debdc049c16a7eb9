"""Random traffic with faults for some minutes: afterwards nothing is left, and memory has not grown.

    python benchmarks/soak.py                                  3 minutes
    python benchmarks/soak.py --seconds 600 --seed 7 --policy fpcompile

One engine holds two programs, an LLM and an encoder, both tiny. Threads and an event loop submit prompts of
random lengths, with and without promises; some are cancelled at a random time, some time out, some are
generated, some meet a fault in a segment: an exception, memory that runs out once or for good, a slow
segment. One copy to the host of twenty finds no memory, for which nobody may fail. A hook that raises is
there too. At the end, and then the exit code is 1:

    a request that has not ended as completed, cancelled, rejected or failed, or ended as nobody asked;
    a result that has not the bits of the same request alone;
    a live request, a byte, a cache block, a thread or a file handle more than at the start;
    resident memory that grew by more than ``--growth`` MB after the first third.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any directory

from benchmarks import common
from fpcompile import Engine, Run, segment
from fpcompile.cli.guard import quiet, remedied
from fpcompile.errors import (
    QueueFullError,
    RequestCancelledError,
    RequestRejectedError,
    RequestTimeoutError,
    SegmentError,
)
from fpcompile.executor.offload import Parking
from fpcompile.models.zoo import tiny_model

LENGTHS = (3, 9, 33, 70)
CLIENTS = 3
COPIES = 0.05
ENDS = ("completed", "cancelled", "rejected", "failed")


def arguments() -> argparse.Namespace:
    """The command line."""
    made = common.parser("Random traffic with faults; afterwards nothing is left.")
    made.add_argument("--seconds", type=float, default=180.0)
    made.add_argument("--policy", default="s-edf")
    made.add_argument("--faults", type=float, default=0.002, help="of all segments: how many fail")
    made.add_argument("--growth", type=float, default=64.0, help="MB of resident memory that may be added")
    return made.parse_args()


class Injected(Exception):
    """A fault that this script made."""


class Faults:
    """Makes segments of any run fail now and then. ``made`` counts what was done, by kind."""

    def __init__(self, share: float, seed: int) -> None:
        self.made: Counter[str] = Counter()
        self._share, self._draw = share, random.Random(seed)
        self._real, self._copy = Run._call, Parking.to_host

    def __enter__(self) -> Faults:
        faults, real = self, self._real

        def call(run: Run, *rest: Any) -> Any:
            if threading.current_thread().name == "fpcompile-device":
                faults.strike()
            return real(run, *rest)

        def to_host(parking: Parking, tensors: Any, **options: Any) -> Any:
            if tensors and faults._draw.random() < COPIES:
                faults.made["copy"] += 1
                raise MemoryError("injected")
            return faults._copy(parking, tensors, **options)

        _patch(call, to_host)
        return self

    def __exit__(self, *_: object) -> None:
        _patch(self._real, self._copy)

    def strike(self) -> None:
        """Before a segment: raise, wait, or do nothing."""
        if self._draw.random() >= self._share:
            return
        kind = self._draw.choice(("exception", "memory", "slow"))
        self.made[kind] += 1
        if kind == "slow":
            time.sleep(0.02)
        elif kind == "memory":
            raise SegmentError("soak", cause=MemoryError("injected"))
        else:
            raise SegmentError("soak", cause=Injected("injected"))


def _patch(call: Any, to_host: Any) -> None:
    """Let runs call their functions through ``call``, and copies to the host be made by ``to_host``."""
    runs: Any = Run
    copies: Any = Parking
    runs._call, copies.to_host = call, to_host


class Traffic:
    """What was asked of an engine, and how it ended; used by many threads."""

    def __init__(self, engine: Engine, expected: dict[tuple[str, int], torch.Tensor]) -> None:
        self.engine, self.expected = engine, expected
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def send(self, draw: random.Random) -> tuple[Any, tuple[str, int], dict[str, Any]]:
        """One random request."""
        name, length = draw.choice(("chat", "embed")), draw.choice(LENGTHS)
        terms: dict[str, Any] = {}
        if draw.random() < 0.5:
            terms["ttft_slo"] = draw.choice((0.01, 0.1, 1.0))
        if draw.random() < 0.2:
            terms["timeout"] = draw.choice((0.001, 0.02, 0.2))
        if name == "chat" and draw.random() < 0.2:
            terms["max_new_tokens"] = draw.randrange(1, 9)
        ids = prompt(length)
        handle = self.engine.submit(ids, program=name, tenant=draw.choice("ab"), **terms)
        return handle, (name, length), terms

    def judge(self, handle: Any, key: tuple[str, int], terms: dict[str, Any], asked: bool) -> None:
        """Whether the request, which has ended, ended as it may."""
        problem = ""
        try:
            output = handle.result(0)
        except RequestCancelledError:
            problem = "" if asked else "cancelled, but not asked to"
        except RequestTimeoutError:
            problem = "" if "timeout" in terms else "timed out without a timeout"
        except RequestRejectedError:
            problem = "rejected without a limit"
        except SegmentError as error:
            injected = isinstance(error.__cause__, (Injected, MemoryError))
            problem = "" if injected else f"failed by itself: {error}"
        except Exception as error:  # a soak reports whatever it finds
            problem = f"ended with {type(error).__name__}: {error}"
        else:
            if "max_new_tokens" not in terms and not torch.equal(output[0], self.expected[key]):
                problem = "other bits than alone"
        state = handle.metrics.state
        if state not in ENDS:
            problem = f"state {state}"
        with self._lock:
            self.ended[state] += 1
            if problem:
                self.wrong.append(f"{handle.request_id} ({key}, {terms}): {problem}")


def prompt(length: int) -> torch.Tensor:
    """Token ids ``[1, length]``."""
    return torch.randint(100, (1, length), generator=torch.Generator().manual_seed(length))


def client(traffic: Traffic, until: float, seed: int) -> None:
    """A thread: bursts of requests, some of them withdrawn, all of them awaited."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        sent = []
        for _ in range(draw.randrange(1, 6)):
            try:
                sent.append(traffic.send(draw))
            except QueueFullError as error:
                time.sleep(min(error.retry_after, 0.05))
        for handle, key, terms in sent:
            asked = draw.random() < 0.2
            if asked:
                time.sleep(draw.random() * 0.01)
                handle.cancel()
            _wait(handle)
            traffic.judge(handle, key, terms, asked)


def _wait(handle: Any) -> None:
    done = threading.Event()
    handle.add_done_callback(lambda _: done.set())
    if not done.wait(60):
        raise TimeoutError(f"{handle!r} has not ended for a minute")


async def tasks(traffic: Traffic, until: float, seed: int) -> None:
    """An event loop: tasks that await requests, some of which are cancelled."""
    draw = random.Random(seed)

    async def one() -> None:
        try:
            handle, key, terms = traffic.send(draw)
        except QueueFullError:
            return
        asked = draw.random() < 0.2
        waiting = asyncio.ensure_future(_ended(handle))
        if asked:
            await asyncio.sleep(draw.random() * 0.01)
            waiting.cancel()
        await asyncio.wait([waiting])
        while not handle.done():
            await asyncio.sleep(0.001)
        traffic.judge(handle, key, terms, asked)

    while time.monotonic() < until:
        await asyncio.gather(*(one() for _ in range(draw.randrange(1, 5))))


def event_loop(traffic: Traffic, until: float, seed: int) -> None:
    """A thread with an event loop."""
    asyncio.run(tasks(traffic, until, seed + CLIENTS))


async def _ended(handle: Any) -> None:
    try:
        await handle
    except asyncio.CancelledError:
        raise
    except Exception:  # judged by its handle
        return


def resident() -> float:
    """MB of resident memory; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def handles() -> int:
    """Open files; 0 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def programs() -> dict[str, Any]:
    """An LLM and an encoder."""
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    encoder = BertModel(config).train(False)
    return {"chat": segment(tiny_model("llama")), "embed": segment(encoder)}


def soak(compiled: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run it, and say what was found; ``problems`` is empty when all is well."""
    expected = {(name, n): compiled[name](prompt(n))[0] for name in compiled for n in LENGTHS}
    gc.collect()
    threads, files = threading.active_count(), handles()
    engine = Engine(
        compiled,
        policy=options.policy,
        max_queue=50,
        on_segment=_raising,
        kv_blocks={"chat": 64},
        memory_budget=1 << 16,
        deterministic=True,
    )
    traffic = Traffic(engine, expected)
    begun = time.monotonic()
    until = begun + options.seconds
    memory: list[float] = []
    broken: list[str] = []

    def guarded(work: Any, *given: Any) -> None:
        try:
            work(*given)
        except BaseException as error:  # what ends a client is a finding
            broken.append(f"a client ended with {type(error).__name__}: {error}")

    with Faults(options.faults, options.seed) as faults:
        clients = [
            threading.Thread(target=guarded, args=(client, traffic, until, options.seed + i))
            for i in range(CLIENTS)
        ]
        clients.append(threading.Thread(target=guarded, args=(event_loop, traffic, until, options.seed)))
        for thread in clients:
            thread.start()
        while any(thread.is_alive() for thread in clients):
            time.sleep(min(1.0, options.seconds / 10))
            memory.append(resident())
        statistics = engine.statistics()
        engine.close(timeout=30)
    gc.collect()
    return {
        "seconds": time.monotonic() - begun,
        "ended": dict(traffic.ended),
        "faults": dict(faults.made),
        "preemptions": statistics.preemptions,
        "resident_mb": memory,
        "problems": traffic.wrong[:20]
        + broken
        + left(engine, traffic, threads, files, memory, options.growth),
    }


def _raising(*_: object) -> None:
    raise Injected("a hook that raises is switched off")


def left(
    engine: Engine, traffic: Traffic, threads: int, files: int, memory: list[float], growth: float
) -> list[str]:
    """What should not be there any more."""
    statistics, found = engine.statistics(), []
    for name in ("running", "waiting", "paused", "paused_bytes"):
        if value := getattr(statistics, name):
            found.append(f"{name} is {value} at the end")
    memory_now = statistics.memory
    for name in ("blocks_used", "host_bytes", "paused_bytes"):
        if value := getattr(memory_now, name):
            found.append(f"{name} of the memory is {value} at the end")
    if statistics.ended != sum(traffic.ended.values()):
        found.append(f"{statistics.ended} requests ended, {sum(traffic.ended.values())} were awaited")
    if (now := threading.active_count()) > threads:
        found.append(f"{now} threads, {threads} at the start: {threading.enumerate()}")
    if (now := handles()) > files:
        found.append(f"{now} open files, {files} at the start")
    third = len(memory) // 3
    if memory and (grown := memory[-1] - memory[third]) > growth:
        found.append(f"resident memory grew by {grown:.0f} MB after the first third")
    return found


def main() -> None:
    """Run, print, write."""
    options = arguments()
    with quiet(), remedied():
        found = soak(programs(), options)
        print(f"{found['seconds']:.0f} s under {options.policy}: {found['ended']}, faults {found['faults']}")
        print(f"{found['preemptions']} preemptions; resident memory {found['resident_mb'][-1]:.0f} MB")
        content = {"benchmark": "soak", "policy": options.policy, "seed": options.seed, **found}
        machine = common.machine(torch.device("cpu"))
        common.write_json(options.output / "soak.json", {**content, "machine": machine})
        for problem in found["problems"]:
            print(f"PROBLEM: {problem}")
        if found["problems"]:
            raise SystemExit(1)


if __name__ == "__main__":
    main()

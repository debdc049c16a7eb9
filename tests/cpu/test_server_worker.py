"""The worker without an engine: tokens of one step are one message, and come before the end."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from types import SimpleNamespace
from typing import Any

from fpcompile.engine.errors import Home
from fpcompile.engine.handle import Handle
from fpcompile.serving.server.messages import Ended, Facts, Fresh, Generate, Ready, Sampling, Terms
from fpcompile.serving.server.worker import _Worker
from tests.cpu.server_support import PATIENCE

METRICS = SimpleNamespace(
    state="completed", arrival=0.0, ended=1.0, queued=0.0, ttft=0.1, suspended=0.0, executed=0.1,
    predicted_ttft=0.1, preemptions=0, slo_met=None, numerics="bits", finish_reason="length",
)  # fmt: skip


class Backend:
    """Makes handles, and nothing else."""

    def __init__(self) -> None:
        self.facts = {"tiny": Facts("generate", 260, 64)}
        self.handles: dict[str, Handle] = {}

    def generate(self, ask: Generate) -> Handle:
        handle = Handle(ask.id, ask_cancel=lambda name: None, home=Home(), generates=True)
        snapshot: Any = lambda: METRICS  # noqa: E731
        handle.bind(snapshot)
        handle.put(0)  # the first one is there before anybody listens
        self.handles[ask.id] = handle
        return handle


def _messages(count: int, steps: int) -> list[Any]:
    """What the worker sends for ``count`` requests, of which each step of the device makes a token."""

    async def scene() -> list[Any]:
        mine, theirs = multiprocessing.Pipe()
        fake: Any = Backend()
        worker = _Worker(fake, theirs)
        serving = asyncio.create_task(worker.serve())
        heard: list[Any] = []
        names = [f"r{number}" for number in range(count)]

        def read() -> None:
            while sum(isinstance(one, Ended) for one in heard) < count:
                heard.extend(mine.recv())

        reading = asyncio.create_task(asyncio.to_thread(read))
        mine.send([Generate(name, "tiny", (1,), 9, Sampling(), Terms(0.0)) for name in names])
        while not (len(fake.handles) == count and all(one._followers for one in fake.handles.values())):
            await asyncio.sleep(0.001)
        turn = threading.Barrier(2)

        def device() -> None:
            for step in range(1, steps + 1):
                turn.wait(PATIENCE)
                for name in names:
                    fake.handles[name].put(step)
                turn.wait(PATIENCE)
            for name in names:
                fake.handles[name].seal()
                fake.handles[name].resolve(None)

        driving = threading.Thread(target=device)
        driving.start()
        for _ in range(steps):
            turn.wait(PATIENCE)  # the event loop is held here while the step puts its tokens
            turn.wait(PATIENCE)
            await asyncio.sleep(0.01)
        await asyncio.wait_for(reading, PATIENCE)
        driving.join()
        mine.close()
        await serving
        return heard

    return asyncio.run(scene())


def test_the_tokens_of_a_step_are_one_message() -> None:
    heard = _messages(count=5, steps=3)
    assert isinstance(heard[0], Ready)
    fresh = [one for one in heard if isinstance(one, Fresh)]
    of_steps = [one for one in fresh if any(tokens != (0,) for _, tokens in one.tokens)]
    assert len(of_steps) == 3
    assert all(len(one.tokens) == 5 for one in of_steps)


def test_tokens_come_in_order_each_once_and_before_the_end() -> None:
    heard = _messages(count=3, steps=4)
    for name in ("r0", "r1", "r2"):
        mine: list[Any] = []
        for one in heard:
            if isinstance(one, Fresh):
                mine += [token for other, tokens in one.tokens for token in tokens if other == name]
            elif isinstance(one, Ended) and one.id == name:
                mine.append("end")
        assert mine == [0, 1, 2, 3, 4, "end"]

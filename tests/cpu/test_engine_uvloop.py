"""Handles and a loop that the host drives, under uvloop: skipped where it is not installed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import fpcompile
from fpcompile.errors import RequestCancelledError
from tests.cpu.memory_support import ids
from tests.cpu.support import program_of
from tests.cpu.test_generate import own

uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """As ``uvloop.run``: the running loop is one of uvloop's."""

    async def checked() -> None:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        await asyncio.wait_for(main(), 60)

    uvloop.run(checked())


def test_a_handle_is_awaited_and_streams() -> None:
    async def main() -> None:
        plain = engine.submit(ids(20))
        stream = engine.submit(ids(23), max_new_tokens=12)
        tokens = [token async for token in stream]
        assert tokens == own("qwen3", ids(23), 12)
        assert (await plain).logits.shape[1] == 20

    with fpcompile.Engine(program_of("qwen3")) as engine:
        run(main)


class _Slow(LogitsProcessor):
    """Leaves the loop the time to cancel before the last token, however busy the machine is."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        time.sleep(0.01)
        return scores


def test_cancelling_the_task_cancels_the_request() -> None:
    async def main() -> None:
        handle = engine.submit(ids(23), max_new_tokens=480, logits_processor=LogitsProcessorList([_Slow()]))

        async def listen() -> None:
            async for _ in handle:
                pass

        task = asyncio.ensure_future(listen())
        while handle.metrics.tokens_out < 2:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not handle.done():
            await asyncio.sleep(0.001)
        with pytest.raises(RequestCancelledError):
            handle.result(0)

    with fpcompile.Engine(program_of("qwen3")) as engine:
        run(main)


def test_the_hosts_loop_turns_the_engine() -> None:
    """No thread: each turn is one launch, and other tasks run in between."""
    beats = 0

    async def main() -> None:
        nonlocal beats
        handles = [engine.submit(ids(20 + n), max_new_tokens=5) for n in range(3)]

        async def beat() -> None:
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0)

        beating = asyncio.ensure_future(beat())
        turns = 0
        while engine.turn():
            turns += 1
            await asyncio.sleep(0)
        beating.cancel()
        assert beats >= turns > 15
        for number, handle in enumerate(handles):
            assert [token async for token in handle] == own("qwen3", ids(20 + number), 5)

    engine = fpcompile.Engine(program_of("qwen3"), device_thread=False)
    run(main)
    engine.close()

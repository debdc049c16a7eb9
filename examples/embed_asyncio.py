"""Embed the engine in an asyncio server: three ways, from most to least of it.

    python examples/embed_asyncio.py

1. The engine has its device thread; coroutines await handles, and cancelling a task cancels its request.
2. No thread at all: a task of the host's own event loop turns the engine, one launch at a time.
3. No engine either: a compiled run is stepped by the host, which may do anything between two cuts.
"""

from __future__ import annotations

import asyncio
import contextlib

import torch
from embed_threads import prompt, small_model

import fpcompile
from fpcompile.executor.loop import iterate


async def with_device_thread(program: fpcompile.Program) -> None:
    """Await results, and withdraw a request by cancelling the task that awaits it."""
    with fpcompile.Engine(program) as engine:
        long = engine.submit(prompt(2000), logits_to_keep=1)
        while long.metrics.started is None:
            await asyncio.sleep(0.001)
        impatient = asyncio.create_task(_answer(engine, prompt(2000)))
        urgent = await _answer(engine, prompt(32), ttft_slo=2.0)
        impatient.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await impatient
        await long
        print(f"1. next tokens: urgent {urgent}; engine: {_told(engine)}")


async def _answer(engine: fpcompile.Engine, ids: torch.Tensor, ttft_slo: float | None = None) -> int:
    output = await engine.submit(ids, logits_to_keep=1, ttft_slo=ttft_slo)
    return int(output.logits[0, -1].argmax())


def _told(engine: fpcompile.Engine) -> str:
    s = engine.statistics()
    return f"{s.completed} completed, {s.cancelled} cancelled, {s.preemptions} preemptions"


async def without_thread(program: fpcompile.Program) -> None:
    """The event loop drives the device: each turn is one launch, then other tasks have their say."""
    engine = fpcompile.Engine(program, device_thread=False)

    async def device() -> None:
        while True:
            busy = engine.turn(max_segments=1)
            await asyncio.sleep(0 if busy else 0.001)

    driving = asyncio.create_task(device())
    long = engine.submit(prompt(2000), ttft_slo=30.0, logits_to_keep=1)
    while long.metrics.state == "waiting":
        await asyncio.sleep(0)
    urgent = engine.submit(prompt(32), ttft_slo=2.0, logits_to_keep=1)
    await urgent
    assert not long.done(), "the urgent one has overtaken it"
    await long
    driving.cancel()
    engine.close()
    first, second = (handle.metrics.ttft or 0.0 for handle in (urgent, long))
    print(f"2. urgent after {first * 1e3:.0f} ms, long after {second * 1e3:.0f} ms")


async def without_engine(program: fpcompile.Program) -> None:
    """Two runs side by side, a heartbeat beside them: control comes back at every cut."""
    beats = 0

    async def heartbeat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0)

    async def execute(ids: torch.Tensor) -> torch.Tensor:
        run = program.start(ids, logits_to_keep=1)
        for _ in iterate(run):
            await asyncio.sleep(0)
        logits: torch.Tensor = run.result().logits
        return logits

    beating = asyncio.create_task(heartbeat())
    first, second = await asyncio.gather(execute(prompt(200)), execute(prompt(300)))
    beating.cancel()
    equal = torch.equal(first, program(prompt(200), logits_to_keep=1).logits)
    assert second.shape == first.shape
    segments = len(program.segments)
    print(f"3. two interleaved runs of {segments} segments, {beats} heartbeats, bits equal: {equal}")


async def main() -> None:
    """All three ways with one small program."""
    program = fpcompile.segment(small_model())
    await with_device_thread(program)
    await without_thread(program)
    await without_engine(program)


if __name__ == "__main__":
    asyncio.run(main())

"""Awaiting handles: one loop, several loops, cancelled tasks, and a loop that drives the device itself."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from fpcompile.engine.engine import Engine
from fpcompile.errors import RequestCancelledError, SegmentError
from tests.cpu.test_engine_fakes import Clock, FakeProgram, Gate, inline, raises


async def _await(handle: Any) -> Any:
    return await handle


def test_many_tasks_await_their_requests() -> None:
    async def main() -> list[int]:
        with Engine(FakeProgram()) as engine:
            return list(await asyncio.gather(*(engine.submit([i]) for i in range(1, 30))))

    assert asyncio.run(main()) == list(range(1, 30))


def test_the_loop_goes_on_while_a_request_runs() -> None:
    gate = Gate()

    async def main() -> int:
        with Engine(FakeProgram()) as engine:
            task = asyncio.ensure_future(_await(engine.submit([1], at={0: gate})))
            await asyncio.to_thread(gate.wait)
            turns = 0
            for _ in range(100):
                await asyncio.sleep(0)
                turns += 1
            assert not task.done()
            gate.open.set()
            assert await task == 1
            return turns

    assert asyncio.run(main()) == 100


def test_two_loops_share_an_engine_and_a_handle() -> None:
    gate = Gate()
    results: list[int] = []
    with Engine(FakeProgram()) as engine:
        shared = engine.submit([1], at={0: gate})
        gate.wait()
        waiting = threading.Barrier(3, timeout=20)

        async def main(number: int) -> None:
            own = engine.submit([number])
            tasks = [asyncio.ensure_future(_await(handle)) for handle in (shared, own)]
            await asyncio.sleep(0)
            waiting.wait()
            results.extend(await asyncio.gather(*tasks))

        threads = [threading.Thread(target=lambda n=n: asyncio.run(main(n))) for n in (10, 20)]
        for thread in threads:
            thread.start()
        waiting.wait()
        gate.open.set()
        for thread in threads:
            thread.join(20)
    assert sorted(results) == [1, 1, 10, 20]


def test_cancelling_the_task_cancels_the_request() -> None:
    gate, program = Gate(), FakeProgram()

    async def main() -> None:
        with Engine(program) as engine:
            handle = engine.submit([1], at={1: gate})
            task = asyncio.ensure_future(_await(handle))
            await asyncio.to_thread(gate.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.open.set()
            with pytest.raises(RequestCancelledError):
                await handle
            assert engine.statistics().cancelled == 1

    asyncio.run(main())
    assert program.log == [(1, 0), (1, 1)]
    assert program.runs[0].released


def test_a_timeout_around_the_awaiting_cancels_the_request() -> None:
    gate, program = Gate(), FakeProgram()

    async def main() -> None:
        with Engine(program) as engine:
            handle = engine.submit([1], at={1: gate})
            await asyncio.to_thread(gate.wait)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await handle
            gate.open.set()
            with pytest.raises(RequestCancelledError):
                await handle

    asyncio.run(main())


def test_the_original_exception_is_raised_in_the_task() -> None:
    async def main() -> None:
        with Engine(FakeProgram()) as engine:
            with pytest.raises(SegmentError) as caught:
                await engine.submit([1], at={0: raises})
            assert caught.value.node == "mm_3"

    asyncio.run(main())


def test_an_event_loop_drives_the_device_without_a_thread() -> None:
    threads = threading.active_count()
    program = FakeProgram(6, clock=Clock())

    async def device(engine: Engine) -> None:
        while True:
            engine.turn(max_segments=1)
            await asyncio.sleep(0)

    async def main() -> list[int]:
        engine = inline(program)
        driving = asyncio.ensure_future(device(engine))
        long = engine.submit([1] * 50, ttft_slo=1e6)
        while long.metrics.state == "waiting":
            await asyncio.sleep(0)
        urgent = engine.submit([7], ttft_slo=100.0)
        results = [await urgent, await long]
        assert threading.active_count() == threads
        assert long.metrics.preemptions == 1
        driving.cancel()
        engine.close()
        return results

    assert asyncio.run(main()) == [7, 50]

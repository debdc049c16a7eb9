"""Handles without an engine: one end, promises kept, threads and event loops woken."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import logging
import threading
import weakref
from collections.abc import Callable

import pytest

from fpcompile.engine.errors import Home
from fpcompile.engine.handle import Handle
from fpcompile.errors import InternalError, RequestCancelledError, UsageError


def _handle(ask: Callable[[str], object] = lambda request_id: None) -> Handle:
    return Handle("r1", ask_cancel=ask, home=Home())


def _resolve(handle: Handle, value: object) -> None:
    handle.seal()
    handle.resolve(value)


def test_a_result_is_there_for_everybody_and_for_ever() -> None:
    handle = _handle()
    assert not handle.done()
    _resolve(handle, 7)
    assert handle.done()
    assert [handle.result(), handle.result(0), asyncio.run(_await(handle))] == [7, 7, 7]


async def _await(handle: Handle) -> object:
    return await handle


def test_waiting_ends_with_the_original_exception() -> None:
    handle, error = _handle(), KeyError("original")
    handle.seal()
    handle.fail(error)
    with pytest.raises(KeyError) as caught:
        handle.result()
    assert caught.value is error
    with pytest.raises(KeyError) as caught:
        asyncio.run(_await(handle))
    assert caught.value is error


def test_a_timeout_leaves_the_request_alone() -> None:
    asked: list[str] = []
    handle = _handle(asked.append)
    with pytest.raises(TimeoutError, match="'r1' has not ended within 0"):
        handle.result(0)
    assert asked == []
    _resolve(handle, 1)
    assert handle.result(0) == 1


def test_a_handle_ends_once() -> None:
    handle = _handle()
    _resolve(handle, 1)
    with pytest.raises(InternalError, match="twice"):
        handle.resolve(2)
    assert handle.result() == 1


def test_an_end_is_sealed_first() -> None:
    with pytest.raises(InternalError, match="unsealed"):
        _handle().resolve(2)


def test_cancel_asks_once_and_keeps_its_promise() -> None:
    asked: list[str] = []
    handle = _handle(asked.append)
    assert handle.cancel()
    assert handle.cancel(), "asking twice is no mistake"
    assert asked == ["r1"]
    assert not handle.done(), "it takes effect at the next cut"
    assert handle.seal(), "the driver is told, even when it has a result"
    handle.fail(RequestCancelledError("r1"))
    assert handle.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        handle.result()


def test_cancel_comes_too_late() -> None:
    asked: list[str] = []
    handle = _handle(asked.append)
    assert handle.seal() is False
    assert handle.cancel() is False, "decided, though not yet done"
    handle.resolve(1)
    assert handle.cancel() is False
    assert asked == []
    assert handle.result() == 1


def test_a_sealed_handle_does_not_keep_the_engine_alive() -> None:
    class Engine:
        def ask(self, request_id: str) -> None: ...

    engine = Engine()
    handle, alive = _handle(engine.ask), weakref.ref(engine)
    del engine
    assert alive() is not None, "somebody waits for a request of it"
    _resolve(handle, 1)
    assert alive() is None


def test_threads_wait() -> None:
    handle = _handle()
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(handle.result(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    _resolve(handle, 3)
    for thread in threads:
        thread.join()
    assert results == [3, 3, 3, 3]


def test_two_event_loops_await_one_handle() -> None:
    handle = _handle()
    waiting = threading.Barrier(3, timeout=20)
    results: list[object] = []

    async def wait() -> None:
        task = asyncio.ensure_future(_await(handle))
        await asyncio.sleep(0)  # the task runs up to its waiter
        waiting.wait()
        results.append(await task)

    threads = [threading.Thread(target=lambda: asyncio.run(wait())) for _ in range(2)]
    for thread in threads:
        thread.start()
    waiting.wait()
    _resolve(handle, 5)
    for thread in threads:
        thread.join()
    assert results == [5, 5]


def test_cancelling_the_task_cancels_the_request() -> None:
    asked: list[str] = []
    handle = _handle(asked.append)

    async def main() -> None:
        task = asyncio.ensure_future(_await(handle))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert asked == ["r1"]
    assert handle._callbacks == [], "nobody waits any more"


def test_a_shielded_wait_does_not_cancel_the_request() -> None:
    asked: list[str] = []
    handle = _handle(asked.append)

    async def main() -> object:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await asyncio.shield(handle)
        _resolve(handle, 4)
        return await handle

    assert asyncio.run(main()) == 4
    assert asked == []


def test_the_end_of_a_request_cancelled_elsewhere_is_not_a_cancelled_task() -> None:
    handle = _handle()

    async def main() -> None:
        task = asyncio.ensure_future(_await(handle))
        await asyncio.sleep(0)
        handle.cancel()
        handle.seal()
        handle.fail(RequestCancelledError("r1"))
        with pytest.raises(RequestCancelledError):
            await task
        assert not task.cancelled()

    asyncio.run(main())


def test_a_closed_loop_does_not_harm_the_one_who_ends_the_request() -> None:
    handle = _handle()
    loop = asyncio.new_event_loop()
    task = loop.create_task(_await(handle))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    _resolve(handle, 1)
    assert handle.result() == 1
    task.get_coro().close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_callbacks_are_called_once_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    handle = _handle()
    seen: list[Handle] = []

    def broken(handle: Handle) -> None:
        raise ValueError("callback")

    handle.add_done_callback(broken)
    handle.add_done_callback(seen.append)
    with caplog.at_level(logging.ERROR):
        _resolve(handle, 1)
    assert seen == [handle]
    handle.add_done_callback(seen.append)
    assert seen == [handle, handle]
    assert [record.getMessage() for record in caplog.records] == ["a callback of a handle raised"]


def test_token_callbacks_hear_every_token_once_and_in_order(caplog: pytest.LogCaptureFixture) -> None:
    handle = Handle("r1", ask_cancel=lambda request_id: None, home=Home(), generates=True)
    handle.put(1)
    seen: list[int] = []
    handle.add_token_callback(seen.append)
    assert seen == [1], "what was there before"
    handle.add_token_callback(lambda token: 1 // 0)
    writer = threading.Thread(target=lambda: collections.deque(map(handle.put, range(2, 300)), 0))
    late: list[int] = []
    writer.start()
    handle.add_token_callback(late.append)
    writer.join()
    assert seen == late == list(range(1, 300))
    assert "a callback of a handle raised" in caplog.text
    with pytest.raises(UsageError, match="makes no tokens"):
        _handle().add_token_callback(seen.append)

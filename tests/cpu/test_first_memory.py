"""Memory runs out where a run gets its first, or gets it back: what is paused makes room, and it is tried
once more; the second time that run fails, nobody else does, and nothing is left behind.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fpcompile.engine import driver
from fpcompile.engine import memory as engine_memory
from fpcompile.engine.generation import Generation
from fpcompile.errors import RequestCancelledError
from fpcompile.executor import pool as pools
from fpcompile.executor import together
from fpcompile.executor.offload import Parking
from fpcompile.executor.pool import KVPool
from fpcompile.testing import FakeAsyncDevice
from tests.cpu.memory_support import AGAIN, COPY, drain, empty, ids, inline, turn
from tests.cpu.support import differences, finish, outcome, program_of
from tests.cpu.test_decode_memory import hopeful, tokens_of
from tests.cpu.test_generate import own
from tests.cpu.test_pool_growing import Both, pool_of

EXHAUSTED = (MemoryError, torch.OutOfMemoryError)


def short(
    patch: pytest.MonkeyPatch, owner: Any, name: str, *calls: int, error: Any = MemoryError
) -> list[int]:
    """The calls of these numbers raise for want of memory; the list counts all of them."""
    real, count = getattr(owner, name), [0]

    def method(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] in calls:
            raise error("injected")
        return real(*arguments, **options)

    patch.setattr(owner, name, method)
    return count


def same(handle: Any, length: int, **given: Any) -> bool:
    return not differences(outcome(handle.result(0)), finish(program_of("qwen3").start(ids(length), **given)))


def close(handle: Any, length: int) -> None:
    alone = finish(program_of("qwen3").start(ids(length)))
    torch.testing.assert_close(handle.result(0).logits, alone.logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("error", EXHAUSTED)
@pytest.mark.parametrize("device", [None, FakeAsyncDevice], ids=["cpu", "asynchronous"])
@pytest.mark.parametrize("times", [1, 2])
def test_the_first_blocks_of_a_run(
    times: int, device: Any, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = None if device is None else device()
    options = {} if made is None else {"device": made, "clock": made.clock}
    engine = inline(program_of("qwen3"), kv_blocks=40, rate=COPY, **options)
    paused = engine.submit(ids(60), ttft_slo=1000.0)
    turn(engine, 4)
    calls = short(monkeypatch, KVPool, "room", *range(1, times + 1), error=error)
    urgent = engine.submit(ids(61), ttft_slo=1.0)
    behind = engine.submit(ids(20), ttft_slo=2000.0)
    drain(engine)
    assert calls[0] == 3
    assert paused.metrics.offloads == 1, "it made room"
    if times == 1:
        assert same(urgent, 61)
        assert urgent.metrics.numerics == "bits"
    else:
        with pytest.raises(error, match="injected"):
            urgent.result(0)
    assert same(paused, 60)
    assert same(behind, 20)
    assert made is None or made.violations == []
    empty(engine)


def test_where_nothing_is_missing_but_memory_nobody_else_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inline(program_of("qwen3"), kv_blocks=40, rate=COPY)
    paused = engine.submit(ids(60), ttft_slo=1000.0)
    turn(engine, 4)
    calls = short(monkeypatch, KVPool, "room", 1, error=RuntimeError)
    urgent = engine.submit(ids(61), ttft_slo=1.0)
    drain(engine)
    with pytest.raises(RuntimeError, match="injected"):
        urgent.result(0)
    assert (calls[0], paused.metrics.offloads) == (1, 0)
    assert same(paused, 60)
    empty(engine)


@pytest.mark.parametrize("times", [1, 2])
def test_a_run_behind_a_prefix_is_as_it_was(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it is made when memory runs out: its tokens are cut already, and blocks are shared."""
    engine = inline(program_of("qwen3"), kv_blocks=16, prefix_cache=True)
    engine.submit(ids(60, first=40), logits_to_keep=1)
    drain(engine)
    short(monkeypatch, engine_memory, "install", *range(1, times + 1))
    again = engine.submit(ids(50, first=40), logits_to_keep=1)
    drain(engine)
    if times == 1:
        assert again.metrics.reused_tokens == 32
        alone = finish(program_of("qwen3").start(ids(50, first=40), logits_to_keep=1))
        torch.testing.assert_close(again.result(0).logits, alone.logits, rtol=0, atol=2e-5)
        assert engine.statistics().memory.reused_tokens == 32
    else:
        with pytest.raises(MemoryError):
            again.result(0)
    empty(engine)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("where", ["seat", "join"])
def test_a_pack(where: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inline(program_of("qwen3"), pack=4096, kv_blocks=40, rate=COPY)
    paused = engine.submit(ids(100), ttft_slo=1000.0)
    turn(engine, 4)
    owner, name, first = (KVPool, "room", 2) if where == "seat" else (together, "join", 1)
    short(monkeypatch, owner, name, *range(first, first + times))
    members = [engine.submit(ids(length), ttft_slo=1.0) for length in (30, 31)]
    drain(engine)
    assert all(handle.metrics.packed_with for handle in members)
    for handle, length in zip(members, (30, 31), strict=True):
        if times == 1:
            close(handle, length)
        else:
            with pytest.raises(MemoryError):
                handle.result(0)
    assert paused.metrics.offloads == 1
    assert same(paused, 100)
    assert engine.health().healthy
    empty(engine)


def test_a_member_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inline(program_of("qwen3"), policy="vllm:64,32", kv_blocks=40)
    handles = [engine.submit(ids(length)) for length in (70, 20, 30)]
    calls = short(monkeypatch, KVPool, "room", 1)
    drain(engine)
    assert calls[0] == 4
    for handle, length in zip(handles, (70, 20, 30), strict=True):
        close(handle, length)
    empty(engine)


def test_first_tokens_are_tried_again_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of one pack end together: that one of them found no memory is not the other's second time."""
    engine = inline(program_of("qwen3"), pack=4096, kv_blocks=40)
    calls = short(monkeypatch, Generation, "open", 1, 3)
    handles = [engine.submit(ids(30 + n), max_new_tokens=5) for n in range(2)]
    drain(engine)
    assert calls[0] == 4
    for number, handle in enumerate(handles):
        assert tokens_of(handle) == own("qwen3", ids(30 + number), 5)
    empty(engine)


@pytest.mark.parametrize("times", [1, 2])
def test_a_dropped_cache_that_comes_again_as_a_prompt(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9, host_memory=0))
    handles = [engine.submit(ids(30 + n), max_new_tokens=60, tbt_slo=1.0 + n) for n in range(2)]
    short(monkeypatch, driver, "renew", *range(1, times + 1))
    drain(engine)
    assert tokens_of(handles[0]) == own("qwen3", ids(30), 60)
    if times == 1:
        assert tokens_of(handles[1]) == own("qwen3", ids(31), 60)
    else:
        with pytest.raises(MemoryError):
            handles[1].result(0)
    empty(engine)


@pytest.mark.parametrize("times", [1, 2])
def test_what_cannot_be_computed_again_is_brought_back_again(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It continues a caller's cache; its copy on the host is all there is of it."""
    program = program_of("qwen3")
    past = program(ids(6)).past_key_values
    engine = inline(program, rate=COPY, memory_budget=0)
    paused = engine.submit(ids(40), ttft_slo=1000.0, past_key_values=past)
    turn(engine, 4)
    calls = short(monkeypatch, Parking, "bring_back", *range(1, times + 1))
    urgent = engine.submit(ids(41), ttft_slo=1.0)
    drain(engine)
    assert calls[0] == 2
    assert (paused.metrics.offloads, paused.metrics.recomputations) == (1, 0)
    if times == 1:
        assert same(paused, 40, past_key_values=past)
    else:
        with pytest.raises(MemoryError):
            paused.result(0)
    assert same(urgent, 41)
    empty(engine)


def test_cancelled_before_the_second_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inline(program_of("qwen3"), kv_blocks=40)
    real, handles = KVPool.room, list[Any]()

    def room(self: KVPool, *arguments: Any, **options: Any) -> Any:
        handles[0].cancel()
        raise MemoryError("injected")

    monkeypatch.setattr(KVPool, "room", room)
    handles.append(engine.submit(ids(30)))
    drain(engine)
    with pytest.raises((RequestCancelledError, MemoryError)):
        handles[0].result(0)
    monkeypatch.setattr(KVPool, "room", real)
    after = engine.submit(ids(31))
    drain(engine)
    assert same(after, 31)
    empty(engine)


@pytest.mark.parametrize("rate", [COPY, AGAIN], ids=["copied", "again"])
def test_evicted_again_behind_an_attempt_to_come_back(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has blocks already when its copy finds no memory, and gives them to who came meanwhile."""
    engine = inline(program_of("qwen3"), rate=COPY, kv_blocks=12)
    paused = engine.submit(ids(150), ttft_slo=1000.0)
    turn(engine, 3)
    more: list[Any] = []

    def restore(self: Parking, rooms: Any) -> None:
        monkeypatch.setattr(Parking, "restore", real)
        engine._memory.moves.rate = rate
        more.append(engine.submit(ids(149), ttft_slo=0.5))
        raise MemoryError("injected")

    real = Parking.restore
    monkeypatch.setattr(Parking, "restore", restore)
    urgent = engine.submit(ids(151), ttft_slo=1.0)
    drain(engine)
    assert len(more) == 1
    for handle, length in ((paused, 150), (urgent, 151), (more[0], 149)):
        assert same(handle, length)
    empty(engine)


# ---- rooms that grow


def scattered(blocks: int = 12) -> Both:
    """A sequence of two blocks, the one behind which is taken."""
    pool = pool_of(blocks)
    both = Both(pool, 8)
    pool.blocks.take(1)
    return both


def test_without_memory_for_a_move_a_sequence_is_scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    both = scattered()
    blocks = both.tail.room.pool.blocks
    calls = short(monkeypatch, pools, "extents", 1)
    both.append()
    assert calls[0] > 1
    assert not both.tail.room.contiguous
    assert blocks.used == 4, "what it would have moved to is free"
    blocks.validate()
    for _ in range(8):
        both.append()
    monkeypatch.undo()
    assert both.tail.room.move(5), "later there is memory"
    both.check()
    blocks.validate()


def test_a_move_that_fails_gives_back_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    both = scattered()
    blocks, held = both.tail.room.pool.blocks, list(both.tail.room.blocks)
    short(monkeypatch, pools, "extents", 1, error=RuntimeError)
    with pytest.raises(RuntimeError):
        both.tail.room.move(3)
    assert (both.tail.room.blocks, blocks.used) == (held, 3)
    blocks.validate()
    both.check()

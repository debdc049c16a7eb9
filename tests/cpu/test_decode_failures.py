"""Requests that decode and end, or lack memory, at awkward moments: nobody else changes or ends for it.

As in the tests of decode memory, an engine that believes that outputs are short lets more requests in than
there is room for: ``hopeful``.
"""

from __future__ import annotations

from typing import Any

import pytest

import fpcompile
from fpcompile.engine import driver
from fpcompile.engine.decode_memory import Reserve
from fpcompile.engine.renewal import renew
from fpcompile.executor.decode import PackedDecoder
from fpcompile.executor.offload import Parking
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.pool import Room
from fpcompile.models.zoo import tiny_model
from tests.cpu.memory_support import drain, empty, ids, inline
from tests.cpu.support import program_of
from tests.cpu.test_decode_memory import decoding_of, hopeful, tokens_of, until
from tests.cpu.test_generate import own


def test_cancelled_in_the_middle_of_a_step_it_writes_into_nobodys_blocks() -> None:
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9))
    gone, other = (engine.submit(ids(20 + n), max_new_tokens=30) for n in range(2))
    until(engine, lambda: all(handle.metrics.tokens_out > 3 for handle in (gone, other)))
    until(engine, lambda: engine._driver.lane.stepping)
    step, pool = engine._driver.lane._step, decoding_of(engine).pool
    gone.cancel()
    engine._driver._hear()
    assert engine._driver.lane._step is step, "it goes on for the other one"
    taken = pool.blocks.take(pool.blocks.available)
    rows = [row for block in taken for row in range(block * 16, block * 16 + 16)]
    stores = [store for pair in pool.stores.values() for store in pair]
    for store in stores:
        store[:, rows] = 7.0
    while engine._driver.lane._step is step:
        engine.turn(1)
    assert all(bool((store[:, rows] == 7.0).all()) for store in stores)
    pool.blocks.give(taken)
    drain(engine)
    assert gone.metrics.state == "cancelled"
    assert tokens_of(other) == own("qwen3", ids(21), 30)
    empty(engine)


def failing(patch: pytest.MonkeyPatch, owner: Any, name: str, times: int) -> list[str]:
    """The method raises as often for want of memory; each call is noted."""
    method, calls = getattr(owner, name), list[str]()

    def short(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) <= times:
            raise MemoryError("no memory")
        return method(*arguments, **options)

    patch.setattr(owner, name, short)
    return calls


def test_without_memory_for_a_copy_the_cache_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9))
    handles = [engine.submit(ids(30 + n), max_new_tokens=60, tbt_slo=1.0 + n) for n in range(2)]
    failing(monkeypatch, Parking, "put_away", 1)
    drain(engine)
    for number, handle in enumerate(handles):
        assert tokens_of(handle) == own("qwen3", ids(30 + number), 60)
    assert (handles[1].metrics.offloads, handles[1].metrics.recomputations) == (0, 1)
    empty(engine)


@pytest.mark.parametrize("times", [1, 1000])
def test_who_cannot_come_back_for_want_of_memory(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: it comes back later. Always: it fails when it is alone, and nobody else does."""
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9))
    first = engine.submit(ids(30), max_new_tokens=60, tbt_slo=1.0)
    last = engine.submit(ids(31), max_new_tokens=60, tbt_slo=2.0)
    calls = failing(monkeypatch, Parking, "restore", times)
    drain(engine)
    assert len(calls) >= 2
    assert tokens_of(first) == own("qwen3", ids(30), 60)
    if times == 1:
        assert tokens_of(last) == own("qwen3", ids(31), 60)
    else:
        with pytest.raises(MemoryError):
            last.result(0)
    after = engine.submit(ids(20), max_new_tokens=5)
    drain(engine)
    assert tokens_of(after) == own("qwen3", ids(20), 5)
    empty(engine)


def test_a_dropped_cache_comes_again_in_a_pool_of_its_size() -> None:
    """Tokens that it made already are a part of its prompt, and are not to come any more."""
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9, host_memory=0))
    first = engine.submit(ids(30), max_new_tokens=60, tbt_slo=1.0)
    last = engine.submit(ids(31), max_new_tokens=100, tbt_slo=2.0)
    drain(engine)
    assert last.metrics.recomputations > 0
    assert tokens_of(first) == own("qwen3", ids(30), 60)
    assert tokens_of(last) == own("qwen3", ids(31), 100)
    empty(engine)


def test_behind_windows_a_sequence_can_be_too_long_to_come_again() -> None:
    program = fpcompile.segment(tiny_model("mistral"), route="packed")
    assert isinstance(program, PackedProgram)
    assert all(call.mask.span for call in program.attention)
    engine = hopeful(inline(program, kv_blocks=13, block_tokens=4, host_memory=0))
    handles = [engine.submit(ids(5 + n), max_new_tokens=80, tbt_slo=1.0 + n) for n in range(2)]
    decoding = decoding_of(engine)

    def behind() -> bool:
        first, *others = sorted(decoding._members.values(), key=lambda member: member.due)
        return decoding._evict(first, Reserve()) if others else True

    until(engine, lambda: all(handle.metrics.tokens_out > 50 for handle in handles))
    assert not behind(), "more than 52 tokens are no prompt of this pool"
    drain(engine)
    assert [len(tokens_of(handle)) for handle in handles] == [80, 80]
    empty(engine)


def test_the_deadline_of_a_renewed_prompt_leaves_time_for_the_steps_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Any] = []

    def late(ticket: Any, programs: Any, shape: Any, memory: Any, prices: Any, *_: Any) -> Any:
        found.append(renew(ticket, programs, shape, memory, prices, 1e3, 0.75))
        return found[-1]

    monkeypatch.setattr(driver, "renew", late)
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9, host_memory=0))
    for number in range(2):
        engine.submit(ids(30 + number), max_new_tokens=60, tbt_slo=1.0)
    drain(engine)
    assert found[0].cost > 0
    assert found[0].deadline == 1e3 + 4 * found[0].cost + 1.0


@pytest.mark.parametrize(("count", "moves"), [(1, 0), (2, 1)])
def test_a_cache_that_ends_with_its_first_token_is_not_gathered(
    count: int, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = inline(program_of("qwen3"), kv_blocks=9)
    pool = decoding_of(engine).pool
    held = pool.blocks.take(9)
    pool.blocks.give(held[1::2])
    handle = engine.submit(ids(40), max_new_tokens=count)
    engine.turn(1)
    pool.blocks.give(held[0::2])
    calls = failing(monkeypatch, Room, "move", 0)
    drain(engine)
    assert len(calls) == moves
    assert tokens_of(handle) == own("qwen3", ids(40), count)
    empty(engine)


def test_without_memory_for_a_copy_the_budget_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inline(program_of("qwen3"), memory_budget=0)
    handles = [engine.submit(ids(20 + n), max_new_tokens=20) for n in range(3)]
    failing(monkeypatch, PackedDecoder, "layers", 1)
    drain(engine)
    for number, handle in enumerate(handles):
        assert tokens_of(handle) == own("qwen3", ids(20 + number), 20)
    assert sum(handle.metrics.recomputations for handle in handles) == 1
    empty(engine)


def test_nothing_is_copied_for_which_the_host_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inline(program_of("qwen3"), memory_budget=0, host_memory=0)
    handles = [engine.submit(ids(20 + n), max_new_tokens=20) for n in range(3)]
    calls = failing(monkeypatch, PackedDecoder, "layers", 0)
    drain(engine)
    assert calls == []
    assert all(handle.metrics.state == "completed" for handle in handles)


@pytest.mark.parametrize("times", [1, 1000])
def test_a_copy_that_cannot_come_back_to_the_budget(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inline(program_of("qwen3"), memory_budget=0)
    handles = [engine.submit(ids(20 + n), max_new_tokens=20, tbt_slo=1.0 + n) for n in range(3)]
    calls = failing(monkeypatch, PackedDecoder, "put_back", times)
    drain(engine)
    assert len(calls) >= 2
    states = [handle.metrics.state for handle in handles]
    assert states == (["completed"] * 3 if times == 1 else ["completed", "failed", "failed"])
    for number, handle in enumerate(handles):
        if states[number] == "completed":
            assert tokens_of(handle) == own("qwen3", ids(20 + number), 20)
    empty(engine)


def test_where_frequencies_follow_the_length_no_cache_is_dropped() -> None:
    """A longer prompt of the same tokens would have other keys."""
    engine = inline(program_of("llama", rope="dynamic"), memory_budget=0, host_memory=0)
    handles = [engine.submit(ids(20 + n), max_new_tokens=8) for n in range(3)]
    drain(engine)
    assert [handle.metrics.state for handle in handles] == ["completed"] * 3
    assert [handle.metrics.recomputations for handle in handles] == [0, 0, 0]
    empty(engine)

"""Blocks run short while requests decode: who goes on, what the scheduler and the host are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from fpcompile.engine.memory_facts import NOTHING
from fpcompile.engine.metrics import Ticket
from fpcompile.executor.blocks import BlockPool
from fpcompile.executor.offload import unstashed
from tests.cpu.memory_support import drain, empty, ids, inline, turn
from tests.cpu.support import program_of
from tests.cpu.test_decode import generic
from tests.cpu.test_decode_memory import decoding_of, hopeful, tokens_of, until
from tests.cpu.test_engine_fakes import Clock
from tests.cpu.test_generate import own


def test_a_prompt_that_was_begun_goes_on_where_nobody_is_evicted() -> None:
    """One of two streams is away, and wants more than is free; the prompt has its blocks."""
    clock = Clock()
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9, policy="vllm:40", clock=clock))
    first = engine.submit(ids(30), max_new_tokens=30, tbt_slo=1.0)
    last = engine.submit(ids(31), max_new_tokens=20, tbt_slo=2.0)
    until(engine, lambda: min(first.metrics.tokens_out, last.metrics.tokens_out) == 1)
    long = engine.submit(ids(80))
    until(engine, lambda: engine.statistics().memory.blocks_free == 0)
    clock.advance(3.0)  # as far as the fourth token both are late, and go first
    core, least = engine._driver.core, 0.0
    while long.metrics.state != "completed":
        assert turn(engine)
        least = min(least, core.memory.free)
    assert least < 0
    assert last.metrics.offloads == 1
    assert first.metrics.tokens_out < 30, "it does not wait for the end of the streams"
    drain(engine)
    assert tokens_of(first) == own("qwen3", ids(30), 30)
    assert tokens_of(last) == own("qwen3", ids(31), 20)
    empty(engine)


def test_the_scheduler_hears_that_what_was_asked_for_is_not_held() -> None:
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9))
    stream = engine.submit(ids(30), max_new_tokens=20)
    decoding = decoding_of(engine)
    until(engine, lambda: bool(decoding._members))
    (member,) = decoding._members.values()
    until(engine, lambda: member.tail.missing and not engine._driver.lane.stepping)
    blocks = decoding.pool.blocks
    taken = blocks.take(blocks.available)
    decoding.freed = False
    found = decoding.reserve([member.ticket])
    assert (found.ready, found.stuck) == ([], [])
    assert engine._driver.core.memory.outside == decoding.blocks + 1
    assert decoding.freed, "the next turn says so, whatever happens"
    blocks.give(taken)
    drain(engine)
    assert engine._driver.core.memory.free == 9
    assert tokens_of(stream) == own("qwen3", ids(30), 20)


def test_blocks_that_members_share_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who cannot be moved to one extent still shares when it decodes."""
    monkeypatch.setattr(BlockPool, "take_extent", lambda *_: None)
    engine = inline(program_of("qwen3"), kv_blocks=32, prefix_cache=True)
    engine.submit(ids(40, first=32), logits_to_keep=1)
    drain(engine)
    for number in range(2):
        engine.submit(ids(41 + number, first=32), max_new_tokens=8)
    decoding, shared = decoding_of(engine), False
    while turn(engine):
        held = [room.blocks for room in decoding.rooms]
        each = set[int]().union(*held)
        assert decoding.blocks == len(each)
        shared |= sum(map(len, held)) > len(each)
    assert shared
    empty(engine)


def test_nobody_is_looked_at_again_before_a_block_changes_hands() -> None:
    asked: list[bool] = []

    def away() -> Iterator[Ticket]:
        asked.append(True)
        yield from ()

    decoding = decoding_of(inline(program_of("qwen3"), kv_blocks=9))
    for _ in range(3):
        assert decoding.back(away()).ready == []
    assert len(asked) == 1
    decoding.pool.blocks.give(decoding.pool.blocks.take(1))
    decoding.back(away())
    assert len(asked) == 2


def test_beside_a_budget_nobody_is_looked_at_again_before_something_is_freed() -> None:
    asked: list[bool] = []

    def away() -> Iterator[Ticket]:
        asked.append(True)
        yield from ()

    engine = inline(program_of("qwen3"), memory_budget=1000)
    memory, budgeted = engine._memory, engine._memory.budgeted
    assert budgeted is not None

    def looks() -> int:
        """How often, at three cuts."""
        before = len(asked)
        for _ in range(3):
            budgeted.back(away(), [])
        return len(asked) - before

    memory._paused_bytes = 10
    assert looks() == 1
    memory._paused_bytes = 20
    assert looks() == 0, "there is less room than before"
    memory._paused_bytes = 9
    assert looks() == 1, "a paused run went on"
    budgeted.reserve([], [])
    assert looks() == 1, "a step follows"
    engine.submit(ids(5))
    (ticket,) = engine._registry.live()
    budgeted.ended(ticket)
    assert looks() == 1, "somebody has ended"
    memory._paused_bytes = 0
    drain(engine)
    empty(engine)


def test_the_hosts_bound_counts_a_copy_that_was_dropped_for_it() -> None:
    """Who has been away once has a copy there; a full host drops it, and then all has to be copied."""
    clock = Clock()
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9, max_decode_batch=1, clock=clock))
    handles = [engine.submit(ids(30 + n), max_new_tokens=60, tbt_slo=1.0 + n / 10) for n in range(2)]
    decoding = decoding_of(engine)

    def came_back() -> bool:
        clock.advance(0.1)
        return any(
            m.host and not m.away and unstashed(m.room, m.tail.lengths) for m in decoding._members.values()
        )

    until(engine, came_back)
    (member,) = (m for m in decoding._members.values() if m.host)
    memory = engine._memory
    memory.options = dataclasses.replace(memory.options, host_memory=member.host)
    assert not decoding._fits_on_host(member.room, member.tail.lengths)
    assert member.host == 0, "what was there was dropped, and even so there is not enough"
    while turn(engine):
        clock.advance(0.1)
    for number, handle in enumerate(handles):
        assert tokens_of(handle) == own("qwen3", ids(30 + number), 60)


@pytest.mark.parametrize(
    ("arch", "dropped"), [("gpt2", False), pytest.param("mamba", True, marks=pytest.mark.slow)]
)
def test_caches_of_the_generic_route_never_go_to_the_host(arch: str, dropped: bool) -> None:
    """Nor are they dropped where the model was given more than tokens (positions)."""
    engine = inline(generic(arch), memory_budget=0)
    handles = [engine.submit(ids(8 + n), max_new_tokens=6) for n in range(2)]
    drain(engine)
    assert [handle.metrics.offloads for handle in handles] == [0, 0]
    assert (sum(handle.metrics.recomputations for handle in handles) > 0) is dropped
    assert all(len(tokens_of(handle)) == 6 for handle in handles)


def test_a_prompt_that_is_computed_again_has_reused_nothing_yet() -> None:
    engine = inline(program_of("qwen3"), kv_blocks=9)
    handle = engine.submit(ids(20), max_new_tokens=4)
    (ticket,) = engine._driver.registry.live()
    ticket.reused_tokens = 16
    ticket.renewed(ticket.run, NOTHING, 1.0)
    assert handle.metrics.reused_tokens == 0

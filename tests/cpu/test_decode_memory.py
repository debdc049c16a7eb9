"""Requests that decode in a pool: in place, block by block; who is let in, who gives way, and no token lost.

The pool of most tests has nine blocks of 16 tokens. An engine that believes that outputs are short lets more
requests in than there is room for: ``hopeful``.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.engine.decode_memory import DecodeMemory
from fpcompile.engine.engine import Engine
from fpcompile.errors import InvalidInputError, RequestCancelledError, RequestRejectedError
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.pool import layout_of
from fpcompile.executor.pool_growing import PooledGrowingKV
from fpcompile.scheduler.record import differences as differences_of_log
from fpcompile.scheduler.record import read_log
from fpcompile.testing import FakeAsyncDevice
from tests.cpu.memory_support import drain, empty, ids, inline, turn
from tests.cpu.support import program_of
from tests.cpu.test_engine_fakes import Clock
from tests.cpu.test_generate import own
from tests.cpu.test_sampling import config_of


def decoding_of(engine: Engine) -> DecodeMemory:
    memory = engine._memory.decoding
    assert memory is not None
    return memory


def hopeful(engine: Engine, length: int = 4) -> Engine:
    """Its last requests ended behind ``length`` tokens."""
    for lengths in decoding_of(engine)._lengths.values():
        for _ in range(50):
            lengths.ended(length, cut=False)
    return engine


def until(engine: Engine, done: Any) -> None:
    for _ in range(5000):
        if done():
            return
        turn(engine)
    raise AssertionError("it never came about")


def tokens_of(handle: Any) -> list[int]:
    return list(handle.tokens(0))


# ---- in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "gpt_oss"])
def test_in_blocks_the_tokens_are_those_of_generate(arch: str, dtype: torch.dtype) -> None:
    """Grouped heads, windows of 16, sinks; from one block to the next."""
    engine = inline(program_of(arch, dtype), kv_blocks=32, block_tokens=4, deterministic=True)
    for length in (5, 23, 40):
        handle = engine.submit(ids(length), max_new_tokens=30)
        drain(engine)
        assert tokens_of(handle) == own(arch, ids(length), 30, dtype)
        assert handle.metrics.numerics == "bits"
    empty(engine)


def test_the_blocks_of_the_prompt_are_the_sequences() -> None:
    """No copy is made: the cache grows where the prompt was executed."""
    engine = inline(program_of("qwen3"), kv_blocks=16)
    handle = engine.submit(ids(40), max_new_tokens=30, request_id="a")
    turn(engine)
    before = list(engine._memory._seats["a"].rooms[0].blocks)
    until(engine, lambda: handle.metrics.tokens_out > 20)
    (room,) = decoding_of(engine).rooms
    assert room.blocks[:3] == before
    assert len(room.blocks) == 4
    ticket = engine._registry.get("a")
    assert ticket is not None
    assert ticket.generation is not None
    kv = ticket.generation.sequence.kv[0]
    assert isinstance(kv, PooledGrowingKV)
    store = decoding_of(engine).pool.stores[0][0]
    assert kv.keys.untyped_storage().data_ptr() == store.untyped_storage().data_ptr()
    statistics = engine.statistics()
    assert statistics.memory.blocks_decoding == statistics.memory.blocks_used == 4
    assert statistics.decoding_bytes == 4 * statistics.memory.block_bytes
    drain(engine)
    empty(engine)


def test_windows_give_blocks_back() -> None:
    """Every layer of mistral has a window here: however long the output, few blocks are held."""
    from fpcompile.models.zoo import tiny_model

    model: Any = tiny_model("mistral")
    program = fpcompile.segment(model, route="packed")
    assert isinstance(program, PackedProgram)
    spans = {call.mask.span for call in program.attention}
    if not all(spans):
        pytest.skip("the tiny mistral sees everything")
    engine = inline(program, kv_blocks=64, block_tokens=4, deterministic=True)
    handle = engine.submit(ids(40), max_new_tokens=60)
    most = 0
    while turn(engine):
        if handle.metrics.tokens_out > 8:
            most = max(most, engine.statistics().memory.blocks_used)
    assert most <= max(spans) // 4 + 3
    whole = model.generate(ids(40), max_new_tokens=60, do_sample=False)
    assert tokens_of(handle) == whole[0, 40:].tolist()
    empty(engine)


def test_what_was_generated_is_found_again() -> None:
    """The next prompt of a conversation begins behind the answer to the last one."""
    program = program_of("qwen3")
    engine = inline(program, kv_blocks=32, prefix_cache=True)
    first = engine.submit(ids(20), max_new_tokens=30)
    drain(engine)
    assert tokens_of(first) == own("qwen3", ids(20), 30)
    assert engine.statistics().memory.blocks_cached == (20 + 29) // 16
    second = torch.cat([first.result(0).sequences, ids(7)], dim=1)
    beside = torch.cat([first.result(0).sequences, ids(9)], dim=1)
    handles = [engine.submit(prompt, max_new_tokens=20) for prompt in (second, beside)]
    drain(engine)
    for handle, prompt in zip(handles, (second, beside), strict=True):
        assert handle.metrics.reused_tokens == 48
        assert tokens_of(handle) == own("qwen3", prompt, 20)
    empty(engine)


# ---- who is let in


def test_nobody_is_let_in_whom_the_pool_could_not_hold_to_the_end() -> None:
    """Nothing is known of outputs: every request may make all that it asked for."""
    engine = inline(program_of("qwen3"), kv_blocks=9)
    handles = [engine.submit(ids(30 + n), max_new_tokens=60) for n in range(3)]
    together = 0
    while turn(engine):
        together = max(together, engine.statistics().decoding)
    assert together == 1
    for number, handle in enumerate(handles):
        assert tokens_of(handle) == own("qwen3", ids(30 + number), 60)
    assert engine.statistics().memory.decode_evictions == 0
    empty(engine)


def test_history_lets_more_in() -> None:
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=12), 4)
    handles = [engine.submit(ids(20 + n), max_new_tokens=100) for n in range(3)]
    until(engine, lambda: engine.statistics().decoding == 3)
    for handle in handles:
        handle.cancel()
    drain(engine)
    empty(engine)


def test_ends_are_remembered() -> None:
    engine = inline(program_of("qwen3"), kv_blocks=12)
    lengths = decoding_of(engine)._lengths[engine._programs.names[0]]
    for _ in range(25):
        handle = engine.submit(ids(5), max_new_tokens=50)
        until(engine, lambda handle=handle: handle.metrics.tokens_out == 2)
        handle.cancel()
        drain(engine)
    assert 2 <= lengths.expected(0, 50) <= 4, "withdrawn is an end like any other"
    for _ in range(25):
        engine.submit(ids(5), max_new_tokens=3)
    drain(engine)
    assert lengths.expected(0, 50) == 50, "half of them were cut off"
    empty(engine)


def test_what_can_never_fit_is_refused_with_the_size_it_needs() -> None:
    engine = inline(program_of("qwen3"), kv_blocks=4)
    with pytest.raises(InvalidInputError, match="the generation needs 5 cache blocks of 16 tokens") as caught:
        engine.submit(ids(33), max_new_tokens=33)
    assert "Engine(kv_blocks=5)" in str(caught.value)
    handle = engine.submit(ids(33), max_new_tokens=32)
    drain(engine)
    assert tokens_of(handle) == own("qwen3", ids(33), 32)
    empty(engine)


# ---- who gives way


@pytest.mark.parametrize("host", [None, 0], ids=["host", "again"])
def test_when_blocks_run_out_who_is_due_last_gives_way(host: int | None, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9, host_memory=host, record=log))
    first = engine.submit(ids(30), max_new_tokens=60, tbt_slo=1.0)
    last = engine.submit(ids(31), max_new_tokens=60, tbt_slo=2.0)
    free: list[int] = []
    while turn(engine):
        free.append(engine.statistics().memory.blocks_free)
    assert min(free) == 0
    assert tokens_of(first) == own("qwen3", ids(30), 60)
    assert tokens_of(last) == own("qwen3", ids(31), 60)
    assert (first.metrics.offloads, first.metrics.recomputations) == (0, 0)
    moved = (last.metrics.offloads, last.metrics.recomputations)
    assert moved == ((1, 0) if host is None else (0, 1))
    assert last.metrics.suspended == 0.0, "the clock stands still"
    assert last.metrics.numerics == "tolerance"
    memory = engine.statistics().memory
    assert memory.decode_evictions == 1
    assert engine.statistics().tokens_generated == 120
    empty(engine)
    engine.close()
    assert differences_of_log(read_log(log)) == []


def test_of_three_the_last_in_line_gives_way() -> None:
    """All of them need a block in the same step, and none is left."""
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9), 1)
    handles = [engine.submit(ids(40), max_new_tokens=50, tbt_slo=1.0 + n) for n in range(3)]
    until(engine, lambda: engine.statistics().memory.decode_evictions == 1)
    assert [handle.metrics.offloads for handle in handles] == [0, 0, 1]
    drain(engine)
    assert handles[0].metrics.offloads == 0
    for handle in handles:
        assert tokens_of(handle) == own("qwen3", ids(40), 50)
    empty(engine)


def test_moved_to_the_host_the_bits_are_the_same() -> None:
    """One sequence a step: whoever comes back goes on as if it had never been away."""
    clock = Clock()
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9, max_decode_batch=1, clock=clock))
    handles = [engine.submit(ids(30 + n), max_new_tokens=60, tbt_slo=1.0 + n / 10) for n in range(2)]
    while turn(engine):
        clock.advance(0.1)
    assert engine.statistics().memory.decode_evictions > 0
    for number, handle in enumerate(handles):
        assert handle.metrics.numerics == "bits"
        assert tokens_of(handle) == own("qwen3", ids(30 + number), 60)


def test_deterministic_engines_keep_everything_free() -> None:
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9, deterministic=True))
    handles = [engine.submit(ids(30 + n), max_new_tokens=30) for n in range(3)]
    together = 0
    while turn(engine):
        together = max(together, engine.statistics().decoding)
    assert together == 2, "2 * 4 blocks; predictions are not asked"
    assert engine.statistics().memory.decode_evictions == 0
    for number, handle in enumerate(handles):
        assert tokens_of(handle) == own("qwen3", ids(30 + number), 30)
        assert handle.metrics.numerics == "bits"


def test_paused_prompts_give_way_to_what_decodes() -> None:
    clock = Clock()
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9, clock=clock))
    stream = engine.submit(ids(30), max_new_tokens=40, tbt_slo=1.0)
    until(engine, lambda: stream.metrics.tokens_out == 2)
    long = engine.submit(ids(100), ttft_slo=1000.0, request_id="long")
    until(engine, lambda: long.metrics.state == "running")
    assert engine.statistics().memory.blocks_free == 0
    urgent = engine.submit(ids(5), ttft_slo=10.0, use_cache=False)  # needs no block
    until(engine, lambda: long.metrics.state == "paused")
    clock.advance(100.0)  # now the stream is due, and goes first
    until(engine, lambda: stream.metrics.tokens_out > 4)
    assert long.metrics.offloads + long.metrics.recomputations == 1
    drain(engine)
    assert urgent.metrics.state == long.metrics.state == "completed"
    assert tokens_of(stream) == own("qwen3", ids(30), 40)
    assert (stream.metrics.offloads, stream.metrics.recomputations) == (0, 0)
    empty(engine)


@pytest.mark.parametrize("host", [None, 0], ids=["host", "again"])
def test_who_is_away_can_be_cancelled(host: int | None) -> None:
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9, host_memory=host))
    first = engine.submit(ids(30), max_new_tokens=60, tbt_slo=1.0)
    last = engine.submit(ids(31), max_new_tokens=60, tbt_slo=2.0)
    until(engine, lambda: last.metrics.offloads + last.metrics.recomputations > 0)
    assert last.metrics.state == "paused"
    made = last.metrics.tokens_out
    last.cancel()
    drain(engine)
    with pytest.raises(RequestCancelledError):
        last.result(0)
    assert last.metrics.tokens_out == made
    assert tokens_of(first) == own("qwen3", ids(30), 60)
    empty(engine)


def test_a_step_that_fails_gives_the_blocks_back() -> None:
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9))
    handles = [engine.submit(ids(20 + n), max_new_tokens=30) for n in range(2)]
    until(engine, lambda: all(handle.metrics.tokens_out > 3 for handle in handles))
    until(engine, lambda: engine._driver.lane.stepping)
    step = engine._driver.lane._step
    assert step is not None
    step._step.run.values = {name: torch.zeros(3, 3, 3) for name in step._step.run.values}
    drain(engine)
    assert [handle.metrics.state for handle in handles] == ["failed", "failed"]
    empty(engine)


def test_who_cannot_be_computed_again_and_has_no_host_fails_with_the_reason() -> None:
    """Sequences that continue a caller's cache: their beginning is nobody's to compute again."""
    program = program_of("qwen3")
    engine = hopeful(inline(program, kv_blocks=9, host_memory=0))
    decoding_of(engine).to_come = lambda name, generation: 0  # type: ignore[method-assign]
    handles = []  # both are let in
    for number in range(2):
        past = program(ids(20 + number)).past_key_values
        handles.append(engine.submit(ids(9), past_key_values=past, max_new_tokens=60, tbt_slo=1.0 + number))
    drain(engine)
    assert handles[0].metrics.state == "completed"
    with pytest.raises(RequestRejectedError, match="no block"):
        handles[1].result(0)
    empty(engine)


def test_draws_go_on_where_they_were() -> None:
    config = config_of(do_sample=True, temperature=0.9)
    clock = Clock()
    plain = inline(program_of("qwen3"), max_decode_batch=1, clock=clock)
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9, max_decode_batch=1, clock=clock))
    found = []
    for one in (plain, engine):
        handles = [
            one.submit(ids(30 + n), max_new_tokens=60, tbt_slo=1.0 + n / 10, generation_config=config, seed=n)
            for n in range(2)
        ]
        while turn(one):
            clock.advance(0.1)
        found.append([tokens_of(handle) for handle in handles])
    assert engine.statistics().memory.decode_evictions > 0
    assert found[0] == found[1]


def test_on_an_asynchronous_device() -> None:
    """Memory that is given away too early is poisoned there."""
    device = FakeAsyncDevice()
    engine = Engine(program_of("qwen3"), device=device, clock=device.clock, device_thread=False, kv_blocks=9)
    hopeful(engine)
    handles = [engine.submit(ids(30 + n), max_new_tokens=60) for n in range(3)]
    while engine.turn(None):
        engine._driver.validate()
    assert engine.statistics().memory.decode_evictions > 0
    for number, handle in enumerate(handles):
        assert tokens_of(handle) == own("qwen3", ids(30 + number), 60)
    empty(engine)


@pytest.mark.parametrize(
    "policy", ["fcfs", "s-edf", "fpcompile", "chunked:16", "vllm:64,32", "fpcompile:pack=64"]
)
@pytest.mark.parametrize("host", [None, 60_000, 0], ids=["host", "little", "again"])
def test_random_traffic_ends(policy: str, host: int | None) -> None:
    """No request waits for ever, no token is lost, mixed or made twice, and nothing is left behind."""
    draw = random.Random(f"{policy} {host}")
    engine = hopeful(inline(program_of("qwen3"), kv_blocks=9, policy=policy, host_memory=host))
    handles: list[tuple[Any, int, int]] = []
    for _ in range(14):
        length, count = draw.choice([5, 17, 30, 60]), draw.choice([1, 5, 20, 40])
        slo = draw.choice([5.0, 50.0, None])
        wanted: dict[str, Any] = {}
        if draw.random() < 0.8:
            wanted = {"max_new_tokens": count, "tbt_slo": draw.choice([0.5, 2.0])}
        handle = engine.submit(ids(length), ttft_slo=slo, **wanted)
        handles.append((handle, length, count if wanted else 0))
        if draw.random() < 0.2:
            draw.choice(handles)[0].cancel()
        turn(engine, draw.randint(0, 40))
    drain(engine)
    for handle, length, count in handles:
        state = handle.metrics.state
        assert state in ("completed", "cancelled")
        if state == "completed" and count:
            assert tokens_of(handle) == own("qwen3", ids(length), count)
    empty(engine)
    engine.close()


def test_with_a_thread_of_its_own() -> None:
    with Engine(program_of("qwen3"), kv_blocks=9) as engine:
        hopeful(engine)
        handles = [engine.submit(ids(30 + n), max_new_tokens=50) for n in range(5)]
        for number, handle in enumerate(handles):
            assert list(handle.tokens(60)) == own("qwen3", ids(30 + number), 50)
        empty(engine)


# ---- without a pool: a budget in bytes


@pytest.mark.parametrize("host", [None, 0], ids=["host", "again"])
def test_a_budget_bounds_what_decodes(host: int | None) -> None:
    program = program_of("qwen3")
    assert isinstance(program, PackedProgram)
    one = 60 * layout_of(program.attention, program.dtype).token_bytes
    engine = inline(program, memory_budget=2 * one, host_memory=host)
    handles = [engine.submit(ids(40 + n), max_new_tokens=30, tbt_slo=1.0 + n) for n in range(4)]
    most = 0
    while turn(engine):
        lane = engine._driver.lane
        if lane.stepping:
            held = [ticket.generation for ticket in lane._members.values() if ticket.generation is not None]
            most = max(most, sum(each.decoder.cache_bytes(each.sequence) for each in held))
    assert 0 < most <= 2 * one
    for number, each in enumerate(handles):
        assert tokens_of(each) == own("qwen3", ids(40 + number), 30)
    memory = engine.statistics().memory
    assert memory.decode_evictions >= 2
    assert (handles[0].metrics.offloads, handles[0].metrics.recomputations) == (0, 0), "who is due first"
    moved = handles[3].metrics
    assert (moved.offloads > 0, moved.recomputations > 0) == (host is None, host == 0)
    empty(engine)


def test_one_at_least_goes_on() -> None:
    engine = inline(program_of("qwen3"), memory_budget=0)
    handles = [engine.submit(ids(20 + n), max_new_tokens=20) for n in range(3)]
    while turn(engine):
        assert engine.statistics().decoding <= 3
    for number, handle in enumerate(handles):
        assert tokens_of(handle) == own("qwen3", ids(20 + number), 20)
    empty(engine)

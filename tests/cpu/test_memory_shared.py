"""A pool under policies that share launches, prefixes that requests share, and copies beside compute."""

from __future__ import annotations

import contextlib
import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fpcompile.engine.engine import Engine
from fpcompile.errors import RequestCancelledError
from fpcompile.executor import offload
from fpcompile.executor.offload import Parking
from fpcompile.executor.run import Run
from fpcompile.testing import FakeAsyncDevice
from tests.cpu.memory_support import AGAIN, COPY, drain, empty, ids, inline, nested, turn
from tests.cpu.support import differences, finish, outcome, program_of
from tests.cpu.test_engine_isolation import fail_once

# ---- policies that share launches


@pytest.mark.parametrize("rate", [COPY, AGAIN], ids=["copied", "again"])
@pytest.mark.parametrize(
    "policy", ["chunked:16,edf", "vllm:48,16", "s-edf"], ids=["chunks", "steps", "packs"]
)
def test_slices_and_packs_lie_in_the_pool(policy: str, rate: float) -> None:
    program = program_of("qwen3")
    options = {"pack": 96} if policy == "s-edf" else {}
    engine = inline(program, policy=policy, kv_blocks=9, rate=rate, **options)
    lengths = [48, 30, 33, 20, 46, 9]
    handles = []
    for number, length in enumerate(lengths):
        handles.append(engine.submit(ids(length), ttft_slo=1000.0 - number))
        if number != 2:  # of a pack two come together
            turn(engine)
    drain(engine)
    for handle, length in zip(handles, lengths, strict=True):
        got, alone = outcome(handle.result(0)), finish(program.start(ids(length)))
        torch.testing.assert_close(got.logits, alone.logits, rtol=0, atol=2e-5)
        for mine, theirs in zip(got.layers, alone.layers, strict=True):
            torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=2e-5)
    if policy != "vllm:48,16":
        assert engine.statistics().memory.offloads + engine.statistics().memory.recomputations > 0
    empty(engine)


def test_a_batch_and_a_continued_cache_in_the_pool() -> None:
    program = program_of("qwen3")
    past = program(ids(20)).past_key_values
    pair = torch.cat([ids(30), ids(30) + 1])
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :7] = 0
    for rate in (COPY, AGAIN):
        engine = inline(program, kv_blocks=6, rate=rate)
        handles = [
            engine.submit(pair, ttft_slo=1000.0),
            engine.submit(ids(9), past_key_values=past, ttft_slo=900.0),
            engine.submit(pair, attention_mask=mask, ttft_slo=800.0),
        ]
        turn(engine, 3)
        handles.append(engine.submit(ids(96), ttft_slo=1.0))
        drain(engine)
        for handle, run in zip(
            handles,
            [
                program.start(pair),
                program.start(ids(9), past_key_values=past),
                program.start(pair, attention_mask=mask),
                program.start(ids(96)),
            ],
            strict=True,
        ):
            assert differences(outcome(handle.result(0)), finish(run)) == []
        empty(engine)


# ---- prefixes


def test_a_prompt_begins_behind_the_blocks_of_an_earlier_one() -> None:
    program = program_of("qwen3")
    engine = inline(program, kv_blocks=16, prefix_cache=True)
    first = engine.submit(ids(60, first=40), logits_to_keep=1)
    drain(engine)
    assert engine.statistics().memory.blocks_cached == 3, "full blocks only"
    again = engine.submit(ids(50, first=40), logits_to_keep=1)
    whole = engine.submit(ids(60, first=40))
    drain(engine)
    for handle, length, reused in ((first, 60, 0), (again, 50, 32), (whole, 60, 0)):
        metrics = handle.metrics
        assert (metrics.reused_tokens, metrics.numerics) == (reused, "tolerance" if reused else "bits")
        kept = 0 if handle is whole else 1
        alone = finish(program.start(ids(length, first=40), logits_to_keep=kept))
        got = outcome(handle.result(0))
        torch.testing.assert_close(got.logits, alone.logits, rtol=0, atol=2e-5)
        for mine, theirs in zip(got.layers, alone.layers, strict=True):
            torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=2e-5)
    assert engine.statistics().memory.reused_tokens == 32
    engine._memory._seats.clear()
    assert engine.statistics().memory.blocks_used == 0


def test_prefixes_are_a_tenants_own_and_a_setting() -> None:
    program = program_of("qwen3")
    for options, reused in (({}, 32), ({"deterministic": True}, 0), ({"prefix_cache": False}, 0)):
        engine = inline(program, kv_blocks=16, **{"prefix_cache": True, **options})
        for tenant, expected in (("a", 0), ("b", 0), ("a", reused), ("b", reused)):
            handle = engine.submit(ids(40), tenant=tenant, logits_to_keep=1)
            drain(engine)
            assert handle.metrics.reused_tokens == expected
        empty(engine)


@pytest.mark.parametrize("rate", [COPY, AGAIN], ids=["copied", "again"])
def test_a_run_behind_a_prefix_is_evicted_and_comes_back(rate: float) -> None:
    """What is shared stays where it is; the run comes back with blocks of its own."""
    program = program_of("qwen3")
    engine = inline(program, kv_blocks=8, prefix_cache=True, rate=rate)
    engine.submit(ids(33, first=32), logits_to_keep=1)
    drain(engine)
    victim = engine.submit(ids(60, first=32), logits_to_keep=1, ttft_slo=1000.0)
    turn(engine, 4)
    assert victim.metrics.reused_tokens == 32
    urgent = engine.submit(ids(120), ttft_slo=1.0)
    drain(engine)
    assert victim.metrics.offloads + victim.metrics.recomputations == 1
    got, alone = outcome(victim.result(0)), finish(program.start(ids(60, first=32), logits_to_keep=1))
    torch.testing.assert_close(got.logits, alone.logits, rtol=0, atol=2e-5)
    assert differences(outcome(urgent.result(0)), finish(program.start(ids(120)))) == []
    empty(engine)


def test_what_cannot_be_shared_is_not() -> None:
    """Batches, continued caches and other positions have no prefix; whoever needs all logits executes all."""
    program = program_of("qwen3")
    engine = inline(program, kv_blocks=32, prefix_cache=True)
    prompt = ids(40)
    past = program(ids(20)).past_key_values
    for _ in range(2):
        for kwargs in (
            {"input_ids": prompt.repeat(2, 1)},
            {"input_ids": prompt, "past_key_values": past},
            {"input_ids": prompt, "position_ids": torch.arange(3, 43)[None]},
            {"input_ids": prompt, "logits_to_keep": torch.tensor([5, 39])},
        ):
            handle = engine.submit(**kwargs)
            drain(engine)
            assert handle.metrics.reused_tokens == 0
    assert engine.statistics().memory.blocks_cached == 2, "the last kind's"


def test_generation_goes_on_from_a_pooled_prompt() -> None:
    program = program_of("qwen3")
    alone = inline(program, deterministic=True)
    pooled = inline(program, deterministic=True, kv_blocks=4)
    handles = [engine.submit(ids(40), max_new_tokens=6) for engine in (alone, pooled)]
    drain(alone)
    drain(pooled)
    assert handles[0].result(0).sequences.tolist() == handles[1].result(0).sequences.tolist()
    empty(pooled)


def test_a_cached_prefix_makes_a_request_shorter_for_the_scheduler() -> None:
    engine = inline(program_of("qwen3"), kv_blocks=32, prefix_cache=True)
    first = engine.submit(ids(200), logits_to_keep=1)
    drain(engine)
    again = engine.submit(ids(200), logits_to_keep=1)
    drain(engine)
    assert again.metrics.reused_tokens == 192
    assert again.metrics.predicted_ttft < 0.9 * first.metrics.predicted_ttft


def test_the_timeline_shows_what_was_moved() -> None:
    engine = inline(program_of("qwen3"), kv_blocks=9)
    nested(engine, [48, 47, 46, 45])
    drain(engine)
    copies = [(span.lane, span.name) for span in engine.timeline().spans if span.kind == "copy"]
    assert copies == [("r0", "evicted"), ("r0", "restored")]


# ---- an asynchronous device


@pytest.mark.parametrize("rate", [COPY, AGAIN], ids=["copied", "again"])
def test_moving_beside_compute_on_an_asynchronous_device(rate: float) -> None:
    """Copies take virtual time; memory that is freed or read too early holds poison."""
    program = program_of("qwen3")
    device = FakeAsyncDevice(copy_bytes_per_second=1e6)
    engine = inline(
        program, device=device, clock=device.clock, kv_blocks=9, memory_budget=0, rate=rate, policy="s-edf"
    )
    lengths = [48, 47, 46, 45, 10]
    handles = nested(engine, lengths, launches=5)
    drain(engine)
    device.synchronize()
    assert device.violations == []
    for handle, length in zip(handles, lengths, strict=True):
        assert differences(outcome(handle.result(0)), finish(program.start(ids(length)))) == []
    assert engine.statistics().memory.offloads > 0 or rate == AGAIN
    empty(engine)


def test_an_urgent_request_does_not_wait_for_the_copy_to_the_host() -> None:
    """Blocks are free behind a copy on the device; the way to the host would take minutes."""
    program = program_of("qwen3")
    device = FakeAsyncDevice(copy_bytes_per_second=1e12)
    engine = inline(program, device=device, clock=device.clock, kv_blocks=9)
    nested(engine, [48, 47, 46])
    device._bandwidth = 100.0
    urgent, asked = engine.submit(ids(45), ttft_slo=1.0), device.now
    while not urgent.done():
        turn(engine)
    assert engine.statistics().memory.offloads == 1
    assert device.now - asked < 10.0 < engine.statistics().memory.copied_bytes / 100.0
    drain(engine)
    device.synchronize()
    assert device.violations == []
    engine._memory.release([])
    assert engine._memory.flying == [], "nothing keeps what was copied"
    assert differences(outcome(urgent.result(0)), finish(program.start(ids(45)))) == []
    empty(engine)


def weakly(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def test_out_of_memory_waits_for_the_copies_that_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the host holds its memory until it is there; the run begins again behind that."""
    monkeypatch.setattr(offload, "_TOGETHER", 0)  # no tensor is copied on the device first
    program = program_of("qwen3")
    device, seen = FakeAsyncDevice(copy_bytes_per_second=1e3), list[bool]()

    def look(run: Any, segment: Any, start: float, end: float) -> None:
        if run.tokens == 41 and run.at == 1:
            seen.append(all(storage.expired() for storage in moved))  # type: ignore[no-untyped-call]

    engine = inline(program, device=device, clock=device.clock, on_segment=look)
    paused = engine.submit(ids(40), ttft_slo=1000.0)
    turn(engine, 6)
    flight = engine._driver._flight
    assert flight is not None
    run: Any = flight.load.run
    moved = [weakly(t) for t in run.values.values() if t.is_floating_point()]
    assert moved
    urgent = engine.submit(ids(41), ttft_slo=1.0)
    fail_once(monkeypatch, Run, "step", at=2)
    drain(engine)
    assert seen == [False, True]
    assert (paused.metrics.offloads, urgent.metrics.recomputations) == (1, 1)
    for handle, length in ((paused, 40), (urgent, 41)):
        assert differences(outcome(handle.result(0)), finish(program.start(ids(length)))) == []
    assert device.violations == []
    empty(engine)


def test_what_was_copied_away_is_freed_at_a_cut() -> None:
    """Whoever has the device then may keep it for long."""
    device = FakeAsyncDevice(copy_bytes_per_second=1e12)
    engine = inline(program_of("qwen3"), device=device, clock=device.clock, memory_budget=0)
    engine.submit(ids(40), ttft_slo=1000.0)
    turn(engine, 4)
    urgent = engine.submit(ids(41), ttft_slo=1.0)
    while not engine._memory.flying:
        turn(engine)
    device.advance(1.0)
    turn(engine)
    assert urgent.metrics.state == "running"
    assert engine._memory.flying == []
    drain(engine)
    assert device.violations == []
    empty(engine)


def test_tensors_travel_one_by_one_where_there_is_no_memory_for_a_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, device = program_of("qwen3"), FakeAsyncDevice()
    run, parking = program.start(ids(40)), Parking(device)

    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("injected")

    for _ in range(7):
        run.step()
    with device.active():
        monkeypatch.setattr(torch, "cat", full)
        assert parking.park(run) > 0
        monkeypatch.undo()
        device.synchronize()
        parking.bring_back()
        device.synchronize()
    assert differences(finish(run), finish(program.start(ids(40)))) == []
    assert device.violations == []


@pytest.mark.slow
def test_from_threads_with_everything_turned_on() -> None:
    """A device thread, clients, a small pool, a small budget, a small host: everybody gets the numbers."""
    program = program_of("qwen3")
    lengths = (20, 33, 48, 64, 90)
    expected = {n: finish(program.start(ids(n, first=16), logits_to_keep=1)) for n in lengths}
    with Engine(program, kv_blocks=8, prefix_cache=True, memory_budget=40_000, host_memory=100_000) as engine:
        handles: list[tuple[int, Any]] = []

        def client(number: int) -> None:
            draw = random.Random(number)
            for _ in range(25):
                length = draw.choice(lengths)
                slo = draw.choice((0.005, 0.05, 0.5, 5.0))
                handle = engine.submit(ids(length, first=16), logits_to_keep=1, ttft_slo=slo)
                handles.append((length, handle))
                if draw.random() < 0.1:
                    handle.cancel()

        clients = [threading.Thread(target=client, args=(number,)) for number in range(3)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        served = 0
        for length, handle in handles:
            if (state := _settled(handle)) == "completed":
                served += 1
                logits = handle.result(0).logits
                torch.testing.assert_close(logits, expected[length].logits, rtol=0, atol=2e-5)
            else:
                assert state == "cancelled"
        assert served > 40
        assert engine.statistics().memory.reused_tokens > 0
    engine._driver.validate()
    empty(engine)


def _settled(handle: Any) -> str:
    with contextlib.suppress(RequestCancelledError):
        handle.result(60)
    return str(handle.metrics.state)

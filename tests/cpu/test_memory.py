"""An engine with a pool of cache blocks and bounds on what paused runs hold: who gets blocks, who gives way.

Slices, packs, prefixes and asynchronous devices are in ``test_memory_shared.py``.
"""

from __future__ import annotations

import gc
import random
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.engine.engine import Engine
from fpcompile.errors import InvalidInputError, SegmentError, UnknownNameError
from fpcompile.executor.loop import Hook
from fpcompile.scheduler.job import RequestView
from fpcompile.scheduler.policy import RankingPolicy
from fpcompile.scheduler.record import differences as differences_of_log
from fpcompile.scheduler.record import read_log
from tests.cpu.memory_support import AGAIN, COPY, drain, empty, ids, inline, nested, turn
from tests.cpu.support import differences, finish, outcome, program_of
from tests.cpu.test_engine_fakes import Clock, FakeProgram


@pytest.mark.parametrize("rate", [COPY, AGAIN], ids=["copied", "again"])
def test_a_pool_full_of_paused_runs_never_blocks_the_most_urgent_request(rate: float) -> None:
    """Nine blocks, three runs of three: the fourth request is the next that is launched."""
    program, seen = program_of("qwen3"), list[int]()

    def launched(run: Any, segment: Any, start: float, end: float) -> None:
        seen.append(run.tokens)

    engine = inline(program, rate=rate, kv_blocks=9, on_segment=launched)
    handles = nested(engine, [48, 47, 46])
    memory = engine.statistics().memory
    assert (memory.blocks_used, memory.blocks_free) == (9, 0), "full"
    del seen[:]
    urgent = engine.submit(ids(45), ttft_slo=1.0, request_id="urgent")
    turn(engine)
    assert engine._driver.core.in_flight == "urgent", "the run on the device stopped at its next cut"
    turn(engine, 2)
    assert seen == [45, 45], "no launch of another run in between"
    assert engine._driver.core.state("r0").value == "evicted", "the last in line gave way"
    assert urgent.metrics.queued == 0.0
    drain(engine)
    for handle, length in zip([*handles, urgent], [48, 47, 46, 45], strict=True):
        assert differences(outcome(handle.result(0)), finish(program.start(ids(length)))) == []
    victim = handles[0].metrics
    assert (victim.offloads, victim.recomputations) == ((1, 0) if rate == COPY else (0, 1))
    assert victim.numerics == "bits"
    empty(engine)


def test_a_request_that_is_larger_than_the_pool_is_refused_with_the_size_it_needs() -> None:
    engine = inline(program_of("qwen3"), kv_blocks=2)
    with pytest.raises(InvalidInputError, match="needs 3 cache blocks of 16 tokens") as caught:
        engine.submit(ids(33))
    assert "Engine(kv_blocks=3)" in str(caught.value)
    handle = engine.submit(ids(32))
    engine.submit(ids(100), use_cache=False)  # a layer's cache is dropped as soon as it is read: no blocks
    drain(engine)
    assert handle.result(0).logits.shape[1] == 32
    empty(engine)


def test_wrong_memory_options_are_refused() -> None:
    program, fake = program_of("qwen3"), FakeProgram()
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"kv_blocks": 0}, "kv_blocks is wrong"),
        ({"kv_blocks": 1.5}, "kv_blocks is wrong"),
        ({"kv_blocks": 4, "kv_memory": 1 << 20}, "two ways"),
        ({"kv_memory": 10}, "less than one block"),
        ({"kv_blocks": 4, "block_tokens": 0}, "block_tokens is wrong"),
        ({"prefix_cache": True}, "needs a pool"),
        ({"memory_budget": -1}, "memory_budget is wrong"),
        ({"host_memory": True}, "host_memory is wrong"),
        ({"memory_budget": 1, "policy": "vllm:64,32"}, "never moved"),
        ({"deterministic": True, "policy": "chunked:16"}, "changes their bits"),
        ({"deterministic": True, "policy": "fpcompile:pack=64"}, "changes their bits"),
    )
    for wrong, what in cases:
        with pytest.raises(InvalidInputError, match=what):
            inline(program, **{"policy": "s-edf", **wrong})
    with pytest.raises(InvalidInputError, match="no program"):
        inline(fake, kv_blocks=4)
    with pytest.raises(UnknownNameError):
        inline({"a": program}, kv_blocks={"b": 4})
    with pytest.raises(InvalidInputError, match="a pool has one layout"):
        inline({"a": program, "b": program_of("gemma3")}, kv_blocks=4)


def test_one_of_several_programs_has_the_pool() -> None:
    engine = inline({"a": program_of("qwen3"), "b": program_of("gemma3")}, kv_blocks={"a": 3})
    handles = [engine.submit(ids(40), program=name) for name in "abab"]
    drain(engine)
    for handle, arch in zip(handles, ["qwen3", "gemma3"] * 2, strict=True):
        assert differences(outcome(handle.result(0)), finish(program_of(arch).start(ids(40)))) == []
    empty(engine)


def test_bytes_instead_of_blocks() -> None:
    engine = inline(program_of("qwen3"), kv_memory=100_000, block_tokens=8)
    memory = engine.statistics().memory
    assert memory.blocks == 100_000 // memory.block_bytes > 1


# ---- the budget


@pytest.mark.parametrize("rate", [COPY, AGAIN], ids=["copied", "again"])
@pytest.mark.parametrize("budget", [0, 60_000])
def test_paused_runs_keep_to_the_budget(rate: float, budget: int) -> None:
    """Without a pool: live values and the runs' own caches; the last in line are moved."""
    program = program_of("qwen3")
    engine = inline(program, rate=rate, memory_budget=budget)
    handles = []
    for number, length in enumerate([40, 41, 42, 43]):
        handles.append(engine.submit(ids(length), ttft_slo=1000.0 - number))
        turn(engine, 6)
        memory = engine.statistics().memory
        inputs = 2000 * number  # token ids stay, so that a run can begin again
        assert memory.paused_bytes <= budget + inputs
        assert engine.statistics().paused_bytes == memory.paused_bytes
        assert (memory.host_bytes > 0) == (rate == COPY and memory.offloads > 0)
    moved = [handle.metrics.offloads + handle.metrics.recomputations for handle in handles]
    assert moved == ([1, 1, 1, 0] if not budget else [1, 0, 0, 0] if moved[1] == 0 else [1, 1, 0, 0])
    drain(engine)
    for handle, length in zip(handles, [40, 41, 42, 43], strict=True):
        assert differences(outcome(handle.result(0)), finish(program.start(ids(length)))) == []
    empty(engine)


def test_the_scheduler_hears_of_runs_that_begin_again(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    engine = inline(program_of("qwen3"), rate=AGAIN, kv_blocks=9, record=log)
    first = nested(engine, [48, 47, 46, 45], launches=9)[0]
    assert first.metrics.recomputations == 1
    job = engine._driver.core.jobs["r0"]
    before = job.left
    engine.submit(ids(5))
    turn(engine)
    assert before < job.left == pytest.approx(job.cost, rel=1e-6)
    drain(engine)
    engine.close()
    assert differences_of_log(read_log(log)) == []


def test_what_is_kept_on_the_host_is_bounded_too() -> None:
    """A host that is full: the run begins again, with the same bits."""
    program = program_of("qwen3")
    engine = inline(program, memory_budget=0, host_memory=40_000)
    handles = nested(engine, [40, 41, 42, 43], launches=6)
    memory = engine.statistics().memory
    assert 0 < memory.host_bytes <= 40_000
    assert (memory.offloads, memory.recomputations) == (1, 2)
    drain(engine)
    for handle, length in zip(handles, [40, 41, 42, 43], strict=True):
        assert differences(outcome(handle.result(0)), finish(program.start(ids(length)))) == []
    empty(engine)


def test_copies_of_runs_that_are_back_make_room_for_others() -> None:
    program = program_of("qwen3")
    engine = inline(program, memory_budget=0, host_memory=60_000)
    first = engine.submit(ids(40), ttft_slo=1000.0)
    turn(engine, 6)
    engine.submit(ids(5), ttft_slo=10.0)
    turn(engine)
    drain_of(engine, first)
    kept = engine.statistics().memory.host_bytes
    assert kept > 0, "its copy is kept, for the next time"
    engine.submit(ids(41), ttft_slo=9.0)
    turn(engine, 6)
    engine.submit(ids(6), ttft_slo=8.0)
    turn(engine, 2)
    assert engine.statistics().memory.host_bytes <= 60_000
    drain(engine)
    empty(engine)


def drain_of(engine: Engine, handle: Any) -> None:
    """Until that request has the device again."""
    while handle.metrics.state != "running":
        turn(engine)


def test_a_run_of_another_kind_is_counted_and_kept() -> None:
    engine = inline(FakeProgram(4, clock=Clock()), memory_budget=0)
    engine.submit([1] * 8, ttft_slo=1000.0)
    turn(engine, 2)
    engine.submit([5], ttft_slo=100.0)
    turn(engine, 1)
    assert engine.statistics().paused_bytes == 8 * 10 + 2
    drain(engine)


def test_the_generic_route_is_moved_too() -> None:
    program = program_generic()
    engine = inline(program, memory_budget=0)
    one, two = ids(20), ids(21)
    first = engine.submit(one, ttft_slo=1000.0)
    turn(engine, 4)
    second = engine.submit(two, ttft_slo=10.0)
    turn(engine, 2)
    assert engine.statistics().memory.offloads == 1
    drain(engine)
    for handle, prompt in ((first, one), (second, two)):
        assert torch.equal(handle.result(0).logits, program(prompt).logits)
    empty(engine)


def program_generic() -> fpcompile.Program:
    from fpcompile.models.zoo import tiny_model

    return fpcompile.segment(tiny_model("qwen3"), route="generic")


class Newest(RankingPolicy):
    """Whoever came last, until ``order`` names the places of all by request."""

    def __init__(self) -> None:
        self.order: dict[str, int] = {}

    def rank(self, views: Sequence[RequestView], now: float) -> Iterable[str]:
        names = [view.request.id for view in sorted(views, key=lambda view: -view.sequence)]
        return sorted(names, key=lambda name: self.order.get(name, 0))


@pytest.mark.slow
def test_a_thousand_paused_runs() -> None:
    """Bytes as accounted are the bytes of all tensors that appear; no thread comes; any order of resuming."""
    program = program_of("qwen3")
    prompts = [ids(20 + number % 5) for number in range(5)]
    expected = [finish(program.start(prompt)) for prompt in prompts]
    policy = Newest()
    engine = inline(program, policy=policy, max_queue=None, record_timeline=False, memory_budget=1 << 40)
    threads, before = threading.active_count(), _tensor_bytes()
    handles = []
    for number in range(1001):
        handles.append(engine.submit(prompts[number % 5].clone(), request_id=str(number)))
        for _ in range(1 + number % 7):
            engine.turn(1)
    assert threading.active_count() == threads
    statistics = engine.statistics()
    assert statistics.paused == 1000
    running = engine._driver._flight
    assert running is not None
    measured = _tensor_bytes() - before - running.load.run.live_bytes
    assert statistics.paused_bytes == pytest.approx(measured, rel=0.01)
    order = random.Random(0).sample(range(1001), 1001)
    policy.order = {str(number): place for place, number in enumerate(order)}
    while engine.turn(None):
        pass
    engine._driver.validate()
    for number, handle in enumerate(handles):
        assert differences(outcome(handle.result(0)), expected[number % 5]) == []
    empty(engine)


def _tensor_bytes() -> int:
    """Bytes of the storages of all tensors that anybody holds."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at a deprecated module's attributes warns
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if not t.is_mkldnn}
    return sum(storages.values())


# ---- ends


def test_cancelled_and_failed_runs_give_everything_back() -> None:
    program = program_of("qwen3")
    spoilt: list[Any] = []

    def spoil(run: Any, segment: Any, start: float, end: float) -> None:
        if spoilt and run is spoilt[0]:
            run.values = {name: value[..., :1] for name, value in run.values.items()}

    hook: Hook = spoil
    engine = inline(program, kv_blocks=9, memory_budget=0, on_segment=hook)
    handles = nested(engine, [48, 47, 46, 45])
    assert engine.statistics().memory.host_bytes > 0
    handles[0].cancel()  # evicted
    handles[1].cancel()  # on the host, with its blocks
    turn(engine)
    assert handles[0].done()
    spoilt.append(engine._driver._known["r3"].run)
    drain(engine)
    with pytest.raises(SegmentError):
        handles[3].result(0)
    assert differences(outcome(handles[2].result(0)), finish(program.start(ids(46)))) == []
    empty(engine)
    engine.close()


def test_a_scheduler_that_fails_leaves_no_block_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inline(program_of("qwen3"), kv_blocks=9, memory_budget=0)
    nested(engine, [48, 47, 46, 45])

    def broken(events: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(engine._driver.core, "handle_all", broken)
    engine.submit(ids(3))
    engine.turn(1)
    empty(engine)
    handle = engine.submit(ids(100))
    drain(engine)
    assert handle.metrics.state == "completed"
    empty(engine)

"""What happens to one request stays with it: withdrawn members of steps, failures while blocks are given out,
policies that raise where they are merely asked, ids that come back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fpcompile.engine import registry
from fpcompile.errors import RequestCancelledError, RequestTimeoutError
from fpcompile.executor.offload import Parking
from fpcompile.executor.pool import KVPool
from fpcompile.executor.run import Run
from fpcompile.scheduler import books
from tests.cpu.memory_support import AGAIN, COPY, drain, empty, ids, inline, turn
from tests.cpu.support import differences, finish, outcome, program_of
from tests.cpu.test_engine_fakes import Clock


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_withdrawn_member_of_a_step_ends_with_the_step(how: str) -> None:
    clock = Clock()
    engine = inline(program_of("qwen3"), policy="vllm:64,32", clock=clock)
    given: dict[str, Any] = {"timeout": 1.0} if how == "timeout" else {}
    leaver = engine.submit(ids(8), max_new_tokens=50, **given)
    other = engine.submit(ids(9), max_new_tokens=3)
    turn(engine, 2)
    assert leaver.metrics.state == other.metrics.state == "running"
    if how == "cancel":
        assert leaver.cancel()
    else:
        clock.advance(2.0)
    drain(engine)
    with pytest.raises(RequestCancelledError if how == "cancel" else RequestTimeoutError):
        leaver.result(0)
    assert leaver.metrics.tokens_out == 0, "it was withdrawn before its first token"
    assert other.metrics.tokens_out == 3
    empty(engine)


@pytest.mark.parametrize("trouble", ["evicted", "out of memory"])
def test_blocks_of_a_pack_that_begins_again_are_written_before_others_share_them(
    trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of("qwen3")
    engine = inline(program, rate=AGAIN, pack=4096, kv_blocks=14, prefix_cache=True)
    pool = engine._memory.pool
    assert pool is not None
    for keys, values in pool.stores.values():
        keys.fill_(7.0)  # whoever reads what nobody wrote is far off
        values.fill_(7.0)
    members = [engine.submit(ids(length), ttft_slo=1000.0) for length in (80, 81)]
    if trouble == "evicted":
        turn(engine, 4)
        engine.submit(ids(150), ttft_slo=0.5)
    else:
        fail_once(monkeypatch, Run, "step", at=3)
    drain(engine)
    assert members[0].metrics.packed_with
    assert members[0].metrics.recomputations == 1
    monkeypatch.undo()
    for length in (80, 81):
        again = engine.submit(ids(length), logits_to_keep=1, ttft_slo=100.0)
        drain(engine)
        assert again.metrics.reused_tokens >= 64
        alone = finish(program.start(ids(length))).logits[:, -1:]
        torch.testing.assert_close(again.result(0).logits, alone, rtol=0, atol=2e-5)
    empty(engine)


def fail_once(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    *,
    at: int = 1,
    error: type[Exception] = MemoryError,
) -> list[int]:
    """Let call number ``at`` of a method raise; the list counts the calls."""
    real, calls = getattr(owner, name), [0]

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            if owner is Run:
                self.release()
            raise error("injected")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, method)
    return calls


def test_out_of_memory_while_an_evicted_run_comes_back_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = program_of("qwen3")
    engine = inline(program, rate=COPY, kv_blocks=12)
    paused = engine.submit(ids(150), ttft_slo=1000.0)
    turn(engine, 3)
    calls = fail_once(monkeypatch, Parking, "restore")
    urgent = engine.submit(ids(151), ttft_slo=1.0)
    drain(engine)
    assert calls[0] >= 1
    assert urgent.metrics.state == "completed"
    assert differences(outcome(paused.result(0)), finish(program.start(ids(150)))) == []
    empty(engine)


def test_an_error_while_blocks_are_given_out_ends_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("qwen3")
    engine = inline(program, kv_blocks=40)
    first = engine.submit(ids(60), ttft_slo=1000.0)
    turn(engine, 2)
    fail_once(monkeypatch, KVPool, "room", error=RuntimeError)
    second = engine.submit(ids(61), ttft_slo=1.0)
    drain(engine)
    with pytest.raises(RuntimeError, match="injected"):
        second.result(0)
    assert differences(outcome(first.result(0)), finish(program.start(ids(60)))) == []
    empty(engine)


def test_a_policy_that_cannot_rank_memory_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("qwen3")
    engine = inline(program, policy="edf", memory_budget=0)

    def forgetful(*_: Any) -> Any:
        raise ValueError("a defect of the policy")

    monkeypatch.setattr(type(engine._driver.core), "last_first", forgetful)
    first = engine.submit(ids(60), ttft_slo=1000.0)
    turn(engine, 3)
    second = engine.submit(ids(61), ttft_slo=1.0)
    drain(engine)
    for handle, length in ((first, 60), (second, 61)):
        assert differences(outcome(handle.result(0)), finish(program.start(ids(length)))) == []
    assert engine.health().healthy
    empty(engine)


@pytest.mark.parametrize("options", [{}, {"kv_blocks": 64}], ids=["bare", "pool"])
def test_chunks_begin_again_after_out_of_memory(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("qwen3")
    engine = inline(program, policy="chunked:16", **options)
    handle = engine.submit(ids(40), ttft_slo=10.0)
    fail_once(monkeypatch, Run, "step", at=5)
    drain(engine)
    monkeypatch.undo()
    assert handle.metrics.recomputations == 1
    alone = finish(program.start(ids(40)))
    torch.testing.assert_close(handle.result(0).logits, alone.logits, rtol=0, atol=2e-5)
    empty(engine)


def test_a_timeout_is_not_inherited_with_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REMEMBERED", 1)
    monkeypatch.setattr(books, "_REMEMBERED", 0)
    clock = Clock()
    engine = inline(program_of("qwen3"), clock=clock)
    engine.submit(ids(5), request_id="a", timeout=1.0)
    drain(engine)
    for _ in range(3):
        engine.submit(ids(5))
        drain(engine)
    again = engine.submit(ids(30), request_id="a", timeout=50.0)
    turn(engine, 1)
    clock.advance(2.0)
    drain(engine)
    assert again.metrics.state == "completed"


# ---- no memory for a copy


@pytest.mark.parametrize("where", ["stash", "park"])
def test_without_memory_for_a_copy_an_evicted_prompt_begins_again(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of("qwen3")
    engine = inline(program, rate=COPY, kv_blocks=12)
    paused = engine.submit(ids(150), ttft_slo=1000.0)
    turn(engine, 3)
    fail_once(monkeypatch, Parking, where)
    urgent = engine.submit(ids(151), ttft_slo=1.0)
    drain(engine)
    assert (paused.metrics.offloads, paused.metrics.recomputations) == (0, 1)
    assert urgent.metrics.recomputations == 0
    for handle, length in ((paused, 150), (urgent, 151)):
        assert differences(outcome(handle.result(0)), finish(program.start(ids(length)))) == []
    empty(engine)


@pytest.mark.parametrize("continued", [False, True])
def test_without_memory_for_a_copy_nobody_fails_over_the_budget(
    continued: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt begins again; what continues a cache cannot, and stays where it is."""
    program = program_of("qwen3")
    given = {"past_key_values": program(ids(6)).past_key_values} if continued else {}
    engine = inline(program, rate=COPY, memory_budget=0)
    paused = engine.submit(ids(40), ttft_slo=1000.0, **given)
    turn(engine, 4)
    calls = fail_once(monkeypatch, Parking, "park")
    urgent = engine.submit(ids(41), ttft_slo=1.0)
    drain(engine)
    assert calls[0] == 1
    assert (paused.metrics.offloads, paused.metrics.recomputations) == (0, 0 if continued else 1)
    assert differences(outcome(paused.result(0)), finish(program.start(ids(40), **given))) == []
    assert differences(outcome(urgent.result(0)), finish(program.start(ids(41)))) == []
    empty(engine)


def test_out_of_memory_where_what_is_paused_cannot_be_copied_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy that should make room needs memory itself: both runs begin again."""
    program = program_of("qwen3")
    engine = inline(program, rate=COPY)
    paused = engine.submit(ids(40), ttft_slo=1000.0)
    turn(engine, 4)
    urgent = engine.submit(ids(41), ttft_slo=1.0)
    turn(engine, 3)
    fail_once(monkeypatch, Parking, "park")
    fail_once(monkeypatch, Run, "step")
    drain(engine)
    assert [handle.metrics.recomputations for handle in (paused, urgent)] == [1, 1]
    for handle, length in ((paused, 40), (urgent, 41)):
        assert differences(outcome(handle.result(0)), finish(program.start(ids(length)))) == []
    empty(engine)

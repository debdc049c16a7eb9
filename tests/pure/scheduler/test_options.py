"""Limits on preemption, and memory: TRAIL's cap, suspension cap, hysteresis, eviction, started-only."""

from __future__ import annotations

import pytest

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler import (
    Arrival,
    Cancelled,
    Completed,
    CostPredictor,
    Evict,
    Launch,
    Memory,
    Pause,
    Reject,
    Restore,
    Scheduler,
    State,
    Yielded,
)
from tests.pure.scheduler.driver import LINEAR, finished, job, run_all


def launch(name: str) -> Launch:
    return Launch(name, (name,))


def test_trail_protects_a_run_that_is_nearly_done_unless_the_challenger_would_miss() -> None:
    long = job("long", 0.0, 9.0, 4.0)
    relaxed = job("relaxed", 3.5, 6.0, 1.0)
    urgent = job("urgent", 3.5, 4.8, 1.0)
    assert finished(run_all("edf", [long, relaxed])) == ["relaxed", "long"]
    assert finished(run_all("edf", [long, relaxed], trail_cap=0.8)) == ["long", "relaxed"]
    assert finished(run_all("edf", [long, urgent], trail_cap=0.8)) == ["urgent", "long"]
    hopeless = job("hopeless", 3.5, 4.2, 1.0)
    assert finished(run_all("edf", [long, hopeless], trail_cap=0.8)) == ["long", "hopeless"]


def test_hysteresis_lets_a_run_finish_that_is_about_to() -> None:
    requests = [job("long", 0.0, 9.0, 4.0), job("b", 3.9, 6.0, 1.0)]
    assert finished(run_all("edf", requests)) == ["b", "long"]
    assert finished(run_all("edf", requests, hysteresis_s=0.2)) == ["long", "b"]
    assert finished(run_all("edf", requests, hysteresis_s=0.05)) == ["b", "long"]


def test_the_suspension_cap_brings_a_paused_run_back_and_keeps_it() -> None:
    stream = [job(f"u{i}", 1.0 + i, 3.0 + i, 1.0) for i in range(6)]
    requests = [job("long", 0.0, 50.0, 2.0), *stream]
    assert finished(run_all("edf", requests))[-1] == "long"
    log = run_all("edf", requests, suspension_cap_s=1.5)
    assert "2.5 pause u1" in log, "the timer fires while another one runs"
    assert "2.5 launch long" in log
    assert "3.5 done long" in log, "not paused again"
    assert finished(log)[1] == "long"


def test_any_order_can_pack_when_every_deadline_allows_it() -> None:
    requests = [
        job("first", 0.0, 9.0, 1.0),
        job("a", 0.5, 6.0, 0.5),
        job("hasty", 0.5, 2.0, 0.4),
        job("b", 0.6, 7.0, 0.2),
        job("big", 0.6, 8.0, 4.0),
    ]
    assert "0.5 launch hasty+a+b" not in run_all("edf", requests)
    packed = run_all("edf", requests, predictor=CostPredictor(LINEAR), pack=150)
    assert [line for line in packed if "launch" in line] == [
        "0 launch first",
        "0.5 launch hasty+a",
        "1.4 launch b",
        "1.6 launch big",
        "5.6 launch first",
    ], "b comes when the pack is under way, and fits with nobody: big is too long, first has started"
    with pytest.raises(InvalidInputError, match="packs requests"):
        Scheduler("edf", pack=100)
    with pytest.raises(InvalidInputError, match="pack"):
        Scheduler("edf", pack=-1)


def kv(name: str, at: float, due: float, cost: float, blocks: int) -> Arrival:
    return Arrival(at, job(name, at, due, cost, kv_blocks=blocks))


def test_paused_runs_are_evicted_in_reverse_order_for_the_top_request() -> None:
    core = Scheduler("edf", kv_blocks=10)
    core.handle(kv("c", 0.0, 30.0, 5.0, 4))
    assert core.handle(kv("b", 1.0, 20.0, 5.0, 4)) == (Pause("c"),)
    assert core.handle(Yielded(1.0, "c")) == (launch("b"),)
    assert core.memory.free == 2
    assert core.handle(kv("a", 2.0, 10.0, 5.0, 6)) == (Pause("b"),)
    assert core.handle(Yielded(2.0, "b")) == (Evict("c"), launch("a")), "c is the last in order"
    core.validate()
    assert core.state("c") is State.EVICTED
    assert core.handle(Completed(7.0, "a")) == (launch("b"),)
    assert core.handle(Completed(11.0, "b")) == (Restore("c"), launch("c"))
    core.validate()
    assert core.handle(Completed(15.0, "c")) == ()
    assert core.memory.free == 10


def test_started_only_lets_a_started_run_go_on_when_the_winner_does_not_fit() -> None:
    class StartedOnly(type(Scheduler("edf").policy)):  # type: ignore[misc]
        eviction = False

    core = Scheduler(StartedOnly(), kv_blocks=10)
    core.handle(kv("b", 0.0, 20.0, 5.0, 6))
    assert core.handle(kv("a", 1.0, 10.0, 5.0, 6)) == (), "pausing would not help"
    assert core.handle(Completed(5.0, "b")) == (launch("a"),)


def test_what_can_never_fit_is_rejected_at_once_and_named() -> None:
    core = Scheduler("fcfs", kv_blocks=10)
    (reject,) = core.handle(kv("big", 0.0, 9.0, 1.0, 11))
    assert reject == Reject("big", "needs 11 cache blocks of 10")
    assert core.state("big") is State.REJECTED


def test_memory_reports_wake_what_did_not_fit() -> None:
    core = Scheduler("fcfs", kv_blocks=10)
    core.handle(Memory(0.0, 3))
    assert core.handle(kv("a", 0.0, 9.0, 1.0, 5)) == ()
    assert core.handle(Memory(1.0, 5)) == (launch("a"),)
    core.validate()
    core.handle(Cancelled(1.5, "a"))
    core.handle(Yielded(1.6, "a"))
    assert core.memory.free == 5


def test_blocks_of_a_generating_request_come_back_by_report() -> None:
    core = Scheduler("fcfs", kv_blocks=10)
    core.handle(Arrival(0.0, job("a", 0.0, 9.0, 1.0, kv_blocks=6, decode_tokens=5)))
    core.handle(Completed(1.0, "a"))
    assert core.memory.free == 4
    core.handle(Memory(2.0, 10))
    assert core.memory.free == 10


@pytest.mark.parametrize("policy", ["edf", "s-edf", "srpt", "fpcompile"])
def test_a_full_cache_never_blocks_the_urgent_one(policy: str) -> None:
    core = Scheduler(policy, kv_blocks=8)
    now = 0.0
    for index in range(4):
        now += 0.25
        core.handle(kv(f"long{index}", now, 100.0 - index, 8.0 - index, 4))
        if core.flight and core.flight[0].state is State.PAUSING:
            core.handle(Yielded(now, core.flight[0].id))
        core.validate()
    running = core.in_flight
    assert running is not None
    assert core.handle(kv("urgent", 2.0, 2.5, 0.25, 8)) == (Pause(running),)
    commands = core.handle(Yielded(2.0, running))
    assert commands[-1] == launch("urgent")
    assert {type(command) for command in commands[:-1]} == {Evict}
    core.validate()


def test_the_suspension_cap_brings_an_evicted_run_back() -> None:
    stream = [job(f"u{i}", 1.0 + i, 3.0 + i, 1.0, kv_blocks=8) for i in range(6)]
    requests = [job("long", 0.0, 50.0, 2.0, kv_blocks=8), *stream]
    assert finished(run_all("edf", requests, kv_blocks=10))[-1] == "long"
    log = run_all("edf", requests, kv_blocks=10, suspension_cap_s=1.5)
    assert [line for line in log if line.startswith("2.5 ")] == [
        "2.5 pause u1", "2.5 evict u1", "2.5 restore long", "2.5 launch long",
    ]  # fmt: skip
    assert "3.5 done long" in log


def test_a_run_that_was_suspended_for_too_long_goes_on_when_its_quota_is_used_up() -> None:
    core = Scheduler("edf", suspension_cap_s=1.0, max_segments=1)
    core.handle(Arrival(0.0, job("long", 0.0, 50.0, 4.0)))
    core.handle(Arrival(0.5, job("a", 0.5, 9.0, 4.0)))
    core.handle(Yielded(0.5, "long", 3.5))
    assert core.handle(Yielded(1.6, "a", 2.9))[0] == Launch("long", ("long",), 1), "1.1 s are too long"
    assert core.handle(Yielded(2.0, "long", 3.1))[0] == Launch("long", ("long",), 1), "and not for one launch"
    core.handle(Arrival(2.1, job("b", 2.1, 3.5, 0.5)))
    assert core.handle(Yielded(2.2, "long", 2.9))[0] == Launch("long", ("long",), 1)
    assert core.handle(Completed(5.0, "long"))[0].run == "a"  # type: ignore[union-attr]
    core.validate()

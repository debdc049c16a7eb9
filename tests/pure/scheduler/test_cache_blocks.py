"""Who is evicted for whom, who is finished first instead, and what that costs on simulated traffic."""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler import (
    Arrival,
    CostPredictor,
    RankingPolicy,
    Request,
    RequestView,
    Scheduler,
    State,
    make_policy,
    profile,
)
from fpcompile.scheduler.errors import UnknownRequestError
from fpcompile.scheduler.events import Completed, Dropped, Evict, Launch, Pause, Restore, Yielded
from fpcompile.scheduler.goodput import attainment
from fpcompile.scheduler.job import Job
from fpcompile.scheduler.policies.orders import Edf
from fpcompile.scheduler.simulator import SimulationResult, Simulator
from fpcompile.scheduler.synthetic import synthetic_trace
from fpcompile.scheduler.workload import requests_at
from tests.pure.scheduler.driver import job

SLOS = {"text": 0.25, "image": 0.5, "search": 4.0, "file": 6.0}


def arrival(name: str, at: float, due: float, cost: float, blocks: int) -> Arrival:
    return Arrival(at, job(name, at, due, cost, kv_blocks=blocks))


def paused_pool(core: Scheduler) -> None:
    """Runs of 3, 6 and 1 blocks of 10: all but the last one are paused."""
    core.handle(arrival("small", 0.0, 90.0, 9.0, 3))
    core.handle(arrival("large", 1.0, 80.0, 9.0, 6))
    core.handle(Yielded(1.0, "small", 8.0))
    core.handle(arrival("c", 2.0, 70.0, 9.0, 1))
    core.handle(Yielded(2.0, "large", 8.0))


def test_of_the_last_in_line_those_stay_that_are_not_needed() -> None:
    core = Scheduler("edf", kv_blocks=10)
    paused_pool(core)
    core.handle(arrival("urgent", 3.0, 9.0, 1.0, 6))
    commands = core.handle(Yielded(3.0, "c", 8.0))
    assert commands == (Evict("large"), Launch("urgent", ("urgent",))), "not small as well, though it is last"
    core.validate()


def test_a_run_that_is_nearly_done_is_finished_before_it_is_evicted() -> None:
    for move, paused in ((0.0, True), (0.01, True), (0.1, False)):
        core = Scheduler("fpcompile:foresight=0", kv_blocks=10, move_s=move)
        core.handle(arrival("old", 0.0, 90.0, 5.0, 8))
        commands = core.handle(arrival("urgent", 4.5, 9.0, 1.0, 8))
        assert commands == ((Pause("old"),) if paused else ()), "0.5 s to go, moving takes 8 blocks"
        if not paused:
            assert core.handle(Completed(5.0, "old")) == (Launch("urgent", ("urgent",)),)
        core.validate()


def test_nobody_is_made_late_for_it() -> None:
    core = Scheduler("fpcompile:foresight=0", kv_blocks=10, move_s=0.1)
    core.handle(arrival("old", 0.0, 90.0, 5.0, 8))
    assert core.handle(arrival("urgent", 4.5, 5.9, 1.0, 8)) == (Pause("old"),), "its slack is 0.4 s"
    commands = core.handle(Yielded(4.5, "old", 0.5))
    assert commands == (Evict("old"), Launch("urgent", ("urgent",)))
    assert core.handle(Completed(5.5, "urgent")) == (Restore("old"), Launch("old", ("old",)))
    core.validate()


def test_a_paused_run_is_finished_first_too() -> None:
    core = Scheduler("fpcompile:foresight=0", kv_blocks=10, move_s=0.1)
    core.handle(arrival("old", 0.0, 90.0, 5.0, 4))
    core.handle(arrival("b", 4.5, 9.0, 1.0, 4))
    core.handle(Yielded(4.5, "old", 0.3))
    core.handle(arrival("c", 4.6, 20.0, 1.0, 8))
    commands = core.handle(Completed(5.5, "b"))
    assert commands == (Launch("old", ("old",)),), "0.3 s, and c has the time"
    assert core.handle(Completed(5.8, "old")) == (Launch("c", ("c",)),)
    core.validate()


def test_a_run_that_begins_again_has_all_of_its_time_left() -> None:
    core = Scheduler("srpt", kv_blocks=10)
    core.handle(arrival("a", 0.0, 90.0, 5.0, 8))
    core.handle(arrival("b", 4.0, 90.0, 0.5, 8))
    core.handle(Yielded(4.0, "a", 1.0))
    core.handle(arrival("c", 4.1, 90.0, 2.0, 8))
    core.handle(Dropped(4.2, "a", 5.0))
    assert core.jobs["a"].remaining(4.2) == 5.0
    assert core.handle(Completed(4.5, "b")) == (Launch("c", ("c",)),), "now it is shorter than a"
    core.handle(Completed(6.5, "c"))
    assert core.state("a").value == "running"
    core.validate()
    with pytest.raises(UnknownRequestError):
        core.handle(Dropped(7.0, "nobody", 1.0))
    with pytest.raises(InvalidInputError):
        Dropped(7.0, "a", -1.0)


class Stutter(RankingPolicy):
    """Latest first, each of them twice."""

    def rank(self, views: Sequence[RequestView], now: float) -> Iterable[str]:
        latest = sorted(views, key=lambda view: -view.sequence)
        return [view.request.id for view in latest for _ in range(2)]


def test_a_run_that_is_suggested_twice_is_evicted_once() -> None:
    core = Scheduler(Stutter(), kv_blocks=10)
    core.handle(arrival("a", 0.0, 90.0, 5.0, 4))
    core.handle(arrival("b", 1.0, 90.0, 5.0, 4))
    core.handle(Yielded(1.0, "a", 4.0))
    core.handle(arrival("c", 2.0, 90.0, 5.0, 10))
    assert core.handle(Yielded(2.0, "b", 4.0)) == (Evict("a"), Evict("b"), Launch("c", ("c",)))
    assert {(request, why) for _, _, request, why in core.refusals} <= {
        (name, "suggested a run twice") for name in "abc"
    }
    core.validate()


def test_asking_who_is_last_changes_nothing() -> None:
    core = Scheduler("fpcompile", kv_blocks=10)
    paused_pool(core)
    before = {name: vars_of(core, name) for name in core.jobs}
    assert core.last_first(3.0) == ["small", "large"]
    core.handle(arrival("late", 3.0, 3.1, 5.0, 1))
    assert core.last_first(3.0) == ["late", "small", "large"]
    assert {name: vars_of(core, name) for name in before} == before
    assert Scheduler("s-edf").last_first(0.0) == []


def vars_of(core: Scheduler, name: str) -> tuple[object, ...]:
    found = core.jobs[name]
    return found.state, found.held, found.left, found.key


def traffic(load: float, seed: int) -> list[Request]:
    """At this part of the capacity of the bundled profile."""
    rows = synthetic_trace(1000, seed=seed)
    mean = sum(profile().seconds(row.tokens) for row in rows) / len(rows)
    return requests_at(rows, load / mean, profile(), SLOS)


def simulated(requests: list[Request], *, aware: bool, move_s: float = 1e-4) -> SimulationResult:
    """In a cache that the largest request fills; ``aware``: the policy hears what moving costs."""
    told: dict[str, Any] = {} if aware else {"move_s": 0.0}
    simulator = Simulator(
        make_policy("fpcompile"),
        profile(),
        kv_blocks=max(request.kv_blocks for request in requests),
        evict_s=move_s,
        restore_s=move_s,
        **told,
    )
    result = simulator.run(requests)
    simulator.core.validate()
    assert not simulator.core.refusals
    return result


@pytest.mark.slow
def test_in_a_small_cache_fewer_runs_are_moved_and_nobody_is_worse_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    evictions, worst = {True: 0, False: 0}, {True: 0.0, False: 0.0}
    for load in (0.6, 0.9):
        for seed in (1, 2, 3):
            requests = traffic(load, seed)
            for aware in (True, False):
                result = simulated(requests, aware=aware)
                evictions[aware] += result.evictions
                worst[aware] += attainment(result.outcomes).worst / 6
    assert evictions[True] < 0.95 * evictions[False]
    assert worst[True] >= worst[False] - 0.002
    assert not caplog.records, "no suggestion was refused"


class Elsewhere(RankingPolicy):
    """In order of arrival, the latest first; spares a run that is not about to be evicted."""

    name = "elsewhere"

    def rank(self, views: Sequence[RequestView], now: float) -> Iterable[str]:
        return [view.request.id for view in sorted(views, key=lambda view: -view.sequence)]

    def spares(self, victims: Sequence[tuple[RequestView, float]], now: float) -> RequestView:
        return Job(Request("nobody", 0.0, 9.0, 1, 1.0), 99)


def test_a_policy_that_spares_somebody_else_is_refused_and_named() -> None:
    core = Scheduler(Elsewhere(), kv_blocks=10, move_s=0.1)
    core.handle(arrival("old", 0.0, 90.0, 5.0, 8))
    assert core.handle(arrival("new", 1.0, 9.0, 1.0, 8)) == (Pause("old"),)
    assert core.handle(Yielded(1.0, "old", 4.0)) == (Evict("old"), Launch("new", ("new",)))
    core.validate()
    assert {(who, why) for _, _, who, why in core.refusals} == {("nobody", "spared a run that nobody evicts")}


@pytest.mark.parametrize("policy", ["fcfs", "s-edf", "srpt", "fpcompile"])
def test_the_order_among_some_is_that_among_all(policy: str) -> None:
    draw = random.Random(5)
    core = Scheduler(policy)
    for i in range(40):
        core.handle(arrival(f"r{i}", 0.01 * i, draw.uniform(0.5, 60.0), draw.uniform(0.1, 3.0), 0))
        if core.flight and core.flight[0].state is State.PAUSING:
            core.handle(Yielded(0.01 * i, core.flight[0].id))
    running, now = core.flight[0], 5.0
    some = draw.sample(sorted(core.queue.jobs.values(), key=lambda found: found.id), 12)
    expected = [found for found in core.queue.ordered(now) if found in some]
    assert core.queue.among(some, now) == expected
    with_running = core.queue.among(some, now, running)
    assert [found for found in with_running if found is not running] == [
        found for found in core.queue.ordered(now, running) if found in some
    ]
    best = core.queue.challenger(running, now)
    if best in some:
        assert with_running[0] is best


@pytest.mark.parametrize("generates", [(0, 5), (5, 0)])
def test_a_pack_of_which_some_generate_keeps_the_blocks_of_those(generates: tuple[int, int]) -> None:
    core = Scheduler("edf", predictor=CostPredictor(profile()), pack=1000, kv_blocks=10)
    core.handle(arrival("first", 0.0, 90.0, 1.0, 1))
    for name, blocks, tokens in zip("ab", (2, 3), generates, strict=True):
        request = Request(name, 0.1, 95.0, 100, 0.01, kv_blocks=blocks, decode_tokens=tokens)
        core.handle(Arrival(0.1, request))
    assert core.handle(Completed(1.0, "first")) == (Launch("a", ("a", "b")),)
    core.handle(Completed(1.1, "a"))
    core.validate()
    assert core.memory.free == 10 - (2 if generates[0] else 3)


def test_a_full_cache_costs_no_look_at_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only runs that were started have blocks to give: they alone are put in order."""
    looked = 0

    class Counted(Edf):
        def key(self, view: RequestView, now: float) -> float:
            nonlocal looked
            looked += 1
            return super().key(view, now)

    core = Scheduler(Counted(), kv_blocks=10)
    core.handle(arrival("running", 0.0, 500.0, 900.0, 10))
    for i in range(300):
        core.handle(arrival(f"r{i}", 0.0, 1000.0 + i, 5.0, 5))
    asked: list[int] = []
    among = core.queue.among

    def noted(jobs: Collection[Job], now: float, running: Job | None = None) -> list[Job]:
        asked.append(len(jobs))
        return among(jobs, now, running)

    monkeypatch.setattr(core.queue, "among", noted)
    looked = 0
    assert core.handle(arrival("urgent", 1.0, 9.0, 1.0, 5)) == (Pause("running"),)
    assert core.handle(Yielded(1.0, "running", 800.0)) == (Evict("running"), Launch("urgent", ("urgent",)))
    assert asked == [1, 2]
    assert looked <= 5

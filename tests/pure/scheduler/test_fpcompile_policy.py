"""Our policy against brute force, in overload, and its bounds; a user's own policy; refused suggestions."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import combinations

import pytest

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler import (
    Arrival,
    Completed,
    Decoding,
    KeyedPolicy,
    Launch,
    RankingPolicy,
    Request,
    RequestView,
    Scheduler,
    make_policy,
    profile,
)
from fpcompile.scheduler.bound import attainment_bound
from fpcompile.scheduler.events import Command, Event, Yielded
from fpcompile.scheduler.goodput import attainment, highest_rate, percentile
from fpcompile.scheduler.policies.hodgson import MooreHodgson
from fpcompile.scheduler.simulator import Simulator, simulate
from fpcompile.scheduler.synthetic import synthetic_trace
from fpcompile.scheduler.workload import requests_at
from tests.pure.scheduler.driver import LINEAR, finished, job, run_all

SLOS = {"text": 0.25, "image": 0.5, "search": 4.0, "file": 6.0}


def possible(jobs: Sequence[Request]) -> bool:
    """Whether all can be in time on one preemptive device: no interval asks for more than its length."""
    for start in {one.arrival for one in jobs}:
        for end in {one.deadline for one in jobs}:
            inside = sum(one.cost for one in jobs if one.arrival >= start and one.deadline <= end)
            if inside > max(end - start, 0.0) + 1e-9:
                return False
    return True


def optimum(jobs: Sequence[Request]) -> int:
    """The most requests that any schedule serves in time, by trying all subsets."""
    sizes = range(len(jobs), 0, -1)
    return next((size for size in sizes if any(possible(some) for some in combinations(jobs, size))), 0)


def instance(draw: random.Random, together: bool) -> list[Request]:
    """2 to 7 jobs of 10 to 200 ms within 0.3 s, with slack from none to 0.6 s."""
    jobs = []
    for _ in range(draw.randint(2, 7)):
        cost, at = draw.randint(1, 20), 0 if together else draw.randint(0, 30)
        slack = draw.choice([0, draw.randint(0, 10), draw.randint(0, 60)])
        jobs.append((at, cost, at + cost + slack))
    jobs.sort(key=lambda row: row[0])
    return [job(f"r{i}", at / 100, due / 100, cost / 100) for i, (at, cost, due) in enumerate(jobs)]


def served(policy: str, jobs: list[Request]) -> int:
    return sum(outcome.met for outcome in simulate(policy, jobs, LINEAR).outcomes)


def against_brute_force(count: int, together: bool) -> dict[str, int]:
    draw = random.Random(7)
    seen = {"below fcfs": 0, "below s-edf": 0, "below optimum": 0, "above optimum": 0}
    for _ in range(count):
        jobs = instance(draw, together)
        ours, best = served("fpcompile", jobs), optimum(jobs)
        seen["below fcfs"] += ours < served("fcfs", jobs)
        seen["below s-edf"] += ours < served("s-edf", jobs)
        seen["below optimum"] += ours < best
        seen["above optimum"] += ours > best
    return seen


def test_all_present_it_is_the_optimum() -> None:
    assert set(against_brute_force(100, together=True).values()) == {0}


@pytest.mark.slow
def test_never_below_fcfs_and_rarely_below_s_edf_on_ten_thousand_instances() -> None:
    seen = against_brute_force(10_000, together=False)
    assert seen["below fcfs"] == 0
    assert seen["below s-edf"] <= 50, "0.5 %"
    assert seen["above optimum"] == 0, "the brute force or the simulator is wrong"
    assert seen["below optimum"] <= 500, "it does not know the future, and is near the optimum all the same"


def test_moore_hodgson_golden_log() -> None:
    requests = [
        job("a", 0.0, 0.4, 0.3),
        job("b", 0.0, 0.5, 0.35),
        job("c", 0.0, 0.6, 0.2),
        job("d", 0.0, 2.0, 0.3),
    ]
    log = run_all("fpcompile:late_share=0", requests)
    assert finished(log) == ["a", "c", "d", "b"], "b is the longest when c would be late; it goes last"


def overload(policy: str, max_queue_s: float) -> tuple[dict[str, float], list[str], float]:
    """At 1.5 times the capacity: attainment by class, reasons of rejections, time share of late requests."""
    rows = synthetic_trace(1500, seed=3)
    mean = sum(profile().seconds(row.tokens) for row in rows) / len(rows)
    requests = requests_at(rows, 1.5 / mean, profile(), SLOS)
    deadline = {request.id: request.deadline for request in requests}
    end = requests[-1].arrival
    spent = {True: 0.0, False: 0.0}
    flying: list[tuple[float, bool]] = []

    def log(event: Event, commands: tuple[Command, ...]) -> None:
        if isinstance(event, Completed | Yielded) and flying:
            since, late = flying.pop()
            spent[late] += max(0.0, min(event.time, end) - since)
        for command in commands:
            if isinstance(command, Launch):
                left = simulator.core.jobs[command.run].remaining(event.time)
                flying.append((event.time, event.time + left > deadline[command.run] + 1e-9))

    simulator = Simulator(policy, profile(), log=log, max_queue_s=max_queue_s)
    result = simulator.run(requests)
    reasons = [outcome.reason for outcome in result.outcomes if outcome.ttft is None]
    return dict(attainment(result.outcomes).by_class), reasons, spent[True] / (spent[True] + spent[False])


@pytest.mark.slow
def test_overload_degrades_every_class_alike_and_late_requests_keep_their_share() -> None:
    ours, reasons, share = overload("fpcompile", max_queue_s=8.0)
    assert min(ours.values()) > 0.6, "1.5 times the capacity: two thirds of the work at most"
    assert max(ours.values()) - min(ours.values()) < 0.15
    assert reasons
    assert all("max_queue_s" in reason for reason in reasons)
    assert share == pytest.approx(0.05, abs=0.01)
    edf, _, _ = overload("edf", max_queue_s=8.0)
    assert max(edf.values()) < 0.2, "plain EDF collapses"


def test_hopeless_late_requests_can_be_rejected_early() -> None:
    requests = [job("a", 0.0, 20.0, 10.0), *[job(f"late{i}", 0.1, 0.2, 1.0) for i in range(3)]]
    log = run_all("fpcompile:patience=30", requests)
    assert [line for line in log if "reject" in line] == ["0.1 reject late2"]


@pytest.mark.parametrize("known_before", [True, False])
def test_who_is_late_beside_decode_steps_is_so_no_longer_when_those_end(known_before: bool) -> None:
    core = Scheduler("fpcompile:late_share=0")
    core.handle(Arrival(0.0, job("first", 0.0, 3.0, 1.0, klass="x")))
    second = Arrival(0.1, job("second", 0.1, 4.0, 1.0, klass="x"))
    decoding = Decoding(0.1, 0.9)
    core.handle_all([second, decoding] if known_before else [decoding, second])
    assert core.jobs["second"].remaining(0.1) == pytest.approx(10.0), "neither could be in time like that"
    core.handle(Decoding(0.2, 0.0))
    core.handle(Arrival(0.3, job("other", 0.3, 30.0, 1.0, klass="y")))
    assert core.handle(Completed(1.2, "first")) == (Launch("second", ("second",)),), "not a late one any more"
    core.handle(Completed(2.2, "second"))
    policy = core.policy
    assert isinstance(policy, MooreHodgson)
    assert policy._books["x"].attainment > 0.9, "nobody missed"


@pytest.mark.parametrize(
    "spec", ["fpcompile:late_share=1", "fpcompile:balance=-1", "fpcompile:memory=0", "fpcompile:x=1"]
)
def test_bad_options_are_refused(spec: str) -> None:
    with pytest.raises(InvalidInputError):
        make_policy(spec)


def test_a_users_policy_in_a_few_lines() -> None:
    class ShortestPrompt(KeyedPolicy):
        def key(self, view: RequestView, now: float) -> int:
            return view.request.tokens

    requests = [job("long", 0.0, 9.0, 3.0), job("short", 1.0, 9.0, 0.5)]
    assert finished(run_all(ShortestPrompt(), requests)) == ["short", "long"]


class Confused(RankingPolicy):
    """Names requests that do not exist, then gives up one that is running."""

    name = "confused"

    def rank(self, views: Sequence[RequestView], now: float) -> Iterable[str]:
        yield "nobody"

    def rejects(self) -> list[tuple[str, str]]:
        return [("a", "because")]


def test_illegal_suggestions_are_refused_named_and_requests_go_on(caplog: pytest.LogCaptureFixture) -> None:
    core = Scheduler(Confused())
    assert core.handle(Arrival(0.0, job("a", 0.0, 9.0, 1.0))) == (Launch("a", ("a",)),)
    core.validate()
    assert [(policy, request) for _, policy, request, _ in core.refusals] == [
        ("confused", "nobody"),
        ("confused", "a"),
    ]
    assert "confused" in caplog.text
    assert core.handle(Arrival(0.5, job("b", 0.5, 9.0, 1.0))) == ()
    assert core.handle(Completed(1.0, "a")) == (Launch("b", ("b",)),)


def test_goodput_counts_every_lower_rate_and_every_class() -> None:
    assert highest_rate([(1, 0.95), (3, 0.99), (2, 0.89)]) == 1
    assert highest_rate([(1, 0.9), (2, 0.9)]) == 2
    assert highest_rate([(1, 0.5), (2, 1.0)]) == 0.0
    assert percentile([5.0, 1.0, 3.0, 2.0], 50) == 2.0
    assert percentile([5.0, 1.0, 3.0, 2.0], 99) == 5.0
    assert percentile([], 50) is None
    jobs = [
        job("x", 0.0, 2.0, 1.0, klass="x"),
        job("alone too long", 0.0, 0.5, 1.0, klass="x"),
        job("y", 0.0, 1.5, 1.0, klass="y"),
    ]
    met = attainment(simulate("fcfs", jobs, LINEAR).outcomes)
    assert met.by_class == {"x": 1.0, "y": 0.0}
    assert (met.overall, met.worst, met.counted, met.uncounted) == (0.5, 0.0, 2, 1)


def test_the_bound_is_above_every_policy_and_tight_when_all_is_possible() -> None:
    pytest.importorskip("scipy")
    draw = random.Random(3)
    for _ in range(20):
        jobs = [item for item in instance(draw, together=False) if item.arrival + item.cost <= item.deadline]
        bound = attainment_bound(jobs, per_class=False)
        assert bound.converged
        assert bound.attainment * len(jobs) >= optimum(jobs) - 1e-6
        if possible(jobs):
            assert bound.attainment == pytest.approx(1.0)
    overloaded = [job(f"r{i}", 0.0, 1.0, 0.5) for i in range(10)]
    assert attainment_bound(overloaded).attainment == pytest.approx(0.2)
    halves = [job(f"r{i}", 0.0, 1.0, 0.5, klass="ab"[i % 2]) for i in range(10)]
    assert attainment_bound(halves).attainment == pytest.approx(0.2)
    draw = random.Random(1)
    crowd = [job(f"r{i}", draw.random(), 1.0 + draw.random(), 0.3) for i in range(60)]
    loose, tight = attainment_bound(crowd, enough=0.9), attainment_bound(crowd)
    assert tight.converged
    assert tight.attainment <= loose.attainment < 0.9
    assert loose.rounds < tight.rounds
    with pytest.raises(InvalidInputError):
        attainment_bound([job("late", 0.0, 0.1, 1.0)])

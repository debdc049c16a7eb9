"""Golden logs of the rules of other systems."""

from __future__ import annotations

import pytest

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler import (
    Arrival,
    Completed,
    CostPredictor,
    CostTable,
    Grain,
    KeyedPolicy,
    Launch,
    Pause,
    Request,
    RequestView,
    Scheduler,
    State,
    Yielded,
    make_policy,
)
from fpcompile.scheduler.batching import Batching, published_batching, slo_batching
from fpcompile.scheduler.job import Job
from fpcompile.scheduler.policies.neighbours import Chunked
from tests.pure.scheduler.driver import finished, job, run_all

MS = CostTable.from_segments([("all", (0.0, 1e-3, 0.0))])
"""1 ms per token, nothing fixed."""


def short(
    name: str, tokens: int, *, due: float = 10.0, at: float = 0.0, slo: float = 1.0, blocks: int = 0
) -> Request:
    return Request(name, at, due, tokens, tokens * 1e-3, slo=slo, kv_blocks=blocks)


def mates(
    rule: Batching, lead: Request, others: list[Request], now: float = 0.0, free: float = 1e9
) -> list[str]:
    jobs = [Job(request, index) for index, request in enumerate([lead, *others])]
    chosen, _ = rule.mates(jobs[0], jobs, now, free, CostPredictor(MS))
    return [mate.id for mate in chosen]


def test_published_batching_fills_up_to_2048_tokens_and_skips_what_does_not_fit() -> None:
    others = [short("a", 1000), short("b", 600), short("c", 400), short("d", 48), short("e", 1)]
    assert mates(published_batching(), short("q", 600), others) == ["a", "c", "d"]


def test_published_batching_needs_a_tenth_of_the_slo_after_the_batch() -> None:
    lead = short("q", 100, due=1.0, slo=1.0)
    assert mates(published_batching(), lead, [short("a", 800)]) == ["a"], "1.0 - 0.9 is alpha: not below it"
    assert mates(published_batching(), lead, [short("a", 801), short("b", 10)]) == [], "stops at the first"
    assert mates(published_batching(), lead, [short("a", 10)], now=0.91) == [], "less than alpha left"
    assert mates(published_batching(), short("q", 2049), [short("a", 10)]) == [], "the lead is too long"


def test_published_batching_ignores_the_deadlines_of_mates_and_ours_does_not() -> None:
    lead, hasty = short("q", 500), short("hasty", 100, due=0.55)
    assert mates(published_batching(), lead, [hasty, short("b", 10)]) == ["hasty", "b"]
    assert mates(slo_batching(), lead, [hasty, short("b", 10)]) == ["b"]
    assert mates(slo_batching(), lead, [short("a", 40, due=0.55), short("b", 20)]) == ["a"], (
        "b would make a late"
    )


def test_batching_respects_free_memory() -> None:
    lead = short("q", 100, blocks=4)
    assert mates(
        published_batching(), lead, [short("a", 10, blocks=7), short("b", 10, blocks=6)], free=10
    ) == ["b"]


def test_batching_looks_at_a_bounded_number_of_requests() -> None:
    others = [short(f"big{i}", 2000) for i in range(127)]
    assert mates(published_batching(), short("q", 100), [*others[:126], short("a", 10)]) == ["a"]
    assert mates(published_batching(), short("q", 100), [*others, short("a", 10)]) == []


def test_a_packed_run_carries_its_members_to_the_end() -> None:
    core = Scheduler("flowprefill", predictor=CostPredictor(MS))
    core.handle(Arrival(0.0, short("busy", 3000, due=4.0)))
    for name in ("a", "b", "c"):
        core.handle(Arrival(0.1, short(name, 100)))
    assert core.handle(Completed(3.0, "busy")) == (Launch("a", ("a", "b", "c")),)
    core.validate()
    assert core.jobs["a"].left == pytest.approx(0.3)
    assert core.state("b") is State.JOINED
    core.handle(Completed(3.3, "a"))
    assert [core.state(name) for name in "abc"] == [State.COMPLETED] * 3


def test_a_policy_that_packs_needs_a_predictor() -> None:
    with pytest.raises(InvalidInputError, match="packs requests"):
        Scheduler("flowprefill")


def test_vllm_shares_each_step_started_first_and_bounds_one_prompt() -> None:
    core = Scheduler("vllm:1000,400")
    assert core.handle(Arrival(0.0, short("long", 1000))) == (Launch("long", ("long",), None, (400,)),)
    core.handle(Arrival(0.1, short("b", 700)))
    core.handle(Arrival(0.1, short("c", 500)))
    assert core.handle(Yielded(0.4, "long")) == (Launch("long", ("long", "b", "c"), None, (400, 400, 200)),)
    core.validate()
    assert core.handle(Yielded(1.4, "long")) == (Launch("long", ("long", "b", "c"), None, (200, 300, 300)),)
    assert core.handle(Completed(2.2, "long")) == ()
    assert [core.state(name) for name in ("long", "b", "c")] == [State.COMPLETED] * 3


def test_vllm_finishes_members_inside_a_step_that_goes_on() -> None:
    core = Scheduler("vllm:1000")
    core.handle(Arrival(0.0, short("first", 900)))
    core.handle(Arrival(0.1, short("tiny", 50)))
    assert core.handle(Arrival(0.1, short("long", 5000))) == ()
    assert core.handle(Completed(0.9, "first")) == (Launch("tiny", ("tiny", "long"), None, (50, 950)),)
    assert core.handle(Yielded(1.9, "tiny")) == (Launch("long", ("long",), None, (1000,)),)
    assert core.state("tiny") is State.COMPLETED
    assert core.jobs["long"].tokens_left == 4050


def test_chunked_and_layered_are_orders_at_another_grain() -> None:
    requests = [job("long", 0.0, 9.0, 4.0), job("urgent", 1.0, 2.5, 1.0)]
    assert finished(run_all("chunked:512", requests)) == ["long", "urgent"]
    assert finished(run_all("chunked:512,s-edf", requests)) == ["urgent", "long"]
    assert finished(run_all("layered:4,edf", requests)) == ["urgent", "long"]
    assert make_policy("chunked:512").grain == Grain("tokens", 512)
    assert make_policy("layered:4").grain == Grain("layers", 4)
    assert make_policy("flowprefill-published").grain == Grain("half-layer", synchronises=True)
    for spec in (
        "chunked:0",
        "chunked:x",
        "vllm:0",
        "layered:-1",
        "chunked:512,vllm",
        "chunked:512,fpcompile",
    ):
        with pytest.raises(InvalidInputError):
            make_policy(spec)


def test_vllm_starts_nobody_before_one_who_came_first_and_does_not_fit() -> None:
    core = Scheduler("vllm:1000,400", kv_blocks=10)
    core.handle(Arrival(0.0, short("first", 800, blocks=6)))
    core.handle(Arrival(0.1, short("big", 100, blocks=5)))
    core.handle(Arrival(0.1, short("small", 50, blocks=1)))
    assert core.handle(Yielded(0.4, "first")) == (Launch("first", ("first",), None, (400,)),)
    core.validate()
    assert core.handle(Completed(0.8, "first")) == (Launch("big", ("big", "small"), None, (100, 50)),)


def test_a_started_run_takes_the_device_when_the_winner_does_not_fit() -> None:
    """FlowPrefill's rule: for a winner that does not fit, the runs that have their blocks are looked at."""
    core = Scheduler("flowprefill", predictor=CostPredictor(MS), kv_blocks=10)
    core.handle(Arrival(0.0, short("a", 3000, due=20.0, blocks=4)))
    assert core.handle(Arrival(0.1, short("b", 2500, due=4.0, at=0.1, blocks=4))) == (Pause("a"),)
    assert core.handle(Yielded(0.1, "a", 2.9)) == (Launch("b", ("b",)),)
    hasty = Arrival(3.0, short("hasty", 100, due=3.9, at=3.0, blocks=4))
    assert core.handle(hasty) == (), "it does not fit, and b goes before a"
    winner = Arrival(4.1, short("winner", 2100, due=10.0, at=4.1, blocks=4))
    assert core.handle(winner) == (Pause("b"),), "b takes longer than predicted and is late: a goes before b"
    assert core.handle(Yielded(4.1, "b", 0.5)) == (Launch("a", ("a",)),)
    core.validate()


class Told(KeyedPolicy):
    """First come, first served; remembers what it was told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def key(self, view: RequestView, now: float) -> float:
        return view.request.arrival

    def joined(self, view: RequestView, lead: RequestView, now: float) -> None:
        self.heard.append(f"{view.request.id} joined {lead.request.id}")

    def stopped(self, view: RequestView, now: float) -> None:
        self.heard.append(f"{view.request.id} stopped")


def test_the_order_of_another_grain_hears_all_that_happens() -> None:
    inner = Told()
    policy = make_policy("chunked:512,edf")
    assert isinstance(policy, Chunked)
    policy._inner = inner
    core = Scheduler(policy, predictor=CostPredictor(MS), pack=500)
    for name in ("first", "a", "b"):
        core.handle(Arrival(0.0, short(name, 100)))
    core.handle(Completed(0.1, "first"))
    assert inner.heard == ["first stopped", "b joined a"]

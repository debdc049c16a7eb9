"""The simulated device: timelines of every grain, blocking, conservation, memory, replicas, determinism."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest

from fpcompile.errors import InvalidInputError, UnknownNameError
from fpcompile.scheduler import (
    Command,
    Completed,
    CostTable,
    Event,
    Grain,
    Launch,
    Request,
    SegmentCost,
    Yielded,
    profile,
)
from fpcompile.scheduler.profiles import SLO_TABLE
from fpcompile.scheduler.routers import least_work, round_robin, simulate_replicas
from fpcompile.scheduler.simulator import SimulationResult, Simulator, simulate
from fpcompile.scheduler.synthetic import synthetic_trace
from fpcompile.scheduler.timeline import Timelines
from fpcompile.scheduler.workload import requests_at
from tests.pure.scheduler.driver import LINEAR, job

SLOS = {klass: slo for klass, (slo, _) in SLO_TABLE.items()}
LAYERS = CostTable.from_segments(
    [(f"layers.{layer}.{name}", (0.0, 0.001, 0.0)) for layer in range(4) for name in "abc"]
)
"""4 layers of 3 segments, 1 ms per token each."""


def traffic(count: int, rate: float, seed: int = 1) -> list[Request]:
    return requests_at(synthetic_trace(count, seed=seed), rate, profile(), SLOS)


def stops(table: CostTable, grain: Grain, tokens: int) -> list[float]:
    """All stop points of a run, by asking."""
    timeline = Timelines(table, grain).of([tokens])
    found, at = [], 0.0
    while at < timeline.length - 1e-9:
        at = timeline.next_stop(at + 1e-6)
        found.append(at)
    return found


def test_stop_points_of_each_grain() -> None:
    one_ms = pytest.approx
    assert stops(LAYERS, Grain("model"), 1) == [one_ms(0.012)]
    assert stops(LAYERS, Grain("operator"), 1) == one_ms([0.001 * i for i in range(1, 13)])
    assert stops(LAYERS, Grain("half-layer"), 1) == one_ms(
        [0.002, 0.003, 0.005, 0.006, 0.008, 0.009, 0.011, 0.012]
    )
    assert stops(LAYERS, Grain("layers", 2), 1) == one_ms([0.006, 0.012])
    assert stops(LAYERS, Grain("layers", 3), 1) == one_ms([0.006, 0.009, 0.012])
    assert stops(LAYERS, Grain("layers", 99), 1) == one_ms([0.003, 0.006, 0.009, 0.012])
    assert stops(LAYERS, Grain("tile", 5000), 1) == one_ms([0.004, 0.008, 0.012])
    assert stops(LAYERS, Grain("tokens", 2), 5) == one_ms([0.024, 0.048, 0.060])


def test_layer_groups_follow_the_published_lengths() -> None:
    table = profile()
    counts = [len(stops(table, Grain("layers", 0), tokens)) for tokens in (512, 513, 1025, 2049, 4097)]
    assert counts == [1, 2, 4, 8, 16]


def test_chunks_pay_the_fixed_cost_again() -> None:
    table = profile()
    timeline = Timelines(table, Grain("tokens", 512)).of([5000])
    assert timeline.length == pytest.approx(table.seconds(5000) + 9 * table.total.a)
    assert stops(table, Grain("tokens", 512), 5000)[-1] == pytest.approx(timeline.length)


@pytest.mark.parametrize(
    "grain", [Grain("operator"), Grain("half-layer", synchronises=True), Grain("tile", 500)]
)
def test_stop_points_cost_what_the_table_says(grain: Grain) -> None:
    free = profile()
    paid = CostTable(free.segments, check=1e-4, sync=3e-4)
    extra = Timelines(paid, grain).of([2000]).length - free.seconds(2000)
    each = 4e-4 if grain.synchronises else 1e-4
    points = {"operator": 159, "half-layer": 63, "tile": ceil(free.seconds(2000) / 5e-4)}[grain.unit]
    assert extra == pytest.approx(points * each)
    if grain.unit != "tile":
        assert stops(paid, grain, 2000)[-1] == pytest.approx(
            Timelines(paid, grain).of([2000]).length, rel=1e-3
        )


def test_blocking_is_the_time_to_the_next_stop_point() -> None:
    requests = [job("long", 0.0, 99.0, 10.0), job("urgent", 2.5, 4.0, 1.0)]
    table = CostTable.from_segments([(f"layers.{i}", (0.0, 0.0025, 0.0)) for i in range(4)])
    result = simulate("layered:4,edf", requests, table)
    assert result.blocking == pytest.approx([0.0], abs=1e-9), "exactly at a stop point"
    requests[1] = job("urgent", 2.6, 9.0, 1.0)
    result = simulate("layered:4,edf", requests, table)
    assert result.blocking == pytest.approx([2.4])
    long, urgent = result.outcomes
    assert urgent.ttft == pytest.approx(2.4 + 1.0)
    assert long.ttft == pytest.approx(11.0)
    assert long.preemptions == 1
    assert urgent.met
    assert simulate("fcfs", requests, table).outcomes[1].ttft == pytest.approx(10.0 - 2.6 + 1.0)


@pytest.mark.parametrize(
    "policy", ["fcfs", "s-edf", "flowprefill", "chunked:512,edf", "vllm:2048,512", "fpcompile"]
)
def test_every_request_ends_and_device_time_is_conserved(policy: str) -> None:
    requests = traffic(150, 6.0)
    result = simulate(policy, requests, profile())
    assert [outcome.request for outcome in result.outcomes] == requests
    assert all(outcome.ttft is not None for outcome in result.outcomes)
    alone = sum(request.cost for request in requests)
    packs = policy in ("flowprefill", "vllm:2048,512")
    assert result.busy_s <= result.end + 1e-6
    assert packs or result.busy_s >= alone - 1e-6
    assert result.busy_s == pytest.approx(alone, rel=0.1)
    for outcome in result.outcomes:
        assert outcome.ttft is not None
        assert packs or outcome.ttft >= outcome.request.cost - 1e-6


def test_the_same_input_gives_the_same_outcomes() -> None:
    def once() -> SimulationResult:
        return simulate("fpcompile", traffic(120, 9.0), profile(), time_decisions=True)

    first, second = once(), once()
    assert first.outcomes == second.outcomes
    assert first.blocking == second.blocking


def test_wrong_predictions_change_times_and_lose_nobody() -> None:
    requests = traffic(120, 5.0)
    slow = simulate(
        "s-edf", requests, profile(), slowdown=lambda request: 1.3 if request.tokens > 800 else 0.9
    )
    alone = sum(r.cost * (1.3 if r.tokens > 800 else 0.9) for r in requests)
    assert slow.busy_s == pytest.approx(alone)
    assert len(slow.outcomes) == len(requests)


def test_only_a_run_that_finds_the_device_idle_pays_for_its_waking() -> None:
    requests = [job("a", 1.0, 9.0, 2.0), job("b", 2.0, 9.0, 1.0), job("c", 6.0, 9.0, 1.0)]
    result = simulate("fcfs", requests, LINEAR, wake_s=lambda request: 0.1 if request.id == "a" else 0.25)
    assert [outcome.ttft for outcome in result.outcomes] == pytest.approx([2.1, 2.1, 1.25])
    assert [outcome.started for outcome in result.outcomes] == pytest.approx([1.1, 3.1, 6.25])
    assert result.busy_s == pytest.approx(4.0), "the device does not work while it wakes"


def test_a_run_that_is_paused_while_the_device_wakes_goes_on_to_its_first_stop_point() -> None:
    requests = [job("long", 0.0, 99.0, 4.0), job("urgent", 0.05, 3.0, 1.0)]
    result = simulate("chunked:100,edf", requests, LINEAR, wake_s=lambda _: 0.1)
    assert [outcome.ttft for outcome in result.outcomes] == pytest.approx([5.1, 2.05])
    assert result.blocking == pytest.approx([1.05])
    assert result.busy_s == pytest.approx(5.0)


def test_eviction_and_restoring_take_their_time() -> None:
    requests = [
        job("long", 0.0, 99.0, 4.0, kv_blocks=8),
        job("urgent", 1.0, 9.0, 1.0, kv_blocks=8),
    ]
    free = simulate("chunked:100,edf", requests, LINEAR, kv_blocks=8)
    paid = simulate("chunked:100,edf", requests, LINEAR, kv_blocks=8, evict_s=0.01, restore_s=0.02)
    assert free.evictions == paid.evictions == 1
    first, second = ([outcome.ttft or 0.0 for outcome in result.outcomes] for result in (free, paid))
    assert second[1] - first[1] == pytest.approx(8 * 0.01)
    assert second[0] - first[0] == pytest.approx(8 * 0.03)


def test_what_is_evicted_is_not_paused_on_the_device() -> None:
    requests = [
        job("a", 0.0, 50.0, 5.0, kv_blocks=6),
        job("b", 1.0, 20.0, 3.0, kv_blocks=6),
        job("c", 2.0, 5.0, 0.5, kv_blocks=4),
    ]
    roomy = simulate("chunked:10,edf", requests, LINEAR)
    tight = simulate("chunked:10,edf", requests, LINEAR, kv_blocks=10)
    assert (roomy.evictions, roomy.peak_paused_tokens) == (0, 800), "a and b wait for c"
    assert (tight.evictions, tight.peak_paused_tokens) == (1, 500), "a is away by then"


def test_generating_requests_hold_their_blocks_while_they_decode() -> None:
    requests = [
        job("a", 0.0, 99.0, 1.0, kv_blocks=8, decode_tokens=10),
        job("b", 0.5, 99.0, 1.0, kv_blocks=8),
    ]
    result = simulate("fcfs", requests, LINEAR, kv_blocks=10, decode_s=0.3)
    assert result.outcomes[1].ttft == pytest.approx(1.0 + 3.0 + 1.0 - 0.5)


def test_decoding_slows_the_prefill_on_the_device_down() -> None:
    requests = [
        job("a", 0.0, 99.0, 1.0, decode_tokens=10),
        job("b", 0.5, 99.0, 1.0),
        job("c", 9.0, 99.0, 1.0),
    ]
    result = simulate("fcfs", requests, LINEAR, decode_s=0.05, decode_step=(0.005, 0.005))
    half = 1.0 + 0.5  # a generates until then, and takes a fifth of the device
    assert result.outcomes[1].ttft == pytest.approx(half + (1.0 - 0.5 * 0.8) - 0.5)
    assert result.outcomes[2].ttft == pytest.approx(1.0)
    paused = [*requests[:2], job("urgent", 1.2, 3.0, 0.1)]
    early = simulate("chunked:1,edf", paused, LINEAR, decode_s=0.05, decode_step=(0.005, 0.005))
    assert early.outcomes[2].ttft == pytest.approx(0.1 / 0.8, abs=0.013)


def test_queue_limit_rejects_and_names_the_reason() -> None:
    requests = [job("a", 0.0, 9.0, 3.0), job("b", 0.5, 9.0, 1.0)]
    result = simulate("fcfs", requests, LINEAR, max_queue_s=1.0)
    assert result.outcomes[1].ttft is None
    assert "max_queue_s" in result.outcomes[1].reason


def test_routers_and_replicas() -> None:
    requests = [job(f"r{i}", 0.1 * i, 9.0, 4.0 if i == 0 else 0.1) for i in range(6)]
    assert round_robin(requests, 2) == [0, 1, 0, 1, 0, 1]
    assert least_work(requests, 2) == [0, 1, 1, 1, 1, 1]
    one, two = simulate_replicas("fcfs", requests, LINEAR, replicas=2)
    assert len(one.outcomes) == 1
    assert len(two.outcomes) == 5
    with pytest.raises(UnknownNameError, match="least-work"):
        simulate_replicas("fcfs", requests, LINEAR, router="random")
    with pytest.raises(InvalidInputError):
        simulate_replicas("fcfs", requests, LINEAR, replicas=0)


def test_a_quota_of_launches_gives_the_device_back_at_the_stop_points() -> None:
    seen: list[tuple[float, str]] = []

    def log(event: Event, commands: tuple[Command, ...]) -> None:
        if isinstance(event, Yielded | Completed):
            seen.append((event.time, type(event).__name__))

    requests = [job("a", 0.0, 99.0, 0.12)]
    simulate("edf", [replace(requests[0], tokens=10)], LAYERS, max_segments=5, log=log)
    assert [time for time, _ in seen] == pytest.approx([0.05, 0.10, 0.12]), "12 segments of 10 ms"
    assert [kind for _, kind in seen] == ["Yielded", "Yielded", "Completed"]
    seen.clear()
    tiles = "fpcompile:budget_us=35000"
    result = simulate(tiles, [replace(requests[0], tokens=10)], LAYERS, max_segments=3, log=log)
    assert [time for time, _ in seen] == pytest.approx([0.09, 0.12]), "4 tiles of 30 ms"
    assert result.outcomes[0].preemptions == 0, "nobody else had the device"


def test_a_pause_in_a_quota_stops_where_the_quota_ends_at_the_latest() -> None:
    long, urgent = replace(job("long", 0.0, 99.0, 0.12), tokens=10), job("urgent", 0.005, 0.5, 0.012)
    quick = simulate("edf", [long, urgent], LAYERS, max_segments=1)
    assert quick.blocking == pytest.approx([0.005])
    assert quick.outcomes[0].preemptions == 1


def test_what_ends_when_blocks_come_back_frees_its_own_as_well() -> None:
    """`b` ends at 2.0, in the moment at which `a` has been decoded to its end."""
    requests = [
        job("a", 0.0, 99.0, 1.0, kv_blocks=4, decode_tokens=2),
        job("b", 0.0, 99.0, 1.0, kv_blocks=4),
        job("c", 0.5, 99.0, 1.0, kv_blocks=8),
    ]
    simulator = Simulator("fcfs", LINEAR, kv_blocks=8, decode_s=0.5)
    result = simulator.run(requests)
    assert result.outcomes[2].ttft == pytest.approx(2.5), "it begins at 2.0"
    assert simulator.core.memory.free == 8


@pytest.mark.parametrize("decode_s", [0.0, 0.1])
@pytest.mark.parametrize("policy", ["flowprefill", "vllm:4000", "fpcompile:pack=2048"])
def test_all_blocks_come_back_whoever_generates(policy: str, decode_s: float) -> None:
    requests = [replace(r, decode_tokens=(0, 7)[i % 2]) for i, r in enumerate(traffic(60, 9.0))]
    blocks = max(request.kv_blocks for request in requests) + 200
    launched: list[int] = []

    def log(_: Event, commands: tuple[Command, ...]) -> None:
        launched.extend(len(command.requests) for command in commands if isinstance(command, Launch))

    simulator = Simulator(policy, profile(), kv_blocks=blocks, decode_s=decode_s, log=log)
    result = simulator.run(requests)
    assert simulator.core.memory.free == blocks
    assert all(outcome.ttft is not None for outcome in result.outcomes)
    assert max(launched) > 1, "some shared a launch"


def test_layers_may_be_numbered_with_holes() -> None:
    rows = [SegmentCost(f"part{i}", 0.0, 0.001, 0.0, layer) for i, layer in enumerate((-1, 0, 0, 5, 5, 7))]
    table = CostTable(tuple(rows))
    assert stops(table, Grain("layers", 3), 1) == pytest.approx([0.003, 0.005, 0.006])
    assert stops(table, Grain("layers", 99), 1) == pytest.approx([0.003, 0.005, 0.006])
    assert stops(table, Grain("half-layer"), 1) == pytest.approx([0.002, 0.003, 0.004, 0.005, 0.006])
    assert stops(CostTable((rows[0],)), Grain("layers", 4), 1) == pytest.approx([0.001]), "none at all"

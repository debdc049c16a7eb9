"""A recorded log replays to the same decisions, and serves another policy with what it measured."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler import (
    Arrival,
    Cancelled,
    Command,
    Completed,
    CostPredictor,
    Event,
    Failed,
    Launch,
    Request,
    Scheduler,
    TraceError,
    profile,
)
from fpcompile.scheduler.record import (
    Log,
    Recorder,
    differences,
    measured_costs,
    outcomes_of,
    read_log,
    requests_of,
)
from fpcompile.scheduler.simulator import Simulator, simulate
from fpcompile.scheduler.synthetic import synthetic_trace
from fpcompile.scheduler.workload import requests_at

SLOS = {"text": 0.25, "image": 0.5, "search": 4.0, "file": 6.0}


def slowdown(request: Request) -> float:
    return 1.2 if request.tokens > 1000 else 0.95


def recorded(path: Path, policy: str, rate: float = 7.0, **options: object) -> list[Request]:
    """Simulate with wrong predictions, and record it."""
    requests = requests_at(synthetic_trace(80, seed=5), rate, profile(), SLOS)
    core = Scheduler(policy, predictor=CostPredictor(profile()), **options)  # type: ignore[arg-type]
    pending: list[Event] = []
    with Recorder(path, core) as recorder:

        def log(event: Event, commands: tuple[Command, ...]) -> None:
            recorder.record([event], commands)

        Simulator(policy, profile(), core=core, slowdown=slowdown, log=log).run(requests)
    assert not pending
    return requests


@pytest.mark.parametrize("policy", ["fcfs", "s-edf", "fpcompile", "flowprefill", "vllm:2048,512", "wfq"])
def test_a_log_replays_to_identical_decisions(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "log.jsonl"
    requests = recorded(path, policy, max_queue_s=5.0)
    log = read_log(path)
    assert log.policy == policy
    assert log.options["max_queue_s"] == 5.0
    assert log.options["trail_cap"] == inf
    assert requests_of(log) == requests
    assert differences(log, CostPredictor(profile())) == []


def test_a_changed_log_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    recorded(path, "s-edf")
    text = path.read_text()
    path.write_text(text.replace('"run":"r3"', '"run":"r4"', 1))
    found = differences(read_log(path))
    assert found
    assert "r4" in found[0]


def test_the_simulator_reproduces_the_recorded_times_from_measured_costs(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    requests = recorded(path, "s-edf")
    log = read_log(path)
    costs = measured_costs(log)
    assert costs["r7"] == pytest.approx(requests[7].cost * slowdown(requests[7]))
    ratio = {r.id: costs[r.id] / profile().seconds(r.tokens) for r in requests}
    again = simulate("s-edf", requests_of(log), profile(), slowdown=lambda r: ratio[r.id])
    first = simulate("s-edf", requests, profile(), slowdown=slowdown)
    assert [o.ttft for o in again.outcomes] == pytest.approx([o.ttft for o in first.outcomes])


def test_recorded_outcomes_are_what_happened(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for policy in ("vllm:2048,512", "s-edf", "flowprefill"):
        requests = recorded(path, policy, max_queue_s=0.5)
        expected = simulate(policy, requests, profile(), slowdown=slowdown, max_queue_s=0.5).outcomes
        found = outcomes_of(read_log(path))
        assert [(o.request, o.reason) for o in found] == [(o.request, o.reason) for o in expected]
        assert [o.ttft for o in found] == pytest.approx([o.ttft for o in expected])
    assert any(o.reason for o in found)


def test_another_rate_moves_arrivals_and_keeps_promises(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    recorded(path, "fcfs")
    log = read_log(path)
    plain, fast = requests_of(log), requests_of(log, 2.0)
    assert fast[-1].arrival - fast[0].arrival == pytest.approx((plain[-1].arrival - plain[0].arrival) / 2)
    assert [r.deadline - r.arrival for r in fast] == pytest.approx([r.deadline - r.arrival for r in plain])
    for bad in (0.0, -1.0, inf, float("nan")):
        with pytest.raises(InvalidInputError):
            requests_of(log, bad)


def told(path: Path, policy: str, *steps: Event) -> Log:
    """A log of a core that was told these events one by one."""
    core = Scheduler(policy, predictor=CostPredictor(profile()))
    with Recorder(path, core) as recorder:
        for event in steps:
            recorder.record([event], core.handle(event))
    return read_log(path)


def arrival(name: str, tokens: int, time: float = 0.0) -> Arrival:
    return Arrival(time, Request(name, time, 60.0, tokens, profile().seconds(tokens)))


def test_who_was_cancelled_was_not_served_although_its_launch_completed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    three: list[Event] = [arrival("first", 900), arrival("a", 10), arrival("b", 20), arrival("c", 30)]
    packed = [*three, Completed(1.0, "first"), Cancelled(1.5, "b"), Completed(2.0, "a"), Cancelled(3.0, "c")]
    for policy in ("flowprefill", "vllm:2048"):
        log = told(path, policy, *packed)
        launches = [c.requests for _, commands in log.steps for c in commands if isinstance(c, Launch)]
        assert launches == [("first",), ("a", "b", "c")], policy
        found = {outcome.request.id: (outcome.ttft, outcome.reason) for outcome in outcomes_of(log)}
        served = {"first": (1.0, ""), "a": (2.0, ""), "c": (2.0, "")}
        assert found == {**served, "b": (None, "cancelled")}, "c was cancelled behind its end"


def test_who_was_cancelled_alone_was_not_served(tmp_path: Path) -> None:
    steps: list[Event] = [
        arrival("a", 10),
        arrival("b", 20),
        Cancelled(0.5, "b"),
        Cancelled(0.6, "a"),
        Completed(1.0, "a"),
    ]
    found = outcomes_of(told(tmp_path / "log.jsonl", "edf", *steps))
    assert [(outcome.ttft, outcome.reason) for outcome in found] == [(None, "cancelled")] * 2


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t.replace('"version":1', '"version":9'), 1),
        (lambda t: t + "{\n", -1),
        (lambda t: t + '{"a":1}\n', -1),
        (lambda t: t.replace('"policy"', '"polity"', 1), 1),
        (lambda t: t.replace('"options":{', '"options":3,"was":{', 1), 1),
    ],
)
def test_bad_logs_are_named(tmp_path: Path, change: object, line: int) -> None:
    path = tmp_path / "log.jsonl"
    recorded(path, "fcfs")
    assert callable(change)
    path.write_text(change(path.read_text()))
    with pytest.raises(TraceError) as error:
        read_log(path)
    assert error.value.line == (line if line > 0 else len(path.read_text().splitlines()))
    path.write_text("")
    with pytest.raises(InvalidInputError, match="empty"):
        read_log(path)


def test_a_last_line_that_breaks_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    recorded(path, "s-edf")
    text = path.read_text()
    whole = read_log(path)
    assert not whole.torn
    header, last = text.index("\n") + 1, len(text.splitlines()[-1])
    for cut in (1, 2, last // 2, last):
        path.write_text(text[:-cut])
        log = read_log(path)
        kept = len(whole.steps) if cut == 1 else len(whole.steps) - 1
        assert log.steps == whole.steps[:kept], "only the newline is missing" if cut == 1 else cut
        assert log.torn == (cut > 1)
        assert differences(log, CostPredictor(profile())) == []
    path.write_text(text[: header + 5])
    assert read_log(path).steps == ()
    for bad in (text[: header - 5], text + '{"a":1}', text[:-2] + "\n"):
        path.write_text(bad)
        with pytest.raises(TraceError):
            read_log(path)


def test_names_may_look_like_infinity(tmp_path: Path) -> None:
    request = Request("inf", 0.0, inf, 10, 0.5, tenant="inf", klass="inf")
    events: list[Event] = [Arrival(0.0, request), Failed(0.1, "inf", "inf")]
    log = told(tmp_path / "log.jsonl", "edf", *events)
    assert [event for events, _ in log.steps for event in events] == events
    assert (log.options["max_queue_s"], log.options["hysteresis_s"]) == (inf, 0.0)
    assert differences(log) == []


def test_commands_survive_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    recorded(path, "vllm:2048,512")
    launches = [c for _, commands in read_log(path).steps for c in commands if isinstance(c, Launch)]
    assert any(launch.tokens and len(launch.tokens) > 1 for launch in launches)
    assert all(isinstance(launch.requests, tuple) for launch in launches)


def test_a_log_with_options_of_another_version_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    recorded(path, "fcfs")
    path.write_text(path.read_text().replace('"max_queue_s"', '"max_queue_h"', 1))
    with pytest.raises(InvalidInputError, match="unknown scheduler option 'max_queue_h'"):
        differences(read_log(path))


def test_only_what_was_asked_for_counts_as_a_pause(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    requests = recorded(path, "s-edf", max_segments=20)
    expected = simulate("s-edf", requests, profile(), slowdown=slowdown, max_segments=20).outcomes
    found = outcomes_of(read_log(path))
    assert [o.preemptions for o in found] == [o.preemptions for o in expected]
    assert 0 < sum(o.preemptions for o in found) < path.read_text().count('"Yielded"')

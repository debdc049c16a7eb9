"""The core's contract: one run in flight, pauses, acknowledgements, cancels, failures, typed errors."""

from __future__ import annotations

from math import inf, nan

import pytest

from fpcompile.errors import FpcompileError, InvalidInputError
from fpcompile.scheduler import (
    TRANSITIONS,
    Arrival,
    Cancelled,
    Completed,
    CostPredictor,
    EventOrderError,
    Failed,
    Launch,
    Pause,
    Reject,
    Request,
    Scheduler,
    SetTimer,
    State,
    Timer,
    TransitionError,
    UnknownPolicyError,
    UnknownRequestError,
    Yielded,
    make_policy,
    policy_names,
    profile,
)


def request(name: str, at: float = 0.0, due: float = 10.0, cost: float = 1.0, **more: object) -> Request:
    return Request(name, at, due, 100, cost, **more)  # type: ignore[arg-type]


def launch(name: str) -> Launch:
    return Launch(name, (name,))


def test_an_idle_device_gets_the_first_request_and_then_the_next() -> None:
    core = Scheduler("fcfs")
    assert core.handle(Arrival(0.0, request("a"))) == (launch("a"),)
    assert core.handle(Arrival(0.1, request("b", 0.1))) == ()
    core.validate()
    assert core.in_flight == "a"
    assert core.handle(Completed(1.0, "a")) == (launch("b"),)
    assert core.handle(Completed(2.0, "b")) == ()
    assert not core.flight
    assert core.state("a") is State.COMPLETED


def test_a_pause_is_acknowledged_and_the_paused_run_goes_on_later() -> None:
    core = Scheduler("s-edf")
    core.handle(Arrival(0.0, request("long", 0.0, 20.0, 8.0)))
    assert core.handle(Arrival(1.0, request("urgent", 1.0, 3.0, 0.5))) == (Pause("long"),)
    assert core.handle(Arrival(1.1, request("other", 1.1, 2.5, 0.1))) == (), "a pause is on its way"
    assert core.handle(Yielded(1.25, "long", 6.5)) == (launch("other"),)
    core.validate()
    assert core.handle(Completed(1.35, "other")) == (launch("urgent"),)
    assert core.handle(Completed(1.85, "urgent")) == (launch("long"),)
    assert core.jobs["long"].remaining(1.85) == 6.5
    assert core.jobs["long"].executed == 1.25


def test_without_a_measured_remainder_the_executed_time_is_subtracted() -> None:
    core = Scheduler("s-edf")
    core.handle(Arrival(0.0, request("long", 0.0, 20.0, 8.0)))
    core.handle(Arrival(1.0, request("urgent", 1.0, 3.0, 0.5)))
    core.handle(Yielded(1.5, "long"))
    assert core.jobs["long"].remaining(2.0) == 6.5


def test_completion_serves_as_the_acknowledgement_of_a_late_pause() -> None:
    core = Scheduler("s-edf")
    core.handle(Arrival(0.0, request("long", 0.0, 20.0, 1.0)))
    assert core.handle(Arrival(0.9, request("urgent", 0.9, 3.0, 0.5))) == (Pause("long"),)
    assert core.handle(Completed(1.0, "long")) == (launch("urgent"),)
    with pytest.raises(TransitionError, match="story of 'long'") as told:
        core.handle(Yielded(1.1, "long", 0.0))
    assert [what for _, what, _ in told.value.story] == ["arrival", "launch", "pause", "completed"]
    assert core.in_flight == "urgent"
    core.validate()


def test_cancel_of_a_waiting_request_ends_it_at_once() -> None:
    core = Scheduler("fcfs")
    core.handle(Arrival(0.0, request("a")))
    core.handle(Arrival(0.1, request("b")))
    assert core.handle(Cancelled(0.2, "b")) == ()
    assert core.state("b") is State.CANCELLED
    assert core.handle(Completed(1.0, "a")) == ()
    assert core.handle(Cancelled(1.1, "a")) == (), "a cancel that comes too late is not an error"
    assert core.state("a") is State.COMPLETED


@pytest.mark.parametrize("paused_before", [False, True])
def test_cancel_of_the_running_request_pauses_it_and_ends_it_at_the_next_cut(paused_before: bool) -> None:
    core = Scheduler("s-edf")
    core.handle(Arrival(0.0, request("a")))
    if paused_before:
        core.handle(Arrival(0.1, request("b", 0.1, 2.0)))
    assert core.handle(Cancelled(0.2, "a")) == (() if paused_before else (Pause("a"),))
    assert core.handle(Cancelled(0.2, "a")) == ()
    assert core.state("a") is State.CANCELLING
    assert core.handle(Yielded(0.3, "a")) == ((launch("b"),) if paused_before else ())
    assert core.state("a") is State.CANCELLED
    core.validate()


def test_cancel_of_a_paused_request_ends_it_at_once() -> None:
    core = Scheduler("s-edf")
    core.handle(Arrival(0.0, request("a")))
    core.handle(Arrival(0.1, request("b", 0.1, 2.0)))
    core.handle(Yielded(0.2, "a"))
    assert core.handle(Cancelled(0.3, "a")) == ()
    assert core.state("a") is State.CANCELLED
    assert core.handle(Completed(1.0, "b")) == ()


def test_a_failure_ends_its_own_run_only() -> None:
    core = Scheduler("fcfs")
    core.handle(Arrival(0.0, request("a")))
    core.handle(Arrival(0.1, request("b")))
    assert core.handle(Failed(0.5, "a", "boom")) == (launch("b"),)
    assert core.state("a") is State.FAILED
    assert core.state("b") is State.RUNNING


def test_a_quota_that_is_used_up_is_a_decision_point() -> None:
    core = Scheduler("s-edf", max_segments=3)
    assert core.handle(Arrival(0.0, request("a", due=9.0))) == (Launch("a", ("a",), 3),)
    assert core.handle(Yielded(0.3, "a", 0.7)) == (Launch("a", ("a",), 3),)


def test_simultaneous_events_are_decided_once() -> None:
    core = Scheduler("s-edf")
    both = [Arrival(0.0, request("late", due=9.0)), Arrival(0.0, request("soon", due=5.0))]
    assert core.handle_all(both) == (launch("soon"),)


def test_a_request_that_waited_too_long_is_rejected() -> None:
    core = Scheduler("fcfs", max_queue_s=2.0)
    first = core.handle(Arrival(0.0, request("a")))
    assert first == (launch("a"),)
    assert core.handle(Arrival(0.5, request("b", 0.5))) == (SetTimer(2.5),)
    assert core.handle(Timer(2.5)) == (Reject("b", "waited 2 s (max_queue_s)"),)
    assert core.state("b") is State.REJECTED
    assert core.handle(Completed(3.0, "a")) == ()


def test_time_may_not_go_back() -> None:
    core = Scheduler("fcfs")
    core.handle(Arrival(1.0, request("a")))
    with pytest.raises(EventOrderError, match="back in time"):
        core.handle(Completed(0.5, "a"))
    with pytest.raises(EventOrderError):
        core.handle(Completed(nan, "a"))


def test_unknown_and_repeated_names_are_typed_errors() -> None:
    core = Scheduler("fcfs")
    core.handle(Arrival(0.0, request("a")))
    with pytest.raises(EventOrderError, match="arrived twice"):
        core.handle(Arrival(0.1, request("a")))
    for event in (Completed(0.2, "x"), Yielded(0.2, "x"), Failed(0.2, "x", ""), Cancelled(0.2, "x")):
        with pytest.raises(UnknownRequestError, match="'x'"):
            core.handle(event)
    with pytest.raises(UnknownRequestError):
        core.state("x")
    core.handle(Arrival(0.3, request("b")))
    with pytest.raises(TransitionError):
        core.handle(Failed(0.4, "b", "it has not started"))
    core.validate()


def test_unknown_policy_lists_the_legal_names() -> None:
    with pytest.raises(UnknownPolicyError) as told:
        make_policy("sedf")
    assert told.value.known == policy_names()
    assert {"fcfs", "s-edf"} <= set(policy_names())
    assert isinstance(told.value, FpcompileError)
    for spec, takes in (
        ("fcfs:3", "no arguments"),
        ("vllm:1,2,3", "tokens=2048, threshold=0"),
        ("wfq:3", r"name=number \(weights\)"),
    ):
        with pytest.raises(InvalidInputError, match=rf"does not take these arguments\n  expected: {takes}\n"):
            make_policy(spec)
    with pytest.raises(InvalidInputError, match="unknown scheduler option 'trail'"):
        Scheduler("fcfs", trail=1)
    with pytest.raises(InvalidInputError):
        Scheduler("fcfs", max_queue_s=nan)


@pytest.mark.parametrize(
    "change",
    [
        {"id": ""}, {"arrival": inf}, {"arrival": nan}, {"deadline": nan}, {"tokens": 0}, {"tokens": -1},
        {"cost": -0.1}, {"cost": inf}, {"cost": nan}, {"slo": 0.0}, {"slo": nan}, {"kv_blocks": -1},
        {"decode_tokens": -1},
    ],
)  # fmt: skip
def test_a_request_checks_itself(change: dict[str, float]) -> None:
    good: dict[str, object] = {"id": "a", "arrival": 0.0, "deadline": 1.0, "tokens": 1, "cost": 1.0}
    Request(**good)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=next(iter(change))):
        Request(**{**good, **change})  # type: ignore[arg-type]


def test_every_end_state_is_reached_by_the_table_and_left_by_none() -> None:
    ends = {State.COMPLETED, State.CANCELLED, State.REJECTED, State.FAILED}
    assert ends <= set(TRANSITIONS.values())
    assert not ends & {state for state, _ in TRANSITIONS}


def packed(*names: str) -> Scheduler:
    """A core whose run ``a`` took the others along and was then paused for ``urgent``."""
    core = Scheduler("flowprefill", predictor=CostPredictor(profile()))
    core.handle(Arrival(0.0, request("first", cost=0.1)))
    for name in names:
        core.handle(Arrival(0.05, request(name, 0.05)))
    assert core.handle(Completed(0.1, "first")) == (Launch("a", names),)
    core.handle(Arrival(0.105, request("urgent", 0.105, due=5.0)))
    assert core.handle(Yielded(0.11, "a")) == (launch("urgent"),)
    return core


def test_a_paused_pack_that_fails_ends_everybody_in_it() -> None:
    core = packed("a", "b", "c")
    core.handle(Cancelled(0.2, "b"))
    assert core.handle(Failed(0.3, "a", "its memory is gone")) == ()
    core.validate()
    assert [core.state(name) for name in "abc"] == [State.FAILED, State.CANCELLED, State.FAILED]
    assert core.handle(Completed(1.0, "urgent")) == ()
    assert not core.jobs


def test_who_joined_another_run_is_no_run_that_fails() -> None:
    core = packed("a", "b")
    with pytest.raises(TransitionError, match="joined another run"):
        core.handle(Failed(0.3, "b", "what?"))
    core.validate()
    assert core.state("b") is State.JOINED
    assert core.handle(Completed(1.0, "urgent")) == (Launch("a", ("a", "b")),)


@pytest.mark.parametrize("wrong", [{"max_queue_s": "1"}, {"kv_blocks": True}, {"trail_cap": None}])
def test_an_option_that_is_no_number_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        Scheduler("fcfs", **wrong)  # type: ignore[arg-type]

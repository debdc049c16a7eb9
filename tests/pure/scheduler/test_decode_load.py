"""Decode steps take a share of the device: what is left of prefills lasts longer, for the core as in time."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler import (
    Arrival,
    Command,
    Completed,
    CostPredictor,
    Decoding,
    Dropped,
    Event,
    Launch,
    Reject,
    Scheduler,
    State,
    Yielded,
)
from fpcompile.scheduler.batching import slo_batching
from fpcompile.scheduler.job import Job
from fpcompile.scheduler.record import Recorder, differences, read_log
from fpcompile.scheduler.simulator import simulate
from tests.pure.scheduler.driver import LINEAR, job


def launched(commands: tuple[Command, ...]) -> list[str]:
    return [command.run for command in commands if isinstance(command, Launch)]


def test_what_is_left_lasts_longer_while_others_decode() -> None:
    core = Scheduler("edf")
    core.handle(Arrival(0.0, job("a", 0.0, 9.0, 4.0)))
    core.handle(Arrival(0.5, job("b", 0.5, 99.0, 2.0)))
    a, b = core.jobs["a"], core.jobs["b"]
    core.handle(Decoding(1.0, 0.5))
    assert a.remaining(1.0) == pytest.approx(6.0), "one of its four seconds is done"
    assert a.remaining(3.0) == pytest.approx(4.0)
    assert b.remaining(3.0) == pytest.approx(4.0)
    core.handle(Decoding(3.0, 0.75))
    assert a.remaining(3.0) == pytest.approx(8.0)
    core.handle(Decoding(3.0, 0.0))
    assert a.remaining(3.0) == pytest.approx(2.0), "half of the two seconds since were its own"
    assert b.remaining(3.0) == pytest.approx(2.0)
    core.handle(Completed(5.0, "a"))
    assert core.ended["a"].executed == pytest.approx(5.0)
    core.validate()


def test_what_the_driver_says_is_left_is_in_device_seconds() -> None:
    core = Scheduler("edf")
    core.handle(Decoding(0.0, 0.5))
    core.handle(Arrival(0.0, job("a", 0.0, 99.0, 4.0)))
    assert core.jobs["a"].remaining(0.0) == pytest.approx(8.0)
    core.handle(Arrival(1.0, job("b", 1.0, 9.0, 1.0)))
    core.handle(Yielded(1.0, "a", 3.0))
    assert core.in_flight == "b"
    assert core.jobs["a"].remaining(1.0) == pytest.approx(6.0)
    core.handle(Dropped(1.5, "a", 4.0))
    assert core.jobs["a"].remaining(1.5) == pytest.approx(8.0)
    core.validate()


@pytest.mark.parametrize(("share", "first"), [(0.0, "tight"), (0.75, "loose")])
def test_feasibility_counts_decode_steps(share: float, first: str) -> None:
    """``s-edf`` serves what can be in time first; waiting requests are looked at anew when that changes."""
    core = Scheduler("s-edf")
    core.handle(Arrival(0.0, job("now", 0.0, 1.5, 1.0)))
    core.handle(Arrival(0.0, job("tight", 0.0, 5.0, 2.0)))
    core.handle(Arrival(0.0, job("loose", 0.0, 20.0, 2.0)))
    assert core.in_flight == "now"
    assert launched(core.handle_all([Decoding(0.5, share), Completed(1.0, "now")])) == [first]
    core.validate()


@pytest.mark.parametrize(("share", "rejected"), [(0.0, []), (0.75, ["b"])])
def test_early_rejection_counts_decode_steps(share: float, rejected: list[str]) -> None:
    core = Scheduler("fpcompile:patience=1")
    core.handle_all([Decoding(0.0, share), Arrival(0.0, job("a", 0.0, 2.5, 1.0))])
    commands = core.handle(Arrival(0.1, job("b", 0.1, 2.6, 1.0)))
    assert [command.request for command in commands if isinstance(command, Reject)] == rejected
    core.validate()


@pytest.mark.parametrize(("pace", "packed"), [(1.0, ["mate"]), (3.0, [])])
def test_packing_counts_decode_steps(pace: float, packed: list[str]) -> None:
    lead, mate = (Job(job(name, 0.0, 0.5, 0.1), number) for number, name in enumerate(["lead", "mate"]))
    chosen, _ = slo_batching().mates(lead, [mate], 0.0, inf, CostPredictor(LINEAR), pace)
    assert [other.id for other in chosen] == packed


@pytest.mark.parametrize("share", [-0.1, 1.0, inf])
def test_a_share_is_less_than_the_whole(share: float) -> None:
    with pytest.raises(InvalidInputError, match="share"):
        Decoding(0.0, share)


def test_a_log_with_decode_load_replays(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    core = Scheduler("s-edf")
    steps: list[list[Event]] = [
        [Arrival(0.0, job("a", 0.0, 4.0, 1.0)), Arrival(0.0, job("b", 0.0, 6.0, 2.0))],
        [Decoding(1.0, 0.4), Completed(1.0, "a")],
        [Arrival(1.5, job("c", 1.5, 3.0, 1.0))],
    ]
    with Recorder(path, core) as recorder:
        for events in steps:
            recorder.record(events, core.handle_all(events))
    log = read_log(path)
    assert [list(events) for events, _ in log.steps] == steps
    assert differences(log) == []


def test_the_simulated_core_hears_what_decoding_takes() -> None:
    """Request ``a`` generates from 1.0 to 1.5 and takes a fifth of the device meanwhile."""
    seen: list[Event] = []
    requests = [
        job("a", 0.0, 99.0, 1.0, decode_tokens=10),
        job("b", 0.5, 99.0, 1.0),
        job("c", 9.0, 99.0, 1.0),
    ]
    options = {"decode_s": 0.05, "decode_step": (0.005, 0.005)}
    result = simulate("fcfs", requests, LINEAR, log=lambda event, _: seen.append(event), **options)
    told = [(event.time, event.share) for event in seen if isinstance(event, Decoding)]
    assert [at for at, _ in told] == pytest.approx([1.0, 0.5 + (result.outcomes[1].ttft or 0.0)])
    assert [share for _, share in told] == pytest.approx([0.2, 0.0])


def test_a_simulated_prompt_that_decoding_makes_late_gives_way() -> None:
    """Beside a generating request ``tight`` cannot be in time any more: ``loose`` goes first."""
    requests = [
        job("a", 0.0, 9.0, 1.0, decode_tokens=100),
        job("tight", 0.1, 3.2, 2.0),
        job("loose", 0.1, 9.0, 2.0),
    ]
    alone = simulate("s-edf", requests, LINEAR, decode_s=0.05)
    beside = simulate("s-edf", requests, LINEAR, decode_s=0.05, decode_step=(0.005, 0.005))
    assert [outcome.met for outcome in alone.outcomes] == [True, True, True]
    assert alone.outcomes[1].started is not None
    assert beside.outcomes[2].started is not None
    assert beside.outcomes[2].started < (beside.outcomes[1].started or inf)
    assert beside.outcomes[2].met
    assert not beside.outcomes[1].met


def test_a_state_of_its_own_for_nobody() -> None:
    """The load changes no request's state."""
    core = Scheduler("fpcompile")
    assert core.handle(Decoding(0.0, 0.3)) == ()
    core.handle(Arrival(1.0, job("a", 1.0, 9.0, 1.0)))
    core.handle(Decoding(1.1, 0.6))
    assert core.state("a") is State.RUNNING

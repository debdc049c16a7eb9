"""Wrong calls of the scheduler's public names: each is a typed error that names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from fpcompile.errors import FpcompileError, InvalidInputError
from fpcompile.scheduler import (
    Arrival,
    Completed,
    CostPredictor,
    CostTable,
    Grain,
    KeyedPolicy,
    Launch,
    Request,
    RequestView,
    Scheduler,
    SchedulerOptions,
    SegmentCost,
    make_policy,
    profile,
    register,
)
from fpcompile.scheduler.policies.hodgson import MooreHodgson
from fpcompile.scheduler.policies.orders import Edf, Wfq
from fpcompile.scheduler.record import outcomes_of, read_log
from fpcompile.scheduler.routers import simulate_replicas
from fpcompile.scheduler.simulator import Simulator, simulate
from fpcompile.scheduler.workload import TraceRow, requests_at, tile
from tests.pure.scheduler.driver import LINEAR, job


class Chunks(KeyedPolicy):
    """Forgets how long its chunks are."""

    grain = Grain("tokens")

    def key(self, view: RequestView, now: float) -> float:
        return view.request.arrival


ONE = SegmentCost("all", 1e-3, 1e-5, 0.0)
ROWS = [TraceRow(0.0, 10, klass="text"), TraceRow(1.0, 10, klass="text")]
Wrong = tuple[Callable[[], Any], str]

CALLS: dict[str, Wrong] = {
    "an id that is no text": (lambda: job(7, 0.0, 1.0, 1.0), "Request.id"),  # type: ignore[arg-type]
    "tokens that are text": (lambda: Request("a", 0.0, 1.0, "100", 1.0), "Request.tokens"),  # type: ignore[arg-type]
    "half a token": (lambda: Request("a", 0.0, 1.0, 1.5, 1.0), "Request.tokens"),  # type: ignore[arg-type]
    "an arrival that is text": (lambda: Request("a", "now", 1.0, 1, 1.0), "Request.arrival"),  # type: ignore[arg-type]
    "no cost": (lambda: Request("a", 0.0, 1.0, 1, None), "Request.cost"),  # type: ignore[arg-type]
    "a deadline that is none": (lambda: Request("a", 0.0, None, 1, 1.0), "Request.deadline"),  # type: ignore[arg-type]
    "a priority between two": (lambda: job("a", 0.0, 1.0, 1.0, priority=0.5), "Request.priority"),
    "a tenant that is a number": (lambda: job("a", 0.0, 1.0, 1.0, tenant=3), "Request.tenant"),
    "a class that is none": (lambda: job("a", 0.0, 1.0, 1.0, klass=None), "Request.klass"),
    "an arrival of text": (lambda: Arrival(0.0, "a"), "Arrival.request"),  # type: ignore[arg-type]
    "an event of text": (lambda: Scheduler("fcfs").handle("a"), "no event"),  # type: ignore[arg-type]
    "a command for an event": (lambda: Scheduler("fcfs").handle(Launch("a", ("a",))), "no event"),  # type: ignore[arg-type]
    "a time of text": (lambda: Scheduler("fcfs").handle(Completed("1", "a")), "back in time"),  # type: ignore[arg-type]
    "options that are a dict": (lambda: Scheduler("fcfs", options={"pack": 1}), "SchedulerOptions"),  # type: ignore[arg-type]
    "a misspelt option": (lambda: Scheduler("fcfs", max_que_s=1), "did you mean 'max_queue_s'"),
    "half a block": (lambda: SchedulerOptions(kv_blocks=1.5), "kv_blocks"),  # type: ignore[arg-type]
    "infinitely many segments": (lambda: SchedulerOptions(max_segments=inf), "max_segments"),  # type: ignore[arg-type]
    "a policy that is a class": (lambda: Scheduler(Edf), r"Edf\(\)"),  # type: ignore[arg-type]
    "no policy": (lambda: make_policy(None), "unknown policy"),  # type: ignore[arg-type]
    "an option given twice": (lambda: make_policy("fpcompile:pack=0,pack=1"), "twice"),
    "the same with a hyphen": (lambda: make_policy("fpcompile:late-share=0.1,late_share=0.2"), "twice"),
    "a memory that is no number": (lambda: make_policy("fpcompile:memory=nan"), "policy option memory"),
    "half a microsecond": (lambda: make_policy("fpcompile:budget_us=0.5"), "policy option budget_us"),
    "half a packed token": (lambda: MooreHodgson(pack=0.5), "policy option pack"),  # type: ignore[arg-type]
    "no patience": (lambda: make_policy("fpcompile:patience=0"), "policy option patience"),
    "a negative threshold": (lambda: make_policy("vllm:512,-1"), "threshold"),
    "a name without an argument": (lambda: register(Edf), "wrong name"),  # type: ignore[arg-type]
    "a name that specs cannot say": (lambda: register("mine:fast"), "wrong name"),
    "an unknown grain": (lambda: Grain("layer"), "'layers'"),  # type: ignore[arg-type]
    "tiles without a size": (lambda: Grain("tile"), "size of a grain"),
    "chunks without a size": (lambda: Scheduler(Chunks()), "chunks of a wrong size"),
    "a table that is a name": (lambda: simulate("fcfs", [], "llama3-8b-a800"), "no cost table"),  # type: ignore[arg-type]
    "a table without time": (lambda: CostTable((SegmentCost("x", 0, 0, 0),)), "all costs are zero"),
    "a negative check": (lambda: CostTable((ONE,), check=-1e-6), "'check'"),
    "a sync that is no number": (lambda: CostTable((ONE,), sync=nan), "'sync'"),
    "requests that are none": (lambda: simulate("fcfs", None, LINEAR), "sequence of Request"),  # type: ignore[arg-type]
    "rows for requests": (lambda: simulate("fcfs", ROWS, LINEAR), "sequence of Request"),  # type: ignore[arg-type]
    "unsorted requests": (
        lambda: simulate("fcfs", [job("a", 2.0, 9.0, 1.0), job("b", 1.0, 9.0, 1.0)], LINEAR),
        "sorted by arrival",
    ),
    "an id twice": (
        lambda: simulate("fcfs", [job("a", 0.0, 9.0, 1.0), job("a", 1.0, 9.0, 1.0)], LINEAR), "arrived twice",
    ),
    "negative decoding": (lambda: simulate("fcfs", [], LINEAR, decode_s=-1.0), "decode_s"),
    "one number for a step": (lambda: simulate("fcfs", [], LINEAR, decode_step=0.1), "decode_step"),
    "negative moves": (lambda: simulate("fcfs", [], LINEAR, evict_s=nan), "evict_s"),
    "options beside a core": (
        lambda: Simulator("fcfs", LINEAR, core=Scheduler("fcfs"), kv_blocks=4), "made already",
    ),
    "one policy for two devices": (
        lambda: simulate_replicas(Edf(), [], LINEAR, replicas=2), "is a spec",  # type: ignore[arg-type]
    ),
    "half a replica": (lambda: simulate_replicas("edf", [], LINEAR, replicas=0.5), "replicas"),  # type: ignore[arg-type]
    "no rows": (lambda: tile([], 10), "too short"),
    "a rate of none": (lambda: requests_at(ROWS, nan, profile(), {"text": 1.0}), "rate"),
    "a class without an SLO": (lambda: requests_at(ROWS, 1.0, profile(), {}), "'text' has no SLO"),
    "no measurement": (lambda: CostPredictor(profile()).correct(10, 0.0), "real measurement"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_a_typed_error_that_names_it(name: str) -> None:
    call, told = CALLS[name]
    with pytest.raises(FpcompileError, match=told) as caught:
        call()
    assert caught.value.what
    assert caught.value.got or caught.value.expected


def test_a_tenant_of_wfq_keeps_its_hyphens_and_other_options_may_have_them() -> None:
    fair = make_policy("wfq:team-a=2.5,b=3")
    assert isinstance(fair, Wfq)
    light, heavy = job("light", 0.0, 9.0, 1.0, tenant="team_a"), job("heavy", 0.0, 9.0, 1.0, tenant="team-a")
    core = Scheduler(fair)
    core.handle_all([Arrival(0.0, light), Arrival(0.0, heavy)])
    assert core.in_flight == "heavy", "its weight is 2.5, the other one's 1"
    assert isinstance(make_policy("fpcompile:late-share=0.1"), MooreHodgson)


HEADER = {"version": 1, "policy": "fcfs", "options": {}}
ARRIVED = {"type": "Arrival", "time": 0.0, "again": False, "request": {
    "id": "a", "arrival": 0.0, "deadline": 1.0, "tokens": 1, "cost": 1.0,
}}  # fmt: skip
LAUNCHED = {"type": "Launch", "run": "a", "requests": ["a"], "max_segments": None, "tokens": None}
COMPLETED = {"type": "Completed", "time": 1.0, "run": "a"}


def written(path: Path, *steps: tuple[list[Any], list[Any]]) -> Path:
    """A log of these steps, each events and commands."""
    lines = [HEADER, *({"events": events, "commands": commands} for events, commands in steps)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "event",
    [
        {"type": "Completed", "time": "1", "run": "a"},
        {"type": "Completed", "time": 1.0, "run": ["a"]},
        {"type": "Completed", "time": None, "run": "a"},
        {"type": "Memory", "time": 1.0, "free_blocks": "4"},
        {"type": "Comploted", "time": 1.0, "run": "a"},
        {**ARRIVED, "request": "a"},
    ],
    ids=str,
)
def test_a_forged_event_is_a_line_that_cannot_be_read(tmp_path: Path, event: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="line 2"):
        read_log(written(tmp_path / "log.jsonl", ([event], [])))


def test_a_log_that_is_no_text_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe\x00\x81" * 20)
    for path in (tmp_path / "log.jsonl", tmp_path, tmp_path / "missing"):
        with pytest.raises(InvalidInputError, match="cannot read the log"):
            read_log(path)


def test_a_log_whose_commands_are_lost_is_a_typed_error(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.jsonl", ([ARRIVED], [LAUNCHED]), ([COMPLETED], []))
    assert [outcome.ttft for outcome in outcomes_of(read_log(whole))] == [1.0]
    lost = written(tmp_path / "lost.jsonl", ([ARRIVED], []), ([COMPLETED], []))
    with pytest.raises(InvalidInputError, match="do not belong together") as caught:
        outcomes_of(read_log(lost))
    assert caught.value.got == "Completed of 'a'"
    strange = written(tmp_path / "strange.jsonl", ([ARRIVED], [{**LAUNCHED, "requests": ["a", "b"]}]))
    with pytest.raises(InvalidInputError, match="do not belong together"):
        outcomes_of(read_log(strange))

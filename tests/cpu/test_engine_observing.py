"""What an engine tells of its requests: structured logs, tiles in the timeline, who shared a launch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fpcompile.engine.engine import Engine
from fpcompile.engine.timeline import write_chrome_trace
from fpcompile.models.zoo import sample_ids
from tests.cpu.support import program_of
from tests.cpu.test_engine_fakes import Clock, FakeProgram, drive, inline, raises

REQUESTS = "fpcompile.engine.requests"


def _told(caplog: pytest.LogCaptureFixture, request_id: str) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if getattr(record, "request_id", None) == request_id]


def test_every_step_of_a_request_is_a_record_with_its_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger=REQUESTS)
    engine = inline(FakeProgram(clock=Clock()))
    urgent = {0: lambda run: engine.submit([2], ttft_slo=50.0, request_id="urgent")}
    engine.submit([1] * 9, at=urgent, request_id="long", tenant="acme")
    drive(engine)
    told = _told(caplog, "long")
    assert [record["event"] for record in told] == ["arrived", "launched", "preempted", "launched", "ended"]
    assert {record["tenant"] for record in told} == {"acme"}
    assert {record["program"] for record in told} == {"default"}
    assert told[0]["tokens"] == 9
    assert told[2]["by"] == "urgent"
    end = told[-1]
    assert (end["levelno"], end["outcome"], end["preemptions"]) == (logging.INFO, "completed", 1)
    assert (end["ttft"], end["executed"], end["suspended"], end["error"]) == (40.0, 36.0, 4.0, None)
    assert [record["event"] for record in _told(caplog, "urgent")] == ["arrived", "launched", "ended"]


def test_ends_of_all_kinds_are_told_at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=REQUESTS)
    engine = inline(FakeProgram(clock=Clock()), max_queue_s=100.0)
    engine.submit([1], at={1: raises}, request_id="failing")
    engine.submit([2], request_id="cancelled").cancel()
    engine.submit([3], timeout=0.5, request_id="late")
    drive(engine)
    ends = {name: _told(caplog, name) for name in ("failing", "cancelled", "late")}
    assert [len(records) for records in ends.values()] == [1, 1, 1]
    outcomes = {name: (records[0]["outcome"], records[0]["error"]) for name, records in ends.items()}
    assert outcomes == {
        "failing": ("failed", "SegmentError"),
        "cancelled": ("cancelled", "RequestCancelledError"),
        "late": ("failed", "RequestTimeoutError"),
    }
    assert "request failing ended: outcome failed" in ends["failing"][0]["msg"] % ends["failing"][0]["args"]


def test_logs_that_are_off_cost_no_snapshot(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, logger=REQUESTS)
    engine = inline(FakeProgram(clock=Clock()))

    def never(*_: object) -> None:
        raise AssertionError("a snapshot was made for nobody")

    monkeypatch.setattr("fpcompile.engine.metrics.Ticket.snapshot", never)
    engine.submit([1])
    drive(engine)
    assert engine.statistics().completed == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning")
def test_tiles_are_told_from_segments(tmp_path: Path) -> None:
    program = program_of("llama")
    engine = Engine(program, device_thread=False)
    engine.submit(sample_ids(200), max_blocking_ms=1e-3, request_id="tiled")
    engine.submit(sample_ids(200), request_id="whole")
    drive(engine)
    timeline = engine.timeline()
    kinds = {
        lane: {span.kind for span in timeline.spans if span.lane == lane and span.kind in ("segment", "tile")}
        for lane in ("tiled", "whole")
    }
    assert "tile" in kinds["tiled"]
    assert kinds["whole"] == {"segment"}
    write_chrome_trace(tmp_path / "trace.json", timeline.spans, timeline.marks)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tiles = [event for event in events if event.get("cat") == "tile"]
    launches = program.tile_plan(program.start(sample_ids(200)).call.shape, 1e-3, warn=False)
    assert len(tiles) == sum(launch.tiled for launch in launches) > 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["flowprefill", "vllm:32,48"])
def test_metrics_name_those_with_whom_launches_were_shared(policy: str) -> None:
    engine = Engine(program_of("llama"), policy=policy, device_thread=False)
    handles = [engine.submit(sample_ids(n, seed=n), request_id=f"r{n}", ttft_slo=100.0) for n in (9, 11)]
    drive(engine)
    alone = engine.submit(sample_ids(5), request_id="alone", ttft_slo=100.0)
    drive(engine)
    assert [handle.metrics.packed_with for handle in handles] == [("r11",), ("r9",)]
    assert alone.metrics.packed_with == ()


def test_hooks_and_callbacks_that_raise_harm_nobody(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    def bad(what: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls.append(what)
            raise SystemExit(what)

        return hook

    program = FakeProgram(clock=Clock())
    engine = inline(program, on_segment=bad("hook"))
    handle = engine.submit([1])
    handle.add_done_callback(bad("callback"))
    drive(engine)
    assert handle.result(0) == 1
    assert calls == ["hook", "callback"], "the hook is switched off at once"
    assert [r.levelname for r in caplog.records if r.levelno >= logging.WARNING] == ["ERROR", "ERROR"]

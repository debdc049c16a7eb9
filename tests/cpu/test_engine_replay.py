"""What a real engine's scheduler was told replays to the same decisions, and tells what was measured."""

from __future__ import annotations

import logging
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fpcompile.cli.app import app
from fpcompile.engine.engine import Engine
from fpcompile.engine.errors import SchedulerFailedError
from fpcompile.errors import InvalidInputError
from fpcompile.models.zoo import sample_ids
from fpcompile.scheduler import RequestView, register
from fpcompile.scheduler.policies.orders import Edf
from fpcompile.scheduler.record import differences, measured_costs, outcomes_of, read_log
from tests.cpu.support import program_of
from tests.cpu.test_engine_fakes import Clock, FakeProgram, drive, inline


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", ["fcfs", "s-edf:late=shortest", "wfq:1=2.5", "fpcompile:balance=2", "flowprefill", "vllm:64,32"]
)
def test_an_engines_log_replays_to_identical_decisions(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "log.jsonl"
    draw = random.Random(3)
    with Engine(
        program_of("qwen3"), policy=policy, record=path, max_queue_s=30.0, suspension_cap_s=0.5
    ) as engine:
        handles: list[Any] = []

        def client(number: int) -> None:
            for turn in range(6):
                ids = sample_ids(draw.choice((4, 40, 160)), seed=turn)
                slo = draw.choice((0.02, 0.2, 5.0))
                handles.append(engine.submit(ids, ttft_slo=slo, tenant=str(number), slo_class=f"c{slo}"))

        clients = [threading.Thread(target=client, args=(number,)) for number in range(3)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        handles[-1].cancel()
    log = read_log(path)
    assert log.policy == policy, "with its arguments: a replay makes the same policy"
    assert log.options["suspension_cap_s"] == 0.5
    assert differences(log) == []
    completed = [handle.request_id for handle in handles if handle.metrics.state == "completed"]
    assert len(completed) >= 17, "all but the cancelled one"
    if policy in ("flowprefill", "vllm:64,32"):
        assert set(measured_costs(log)) <= set(completed), "not of those that shared launches"
    else:
        assert set(measured_costs(log)) == set(completed)
    seen = {outcome.request.id: outcome for outcome in outcomes_of(log)}
    for handle in handles:
        if handle.request_id in completed:
            assert seen[handle.request_id].request.klass == handle.metrics.slo_class
            told = seen[handle.request_id].ttft
            assert told is not None
            assert told >= handle.metrics.ttft, "the scheduler is told behind the end"
            assert told < handle.metrics.ended, "on the same clock, counted from the arrival"
    command = ["replay", str(path), "--policy", "srpt", "--rate-scale", "1.5"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "identical" in result.output
    assert "c5.0" in result.output


def _recorded(path: Path, **options: Any) -> tuple[Engine, Clock]:
    clock = Clock()
    return inline(FakeProgram(2, clock=clock), record=path, **options), clock


def test_a_log_can_be_read_while_the_engine_lives(tmp_path: Path) -> None:
    engine, _ = _recorded(tmp_path / "log.jsonl", policy="edf")
    engine.submit([1, 2], ttft_slo=9.0, tenant="t", priority=3, slo_class="chat")
    drive(engine)
    log = read_log(tmp_path / "log.jsonl")
    request = outcomes_of(log)[0].request
    assert (request.tenant, request.priority, request.klass, request.slo) == ("t", 3, "chat", 9.0)
    assert outcomes_of(log)[0].ttft == 4.0
    engine.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_ends_the_log_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, _ = _recorded(tmp_path / "log.jsonl", policy="edf")
    log = engine._driver.log
    assert log is not None
    assert log._recorder is not None
    log._recorder._file.close()
    log._recorder._file = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115
    handles = [engine.submit([i]) for i in (1, 2, 3)]
    with caplog.at_level(logging.ERROR):
        drive(engine)
    assert [handle.result(0) for handle in handles] == [1, 2, 3]
    assert len(caplog.records) == 1
    assert "ends here" in caplog.text
    engine.close()


@register("test-moody")
class _Moody(Edf):
    """Raises when it sees a request of the class ``anger``."""

    def key(self, view: RequestView, now: float) -> float:
        if view.request.klass == "anger":
            raise ZeroDivisionError
        return super().key(view, now)


def test_a_log_goes_on_behind_a_policy_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    engine, _ = _recorded(path, policy="test-moody")
    first = engine.submit([1])
    engine.turn()
    lost = engine.submit([2], slo_class="anger")
    drive(engine)
    after = engine.submit([3])
    drive(engine)
    engine.close()
    with pytest.raises(SchedulerFailedError):
        lost.result(0)
    log = read_log(path)
    assert log.restarts == {1}
    assert differences(log) == []
    ends = {outcome.request.id: outcome.reason for outcome in outcomes_of(log)}
    assert ends == {first.request_id: "did not end", after.request_id: ""}


def test_a_policy_that_no_replay_could_make_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="needs its policy by name"):
        _recorded(tmp_path / "log.jsonl", policy=Edf())
    with pytest.raises(InvalidInputError, match="cannot be written"):
        _recorded(tmp_path / "nowhere" / "log.jsonl")
    assert list(tmp_path.iterdir()) == []

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
from fpcompile.scheduler import Command, CostTable, Event, Grain, Pause, RequestView, make_policy, register
from fpcompile.scheduler.policies.orders import Edf
from fpcompile.scheduler.record import differences, measured_costs, outcomes_of, read_log, requests_of
from fpcompile.scheduler.simulator import Simulator
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("s-edf", {"kv_blocks": 12}),
        ("fpcompile", {"kv_blocks": 12, "memory_budget": 0}),
        ("flowprefill", {}),
        ("vllm:64,32", {}),
    ],
)
def test_requests_that_generate_replay_to_identical_decisions(
    tmp_path: Path, policy: str, options: dict[str, Any]
) -> None:
    """With decode steps between the segments, and runs that give their cache blocks away."""
    path = tmp_path / "log.jsonl"
    engine = Engine(program_of("qwen3"), policy=policy, device_thread=False, record=path, **options)
    handles = []
    for number, length in enumerate((90, 12, 40, 5, 33, 100, 7)):
        slo = 60.0 - 8 * number
        more: dict[str, Any] = {"max_new_tokens": 4} if number % 2 else {}
        handles.append(engine.submit(sample_ids(length, seed=length), ttft_slo=slo, **more))
        for _ in range(5):
            engine.turn()
    drive(engine)
    engine.close()
    assert {handle.metrics.state for handle in handles} == {"completed"}
    log = read_log(path)
    assert differences(log) == []
    found = {outcome.request.id: outcome.ttft for outcome in outcomes_of(log)}
    assert set(found) == {handle.request_id for handle in handles}
    assert None not in found.values()


@pytest.mark.parametrize(
    "policy", ["fcfs", "edf", "s-edf", "srpt", "priority", "wfq:a=2", "fpcompile:late_share=0"]
)
def test_the_simulator_decides_as_the_engine_did(tmp_path: Path, policy: str) -> None:
    """From the log's requests and the times of the segments alone: every command, at its time."""
    path, count, unit = tmp_path / "log.jsonl", 120, 2.0**-6
    draw, clock = random.Random(6), Clock()
    handles: list[Any] = []

    def come(*about: object) -> None:
        """Behind some segments somebody arrives, sometimes two; nobody's slack is ever exactly 0."""
        for _ in range(draw.choice((0,) * 8 + (1, 2))):
            if len(handles) < count:
                tokens = draw.choice((5, 7, 11, 13, 17, 19))
                slo = unit * (4 * tokens + draw.choice((20, 100, 400, 900)) + 0.25)
                more: dict[str, Any] = {
                    "tenant": draw.choice("ab"),
                    "priority": draw.randrange(3),
                    "slo_class": f"{slo > 3}",
                }
                handles.append(engine.submit([1] * tokens, ttft_slo=slo, **more))

    engine = inline(FakeProgram(4, seconds=unit, clock=clock), policy=policy, record=path, on_segment=come)
    while len(handles) < count:
        clock.advance(unit)
        come()
        drive(engine)
    engine.close()
    log = read_log(path)
    told = [(events[-1].time, command) for events, commands in log.steps for command in commands]
    seen: list[tuple[float, Command]] = []
    chosen = make_policy(policy)
    chosen.grain = Grain("operator")  # the segments of this program, whatever the policy
    table = CostTable.from_segments([(f"layer.{i}", (0.0, unit, 0.0)) for i in range(4)])

    def see(event: Event, commands: tuple[Command, ...]) -> None:
        seen.extend((event.time, command) for command in commands)

    Simulator(chosen, table, log=see).run(requests_of(log))
    assert seen == told
    pauses = sum(isinstance(command, Pause) for _, command in told)
    assert pauses >= 2 or policy in ("fcfs", "wfq:a=2")

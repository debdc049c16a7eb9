"""What a real engine's scheduler was told replays to the same decisions, and tells what was measured."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fpcompile.engine.engine import Engine
from fpcompile.models.zoo import sample_ids
from fpcompile.scheduler import Command, Event, Scheduler
from fpcompile.scheduler.record import Recorder, differences, measured_costs, outcomes_of, read_log
from tests.cpu.support import program_of


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fcfs", "s-edf", "srpt", "wfq", "fpcompile"])
def test_an_engines_log_replays_to_identical_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    path = tmp_path / "log.jsonl"
    recorders: list[Recorder] = []

    class Recorded(Scheduler):
        def handle_all(self, events: Iterable[Event]) -> tuple[Command, ...]:
            given = tuple(events)
            commands = super().handle_all(given)
            if not recorders:
                recorders.append(Recorder(path, self))
            recorders[0].record(given, commands)
            return commands

    monkeypatch.setattr("fpcompile.engine.engine.Scheduler", Recorded)
    draw = random.Random(3)
    with Engine(program_of("qwen3"), policy=policy, max_queue_s=30.0, suspension_cap_s=0.5) as engine:
        handles: list[Any] = []

        def client(number: int) -> None:
            for turn in range(6):
                ids = sample_ids(draw.choice((4, 40, 160)), seed=turn)
                slo = draw.choice((0.02, 0.2, 5.0))
                handles.append(engine.submit(ids, ttft_slo=slo, tenant=str(number)))

        clients = [threading.Thread(target=client, args=(number,)) for number in range(3)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        handles[-1].cancel()
    recorders[0].close()
    log = read_log(path)
    assert log.policy == policy
    assert differences(log) == []
    completed = [handle.request_id for handle in handles if handle.metrics.state == "completed"]
    assert len(completed) >= 17, "all but the cancelled one"
    assert set(measured_costs(log)) == set(completed)
    seen = {outcome.request.id: outcome.ttft for outcome in outcomes_of(log)}
    for handle in handles:
        if handle.request_id in completed:
            assert seen[handle.request_id] == pytest.approx(handle.metrics.ttft, abs=1e-3)

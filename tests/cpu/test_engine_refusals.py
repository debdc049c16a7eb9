"""What an engine refuses, and that nothing is left of it: terms of requests, options, full queues, misuse."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fpcompile.engine.engine import Engine
from fpcompile.errors import InvalidInputError, QueueFullError, UnknownNameError, UsageError
from tests.cpu.test_engine_fakes import Clock, FakeProgram, FakeRun, drive, inline


@pytest.mark.parametrize(
    ("terms", "match"),
    [
        ({"ttft_slo": 0}, "ttft_slo is wrong"),
        ({"ttft_slo": -0.1}, "ttft_slo is wrong"),
        ({"ttft_slo": math.nan}, "ttft_slo is wrong"),
        ({"ttft_slo": "250ms"}, "ttft_slo is wrong"),
        ({"ttft_slo": True}, "ttft_slo is wrong"),
        ({"deadline": 1.0}, "deadline is wrong"),
        ({"deadline": math.nan}, "deadline is wrong"),
        ({"ttft_slo": 1.0, "deadline": 9.0}, "two ways"),
        ({"arrival": 3.0}, "arrival is wrong"),
        ({"arrival": -math.inf}, "arrival is wrong"),
        ({"arrival": math.nan}, "arrival is wrong"),
        ({"tenant": 3}, "tenant is wrong"),
        ({"priority": 1.5}, "priority is wrong"),
        ({"request_id": ""}, "request_id is wrong"),
        ({"request_id": 7}, "request_id is wrong"),
        ({"unknown_input": 7}, "input_ids is empty"),
    ],
)
def test_wrong_terms_are_refused_and_leave_nothing_behind(terms: dict[str, Any], match: str) -> None:
    clock = Clock()
    clock.advance(2.0)
    engine = inline(FakeProgram(1, clock=clock))
    with pytest.raises(InvalidInputError, match=match):
        engine.submit([1], **terms)
    with pytest.raises(InvalidInputError, match="input_ids is empty"):
        engine.submit([])
    with pytest.raises(UnknownNameError, match="program"):
        engine.submit([1], program=[])  # type: ignore[arg-type]
    assert engine.statistics().waiting == 0
    assert engine.turn() is False


def test_a_request_id_is_used_once() -> None:
    engine = inline(FakeProgram(1, clock=Clock()))
    engine.submit([1], request_id="request-1")
    with pytest.raises(InvalidInputError, match="one that is live"):
        engine.submit([1], request_id="request-1")
    assert engine.submit([1]).request_id == "request-2", "ids that callers chose are left out"
    drive(engine)
    with pytest.raises(InvalidInputError, match="one that ended"):
        engine.submit([1], request_id="request-1")


def test_ids_are_of_the_engine() -> None:
    first, second = (inline(FakeProgram(1, clock=Clock())) for _ in range(2))
    assert first.submit([1]).request_id == second.submit([1]).request_id == "request-1"


def test_a_full_queue_says_when_to_come_back() -> None:
    clock = Clock()
    program = FakeProgram(4, clock=clock)
    engine = inline(program, max_queue=2)
    first = engine.submit([1] * 5)
    engine.turn()  # started: it does not wait any more
    for _ in range(2):
        engine.submit([1])
    with pytest.raises(QueueFullError) as caught:
        engine.submit([1])
    assert caught.value.retry_after == pytest.approx(15.0), "20 s predicted, 5 s of them executed"
    assert engine.statistics().waiting == 2
    drive(engine)
    assert first.result(0) == 5
    engine.submit([1])


def test_wrong_engines_are_refused() -> None:
    program = FakeProgram(1)
    with pytest.raises(UnknownNameError) as caught:
        Engine(program, policy="sedf")
    assert "s-edf" in caught.value.known
    assert caught.value.known == tuple(sorted(caught.value.known))
    with pytest.raises(InvalidInputError, match="unknown scheduler option 'max_que_s'"):
        Engine(program, max_que_s=1.0)
    with pytest.raises(InvalidInputError, match="no program of this engine can have cache blocks"):
        Engine(program, kv_blocks=10)
    with pytest.raises(InvalidInputError, match="kv_blocks names no program"):
        Engine(program, kv_blocks={})
    wrong: list[tuple[str, Any]] = [
        ("max_queue", 0), ("max_queue", 1.5), ("max_queue", "5"), ("max_blocking_ms", -1.0),
        ("max_blocking_ms", "2"), ("clock", 3), ("clock", None), ("on_segment", 3), ("device", "cpu"),
        ("record", ["log"]),
    ]  # fmt: skip
    for name, value in wrong:
        told = "log of decisions" if name == "record" else f"{name} "
        with pytest.raises(InvalidInputError, match=told):
            Engine(program, **{"policy": "s-edf", name: value})
    with pytest.raises(InvalidInputError, match="without a program"):
        Engine({})
    with pytest.raises(InvalidInputError, match="a program's name is wrong"):
        Engine({"": program})
    with pytest.raises(InvalidInputError, match=r"what fpcompile\.segment\(model\) returns"):
        Engine({"chat": object()})  # type: ignore[dict-item]
    with pytest.raises(InvalidInputError, match="different devices"):
        Engine({"a": program, "b": FakeProgram(1, device="meta")})


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "1", True])
def test_a_turn_makes_a_number_of_launches(wrong: Any) -> None:
    engine = inline(FakeProgram(1, clock=Clock()))
    engine.submit([1])
    with pytest.raises(InvalidInputError, match="max_segments"):
        engine.turn(wrong)
    drive(engine)
    assert engine.statistics().completed == 1


@pytest.mark.parametrize("wrong", [-1.0, math.nan, "5"])
def test_closing_waits_for_seconds(wrong: Any) -> None:
    engine = inline(FakeProgram(1, clock=Clock()))
    with pytest.raises(InvalidInputError, match="timeout"):
        engine.close(timeout=wrong)
    engine.submit([1])
    engine.close()
    assert engine.statistics().completed == 1, "the wrong call has closed nothing"


def test_turn_belongs_to_hosts_and_to_one_of_them() -> None:
    with Engine(FakeProgram(1)) as engine, pytest.raises(UsageError, match="has a device thread"):
        engine.turn()
    inner: list[BaseException] = []
    turned = inline(FakeProgram(1, clock=Clock()))

    def again(run: FakeRun) -> None:
        with pytest.raises(UsageError, match="while another") as caught:
            turned.turn()
        inner.append(caught.value)

    turned.submit([1], at={0: again})
    drive(turned)
    assert len(inner) == 1

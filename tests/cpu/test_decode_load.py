"""Predicted times of prompts count the share of the device that decode steps take. Fakes on virtual time.

As in the lane's tests, a prompt takes a second for each of its segments, a step two seconds; tokens are ten
seconds apart, so that one stream takes a fifth of the device.
"""

from __future__ import annotations

from typing import Any

import pytest

from fpcompile.engine.engine import Engine
from fpcompile.engine.handle import Handle
from fpcompile.errors import QueueFullError
from fpcompile.scheduler.policy import make_policy
from tests.cpu.test_decode_lane import Generating, decoding, engine_of
from tests.cpu.test_engine_fakes import Clock, drive, inline


def predicted(engine: Engine, handle: Handle) -> float:
    """Seconds that the scheduler believes a prompt to take, once it has heard of it."""
    engine.turn()
    return engine._driver.core.jobs[handle.request_id].cost


def test_the_scheduler_hears_what_streams_take() -> None:
    engine, _, _ = engine_of(tbt_slo=10.0)
    assert predicted(engine, engine.submit([1])) == pytest.approx(4.0)
    drive(engine)
    stream = decoding(engine, [5])
    assert predicted(engine, engine.submit([100])) == pytest.approx(4.0 / 0.8)
    stream.cancel()
    drive(engine)
    assert predicted(engine, engine.submit([200])) == pytest.approx(4.0), "as soon as anything is told"
    drive(engine)


def test_a_prompt_beside_a_stream_takes_what_was_predicted() -> None:
    engine, _, _ = engine_of(40, tbt_slo=10.0)
    stream = decoding(engine, [5], 30)
    prompt = engine.submit([100])
    expected = predicted(engine, prompt)
    assert expected == pytest.approx(50.0)
    drive(engine)
    assert prompt.metrics.ttft == pytest.approx(expected, abs=2.0), "a step more or less"
    assert stream.metrics.tokens_out == 30


@pytest.mark.parametrize(("batch", "share"), [(256, 0.2), (1, 0.4)])
def test_streams_that_share_no_steps_take_more(batch: int, share: float) -> None:
    engine, _, _ = engine_of(tbt_slo=10.0, max_decode_batch=batch)
    for first in (5, 105):
        decoding(engine, [first])
    assert predicted(engine, engine.submit([200])) == pytest.approx(4.0 / (1 - share))


def test_streams_that_ask_for_nothing_count_with_the_default() -> None:
    """What they get beyond that is taken from no promise."""
    engine, program, _ = engine_of(20, tbt_slo=None)
    program.seconds = program.decodes.seconds_each = 0.01
    decoding(engine, [5])
    assert predicted(engine, engine.submit([100])) == pytest.approx(0.2 / (1 - 0.02 / 0.2))


def test_streams_that_ask_for_nothing_count_with_what_they_get_if_that_is_less() -> None:
    """A step of 2 s in every 4."""
    engine, _, _ = engine_of(tbt_slo=None)
    decoding(engine, [5])
    assert predicted(engine, engine.submit([100])) == pytest.approx(4.0 / 0.5)
    decoding(engine, [105], tbt_slo=20.0)
    assert predicted(engine, engine.submit([200])) == pytest.approx(4.0 / 0.5), "the shortest of a program"


@pytest.mark.parametrize(
    ("ttft_slo", "stretch", "kept"),
    [
        (150.0, 1.4, True),  # predicted to take 125 s beside the stream, which the stretch counts already
        (110.0, 1.0, True),
        (110.0, 1.2, False),  # can be in time, if it has the device at once
    ],
)
def test_what_streams_take_is_not_counted_twice(ttft_slo: float, stretch: float, kept: bool) -> None:
    """A prompt of 100 s that waits behind one that was promised nothing."""
    engine, _, _ = engine_of(100, tbt_slo=10.0)
    decoding(engine, [5])
    engine.submit([100])
    engine.turn(max_segments=1)
    prompt = engine.submit([200], ttft_slo=ttft_slo)
    engine._driver._hear()
    assert engine._driver.core.jobs[prompt.request_id].cost == pytest.approx(125.0)
    assert engine._driver._affords(stretch) is kept


def test_programs_take_their_shares_each() -> None:
    clock = Clock()
    programs: dict[str, Any] = {name: Generating(clock=clock) for name in ("a", "b")}
    engine = inline(programs, policy="fcfs", tbt_slo=10.0)
    decoding(engine, [5], program="a")
    decoding(engine, [105], program="b", tbt_slo=20.0)
    assert predicted(engine, engine.submit([200], program="a")) == pytest.approx(4.0 / 0.7)


def test_streams_that_ask_for_more_than_the_device_leave_a_part() -> None:
    engine, _, _ = engine_of(tbt_slo=1.0)
    decoding(engine, [5])
    assert predicted(engine, engine.submit([200])) == pytest.approx(4.0 / 0.1)


def test_steps_that_wait_for_prompts_take_nothing_from_them() -> None:
    engine, _, _ = engine_of(tbt_slo=10.0, decode_first=False)
    decoding(engine, [5])
    assert predicted(engine, engine.submit([200])) == pytest.approx(4.0)


def test_when_to_come_again_counts_decode_steps() -> None:
    engine, _, _ = engine_of(tbt_slo=10.0, max_queue=1)
    decoding(engine, [5])
    engine.submit([100])
    engine.turn()
    engine.submit([200])
    with pytest.raises(QueueFullError) as caught:
        engine.submit([300])
    assert caught.value.retry_after == pytest.approx(3.0 / 0.8), "three of four seconds are left"


def test_a_fresh_scheduler_is_told_anew() -> None:
    class Broken(type(make_policy("fcfs"))):  # type: ignore[misc]
        def key(self, request: Any, now: float) -> Any:
            if request.id == "bad":
                raise ValueError("no key")
            return super().key(request, now)

    engine, _, _ = engine_of(policy=Broken(), tbt_slo=10.0)
    decoding(engine, [5])
    bad = engine.submit([900], request_id="bad")
    engine.turn()
    assert bad.metrics.state == "failed"
    assert predicted(engine, engine.submit([200])) == pytest.approx(4.0 / 0.8)

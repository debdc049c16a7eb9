"""Decode steps that ride with prompts: whose tokens are whose, and that leaving a ride loses nothing.

Real models on virtual time, a millisecond for each launch; :func:`rides` makes every step ride that can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fpcompile
from fpcompile.engine import decoding as lane
from fpcompile.engine import rides as riding
from fpcompile.engine.flight import Ride
from fpcompile.engine.handle import Handle
from fpcompile.engine.rides import Offer, fits
from fpcompile.errors import InvalidInputError, RequestCancelledError, SegmentError
from fpcompile.executor.run import Run
from fpcompile.models.zoo import sample_ids
from fpcompile.testing import FakeAsyncDevice
from tests.cpu.memory_support import empty
from tests.cpu.support import model_of, program_of
from tests.cpu.test_engine_fakes import Clock, drive
from tests.cpu.test_generate import own
from tests.cpu.test_sampling import config_of

STREAMS = [sample_ids(n, seed=n) for n in (5, 23, 40)]
PROMPT = sample_ids(30, seed=99)
COUNT = 16


@pytest.fixture
def rides(monkeypatch: pytest.MonkeyPatch) -> list[Ride]:
    """Those that were begun; every step rides that can."""
    begun: list[Ride] = []

    def noted(*arguments: Any) -> Ride:
        begun.append(Ride(*arguments))
        return begun[-1]

    monkeypatch.setattr(lane, "fits", lambda *_: True)
    monkeypatch.setattr(riding, "Ride", noted)
    return begun


class Timed:
    """An engine that is turned by the test; ``at[n]`` is called behind launch n from when it is set."""

    def __init__(self, program: Any, **options: Any) -> None:
        self.clock = Clock()
        self.at: dict[int, Callable[[], object]] = {}
        self.launches = 0
        options = {"policy": "edf", "tbt_slo": 1.0, **options}
        self.engine = fpcompile.Engine(
            program, clock=self.clock, device_thread=False, on_segment=self._behind, **options
        )

    def _behind(self, *_: Any) -> None:
        self.clock.now += 1e-3
        self.launches += 1
        for number in [n for n in self.at if n <= self.launches]:
            self.at.pop(number)()

    def after(self, launches: int, call: Callable[[], object]) -> None:
        """Call it behind so many launches more."""
        self.at[self.launches + launches] = call

    def streams(self, rides: list[Ride]) -> list[Handle]:
        """Three that decode; what rode with their prompts is not in ``rides``."""
        handles = [self.engine.submit(prompt, max_new_tokens=COUNT) for prompt in STREAMS]
        for _ in range(1000):
            if all(handle.metrics.state == "decoding" for handle in handles):
                rides.clear()
                return handles
            self.engine.turn(1)
            self.engine._driver.validate()
        raise AssertionError("they do not decode")

    def finish(self) -> None:
        """Turn until nothing is left."""
        drive(self.engine)
        statistics = self.engine.statistics()
        assert (statistics.paused_bytes, statistics.decoding_bytes) == (0, 0)


def expect(handles: list[Handle], prompts: list[Tensor] = STREAMS) -> None:
    """All tokens, in order, of the unmodified model."""
    for prompt, handle in zip(prompts, handles, strict=True):
        assert list(handle.tokens(0)) == own("qwen3", prompt, COUNT)


@pytest.mark.parametrize(
    ("both", "step", "due", "latest", "deadlines", "rides"),
    [
        (3.0, 2.0, 13.5, 20.0, [], True),
        (3.0, 2.0, 12.9, 20.0, [], False),  # the tokens would be late
        (3.0, 2.0, 16.1, 20.0, [], False),  # the next prompt will do
        (3.0, 2.0, 16.1, 17.9, [], True),  # but its tokens would be late if it were broken off
        (3.0, 2.0, 13.5, 14.9, [], False),  # and so would these
        (3.0, 1.2, 13.5, 20.0, [], False),  # hardly cheaper than by itself
        (3.0, 2.0, 13.5, 20.0, [12.5], False),  # the prompt would be late by it
        (3.0, 2.0, 13.5, 20.0, [14.5], False),  # or would be if it had to begin again
        (3.0, 2.0, 13.5, 20.0, [11.9, 15.1], True),  # it is late anyhow, or is not
    ],
)
def test_a_step_rides_when_that_is_cheaper_and_in_time(
    both: float, step: float, due: float, latest: float, deadlines: list[float], rides: bool
) -> None:
    offer = Offer("default", 2.0, lambda _: both, deadlines)
    assert fits(offer, 10.0, both, step, due, latest) is rides


@pytest.mark.parametrize("generates", [True, False])
@pytest.mark.parametrize("options", [{}, {"kv_blocks": 64, "prefix_cache": True}], ids=["racks", "pool"])
def test_prompt_and_streams_have_the_models_numbers(
    rides: list[Ride], generates: bool, options: dict[str, Any]
) -> None:
    timed = Timed(program_of("qwen3"), **options)
    for _ in range(2 if options else 1):  # the second time the prompt has a prefix
        handles = timed.streams(rides)
        more: dict[str, Any] = {"max_new_tokens": COUNT} if generates else {"logits_to_keep": 3}
        prompt = timed.engine.submit(PROMPT, **more)
        timed.finish()
        assert len(rides) == 1
        expect(handles)
        if generates:
            expect([prompt], [PROMPT])
        else:
            output = model_of("qwen3")(PROMPT, logits_to_keep=3)
            torch.testing.assert_close(prompt.result(0).logits, output.logits, rtol=1e-4, atol=1e-4)
            assert prompt.metrics.numerics == "tolerance"
        assert [handle.metrics.numerics for handle in handles] == ["tolerance"] * 3
    if options:
        timed.engine.close()
        empty(timed.engine)


def test_one_ride_is_one_token_for_each_stream(rides: list[Ride]) -> None:
    timed = Timed(program_of("qwen3"))
    handles = timed.streams(rides)
    before = [len(handle._tokens or ()) for handle in handles]
    prompt = timed.engine.submit(PROMPT, max_new_tokens=COUNT)
    while not len(prompt._tokens or ()):
        timed.engine.turn(1)
    assert [len(handle._tokens or ()) for handle in handles] == [count + 1 for count in before]
    assert len(rides) == 1
    assert prompt.metrics.executed == pytest.approx(1e-3 * len(rides[0].run.joined.schedule))
    timed.finish()
    expect([*handles, prompt], [*STREAMS, PROMPT])


def test_a_single_stream_has_shared_a_launch_too(rides: list[Ride]) -> None:
    timed = Timed(program_of("qwen3"))
    stream = timed.engine.submit(STREAMS[0], max_new_tokens=COUNT)
    while stream.metrics.state != "decoding":
        timed.engine.turn(1)
    prompt = timed.engine.submit(PROMPT)
    timed.finish()
    assert len(rides) == 1
    assert (stream.metrics.numerics, prompt.metrics.numerics) == ("tolerance", "tolerance")
    expect([stream], [STREAMS[0]])


def test_choosing_behind_a_ride_gives_way(rides: list[Ride]) -> None:
    """Members with processors of their own are chosen for one by one; who is urgent does not wait for all."""
    timed = Timed(program_of("qwen3"))
    engine, chosen = timed.engine, list[str]()
    urgent: list[Handle] = []
    armed = False

    def choosing(ids: Tensor, scores: Tensor) -> Tensor:
        if not armed:
            return scores
        if rides and not urgent:
            urgent.append(engine.submit(sample_ids(7), ttft_slo=0.01))
            urgent[0].add_done_callback(lambda _: chosen.append("urgent"))
        if rides:
            chosen.append("choice")
        return scores

    handles = [
        engine.submit(prompt, max_new_tokens=COUNT, logits_processor=[choosing], tbt_slo=10.0)
        for prompt in STREAMS
    ]
    lane_of = engine._driver.lane
    while lane_of.stepping or not all(handle.metrics.state == "decoding" for handle in handles):
        engine.turn(1)
    rides.clear()
    armed = True
    prompt = engine.submit(PROMPT, max_new_tokens=COUNT)
    timed.finish()
    assert chosen[:2] == ["choice", "urgent"]
    expect([*handles, prompt], [*STREAMS, PROMPT])


def test_a_strict_budget_is_kept_by_riding_with_nobody(rides: list[Ride]) -> None:
    timed = Timed(program_of("qwen3"))
    handles = timed.streams(rides)
    prompt = timed.engine.submit(PROMPT, strict_budget=True, max_blocking_ms=1000.0)
    timed.finish()
    assert not rides
    assert prompt.metrics.numerics == "bits"
    expect(handles)


@pytest.mark.parametrize("launches", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"kv_blocks": 64}], ids=["racks", "pool"])
def test_a_ride_that_is_preempted_loses_no_token(
    rides: list[Ride], launches: int, options: dict[str, Any]
) -> None:
    timed = Timed(program_of("qwen3"), **options)
    engine, handles = timed.engine, timed.streams(rides)
    prompt = engine.submit(PROMPT, max_new_tokens=COUNT, ttft_slo=100.0)
    urgent: list[Handle] = []
    timed.after(
        launches, lambda: urgent.append(engine.submit(sample_ids(7), ttft_slo=0.05, max_new_tokens=2))
    )
    timed.finish()
    assert prompt.metrics.preemptions == 1
    assert max(engine.statistics().blocking) <= 1.01e-3, "one launch"
    assert urgent[0].metrics.ttft is not None
    assert prompt.metrics.ttft is not None
    assert engine.now() > prompt.metrics.ttft > urgent[0].metrics.ttft
    assert 1 <= len(rides) <= 2, "the prompt rides once, and so may the urgent one"
    expect([*handles, prompt], [*STREAMS, PROMPT])


@pytest.mark.parametrize("who", ["prompt", "stream", "streams"])
def test_who_is_cancelled_on_a_ride_ends_alone(rides: list[Ride], who: str) -> None:
    timed = Timed(program_of("qwen3"))
    handles = timed.streams(rides)
    prompt = timed.engine.submit(PROMPT, max_new_tokens=COUNT)
    ended = {"prompt": [prompt], "stream": handles[:1], "streams": handles}[who]
    timed.after(1, lambda: [handle.cancel() for handle in ended])
    timed.finish()
    assert rides
    for handle in ended:
        with pytest.raises(RequestCancelledError):
            handle.result(0)
    alive = [(h, p) for h, p in zip([*handles, prompt], [*STREAMS, PROMPT], strict=True) if h not in ended]
    expect([h for h, _ in alive], [p for _, p in alive])


def test_a_step_whose_members_ended_on_the_way_is_forgotten(rides: list[Ride]) -> None:
    """They are drawn for one by one, and the first draw behind the ride leaves some."""
    timed = Timed(program_of("qwen3"))
    config = config_of(do_sample=True)
    drawn = [
        timed.engine.submit(prompt, max_new_tokens=COUNT, generation_config=config, seed=1)
        for prompt in STREAMS
    ]
    lane_of = timed.engine._driver.lane
    while lane_of.stepping or not all(handle.metrics.state == "decoding" for handle in drawn):
        timed.engine.turn(1)
    rides.clear()
    prompt = timed.engine.submit(PROMPT)
    timed.after(1, lambda: [handle.cancel() for handle in drawn])
    timed.finish()
    assert rides
    assert not lane_of.stepping
    assert prompt.result(0).logits.shape[1] == PROMPT.shape[1]


@pytest.mark.parametrize("error", [RuntimeError("broken"), torch.OutOfMemoryError("out of memory")], ids=str)
def test_a_ride_that_fails_is_made_again_by_each_alone(
    rides: list[Ride], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = Timed(program_of("qwen3"))
    handles = timed.streams(rides)
    launch, failed = Run._launch, list[Run]()

    def failing(run: Run, *arguments: Any) -> None:
        if run.tokens == 30 + 3 and run.at == 1:
            failed.append(run)
            raise error
        launch(run, *arguments)

    monkeypatch.setattr(Run, "_launch", failing)
    prompt = timed.engine.submit(PROMPT, max_new_tokens=COUNT)
    timed.finish()
    assert len(failed) == len(rides) == 1, "it does not ride again"
    expect([*handles, prompt], [*STREAMS, PROMPT])


def test_a_prompt_that_always_fails_takes_no_stream_along(
    rides: list[Ride], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = Timed(program_of("qwen3"))
    handles = timed.streams(rides)
    launch = Run._launch

    def failing(run: Run, *arguments: Any) -> None:
        if run.tokens >= 30:
            raise RuntimeError("broken")
        launch(run, *arguments)

    monkeypatch.setattr(Run, "_launch", failing)
    prompt = timed.engine.submit(PROMPT, max_new_tokens=COUNT)
    timed.finish()
    assert len(rides) == 1
    with pytest.raises((RuntimeError, SegmentError), match="broken"):
        prompt.result(0)
    expect(handles)


def test_on_an_asynchronous_device(rides: list[Ride]) -> None:
    """Memory that is given away too early is poisoned there."""
    device = FakeAsyncDevice()
    engine = fpcompile.Engine(
        program_of("qwen3"),
        device=device,
        clock=device.clock,
        device_thread=False,
        policy="edf",
        tbt_slo=1.0,
    )
    handles = [engine.submit(prompt, max_new_tokens=COUNT) for prompt in STREAMS]
    while not all(handle.metrics.state == "decoding" for handle in handles):
        engine.turn(1)
    rides.clear()
    prompt = engine.submit(PROMPT, max_new_tokens=COUNT, ttft_slo=100.0)
    engine.turn(2)
    engine.submit(sample_ids(7), ttft_slo=0.01)
    drive(engine)
    assert rides
    expect([*handles, prompt], [*STREAMS, PROMPT])
    assert device.idle


@pytest.mark.parametrize(
    "options", [{"deterministic": True}, {"piggyback": False}, {"max_decode_batch": 1}], ids=str
)
def test_nothing_rides_where_that_is_not_wanted(rides: list[Ride], options: dict[str, Any]) -> None:
    timed = Timed(program_of("qwen3"), **options)
    handles = timed.streams(rides)
    prompt = timed.engine.submit(PROMPT)
    timed.finish()
    assert not rides
    assert prompt.metrics.numerics == "bits"
    expect(handles)


def test_piggyback_is_a_bool() -> None:
    with pytest.raises(InvalidInputError, match="piggyback"):
        fpcompile.Engine(program_of("qwen3"), piggyback="no", device_thread=False)  # type: ignore[arg-type]

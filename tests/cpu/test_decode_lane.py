"""The decode lane on virtual time: when steps begin, who gives way, who fails, and that no token is lost.

Fake models: a prompt takes a second for each segment, a step as long for each of its two segments. Tokens
count upwards from the prompt's first id, so that a lost, repeated or mixed one shows.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fpcompile.engine import driver
from fpcompile.engine.engine import Engine
from fpcompile.engine.generation import Generation
from fpcompile.engine.handle import Handle
from fpcompile.engine.promises import affordable
from fpcompile.errors import (
    InvalidInputError,
    RequestCancelledError,
    RequestTimeoutError,
    SegmentError,
    UsageError,
)
from fpcompile.executor.decode import Begun, Decoder, Generates, Step
from fpcompile.scheduler.events import Request
from fpcompile.scheduler.job import Job
from fpcompile.scheduler.policy import Policy, make_policy
from fpcompile.scheduler.record import outcomes_of, read_log
from tests.cpu.test_engine_fakes import Clock, FakeProgram, FakeRun, drive, inline, raises

VOCABULARY = 1000


class FakeSampler:
    """The argmax; ``fails_at``: the number of the token that raises."""

    def __init__(
        self, count: int, *, plain: bool = True, fails_at: int | None = None, stop: int = -1
    ) -> None:
        self.max_new_tokens, self.stops, self.plain = count, frozenset({stop}), plain
        self._fails_at, self.taken = fails_at, 0

    def choose(self, logits: Tensor) -> Tensor:
        if self.taken == self._fails_at:
            raise ValueError("inf or nan")
        return logits.argmax()[None]

    def took(self, token: int) -> None:
        self.taken += 1


class FakeDecoder(Decoder):
    """Steps of two segments of ``seconds`` each, however many sequences there are."""

    together = True

    def __init__(self, program: Generating) -> None:
        self.program = program
        self.seconds_each = 1.0
        self.at: dict[int, Callable[[FakeRun], object]] = {}
        """Called while a segment of the next step is executed."""
        self.steps: list[tuple[float, tuple[int, ...]]] = []
        """When each step was made, and of whom (by first id)."""

    def begin(self, input_ids: Any, **inputs: Any) -> Begun:
        options = inputs.pop("options", {})
        run = self.program.start(input_ids, **inputs)
        return Begun(run, torch.tensor([input_ids]), len(input_ids), options)

    def sampler(self, begun: Begun, wishes: Any) -> Any:
        return FakeSampler(wishes.max_new_tokens, **begun.inputs)

    def open(self, begun: Begun, output: Any) -> tuple[dict[str, Any], Tensor]:
        first = int(begun.ids[0, 0])
        return {"name": first, "token": first}, self._after(first)

    def _after(self, token: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(token + 1), VOCABULARY).float()

    def seconds(self, sequences: Sequence[Any], budgets: Any = ()) -> float:
        return 2 * self.seconds_each

    def nbytes(self, sequence: Any) -> int:
        return 100

    def step(self, sequences: Sequence[Any], tokens: Sequence[int], budgets: Any = ()) -> Step:
        clock = self.program.clock
        assert clock is not None
        self.steps.append((clock.now, tuple(sequence["name"] for sequence in sequences)))
        for sequence, token in zip(sequences, tokens, strict=True):
            assert sequence["token"] + 1 == token, "a token was lost, repeated or given to another"
            sequence["token"] = token
        at, self.at = self.at, {}
        model = FakeProgram(2, seconds=self.seconds_each, clock=clock)
        run = FakeRun(model, [0], at)
        rows = torch.stack([self._after(token) for token in tokens])

        def undo() -> None:
            for sequence, token in zip(sequences, tokens, strict=True):
                sequence["token"] = token - 1

        return Step(run, lambda: rows, lambda: self.seconds_each, self.seconds(sequences), undo)


class Generating(FakeProgram):
    """A fake program that generates."""

    def __init__(self, segments: int = 4, **options: Any) -> None:
        super().__init__(segments, **options)
        self.decodes = FakeDecoder(self)

    def decoder(self) -> FakeDecoder:
        return self.decodes


def engine_of(segments: int = 4, **options: Any) -> tuple[Engine, Generating, Clock]:
    clock = Clock()
    program = Generating(segments, clock=clock)
    options = {"policy": "fcfs", "tbt_slo": 1000.0, **options}
    return inline(program, **options), program, clock


def until(engine: Engine, done: Callable[[], bool]) -> None:
    """Turn until something holds; check the invariants on the way."""
    for _ in range(10_000):
        if done():
            return
        engine.turn()
        engine._driver.validate()
    raise AssertionError("it never came about")


def decoding(engine: Engine, ids: list[int], count: int = 50, **options: Any) -> Handle:
    """A request that has its first token."""
    handle = engine.submit(ids, max_new_tokens=count, **options)
    until(engine, lambda: handle.metrics.state == "decoding")
    return handle


def made(handle: Handle) -> list[int]:
    """The tokens so far."""
    return list(handle._tokens or ())


def counting(first: int, count: int) -> list[int]:
    return list(range(first + 1, first + 1 + count))


def test_the_fake_generates() -> None:
    assert isinstance(Generating(), Generates)
    assert not isinstance(FakeProgram(), Generates)


def test_on_an_idle_device_steps_follow_one_another() -> None:
    engine, program, clock = engine_of()
    handle = engine.submit([5], max_new_tokens=4)
    drive(engine)
    assert list(handle.tokens()) == counting(5, 4)
    assert handle.result(0).sequences.tolist() == [[5, *counting(5, 4)]]
    assert clock.now == 4 + 3 * 2, "the first token comes with the prompt"
    metrics = handle.metrics
    assert (metrics.ttft, metrics.tbt_max, metrics.tbt_mean) == (4, 2, 2)
    assert (metrics.tokens_out, metrics.finish_reason, metrics.numerics) == (4, "length", "bits")
    assert metrics.executed == 10
    assert not program.runs[0].released, "its result was made"
    assert engine.statistics().tokens_generated == 4


def test_one_step_serves_all_that_decode() -> None:
    engine, program, _ = engine_of()
    handles = [engine.submit([first], max_new_tokens=3) for first in (100, 200, 300)]
    drive(engine)
    assert [list(h.tokens()) for h in handles] == [counting(n, 3) for n in (100, 200, 300)]
    assert (100, 200, 300) in [members for _, members in program.decodes.steps]
    assert [h.metrics.numerics for h in handles] == ["tolerance"] * 3


@pytest.mark.parametrize(("promised", "ahead"), [(None, 5), (130, 5), (110, 0)])
def test_under_a_prefill_a_step_begins_at_the_latest_cut(promised: float | None, ahead: float) -> None:
    """A token each 10 s of which a step takes 2; a launch of the prefill takes 1: 100 s, 125 beside steps.

    Tokens come half their time ahead, unless the prompt would miss its promise by that: then when they are
    due, and no later, since decode goes first.
    """
    engine, program, _clock = engine_of(100)
    stream = decoding(engine, [5], tbt_slo=10)  # at 100 s: no promise, so 10 s for each token from there
    long = engine.submit([900], ttft_slo=promised)
    until(engine, long.done)
    begins = [begin for begin, _ in program.decodes.steps]
    assert len(begins) >= 8
    # a promise that is lost is no reason to wait
    for number, begin in enumerate(begins[:2] if promised == 110 else begins, start=1):
        end = 100 + 10 * number - ahead
        assert begin + 2 <= end <= begin + 2 + 1, "kept, and no sooner than it had to be"
    assert stream.metrics.tbt_max is not None
    assert stream.metrics.tbt_max <= 3 * 10
    in_time: dict[float | None, bool | None] = {None: None, 130: True, 110: False}
    assert long.metrics.slo_met is in_time[promised]
    assert long.metrics.executed == 100, "the prefill waited, and was not charged"
    drive(engine)
    assert list(stream.tokens()) == counting(5, 50)


@pytest.mark.parametrize("slack", [1.0, 1000.0])
def test_the_mean_between_tokens_is_kept_however_early_the_first_one_came(slack: float) -> None:
    """What `vllm bench serve` counts as TPOT: being ahead of all deadlines is no reason to be slow."""
    engine, _, clock = engine_of(100)
    stream = decoding(engine, [5], tbt_slo=10, ttft_slo=100 + slack)
    clock.now = max(clock.now, 100)
    long = engine.submit([900])
    until(engine, long.done)
    seen = generation(engine, stream)
    assert seen.first is not None
    assert len(seen.tokens) > 8
    assert (seen.last - seen.first) / (len(seen.tokens) - 1) <= 10


def test_a_stream_that_is_ahead_waits_three_times_its_slo_at_most_for_a_promise_to_a_prompt() -> None:
    engine, program, clock = engine_of(100)
    stream = decoding(engine, [5], tbt_slo=10, ttft_slo=1000)  # token j at 1000 + 10 j: far ahead
    clock.now = max(clock.now, 100)
    long = engine.submit([900], ttft_slo=108)
    until(engine, long.done)
    begins = [begin for begin, _ in program.decodes.steps]
    gaps = [b - a for a, b in itertools.pairwise(begins)]
    assert len(gaps) >= 2
    assert set(gaps[:-1]) <= {28.0, 29.0, 30.0}, (
        "then so little is left of the prompt that its promise is safe"
    )
    assert stream.metrics.tbt_max is not None
    assert 28 <= stream.metrics.tbt_max <= 30
    assert long.metrics.slo_met


def test_streams_that_ask_for_nothing_wait_two_steps_and_a_launch_at_most() -> None:
    """A step takes 2 s, a launch may take 1.5: due 5.5 s behind the last token, begun at the latest cut."""
    engine, program, _ = engine_of(100, tbt_slo=None, max_blocking_ms=1500.0)
    stream = decoding(engine, [5])
    long = engine.submit([900])
    until(engine, long.done)
    begins = [begin for begin, _ in program.decodes.steps]
    gaps = [b - a for a, b in itertools.pairwise(begins)]
    assert len(gaps) > 30
    assert set(gaps) == {5.0}, "the prompt has 3 s behind each step: one more would be too late"
    assert long.metrics.executed == 100
    drive(engine)
    assert (stream.metrics.tbt_slo, stream.metrics.tbt_max) == (None, 5.0)
    assert list(stream.tokens()) == counting(5, 50)


def test_what_streams_wait_at_most_counts_the_steps_of_all() -> None:
    """Two that share no step: a token of each takes 4 s, so that 9.5 s are the most."""
    engine, program, _ = engine_of(60, tbt_slo=None, max_blocking_ms=1500.0, max_decode_batch=1)
    streams = [decoding(engine, [first], 100) for first in (100, 300)]
    begun = len(program.decodes.steps)
    long = engine.submit([900])
    until(engine, long.done)
    for first in (100, 300):
        times = [begin for begin, members in program.decodes.steps[begun:] if members == (first,)]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert len(gaps) > 5
        assert 5.5 < max(gaps) <= 9.5
    drive(engine)
    assert [list(stream.tokens()) for stream in streams] == [counting(first, 100) for first in (100, 300)]


def quick(segments: int, **options: Any) -> tuple[Engine, Generating]:
    """Launches of 10 ms, and steps of two of them."""
    engine, program, _ = engine_of(segments, tbt_slo=None, max_blocking_ms=10.0, **options)
    program.seconds = program.decodes.seconds_each = 0.01
    return engine, program


@pytest.mark.parametrize(("ttft_slo", "turns"), [(None, True), (10.0, True), (0.23, False)])
def test_promised_first_tokens_go_before_streams_that_ask_for_nothing(
    ttft_slo: float | None, turns: bool
) -> None:
    engine, _ = quick(20)
    stream = decoding(engine, [5])
    prompt = engine.submit([900], ttft_slo=ttft_slo)
    drive(engine)
    assert prompt.metrics.slo_met is (None if ttft_slo is None else True)
    longest = stream.metrics.tbt_max
    assert longest is not None
    assert (longest <= 0.05 + 1e-9) is turns, "two steps and a launch, or all of the prompt"
    assert longest < 0.6, "as one that asked for 0.2 s, at most"


def generation(engine: Engine, handle: Handle) -> Generation:
    """What a request that decodes has made so far."""
    ticket = engine._driver.lane.get(handle.request_id)
    assert ticket is not None
    assert ticket.generation is not None
    return ticket.generation


def beside_each_other(programs: int, prompt: int) -> tuple[Engine, Handle, Handle, list[str]]:
    """A stream that asks for nothing and one that asks for 0.1 s; no step serves both. Names of programs."""
    clock = Clock()
    models = {name: Generating(prompt, seconds=0.01, clock=clock) for name in "ab"[:programs]}
    for program in models.values():
        program.decodes.seconds_each = 0.01
    batch = {"max_decode_batch": 1} if programs == 1 else {}
    names = list(models)
    engine = inline(dict(models), clock, policy="fcfs", max_blocking_ms=10.0, **batch)
    plain = decoding(engine, [5], 1000, program=names[0])
    asked = decoding(engine, [300], 500, program=names[-1], tbt_slo=0.1)
    return engine, plain, asked, names


@pytest.mark.parametrize("programs", [1, 2])
def test_streams_that_ask_for_nothing_keep_no_promised_token_waiting(programs: int) -> None:
    """The prompt takes 1 s, and 1.25 beside the stream that asks: in turn with both it would be late."""
    engine, plain, asked, names = beside_each_other(programs, 100)
    promised = generation(engine, asked)
    late: list[float] = []
    prompt = engine.submit([900], program=names[0], ttft_slo=1.4)
    before = len(made(plain))
    while not prompt.done():
        due, count = promised.due, len(promised.tokens)
        engine.turn(max_segments=1)
        if len(promised.tokens) > count:
            late.append(promised.last - due)
    steps = len(made(plain)) - before
    assert prompt.metrics.slo_met
    assert steps >= 1, "every 0.6 s or so"
    assert len(late) > 10
    assert sum(lateness > 1e-9 for lateness in late) <= 2 * steps, "in time, but for those beside the other's"
    assert max(late) <= 0.02 + 0.01 + 1e-9, "never later than a step and a launch"
    drive(engine)
    assert plain.metrics.tbt_max is not None
    assert plain.metrics.tbt_max < 0.65


def test_a_step_of_who_asks_for_nothing_leaves_time_for_one_that_was_promised() -> None:
    """It gives way to a prompt, but not for so long that the step behind it comes late."""
    engine, plain, asked, names = beside_each_other(1, 100)
    promised, lane = generation(engine, asked), engine._driver.lane
    for _ in range(10):
        engine.turn(max_segments=1)
        step = lane._step
        if step is not None and step.tickets[0].id == plain.request_id:
            break
    else:
        raise AssertionError("the other one has no steps")
    prompt = engine.submit([900], program=names[0], ttft_slo=1.4)
    due, count = promised.due, len(promised.tokens)
    until(engine, lambda: len(promised.tokens) > count)
    assert promised.last <= due + 0.01 + 1e-9, "a launch, which the prompt makes behind each step"
    until(engine, prompt.done)
    assert prompt.metrics.slo_met


def test_promises_to_prompts_that_wait_count_as_well() -> None:
    """Each takes 0.2 s: in turn with the stream both would take twice as long, and one be late."""
    engine, _ = quick(20)
    decoding(engine, [5])
    prompts = [engine.submit([first], ttft_slo=0.5) for first in (800, 900)]
    drive(engine)
    assert [prompt.metrics.slo_met for prompt in prompts] == [True, True]


@pytest.mark.parametrize(
    ("left", "deadlines", "stretch", "kept"),
    [
        ([1.0, 1.0], [2.0, 4.0], 2.0, True),
        ([1.0, 1.0], [4.0, 2.0], 2.0, True),
        ([1.0, 1.0], [2.0, 3.9], 2.0, False),
        ([1.0, 1.0], [0.9, 2.0], 2.0, True),  # one is late anyhow
        ([1.0, 9.0], [2.0, math.inf], 2.0, True),
        ([0.0] * 65, [9.0] * 65, 1.0, False),
        ([], [], 2.0, True),
    ],
)
def test_what_can_be_spared(left: list[float], deadlines: list[float], stretch: float, kept: bool) -> None:
    jobs = promising(left, deadlines)
    assert affordable(jobs, 0.0, stretch, lambda job: left[job.sequence]) is kept


def promising(left: list[float], deadlines: list[float]) -> list[Job]:
    return [
        Job(Request(str(number), 0.0, deadline, 1, seconds, slo=deadline), number)
        for number, (seconds, deadline) in enumerate(zip(left, deadlines, strict=True))
    ]


def test_no_more_promises_are_looked_at_than_can_be_kept() -> None:
    jobs = iter(promising([1.0] * 1000, [9.0] * 1000))
    assert not affordable(jobs, 0.0, 1.0, lambda job: 0.0)
    assert len(list(jobs)) == 1000 - 65


def test_what_is_not_to_spare_is_not_asked_again_at_every_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of 1 ms: one asks in ten, and one behind an event."""
    engine, program = quick(200)
    program.seconds = program.decodes.seconds_each = 0.001
    decoding(engine, [5], 500)
    asked: list[float] = []

    def counted(jobs: Iterable[Job], now: float, *rest: Any) -> bool:
        asked.append(now)
        return False

    monkeypatch.setattr(driver, "affordable", counted)
    arrives = engine.now() + 0.1
    prompt = engine.submit([900], at={100: lambda run: engine.submit([800])})
    until(engine, prompt.done)
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert len(gaps) > 15
    soon = [before for before, gap in zip(asked, gaps, strict=False) if gap < 0.01 - 1e-9]
    assert len(soon) <= 1
    assert any(arrives <= time <= arrives + 0.003 for time in asked), "what was promised is another thing now"


def test_members_are_not_looked_at_again_at_every_cut() -> None:
    """Some ask for a time between tokens, some for none; nothing changes but the time."""
    engine, program = quick(200)
    program.seconds = program.decodes.seconds_each = 0.001
    for number in range(4):
        decoding(engine, [100 * number], 500, tbt_slo=0.5 if number % 2 else None)
    prompt = engine.submit([900], ttft_slo=1000.0)
    until(engine, lambda: prompt.metrics.state == "running")
    lane, flight = engine._driver.lane, engine._driver._flight
    assert flight is not None
    looked: list[int] = []

    class Looked(dict[str, Any]):
        def values(self) -> Any:
            looked.append(len(self))
            return super().values()

    lane._members = Looked(lane._members)
    lane._changed()
    clock: Any = engine._clock
    for _ in range(50):
        lane.lets(flight.load, flight.load.next_launch)
        clock.advance(0.05)
    assert 0 < len(looked) < 12
    engine.close(drain=False)


def test_streams_do_not_starve_where_launches_have_no_bound() -> None:
    """A launch of any length is none that a stream waits for: twice its step of 20 ms is left."""
    engine, program, _ = engine_of(100, tbt_slo=None, max_blocking_ms=math.inf)
    program.seconds = program.decodes.seconds_each = 0.01
    stream = decoding(engine, [5], 500)
    prompt = engine.submit([900])
    until(engine, prompt.done)
    assert stream.metrics.tbt_max is not None
    assert stream.metrics.tbt_max <= 0.04 + 1e-9
    assert prompt.metrics.executed == pytest.approx(1.0)


def test_blocking_is_not_counted_from_before_the_preemption_was_asked_for() -> None:
    """The scheduler hears of what streams take as of the time of the last event, long ago."""
    engine, _, _ = engine_of(100, policy="s-edf", tbt_slo=10.0)
    stream = decoding(engine, [5], 4)
    urgent: list[Handle] = []
    long = engine.submit(
        [900], ttft_slo=1000, at={50: lambda run: urgent.append(engine.submit([800], ttft_slo=110))}
    )
    until(engine, lambda: bool(urgent) and urgent[0].done())
    assert stream.done(), "its share is free, and nobody was told before"
    assert long.metrics.preemptions == 1
    assert engine.statistics().blocking == (0.0,)


def test_late_streams_leave_the_prefill_a_launch_behind_each_step() -> None:
    """A step of 2 s cannot keep 1 s between tokens: the prefill still comes to its end."""
    engine, program, _ = engine_of(10)
    stream = decoding(engine, [5], tbt_slo=1)
    long = engine.submit([900])
    until(engine, long.done)
    assert long.metrics.executed == 10
    assert len(program.decodes.steps) >= 9, "a step between any two launches"
    drive(engine)
    assert list(stream.tokens()) == counting(5, 50)


@pytest.mark.parametrize(("decode_first", "in_time"), [(True, False), (False, True)])
def test_who_yields_is_a_setting(decode_first: bool, in_time: bool) -> None:
    """A prefill of 20 s that has 21, and a stream that is due in between."""
    engine, _program, _clock = engine_of(20, decode_first=decode_first)
    stream = decoding(engine, [5], tbt_slo=3)
    urgent = engine.submit([900], ttft_slo=21 + 2)  # a step of 2 s may be under way
    until(engine, urgent.done)
    assert urgent.metrics.slo_met is in_time
    drive(engine)
    assert stream.metrics.tbt_max is not None
    assert (stream.metrics.tbt_max > 10) is in_time, "one of both had to wait"
    assert list(stream.tokens()) == counting(5, 50)


def test_a_step_gives_way_to_a_prefill_that_comes_meanwhile() -> None:
    engine, program, _clock = engine_of(4)
    stream = decoding(engine, [5], tbt_slo=100)
    late: list[Handle] = []
    program.decodes.at = {0: lambda run: late.append(engine.submit([900]))}
    until(engine, lambda: bool(late))
    assert engine._driver.lane.stepping, "a step is under way"
    until(engine, late[0].done)
    assert late[0].metrics.ttft is not None
    assert late[0].metrics.ttft <= 1 + 4, "the device was its own at the next cut"
    assert engine._driver.lane.stepping
    drive(engine)
    assert list(stream.tokens()) == counting(5, 50)
    assert late[0].metrics.executed == 4


def test_a_step_that_is_due_does_not_give_way() -> None:
    engine, program, _clock = engine_of(4)
    stream = decoding(engine, [5], tbt_slo=0.7)  # due 2.1 s behind the last one; a step takes 2
    late: list[Handle] = []
    program.decodes.at = {0: lambda run: late.append(engine.submit([900]))}
    before = len(made(stream))
    until(engine, lambda: len(made(stream)) > before)
    assert late[0].metrics.started is not None or late[0].metrics.state == "waiting"
    assert program.runs[-1].executed == [], "the step went first"
    drive(engine)
    assert late[0].metrics.state == "completed"


def test_cancelled_in_the_middle_of_a_step() -> None:
    engine, program, _ = engine_of()
    first, other = (engine.submit([n], max_new_tokens=20) for n in (100, 200))
    until(engine, lambda: len(made(first)) > 2 and len(made(other)) > 2)
    program.decodes.at = {0: lambda run: first.cancel()}
    drive(engine)
    assert list(other.tokens()) == counting(200, 20)
    assert first.metrics.state == "cancelled"
    with pytest.raises(RequestCancelledError):
        list(first.tokens())
    assert made(first) == counting(100, len(made(first)))


def test_a_step_that_serves_nobody_any_more_is_dropped() -> None:
    engine, program, clock = engine_of()
    handle = decoding(engine, [5])
    program.decodes.at = {0: lambda run: handle.cancel()}
    drive(engine)
    assert handle.metrics.state == "cancelled"
    assert not engine._driver.lane.stepping
    assert len(engine._driver.lane) == 0
    assert clock.now == 4 + 2 * (len(made(handle)) - 1) + 1, "the second segment was not launched"
    assert engine.statistics().decoding_bytes == 0


@pytest.mark.parametrize("plain", [True, False])
def test_a_step_that_raises_ends_its_members_and_nobody_else(plain: bool) -> None:
    clock = Clock()
    programs = {name: Generating(clock=clock) for name in ("a", "b")}
    engine = inline(dict(programs), clock, policy="fcfs", tbt_slo=1000.0)
    doomed = [engine.submit([n], program="a", max_new_tokens=9, options={"plain": plain}) for n in (100, 200)]
    other = engine.submit([300], program="b", max_new_tokens=9)
    until(engine, lambda: all(len(made(h)) > 2 for h in (*doomed, other)))
    programs["a"].decodes.at = {1: raises}
    drive(engine)
    assert list(other.tokens()) == counting(300, 9)
    errors = []
    for handle in doomed:
        with pytest.raises(SegmentError) as caught:
            handle.result(0)
        errors.append(caught.value)
    assert errors[0] is not errors[1], "each has an error of its own"
    assert [h.metrics.state for h in doomed] == ["failed", "failed"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_step_without_memory_is_made_once_more(times: int) -> None:
    engine, program, _ = engine_of()
    handles = [engine.submit([n], max_new_tokens=9) for n in (100, 200)]
    until(engine, lambda: all(len(made(handle)) > 2 for handle in handles))
    failures = iter(range(times))

    def short(run: FakeRun) -> None:
        program.decodes.at = {0: short}
        if next(failures, None) is not None:
            raise MemoryError("no memory")

    program.decodes.at = {1: short}
    drive(engine)
    if times == 1:
        assert [list(h.tokens()) for h in handles] == [counting(n, 9) for n in (100, 200)]
    else:
        assert [h.metrics.state for h in handles] == ["failed", "failed"]


def test_a_step_that_cannot_be_made_ends_its_members() -> None:
    engine, program, _ = engine_of()
    handle = decoding(engine, [5])

    def broken(*arguments: Any) -> Step:
        raise ValueError("no variant")

    program.decodes.step = broken  # type: ignore[method-assign, assignment]
    drive(engine)
    with pytest.raises(ValueError, match="no variant"):
        handle.result(0)


def test_a_sampler_that_raises_ends_its_own_request() -> None:
    engine, _, _ = engine_of()
    good = engine.submit([100], max_new_tokens=9)
    at_once = engine.submit([200], max_new_tokens=9, options={"plain": False, "fails_at": 0})
    later = engine.submit([300], max_new_tokens=9, options={"plain": False, "fails_at": 3})
    also = engine.submit([400], max_new_tokens=9, options={"plain": False})
    drive(engine)
    assert list(good.tokens()) == counting(100, 9)
    assert list(also.tokens()) == counting(400, 9)
    for handle, count in ((at_once, 0), (later, 3)):
        assert made(handle) == counting(made(handle)[0] - 1 if count else 0, count)
        with pytest.raises(ValueError, match="inf or nan"):
            handle.result(0)


def test_an_end_of_sequence_token_ends_it() -> None:
    engine, _, _ = engine_of()
    handle = engine.submit([5], max_new_tokens=50, options={"stop": 8})
    drive(engine)
    assert list(handle.tokens()) == [6, 7, 8]
    assert handle.metrics.finish_reason == "stop"


def test_a_batch_is_bounded_and_those_that_are_due_go_first() -> None:
    engine, program, _ = engine_of(max_decode_batch=2)
    handles = [engine.submit([n], max_new_tokens=10, tbt_slo=30) for n in (100, 200, 300)]
    drive(engine)
    assert [list(h.tokens()) for h in handles] == [counting(n, 10) for n in (100, 200, 300)]
    assert max(len(members) for _, members in program.decodes.steps) == 2
    contended = [members for _, members in program.decodes.steps if len(members) == 2][:6]
    assert {n for members in contended[:2] for n in members} == {100, 200, 300}, "nobody is left out"


def test_programs_take_turns_by_what_is_due() -> None:
    clock = Clock()
    programs = {name: Generating(clock=clock) for name in ("a", "b")}
    engine = inline(dict(programs), clock, policy="fcfs", tbt_slo=1000.0)
    handles = [engine.submit([n], program=p, max_new_tokens=8) for n, p in ((100, "a"), (200, "b"))]
    drive(engine)
    assert [list(h.tokens()) for h in handles] == [counting(100, 8), counting(200, 8)]


def test_a_request_whose_time_is_over_while_it_decodes() -> None:
    engine, _, clock = engine_of()
    handle = engine.submit([5], max_new_tokens=500, timeout=20)
    drive(engine)
    with pytest.raises(RequestTimeoutError):
        handle.result(0)
    assert 20 <= clock.now <= 22


def test_a_scheduler_that_fails_leaves_the_streams_alone() -> None:
    class Broken(type(make_policy("fcfs"))):  # type: ignore[misc]
        """Refuses the request with id ``bad``."""

        def key(self, request: Any, now: float) -> Any:
            if request.id == "bad":
                raise ValueError("no key")
            return super().key(request, now)

    policy = Broken()
    assert isinstance(policy, Policy)
    engine, _, _ = engine_of(policy=policy)
    stream = decoding(engine, [5], 20)
    bad = engine.submit([900], request_id="bad")
    drive(engine)
    assert bad.metrics.state == "failed"
    assert list(stream.tokens()) == counting(5, 20)


def test_closing_lets_generations_finish_or_cancels_them() -> None:
    engine, _, _ = engine_of()
    handle = decoding(engine, [5], 10)
    engine.close()
    assert list(handle.tokens()) == counting(5, 10)
    engine, _, _ = engine_of()
    handle = decoding(engine, [5], 10)
    engine.close(drain=False)
    assert handle.metrics.state == "cancelled"
    assert len(engine._driver.lane) == 0


def test_hosts_that_turn_launch_by_launch_see_steps_too() -> None:
    engine, _program, clock = engine_of()
    handle = decoding(engine, [5], 3)
    before = clock.now
    assert engine.turn(max_segments=1)
    assert clock.now == before + 1, "one segment of the step"
    drive(engine)
    assert list(handle.tokens()) == counting(5, 3)


def test_quotas_of_a_policy_hold_across_steps() -> None:
    """A flight that lends the device goes on with what is left of its launch."""
    engine, _program, _ = engine_of(12, policy="layered:3")
    stream = decoding(engine, [5], tbt_slo=1)
    others = [engine.submit([n]) for n in (100, 200)]
    drive(engine)
    assert [h.result(0) for h in others] == [100, 200]
    assert list(stream.tokens()) == counting(5, 50)


def test_what_ended_holds_nothing() -> None:
    engine, _, _ = engine_of()
    handles = [engine.submit([n], max_new_tokens=5) for n in (100, 200)]
    tickets = engine._registry.live()
    until(engine, lambda: all(handle.metrics.state == "decoding" for handle in handles))
    assert engine.statistics().decoding_bytes == 2 * 100
    handles[1].cancel()
    drive(engine)
    assert [ticket.generation and ticket.generation.sequence for ticket in tickets] == [None, None]
    assert engine.statistics().decoding_bytes == 0


def test_the_log_of_decisions_knows_prompts_only(tmp_path: Path) -> None:
    engine, _, _ = engine_of(record=tmp_path / "log.jsonl")
    handles = [engine.submit([n], max_new_tokens=5, ttft_slo=50) for n in (100, 200)]
    drive(engine)
    engine.close()
    outcomes = outcomes_of(read_log(tmp_path / "log.jsonl"))
    assert [o.ttft for o in outcomes] == [handle.metrics.ttft for handle in handles]


def test_the_timeline_shows_decode_steps() -> None:
    engine, _, _ = engine_of()
    handle = engine.submit([5], max_new_tokens=4)
    drive(engine)
    timeline = engine.timeline()
    steps = [span for span in timeline.spans if span.kind == "decode"]
    assert steps
    assert {span.lane for span in steps} == {handle.request_id}
    assert sum(span.end - span.start for span in steps) == 3 * 2
    (first,) = [mark for mark in timeline.marks if mark.kind == "first_token"]
    assert first.time == 4


@pytest.mark.parametrize(
    "wrong",
    [{"tbt_slo": 0}, {"tbt_slo": "x"}, {"max_decode_batch": 0}, {"decode_first": 1}],
    ids=str,
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        engine_of(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"max_new_tokens": 3, "tbt_slo": -1}, "tbt_slo"),
        ({"tbt_slo": 1}, "tbt_slo"),
        ({"seed": 1}, "seed"),
        ({"max_new_tokens": 3, "seed": 1.5}, "seed"),
        ({"max_new_tokens": 3, "generation_config": {}}, "generation_config"),
        ({"max_new_tokens": 3, "logits_processor": "x"}, "logits_processor"),
    ],
    ids=str,
)
def test_wrong_submissions_are_refused(wrong: dict[str, Any], message: str) -> None:
    engine, _, _ = engine_of()
    with pytest.raises(InvalidInputError, match=message):
        engine.submit([5], **wrong)
    assert len(engine._registry) == 0


def test_a_program_that_does_not_generate_is_refused() -> None:
    clock = Clock()
    engine = inline(FakeProgram(clock=clock))
    with pytest.raises(InvalidInputError, match="does not generate"):
        engine.submit([5], max_new_tokens=3)
    handle = engine.submit([5])
    with pytest.raises(UsageError, match="makes no tokens"):
        handle.tokens()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", ["fcfs", "s-edf", "fpcompile", "layered:2"])
def test_random_traffic_loses_mixes_and_repeats_nothing(seed: int, policy: str) -> None:
    draw = random.Random(seed)
    engine, program, _clock = engine_of(
        draw.randint(1, 8), policy=policy, max_decode_batch=draw.choice([1, 2, 256]),
        decode_first=draw.random() < 0.5,
    )  # fmt: skip
    program.decodes.seconds_each = draw.choice([0.1, 1.0])
    handles: list[tuple[Handle, int, int]] = []
    for number in range(1, 40):
        if draw.random() < 0.7:
            first, count = number * 20, draw.randint(1, 15)
            plain = draw.random() < 0.5
            handles.append((
                engine.submit(
                    [first] * draw.randint(1, 3), max_new_tokens=count, ttft_slo=draw.choice([5, 50, 500]),
                    tbt_slo=draw.choice([0.5, 3, 30]), options={"plain": plain},
                ),
                first, count,
            ))  # fmt: skip
        else:
            engine.submit([7] * draw.randint(1, 4), ttft_slo=draw.choice([3, 30]))
        if handles and draw.random() < 0.3:
            draw.choice(handles)[0].cancel()
        for _ in range(draw.randint(0, 12)):
            engine.turn(max_segments=draw.choice([1, 3, None]))
            engine._driver.validate()
    drive(engine)
    for handle, first, count in handles:
        tokens, state = made(handle), handle.metrics.state
        assert state in ("completed", "cancelled")
        assert tokens == counting(first, len(tokens))
        assert len(tokens) == count or state == "cancelled"
    statistics = engine.statistics()
    assert (statistics.decoding, statistics.decoding_bytes, len(engine._driver.lane)) == (0, 0, 0)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("what", ["step", "open"])
def test_what_cannot_be_made_without_memory_is_made_once_more(what: str, times: int) -> None:
    engine, program, _ = engine_of()
    first = engine.submit([100], max_new_tokens=9)
    until(engine, lambda: len(made(first)) > 2)
    make, failures = getattr(program.decodes, what), iter(range(times))

    def short(*arguments: Any) -> Any:
        if next(failures, None) is not None:
            raise MemoryError("no memory")
        return make(*arguments)

    setattr(program.decodes, what, short)
    second = engine.submit([200], max_new_tokens=9)
    drive(engine)
    doomed = (first, second) if what == "step" else (second,)
    for handle, token in ((first, 100), (second, 200)):
        if times == 2 and handle in doomed:
            with pytest.raises(MemoryError):
                handle.result(0)
        else:
            assert list(handle.tokens()) == counting(token, 9)

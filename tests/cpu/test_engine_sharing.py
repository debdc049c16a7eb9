"""Packs, chunks and steps of slices in an engine: everybody gets the unmodified model's own result."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.engine.engine import Engine
from fpcompile.errors import InvalidInputError, RequestCancelledError, SegmentError
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.runahead import DEFAULT_WINDOW
from fpcompile.executor.slices import Sliced
from fpcompile.models.zoo import sample_ids
from fpcompile.scheduler import Grain, Launch, make_policy
from fpcompile.scheduler.policies.orders import Edf
from fpcompile.scheduler.record import differences, outcomes_of, read_log
from fpcompile.testing import FakeAsyncDevice
from tests.cpu.support import Outcome, model_of, outcome, program_of, reference
from tests.cpu.test_engine_fakes import FakeProgram, drive
from tests.cpu.test_together import close

SHARING = ["flowprefill", "fpcompile:pack=300", "chunked:16", "chunked:24,s-edf", "vllm:64", "vllm:64,16"]
LENGTHS = (90, 12, 40, 5, 33)


def turned(policy: str, **options: Any) -> Engine:
    return Engine(program_of("qwen3"), policy=policy, device_thread=False, **options)


def expected(length: int, **arguments: Any) -> Outcome:
    return reference(model_of("qwen3"), sample_ids(length, seed=length), **arguments)


def submit(engine: Engine, length: int, **more: Any) -> Any:
    return engine.submit(sample_ids(length, seed=length), **{"ttft_slo": 60.0, **more})


def launches(path: Path) -> list[Launch]:
    return [c for _, commands in read_log(path).steps for c in commands if isinstance(c, Launch)]


@pytest.mark.slow
@pytest.mark.parametrize("policy", SHARING)
def test_everybody_gets_the_models_own_result(policy: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    engine = turned(policy, record=path)
    handles = [submit(engine, LENGTHS[0])]
    engine.turn()  # it is under way when the others come
    handles += [submit(engine, length, logits_to_keep=1) for length in LENGTHS[1:]]
    drive(engine)
    engine.close()
    for handle, length in zip(handles, LENGTHS, strict=True):
        got = outcome(handle.result(0))
        close(got, expected(length, **({} if length == LENGTHS[0] else {"logits_to_keep": 1})))
        metrics = handle.metrics
        assert metrics.state == "completed"
        assert 0 < metrics.executed <= metrics.ttft
        alone = policy in ("flowprefill", "fpcompile:pack=300") and length == LENGTHS[0]
        assert metrics.numerics == ("bits" if alone else "tolerance")
    log = read_log(path)
    assert differences(log) == [], "what the predictor answered is in the log"
    assert [one.ttft is not None for one in outcomes_of(log)] == [True] * len(LENGTHS)
    made = launches(path)
    if policy == "flowprefill" or policy.startswith("fpcompile"):
        assert max(len(launch.requests) for launch in made) >= 4, "those that waited were packed"
        assert engine.statistics().completed == len(LENGTHS)
    if policy.startswith("vllm"):
        limit = int(policy.split(":")[1].rsplit(",", maxsplit=1)[-1])
        assert all(sum(launch.tokens or ()) <= 64 for launch in made)
        assert all(max(launch.tokens or ()) <= limit for launch in made)
        assert any(len(launch.requests) > 1 for launch in made)


@pytest.mark.slow
def test_a_chunked_run_stops_behind_chunks_and_nowhere_else() -> None:
    seen: list[str] = []
    engine = turned("chunked:16,edf", on_segment=lambda run, part, a, b: seen.append(part.name))
    slow = submit(engine, 40)
    engine.turn()
    urgent = submit(engine, 5, ttft_slo=1.0)
    drive(engine)
    assert seen == ["tokens 0 to 16", "tokens 0 to 5", "tokens 16 to 32", "tokens 32 to 40"]
    assert slow.metrics.preempted_by == (urgent.request_id,)
    close(outcome(slow.result(0)), expected(40))
    close(outcome(urgent.result(0)), expected(5))


def _packed(engine: Engine, path: Path, *more: dict[str, Any]) -> list[Any]:
    """A long prompt that is cancelled, so that those behind it become one pack, which is begun."""
    first = submit(engine, 120)
    engine.turn()
    handles = [submit(engine, 20 + i, **terms) for i, terms in enumerate(more)]
    first.cancel()
    while not any(handle.metrics.started for handle in handles):
        engine.turn()
    assert launches(path)[-1].requests == tuple(handle.request_id for handle in handles)
    return handles


@pytest.mark.slow
@pytest.mark.parametrize("gone", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_members_of_a_pack_can_be_cancelled_and_the_others_go_on(
    gone: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    engine = turned("flowprefill", record=path)
    handles = _packed(engine, path, {}, {}, {})
    for number in gone:
        assert handles[number].cancel()
    drive(engine)
    for number, handle in enumerate(handles):
        if number in gone:
            with pytest.raises(RequestCancelledError):
                handle.result(0)
        else:
            close(outcome(handle.result(0)), expected(20 + number))
    assert engine.statistics().cancelled == len(gone) + 1
    assert len(engine._registry) == 0
    close(outcome(_one(engine, 9)), expected(9))
    engine.close()
    assert differences(read_log(path)) == []


def _one(engine: Engine, length: int) -> Any:
    handle = submit(engine, length)
    drive(engine)
    return handle.result(0)


@pytest.mark.slow
def test_a_pack_is_preempted_as_one_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    engine = turned("flowprefill", record=path)
    handles = _packed(engine, path, {}, {})
    urgent = submit(engine, 6, ttft_slo=10.0)
    engine.turn()
    assert [handle.metrics.state for handle in handles] == ["paused", "paused"]
    assert engine.statistics().paused_bytes > 0
    assert handles[0].cancel(), "the one that the pack is named after"
    drive(engine)
    assert engine.statistics().preemptions == 1
    assert handles[1].metrics.preempted_by == (urgent.request_id,)
    close(outcome(handles[1].result(0)), expected(21))
    close(outcome(urgent.result(0)), expected(6))
    assert launches(path)[-1].requests == tuple(handle.request_id for handle in handles)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["flowprefill", "vllm:500", "chunked:8"])
def test_a_launch_that_fails_fails_its_members_each_with_an_error_of_its_own(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.jsonl"
    engine = turned(policy, record=path)
    close(outcome(_one(engine, 9)), expected(9))
    handles = [submit(engine, 120), *(submit(engine, 20 + i) for i in range(3))]
    engine.turn()
    program = program_of("qwen3")
    assert isinstance(program, PackedProgram)
    call = program.attention[1]
    with monkeypatch.context() as patch:

        def broken(*_: object) -> None:
            raise ValueError("inf or nan")

        patch.setattr(type(call), "attend", broken)
        drive(engine)
    errors = []
    for handle in handles:
        with pytest.raises(SegmentError, match="inf or nan") as caught:
            handle.result(0)
        errors.append(caught.value)
        assert isinstance(caught.value.__cause__, ValueError)
    assert len({id(error) for error in errors}) == len(handles)
    close(outcome(_one(engine, 9)), expected(9))
    engine.close()
    assert differences(read_log(path)) == []


@pytest.mark.slow
@pytest.mark.parametrize("alone", [True, False])
def test_a_request_of_a_step_can_be_cancelled(alone: bool) -> None:
    engine = turned("vllm:64,16")
    handles = [submit(engine, 50), *([] if alone else [submit(engine, 40)])]
    for _ in range(3):
        engine.turn()
    assert handles[0].cancel()
    drive(engine)
    with pytest.raises(RequestCancelledError):
        handles[0].result(0)
    if not alone:
        close(outcome(handles[1].result(0)), expected(40))
    assert len(engine._registry) == 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["flowprefill", "vllm:64,16", "chunked:16"])
def test_inputs_of_all_kinds_share(policy: str) -> None:
    model, engine = model_of("qwen3"), turned(policy)
    ids, mask = sample_ids(24, seed=3).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        cache = model(input_ids=sample_ids(20, seed=1), use_cache=True).past_key_values
    more = sample_ids(8, seed=2)
    first = submit(engine, 70)
    engine.turn()
    padded = engine.submit(ids, attention_mask=mask, ttft_slo=60.0)
    continued = engine.submit(more, past_key_values=cache, ttft_slo=60.0)
    bare = submit(engine, 10, use_cache=False, max_blocking_ms=5.0)
    drive(engine)
    close(outcome(first.result(0)), expected(70))
    close(outcome(continued.result(0)), reference(model, more, past_key_values=cache))
    assert bare.result(0).past_key_values is None
    rows = padded.result(0)
    close(Outcome(rows.logits[:1, 4:], ()), Outcome(reference(model, ids[:1, 4:]).logits, ()))
    close(Outcome(rows.logits[1:], ()), Outcome(reference(model, ids[1:]).logits, ()))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["flowprefill", "vllm:64,16", "chunked:16"])
def test_nothing_is_freed_too_early_on_an_asynchronous_device(policy: str) -> None:
    device = FakeAsyncDevice()
    engine = turned(policy, device=device, clock=device.clock)
    handles = [submit(engine, 90)]
    engine.turn()
    handles += [submit(engine, length) for length in LENGTHS[1:]]
    drive(engine)
    assert device.idle
    for handle, length in zip(handles, LENGTHS, strict=True):
        close(outcome(handle.result(0)), expected(length))
    assert device.violations == []


class _Synchronised(Edf):
    grain = Grain("half-layer", synchronises=True)


def test_a_grain_that_synchronises_waits_for_the_device_at_every_check() -> None:
    waits = []
    for policy in (Edf(), _Synchronised()):
        device = FakeAsyncDevice()
        program = FakeProgram(9, seconds=DEFAULT_WINDOW / 20)
        engine = Engine(program, policy=policy, device=device, clock=device.clock, device_thread=False)
        handle = engine.submit([7])
        drive(engine)
        assert handle.result(0) == 7
        waits.append(device.waits)
    assert waits == [1, 9], "the end alone, or every cut"
    assert make_policy("flowprefill-published").grain.synchronises


@pytest.mark.slow
def test_requests_of_a_thread_and_a_pack() -> None:
    with Engine(program_of("qwen3"), policy="fpcompile:pack=400") as engine:
        handles = [submit(engine, length) for length in LENGTHS * 3]
        for handle, length in zip(handles, LENGTHS * 3, strict=True):
            close(outcome(handle.result(60)), expected(length))


@pytest.mark.slow
def test_the_timeline_shows_members_in_their_own_lanes(tmp_path: Path) -> None:
    engine = turned("flowprefill", record=tmp_path / "log.jsonl")
    handles = _packed(engine, tmp_path / "log.jsonl", {}, {})
    drive(engine)
    spans = engine.timeline().spans
    ran = [{s.name for s in spans if s.lane == h.request_id and s.kind == "segment"} for h in handles]
    assert ran[0] == ran[1] != set()


@pytest.mark.parametrize("policy", ["flowprefill", "vllm:2048,512", "chunked:512", "fpcompile:pack=100"])
def test_programs_that_cannot_share_are_refused(policy: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot execute") as caught:
        Engine(FakeProgram(1), policy=policy)
    assert "fpcompile" in str(caught.value.remedy)
    program = program_of("qwen3")
    both = {"a": program, "b": program_of("qwen3", granularity="layer")}
    Engine({"a": program, "b": program}, policy=policy, device_thread=False).close()
    if policy == "chunked:512":
        Engine(both, policy=policy, device_thread=False).close()
    else:
        with pytest.raises(InvalidInputError, match="several programs"):
            Engine(both, policy=policy, device_thread=False)


def test_a_ticket_of_a_step_keeps_its_slices() -> None:
    engine = turned("vllm:8")
    submit(engine, 20)
    assert isinstance(engine._registry.live()[0].run, Sliced)
    assert isinstance(program_of("qwen3"), fpcompile.Program)
    engine.close(drain=False)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["flowprefill", "fpcompile:pack=60", "vllm:32,8", "chunked:8,s-edf"])
def test_whatever_is_submitted_and_cancelled_everybody_ends_once(policy: str) -> None:
    draw = random.Random(policy)
    engine = turned(policy, max_queue_s=60.0)
    handles: list[Any] = []
    promised: set[str] = set()
    ends: Counter[str] = Counter()
    for _ in range(120):
        what = draw.random()
        if what < 0.3:
            handle = submit(engine, draw.choice((3, 9, 20, 31)), ttft_slo=draw.choice((1e-3, 0.1, 60.0)))
            handle.add_done_callback(lambda one: ends.update([one.request_id]))
            handles.append(handle)
        elif what < 0.4 and handles:
            chosen = draw.choice(handles[-3:])
            if chosen.cancel():
                promised.add(chosen.request_id)
        else:
            engine.turn(draw.choice((1, 3, 9)))
        engine._driver.validate()
    drive(engine)
    assert ends == Counter(handle.request_id for handle in handles)
    assert promised
    for handle in handles:
        if handle.request_id in promised:
            assert handle.metrics.state == "cancelled"
        else:
            close(outcome(handle.result(0)), expected(handle.metrics.tokens))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["chunked:16", "vllm:16"])
@pytest.mark.parametrize("arch", ["phi3", "llama"])
def test_models_whose_positions_follow_the_length_are_not_sliced(policy: str, arch: str) -> None:
    """Early slices would be rotated by frequencies that the whole prompt does not have."""
    program = program_of(arch, rope="longrope" if arch == "phi3" else "dynamic")
    with pytest.raises(InvalidInputError, match="slices prompts") as caught:
        Engine(program, policy=policy, device_thread=False)
    assert "same at every length" in str(caught.value.expected)
    Engine(program, policy="flowprefill", device_thread=False).close()


@pytest.mark.parametrize("policy", ["chunked:16", "vllm:16"])
def test_slices_are_not_packed(policy: str) -> None:
    with pytest.raises(InvalidInputError, match="pack whole ones"):
        turned(policy, pack=200)


def test_chunks_have_a_size() -> None:
    class Endless(Edf):
        grain = Grain("tokens")

    with pytest.raises(InvalidInputError, match="wrong size"):
        Engine(program_of("qwen3"), policy=Endless(), device_thread=False)


@pytest.mark.slow
def test_a_step_that_cannot_be_made_fails_its_members_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out while one member's slice is taken: whoever is not in the step goes on."""
    engine = turned("vllm:32,16")
    handles = [submit(engine, 20) for _ in range(4)]
    take, taken = Sliced.take, []

    def fails(self: Sliced, tokens: int) -> Any:
        taken.append(tokens)
        if len(taken) == 2:
            raise torch.OutOfMemoryError("no memory for a slice")
        return take(self, tokens)

    monkeypatch.setattr(Sliced, "take", fails)
    drive(engine)
    states = Counter(handle.metrics.state for handle in handles)
    assert states == {"failed": 2, "completed": 2}
    for handle in handles:
        if handle.metrics.state == "completed":
            close(outcome(handle.result(0)), expected(20))
        else:
            with pytest.raises(torch.OutOfMemoryError, match="no memory for a slice"):
                handle.result(0)


def test_what_a_host_does_between_two_turns_is_no_device_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-4
        return now[0]

    engine = turned("fpcompile", clock=clock)
    measured: list[float] = []
    monkeypatch.setattr(engine._driver.prices, "learn", lambda *given: measured.append(given[-1]))
    submit(engine, 5)
    while engine.turn():
        now[0] += 100.0
    assert len(measured) == 1
    assert 0 < measured[0] < 1.0

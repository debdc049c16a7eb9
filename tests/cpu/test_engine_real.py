"""The engine with a compiled model: whatever interrupts a request, its bits are the unmodified model's."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fpcompile
from fpcompile.engine.engine import Engine
from fpcompile.engine.outputs import tensors_in
from fpcompile.errors import InvalidInputError, SegmentError
from fpcompile.models.zoo import sample_ids
from fpcompile.testing import FakeAsyncDevice, assert_yields
from tests.cpu.support import differences, model_of, outcome, program_of, reference, same_bits

pytestmark = pytest.mark.slow

LONG, URGENT = sample_ids(96, seed=1), sample_ids(17, seed=2)


def _assert_equal(output: Any, ids: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert differences(outcome(output), reference(model_of("qwen3", dtype), ids)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preempted_at_every_cut_the_bits_stay(dtype: torch.dtype) -> None:
    """A long prefill is preempted at each of its cuts, by requests that arrive while a segment runs."""
    program = program_of("qwen3", dtype)
    handles: list[Any] = []

    def interrupt(run: fpcompile.Run, segment: Any, start: float, end: float) -> None:
        if run.tokens == LONG.shape[1] and len(handles) <= segment.index:
            handles.append(engine.submit(URGENT, ttft_slo=1e3))

    with Engine(program, on_segment=interrupt) as engine:
        long = engine.submit(LONG, ttft_slo=1e6)
        _assert_equal(long.result(60), LONG, dtype)
        for handle in handles:
            _assert_equal(handle.result(60), URGENT, dtype)
    assert len(handles) == len(program.segments)
    assert long.metrics.preemptions == len(program.segments) - 1
    assert long.metrics.suspended > 0


@settings(max_examples=15)
@given(
    plan=st.lists(
        st.tuples(st.sampled_from([1, 2, 17, 40, 96]), st.floats(1.0, 1e3)), min_size=2, max_size=5
    ),
    steps=st.lists(st.integers(1, 9), max_size=60),
    policy=st.sampled_from(["fcfs", "s-edf", "srpt", "edf"]),
)
def test_any_interleaving_gives_each_request_its_own_bits(
    plan: list[tuple[int, float]], steps: list[int], policy: str
) -> None:
    engine = Engine(program_of("qwen3"), policy=policy, device_thread=False)
    arriving = list(enumerate(plan))
    handles: list[tuple[Any, Tensor]] = []
    for step in [*steps, None]:
        if arriving and (step is None or step % 2):
            for number, (length, slo) in arriving if step is None else [arriving.pop(0)]:
                ids = sample_ids(length, seed=number)
                handles.append((engine.submit(ids, ttft_slo=slo), ids))
        while engine.turn(step) and step is None:
            engine._driver.validate()
    assert len(handles) == len(plan)
    for handle, ids in handles:
        _assert_equal(handle.result(0), ids)


def test_the_bits_stay_on_an_asynchronous_device() -> None:
    device = FakeAsyncDevice()
    program = program_of("qwen3")
    engine = Engine(program, device=device, clock=device.clock, device_thread=False)
    long = engine.submit(LONG, ttft_slo=1e6)
    engine.turn(5)
    urgent = engine.submit(URGENT, ttft_slo=1e3)
    while engine.turn():
        pass
    assert long.metrics.preemptions == 1
    assert device.violations == []
    _assert_equal(long.result(0), LONG)
    _assert_equal(urgent.result(0), URGENT)
    assert long.metrics.ttft == pytest.approx(
        program.predict(tokens=96, rows=96) + program.predict(tokens=17, rows=17), rel=1e-6
    )


def test_arguments_reach_the_model() -> None:
    with Engine(program_of("qwen3")) as engine:
        first = engine.submit(LONG).result(60)
        handle = engine.submit(URGENT, past_key_values=first.past_key_values, logits_to_keep=1)
        second = handle.result(60)
    whole = reference(model_of("qwen3"), torch.cat([LONG, URGENT], dim=1))
    assert second.logits.shape[1] == 1
    torch.testing.assert_close(second.logits, whole.logits[:, -1:], rtol=0, atol=2e-5)


def test_bad_input_is_refused_by_submit() -> None:
    with Engine(program_of("qwen3")) as engine:
        for ids in (torch.empty(1, 0, dtype=torch.int64), torch.tensor([[1 << 40]]), torch.ones(1, 1, 1, 1)):
            with pytest.raises(InvalidInputError):
                engine.submit(ids)
        with pytest.raises(InvalidInputError):
            engine.submit(URGENT, labels=URGENT)
        assert engine.statistics().ended == 0


def test_a_segment_that_raises_names_its_place_and_harms_nobody() -> None:
    def spoil(run: fpcompile.Run, segment: Any, start: float, end: float) -> None:
        if run.tokens == 5 and segment.index == 2:
            run.values = {key: value[..., :1] for key, value in run.values.items()}

    with Engine(program_of("qwen3"), on_segment=spoil) as engine:
        before, failing, after = (engine.submit(ids) for ids in (URGENT, sample_ids(5), LONG))
        with pytest.raises(SegmentError) as caught:
            failing.result(60)
        assert caught.value.node
        assert "modeling_qwen3" in str(caught.value)
        _assert_equal(before.result(60), URGENT)
        _assert_equal(after.result(60), LONG)


def test_a_cancelled_run_holds_nothing() -> None:
    program = program_of("qwen3")
    engine = Engine(program, device_thread=False)
    handle = engine.submit(LONG)
    engine.turn(7)
    ticket = engine._registry.get(handle.request_id)
    assert ticket is not None
    run = ticket.run
    assert run.live_bytes > 0
    assert run.kv_bytes > 0
    handle.cancel()
    while engine.turn():
        pass
    assert (run.live_bytes, run.kv_bytes) == (0, 0)
    assert ticket.run is None


def test_a_paused_run_is_accounted_by_its_tensors() -> None:
    program = program_of("qwen3")
    engine = Engine(program, device_thread=False)
    engine.submit(LONG, ttft_slo=1e6)
    engine.turn(6)
    engine.submit(URGENT, ttft_slo=1e3)
    engine.turn(1)
    twin = program.start(LONG)
    while twin.cursor < 6:
        twin.step()
    inputs = 2 * LONG.nbytes  # tokens and positions, should it have to begin again
    assert engine.statistics().paused_bytes == twin.live_bytes + twin.kv_bytes + inputs
    engine.close()
    assert engine.statistics().paused_bytes == 0


def test_tensors_of_an_output_are_found() -> None:
    with Engine(program_of("qwen3")) as engine:
        output = engine.submit(URGENT).result(60)
    found = list(tensors_in(output))
    expected = [output.logits] + [t for kv in outcome(output).layers for t in kv]
    for tensor in expected:
        assert any(t is tensor for t in found)


def test_requests_from_threads_and_tasks_together() -> None:
    with Engine(program_of("qwen3")) as engine:
        results: list[Tensor] = []
        threads = [
            threading.Thread(target=lambda: results.append(engine.submit(LONG).result(60).logits))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()

        async def ask() -> Any:
            return await asyncio.gather(*(engine.submit(URGENT, ttft_slo=5.0) for _ in range(3)))

        for output in asyncio.run(ask()):
            _assert_equal(output, URGENT)
        for thread in threads:
            thread.join()
    expected = reference(model_of("qwen3"), LONG).logits
    assert len(results) == 2
    assert all(same_bits(logits, expected) for logits in results)


def test_a_compiled_run_keeps_the_yield_rule() -> None:
    program = program_of("qwen3")
    run = program.start(LONG)
    launches = assert_yields(run)
    assert [name for name, _ in launches] == [segment.name for segment in program.segments]
    _assert_equal(run.result(), LONG)


@pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning")
def test_a_budget_makes_more_cuts_and_is_served() -> None:
    program = program_of("qwen3")
    with Engine(program) as engine:
        handle = engine.submit(sample_ids(300), max_blocking_ms=0.05)
        output = handle.result(60)
    assert same_bits(output.logits, program(sample_ids(300), max_blocking_ms=0.05).logits)

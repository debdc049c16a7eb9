"""Generation by engines, with real models: tokens of ``model.generate``, through threads and event loops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fpcompile
from fpcompile.errors import InvalidInputError, RequestCancelledError
from fpcompile.models.zoo import sample_ids, tiny_model
from fpcompile.testing import FakeAsyncDevice
from tests.cpu.support import model_of, program_of
from tests.cpu.test_engine_fakes import drive
from tests.cpu.test_sampling import config_of

PROMPTS = [sample_ids(n, seed=n) for n in (5, 23, 40, 1)]


def own(arch: str, prompt: Tensor, count: int, dtype: torch.dtype = torch.float32, **more: Any) -> list[int]:
    """What the unmodified model generates greedily."""
    model: Any = model_of(arch, dtype)
    whole = model.generate(prompt, max_new_tokens=count, do_sample=False, **more)
    return [int(token) for token in whole[0, prompt.shape[1] :]]


@pytest.fixture(scope="module")
def engine() -> Iterator[fpcompile.Engine]:
    with fpcompile.Engine(program_of("qwen3")) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "gpt_oss", "mixtral"])
def test_alone_and_greedy_the_tokens_are_those_of_generate(arch: str, dtype: torch.dtype) -> None:
    with fpcompile.Engine(program_of(arch, dtype), max_decode_batch=1) as engine:
        for prompt in PROMPTS[:3]:
            handle = engine.submit(prompt, max_new_tokens=30)  # beyond the windows of 16
            assert list(handle.tokens(20)) == own(arch, prompt, 30, dtype)
            assert handle.metrics.numerics == "bits"


@pytest.mark.parametrize(
    "policy", ["fpcompile", "s-edf", "chunked:16", "vllm:64,32", "flowprefill", "layered"]
)
def test_whatever_the_policy_does_with_the_prompts(policy: str) -> None:
    with fpcompile.Engine(program_of("qwen3"), policy=policy) as engine:
        handles = [engine.submit(prompt, max_new_tokens=12, ttft_slo=5) for prompt in PROMPTS]
        plain = engine.submit(PROMPTS[2])
        for prompt, handle in zip(PROMPTS, handles, strict=True):
            expected = own("qwen3", prompt, 12)
            output = handle.result(20)
            assert output.sequences.tolist() == [prompt[0].tolist() + expected]
            assert list(handle.tokens()) == expected
        assert plain.result(20).logits.shape[:2] == (1, 40)
        assert engine.statistics().tokens_generated == 12 * len(PROMPTS)


@pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning")
def test_pools_prefixes_and_budgets_change_no_token() -> None:
    program = program_of("qwen3")
    with fpcompile.Engine(program, kv_blocks=64, prefix_cache=True) as engine:
        for _ in range(2):
            handles = [engine.submit(prompt, max_new_tokens=12, max_blocking_ms=0.2) for prompt in PROMPTS]
            for prompt, handle in zip(PROMPTS, handles, strict=True):
                assert list(handle.tokens(20)) == own("qwen3", prompt, 12)
        memory = engine.statistics().memory
    assert memory.reused_tokens > 0, "the second time prompts begin behind what is there"


def test_on_an_asynchronous_device() -> None:
    """Memory that is given away too early is poisoned there; streams beside a prompt, and a draw."""
    device = FakeAsyncDevice()
    engine = fpcompile.Engine(program_of("qwen3"), device=device, clock=device.clock, device_thread=False)
    handles = [engine.submit(prompt, max_new_tokens=12) for prompt in PROMPTS]
    config = config_of(do_sample=True)
    drawn = [engine.submit(PROMPTS[0], max_new_tokens=5, generation_config=config, seed=1) for _ in "ab"]
    engine.turn(30)
    engine.submit(sample_ids(300), ttft_slo=10)
    drive(engine)
    for prompt, handle in zip(PROMPTS, handles, strict=True):
        assert list(handle.tokens(0)) == own("qwen3", prompt, 12)
    assert torch.equal(drawn[0].result(0).sequences, drawn[1].result(0).sequences)
    assert device.idle


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "mamba"])
def test_generic_programs_generate_in_turns(arch: str) -> None:
    model: Any = tiny_model(arch)
    prompts = [prompt % 100 for prompt in PROMPTS[:2]]
    with fpcompile.Engine(fpcompile.segment(model, route="generic")) as engine:
        handles = [engine.submit(prompt, max_new_tokens=8) for prompt in prompts]
        for prompt, handle in zip(prompts, handles, strict=True):
            whole = model.generate(prompt, max_new_tokens=8, do_sample=False)
            assert list(handle.tokens(20)) == whole[0, prompt.shape[1] :].tolist()
            assert handle.metrics.numerics == "bits", "nothing was shared"


def test_sampled_requests_draw_by_their_seed(engine: fpcompile.Engine) -> None:
    config = config_of(do_sample=True, temperature=0.9, top_k=50)
    handle = engine.submit(PROMPTS[0], max_new_tokens=10, generation_config=config, seed=3)
    model: Any = model_of("qwen3")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config.max_new_tokens = 10
        expected = model.generate(PROMPTS[0], generation_config=config)
    assert torch.equal(handle.result(20).sequences, expected)


def test_an_end_of_sequence_token_is_the_last_one(engine: fpcompile.Engine) -> None:
    expected = own("qwen3", PROMPTS[1], 12)
    config = config_of(eos_token_id=[expected[4]])
    handle = engine.submit(PROMPTS[1], max_new_tokens=12, generation_config=config)
    first = expected.index(expected[4])
    assert list(handle.tokens(20)) == expected[: first + 1]
    assert handle.metrics.finish_reason == "stop"


def test_tokens_come_while_they_are_made(engine: fpcompile.Engine) -> None:
    gate, reached = threading.Event(), threading.Event()

    def wait(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 5 + 2:
            reached.set()
            assert gate.wait(20)
        return scores

    handle = engine.submit(PROMPTS[0], max_new_tokens=4, logits_processor=[wait])
    tokens = handle.tokens(20)
    two = [next(tokens), next(tokens)]
    assert reached.wait(20)
    assert not handle.done()
    with pytest.raises(TimeoutError):
        handle.next_token(2, timeout=0.01)
    gate.set()
    assert [*two, *tokens] == own("qwen3", PROMPTS[0], 4)
    assert list(handle.tokens()) == [*two, *handle.result().sequences[0, 7:].tolist()], (
        "again, from the first"
    )


def test_tokens_in_event_loops(engine: fpcompile.Engine) -> None:
    async def read(count: int) -> list[int]:
        return [token async for token in engine.submit(PROMPTS[0], max_new_tokens=count)]

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(read(n) for n in (1, 7, 30)))

    expected = own("qwen3", PROMPTS[0], 30)
    assert asyncio.run(together()) == [expected[:n] for n in (1, 7, 30)]


def test_two_readers_get_all_tokens_each(engine: fpcompile.Engine) -> None:
    async def both() -> list[list[int]]:
        handle = engine.submit(PROMPTS[0], max_new_tokens=9)

        async def read() -> list[int]:
            return [token async for token in handle]

        return list(await asyncio.gather(read(), read(), asyncio.to_thread(lambda: list(handle.tokens()))))

    assert asyncio.run(both()) == [own("qwen3", PROMPTS[0], 9)] * 3


def test_leaving_the_loop_early_ends_nothing_but_cancelling_its_task_does(engine: fpcompile.Engine) -> None:
    async def leave() -> fpcompile.Handle:
        handle = engine.submit(PROMPTS[0], max_new_tokens=9)
        async for _ in handle:
            break
        return handle

    assert len(asyncio.run(leave()).result(20).sequences[0]) == 5 + 9
    gate = threading.Event()

    async def cancelled() -> fpcompile.Handle:
        def wait(ids: Tensor, scores: Tensor) -> Tensor:
            assert gate.wait(20)
            return scores

        handle = engine.submit(PROMPTS[0], max_new_tokens=9, logits_processor=[wait])

        async def read() -> None:
            async for _ in handle:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        return handle

    handle = asyncio.run(cancelled())
    with pytest.raises(RequestCancelledError):
        handle.result(20)


def test_a_processor_that_raises_ends_its_own_request(engine: fpcompile.Engine) -> None:
    def broken(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > 8:
            raise ValueError("my own mistake")
        return scores

    doomed = engine.submit(PROMPTS[0], max_new_tokens=9, logits_processor=[broken])
    fine = engine.submit(PROMPTS[1], max_new_tokens=9)
    with pytest.raises(ValueError, match="my own mistake"):
        list(doomed.tokens(20))
    assert doomed.metrics.tokens_out == 4
    assert list(fine.tokens(20)) == own("qwen3", PROMPTS[1], 9)


def test_what_cannot_be_generated_is_refused_before_it_exists(engine: fpcompile.Engine) -> None:
    live = engine.statistics().decoding
    for inputs in (
        {"input_ids": torch.ones(2, 3, dtype=torch.int64)},
        {"input_ids": [[1]], "position_ids": torch.tensor([[4]])},
        {"input_ids": [[1]], "generation_config": config_of(num_beams=3)},
        {"input_ids": [[1]], "max_new_tokens": 100_000},
    ):
        with pytest.raises(InvalidInputError):
            engine.submit(**{"max_new_tokens": 3, **inputs})  # type: ignore[arg-type]
    assert engine.statistics().decoding == live


def test_many_streams_with_cancels_get_their_own_tokens() -> None:
    expected = {i: own("qwen3", prompt, 25) for i, prompt in enumerate(PROMPTS)}
    with fpcompile.Engine(program_of("qwen3"), max_decode_batch=8) as engine:
        handles = [(i % 4, engine.submit(PROMPTS[i % 4], max_new_tokens=25)) for i in range(40)]
        for number, (_, handle) in enumerate(handles):
            if number % 3 == 0:
                next(handle.tokens(20), None)
                handle.cancel()
        for i, handle in handles:
            try:
                assert list(handle.tokens(20)) == expected[i]
            except RequestCancelledError:
                tokens = list(handle._tokens or ())
                assert tokens == expected[i][: len(tokens)]
        until = time.monotonic() + 20
        while len(engine._registry) and time.monotonic() < until:
            time.sleep(0.001)
        statistics = engine.statistics()
        assert (statistics.decoding, statistics.decoding_bytes) == (0, 0)

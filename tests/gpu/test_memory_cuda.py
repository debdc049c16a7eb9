"""Cache blocks and moved runs on CUDA: bits in one extent, scattered, on the host and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.engine.engine import Engine
from fpcompile.models.zoo import sample_ids, tiny_model


def _program(dtype: torch.dtype) -> fpcompile.Program:
    model = tiny_model("qwen3", dtype=dtype)
    model.to("cuda")  # type: ignore[arg-type]
    return fpcompile.segment(model)


@pytest.mark.parametrize("rate", [float("inf"), 1.0], ids=["copied", "again"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_that_give_way_have_the_bits_of_those_that_do_not(dtype: torch.dtype, rate: float) -> None:
    """Each request is more urgent than those before, and the pool holds two of them."""
    program = _program(dtype)
    prompts = [sample_ids(200 - number, seed=number).cuda() for number in range(6)]
    expected = [program(prompt).logits for prompt in prompts]
    engine = Engine(program, policy="s-edf", device_thread=False, kv_blocks=26, memory_budget=0)
    engine._memory.moves.rate = rate
    handles: list[Any] = []
    for number, prompt in enumerate(prompts):
        handles.append(engine.submit(prompt, ttft_slo=1e6 - 1e3 * number))
        for _ in range(3):
            engine.turn(1)
            engine._driver.validate()
    engine.close()
    for handle, logits in zip(handles, expected, strict=True):
        assert torch.equal(handle.result(60).logits, logits)
    memory = engine.statistics().memory
    assert (memory.offloads > 0) == (rate > 1.0)
    assert (memory.recomputations > 0) == (rate == 1.0)
    assert (memory.blocks_used, memory.host_bytes, memory.paused_bytes) == (0, 0, 0)


def test_a_prefix_is_reused() -> None:
    program = _program(torch.float32)
    prompt = sample_ids(200, seed=1).cuda()
    expected = program(prompt, logits_to_keep=1).logits
    with Engine(program, kv_blocks=32, prefix_cache=True) as engine:
        for reused in (0, 192):
            handle = engine.submit(prompt, logits_to_keep=1)
            torch.testing.assert_close(handle.result(60).logits, expected, rtol=0, atol=1e-4)
            assert handle.metrics.reused_tokens == reused

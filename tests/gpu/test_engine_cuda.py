"""The engine on CUDA: bits, preemption and blocking."""

from __future__ import annotations

import threading
from typing import Any

import torch

import fpcompile
from fpcompile.engine.engine import Engine
from fpcompile.models.zoo import sample_ids, tiny_model


def _compiled(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, fpcompile.Program]:
    model = tiny_model("qwen3", dtype=dtype)
    model.to("cuda")  # type: ignore[arg-type]
    return model, fpcompile.segment(model)


def test_an_interrupted_request_has_the_bits_of_the_uninterrupted_one() -> None:
    _, program = _compiled()
    long, urgent = sample_ids(200, seed=1).cuda(), sample_ids(17, seed=2).cuda()
    expected_long, expected_urgent = program(long).logits, program(urgent).logits
    handles: list[Any] = []

    def interrupt(run: fpcompile.Run, segment: Any, start: float, end: float) -> None:
        if run.tokens == 200 and len(handles) <= segment.index:
            handles.append(engine.submit(urgent, ttft_slo=1e3))

    with Engine(program, on_segment=interrupt) as engine:
        first = engine.submit(long, ttft_slo=1e6)
        assert torch.equal(first.result(60).logits, expected_long)
        assert all(torch.equal(h.result(60).logits, expected_urgent) for h in handles)
    assert first.metrics.preemptions > 0
    assert len(engine.statistics().blocking) == first.metrics.preemptions


def test_inputs_may_still_be_computed_and_results_may_be_used_at_once() -> None:
    """Tensors cross between the caller's stream and the engine's without a synchronisation by the caller."""
    _, program = _compiled()
    ids = sample_ids(64, seed=3).cuda()
    expected = program(ids).logits.float().sum()
    with Engine(program) as engine:
        for _ in range(20):
            busy = torch.ones(2048, 2048, device="cuda") / 2048
            for _ in range(5):
                busy = busy @ busy
            late = ids + (busy.sum() * 0).long()  # depends on the work above
            assert engine.submit(late).result(60).logits.float().sum() == expected


def test_many_threads_on_one_device() -> None:
    _, program = _compiled()
    prompts = [sample_ids(length, seed=length).cuda() for length in (1, 17, 64, 200)]
    expected = [program(ids).logits for ids in prompts]
    wrong: list[int] = []

    def client(engine: Engine, which: int) -> None:
        for _ in range(10):
            handle = engine.submit(prompts[which], ttft_slo=1.0 + which)
            if not torch.equal(handle.result(60).logits, expected[which]):
                wrong.append(which)

    with Engine(program) as engine:
        threads = [threading.Thread(target=client, args=(engine, i % 4)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []

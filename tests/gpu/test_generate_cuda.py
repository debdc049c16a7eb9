"""Generation on CUDA: tokens of ``generate``, alone and beside a long prompt."""

from __future__ import annotations

from typing import Any

import torch

import fpcompile
from fpcompile.models.zoo import sample_ids, tiny_model


def test_greedy_tokens_are_those_of_generate() -> None:
    model: Any = tiny_model("qwen3", dtype=torch.bfloat16)
    model.to("cuda")
    prompts = [sample_ids(n, seed=n).cuda() for n in (5, 40)]
    expected = [model.generate(ids, max_new_tokens=20, do_sample=False) for ids in prompts]
    with fpcompile.Engine(fpcompile.segment(model), max_decode_batch=1) as engine:
        handles = [engine.submit(ids, max_new_tokens=20, tbt_slo=0.01) for ids in prompts]
        long = engine.submit(sample_ids(300).cuda())
        for handle, whole in zip(handles, expected, strict=True):
            assert torch.equal(handle.result(60).sequences, whole)
            assert handle.metrics.numerics == "bits"
        assert long.result(60).logits.is_cuda

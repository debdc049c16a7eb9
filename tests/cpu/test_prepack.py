"""Packed weights: the same bits from the kernel's own layout, and one copy for each weight."""

from __future__ import annotations

import pytest
import torch

import fpcompile
from fpcompile.errors import UnknownNameError
from fpcompile.passes.prepack import can_prepack, pack
from tests.cpu.support import finish, model_of, reference

needs_bf16 = pytest.mark.skipif(
    not can_prepack(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="this CPU has no bf16 matrix kernel"
)


@needs_bf16
@pytest.mark.parametrize("rows", [1, 2, 17, 64, 100, 513])
@pytest.mark.parametrize(("wide", "out"), [(64, 128), (128, 64), (48, 40)])
def test_the_packed_kernel_gives_the_same_bits(rows: int, wide: int, out: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, wide, generator=generator).bfloat16()
    weight = torch.randn(out, wide, generator=generator).bfloat16()
    bias = torch.randn(out, generator=generator).bfloat16()
    got = torch.ops.mkldnn._linear_pointwise(x, pack(weight), bias, "none", [], "")
    assert torch.equal(got, torch.nn.functional.linear(x, weight, bias))


@needs_bf16
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["qwen3", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("length", [1, 17, 128])
def test_a_program_with_packed_weights_gives_the_models_bits(arch: str, length: int) -> None:
    model = model_of(arch, torch.bfloat16)
    program = fpcompile.segment(model, weights="packed", verify=False)
    assert any(weight.is_mkldnn for weight in program.weights.values())
    ids = torch.randint(0, program.vocabulary, (1, length), generator=torch.Generator().manual_seed(3))
    assert torch.equal(finish(program.start(ids)).logits, reference(model, ids).logits)


def test_fp32_weights_stay_shared() -> None:
    program = fpcompile.segment(model_of("qwen3"), weights="packed", verify=False)
    assert not any(weight.is_mkldnn for weight in program.weights.values())


def test_an_unknown_form_lists_the_legal_ones() -> None:
    with pytest.raises(UnknownNameError, match="'packed', 'shared'"):
        fpcompile.segment(model_of("qwen3"), weights="squeezed")

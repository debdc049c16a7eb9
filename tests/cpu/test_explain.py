"""What a plan says about work and memory: formulas against counts made by hand, and the printed table."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import fpcompile
from fpcompile.ir import CONTEXT, ROWS, TOKENS, PartKind, evaluate
from fpcompile.models.zoo import MAIN_ARCHS
from tests.cpu.support import model_of, program_of

SIZES = ((1, 1, 1), (17, 1, 17), (17, 17, 40), (128, 5, 128), (4096, 1, 4096))
"""(tokens, rows, context)"""


def _segment(program: fpcompile.Program, name: str) -> fpcompile.ir.Segment:
    (found,) = [s for s in program.segments if s.name == name and s.kind != "attention"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "rows", "context"), SIZES)
def test_a_linear_layer_costs_two_operations_for_each_weight_and_row(
    tokens: int, rows: int, context: int
) -> None:
    program = program_of("llama")
    for name, over in (("model.layers.0.self_attn.k_proj", tokens), ("lm_head", rows)):
        linear = model_of("llama").get_submodule(name)
        assert isinstance(linear, nn.Linear)
        part = _segment(program, name).parts[-1]
        flops = evaluate(part.cost.flops, tokens=tokens, rows=rows, context=context)
        moved = evaluate(part.cost.bytes, tokens=tokens, rows=rows, context=context)
        assert flops == 2 * over * linear.in_features * linear.out_features
        assert moved == 4 * (over * (linear.in_features + linear.out_features) + linear.weight.numel())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt_neox", "phi3"])
def test_a_whole_prefill_is_its_matrices_its_attention_and_little_else(arch: str) -> None:
    model, program = model_of(arch), program_of(arch)
    tokens = 256
    config = model.config
    matrices = sum(
        2 * m.in_features * m.out_features * (1 if name in ("lm_head", "embed_out") else tokens)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    )
    pairs = tokens * (tokens + 1) // 2 if arch != "phi3" else None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = sum(evaluate(s.cost.flops, tokens=tokens) for s in program.segments if s.kind == "attention")
    if pairs is not None:
        assert attention == config.num_hidden_layers * 4 * head * config.num_attention_heads * pairs
    total = evaluate(program.plan.cost.flops, tokens=tokens, rows=1)
    assert matrices + attention <= total <= 1.15 * (matrices + attention)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queries", "context"), [(1, 1), (9, 9), (20, 20), (31, 31), (128, 128), (1, 60), (30, 90)]
)
def test_attention_counts_the_pairs_that_its_mask_lets_through(queries: int, context: int) -> None:
    """Exact for causal layers; for a window an upper bound that is never more than a third too high."""
    program = program_of("gemma3_text")
    config = program.config
    kinds = dict(
        zip((s.name for s in program.segments if s.kind == "attention"), config.layer_types, strict=True)
    )
    positions = range(context - queries + 1, context + 1)
    unit = 4 * config.head_dim * config.num_attention_heads
    assert set(kinds.values()) == {"full_attention", "sliding_attention"}
    for segment in program.segments:
        if segment.kind != "attention":
            continue
        flops = evaluate(segment.cost.flops, tokens=queries, context=context)
        if kinds[segment.name] == "full_attention":
            assert flops == unit * sum(positions)
        else:
            exact = unit * sum(min(p, config.sliding_window) for p in positions)
            assert exact <= flops <= exact * 4 / 3


@pytest.mark.slow
def test_experts_cost_what_the_chosen_ones_cost() -> None:
    program = program_of("mixtral")
    config = program.config
    per_token = config.num_experts_per_tok * 3 * 2 * config.hidden_size * config.intermediate_size
    parts = [p for s in program.segments for p in s.parts if p.kind is PartKind.LEAF]
    assert [evaluate(p.cost.flops, tokens=9) for p in parts] == [9 * per_token] * config.num_hidden_layers
    weights = config.num_local_experts * 3 * config.hidden_size * config.intermediate_size * 4
    assert all(evaluate(p.cost.bytes, tokens=1) > weights for p in parts)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_formulas_have_no_other_symbols_and_never_shrink(arch: str) -> None:
    program = program_of(arch)
    for segment in program.segments:
        for expr in (segment.cost.flops, segment.cost.bytes, segment.live.nbytes):
            assert expr.free_symbols <= {TOKENS, ROWS, CONTEXT}
            small, large = (evaluate(expr, tokens=n, rows=n) for n in (16, 64))
            assert 0 <= small <= large
        assert CONTEXT not in segment.live.nbytes.free_symbols, "live values do not grow with the cache"
    assert sum(evaluate(s.cost.flops, tokens=33) for s in program.segments) == evaluate(
        program.plan.cost.flops, tokens=33
    )


@pytest.mark.slow
def test_bytes_follow_the_dtype() -> None:
    single, half = program_of("llama"), program_of("llama", torch.bfloat16)
    assert len(single.segments) == len(half.segments)
    for a, b in zip(single.segments, half.segments, strict=True):
        assert a.name == b.name
        floats = [evaluate(v.storage_bytes, tokens=64, rows=3) for v in a.live.values if "int" not in v.dtype]
        halves = [evaluate(v.storage_bytes, tokens=64, rows=3) for v in b.live.values if "int" not in v.dtype]
        assert floats == [2 * n for n in halves]


@pytest.mark.slow
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_the_table_shows_every_segment(arch: str) -> None:
    program = program_of(arch)
    text = program.explain(tokens=100)
    assert type(model_of(arch)).__name__ in text
    assert f"{len(program.segments)} segments" in text
    assert "route packed" in text
    assert "granularity operator" in text
    for segment in program.segments:
        (line,) = [
            row for row in text.splitlines() if re.match(rf"\W*{segment.index}\W+{segment.name} ", row)
        ]
        assert segment.kind in line
        assert str(segment.reason) in line


@pytest.mark.slow
def test_the_table_has_formulas_and_figures_at_the_given_length() -> None:
    program = program_of("llama")

    def row(tokens: int) -> list[str]:
        text = program.explain(tokens=tokens)
        (line,) = [r for r in text.splitlines() if "layers.0.self_attn.k_proj" in r]
        return [cell.strip() for cell in line.split("│")[1:-1]]

    assert row(100) == [
        *("1", "model.layers.0.self_attn.k_proj", "projection"),
        *("4096*n", "409.6k", "384*n + 8192", "46.6k", "8*r + 1024*n", "102.4k", "after projection"),
    ]
    assert row(1000)[4] == "4.1M"
    assert "n = tokens" in program.explain()
    assert "2048" in program.explain()


@pytest.mark.slow
def test_refused_cuts_are_listed() -> None:
    from tests.cpu.support import toy
    from tests.cpu.test_cuts import written_in_place

    program = fpcompile.segment(toy(written_in_place), route="packed", verify=False)
    assert len(program.plan.notes) == 2
    text = " ".join(program.explain().split())
    for layer, note in enumerate(program.plan.notes):
        assert f"layers.{layer}.up" in note
        assert "aten.mul_.Tensor writes in place" in note
        assert note in text

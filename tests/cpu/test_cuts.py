"""Where programs are cut, and why: golden plans, legality around writes in place, shared functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fpcompile
from fpcompile.ir import CutReason, PartKind, Refusal, evaluate
from fpcompile.models.zoo import MAIN_ARCHS, sample_ids, tiny_model
from tests.cpu.support import (
    Spot,
    cuts,
    differences,
    finish,
    mlp,
    outcome,
    program_of,
    reference,
    relay,
    toy,
)


def text_of(program: fpcompile.Program) -> list[str]:
    """A line for each segment: module, kind, reason of the cut behind it, live values and their bytes."""
    return [
        f"{s.name}: {s.kind}, {s.reason}, {len(s.live.values)} live, {s.live.nbytes} bytes"
        for s in program.segments
    ]


LAYER_0 = """
model.layers.0.self_attn.q_proj: projection, after projection, 6 live, 8*rows + 896*tokens bytes
model.layers.0.self_attn.k_proj: projection, after projection, 7 live, 8*rows + 1024*tokens bytes
model.layers.0.self_attn.v_proj: projection, before attention, 7 live, 8*rows + 896*tokens bytes
model.layers.0.self_attn: attention, after attention, 5 live, 8*rows + 640*tokens bytes
model.layers.0.self_attn.o_proj: projection, after projection, 4 live, 8*rows + 384*tokens bytes
model.layers.0.mlp.gate_proj: projection, after projection, 6 live, 8*rows + 1024*tokens bytes
model.layers.0.mlp.up_proj: projection, after projection, 5 live, 8*rows + 768*tokens bytes
model.layers.0.mlp.down_proj: projection, after projection, 4 live, 8*rows + 384*tokens bytes
"""
LAYER_1 = """
model.layers.1.self_attn.q_proj: projection, after projection, 6 live, 8*rows + 896*tokens bytes
model.layers.1.self_attn.k_proj: projection, after projection, 7 live, 8*rows + 1024*tokens bytes
model.layers.1.self_attn.v_proj: projection, before attention, 5 live, 8*rows + 768*tokens bytes
model.layers.1.self_attn: attention, after attention, 3 live, 8*rows + 512*tokens bytes
model.layers.1.self_attn.o_proj: projection, after projection, 2 live, 8*rows + 256*tokens bytes
model.layers.1.mlp.gate_proj: projection, after projection, 4 live, 8*rows + 896*tokens bytes
model.layers.1.mlp.up_proj: projection, after projection, 3 live, 8*rows + 640*tokens bytes
model.layers.1.mlp.down_proj: projection, after projection, 1 live, 256*rows bytes
lm_head: projection, end of model, 1 live, 512*rows bytes
"""
BY_LAYER = """
model.embed_tokens: pointwise, layer boundary, 4 live, 8*rows + 384*tokens bytes
model.layers.0.self_attn: attention, layer boundary, 4 live, 8*rows + 384*tokens bytes
model.layers.1.self_attn: attention, layer boundary, 2 live, 8*rows + 256*tokens bytes
lm_head: projection, end of model, 1 live, 512*rows bytes
"""
"""Written by hand from the model: hidden 64, heads 16 wide, 4 of queries and 2 of keys, MLP 96, fp32.

In front of layer 1, for example: 8 bytes of a kept row's index, and per token the residual (64 values) and
the rotary cosine and sine (16 each). Behind its attention: no cosine and sine, no later layer rotates.
"""


@pytest.mark.slow
def test_the_plan_of_a_tiny_llama() -> None:
    assert text_of(program_of("llama")) == (LAYER_0 + LAYER_1[1:]).split("\n")[1:-1]


@pytest.mark.slow
def test_the_plans_of_coarser_granularities() -> None:
    assert text_of(program_of("llama", granularity="layer")) == BY_LAYER.split("\n")[1:-1]
    (only,) = program_of("llama", granularity="model").segments
    assert (only.reason, len(only.live.values)) == (CutReason.END, 1)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_operators_are_cut_apart(arch: str) -> None:
    program = program_of(arch)
    segments = program.segments
    assert [s.index for s in segments] == list(range(len(segments)))
    assert [s.reason is CutReason.END for s in segments] == [s is segments[-1] for s in segments]
    layers = program.config.num_hidden_layers
    attention = [s for s in segments if s.kind == "attention"]
    assert len(attention) == layers
    for s in attention:
        assert s.reason is CutReason.AFTER_ATTENTION
        assert [p.kind for p in s.parts] == [PartKind.ATTENTION], "attention is a segment of its own"
        assert segments[s.index - 1].reason is CutReason.BEFORE_ATTENTION
    experts = [s for s in segments if s.kind == "experts"]
    assert len(experts) == (layers if arch in ("qwen3_moe", "mixtral", "gpt_oss") else 0)
    assert {s.reason for s in experts if s is not segments[-1]} <= {CutReason.EXPERTS}
    for s in segments:  # no two matrix products with weights in one segment
        matrices = {p for part in s.parts for p in part.params if program.weights[p].dim() == 2}
        if s is segments[0]:
            matrices -= {
                "lm_head.weight",
                "model.embed_tokens.weight",
                "gpt_neox.embed_in.weight",
            }  # looked up
        assert len(matrices) <= 1, s.name


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["operator", "layer", "model"])
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_every_operator_without_a_cut_behind_it_says_why(arch: str, granularity: str) -> None:
    program = program_of(arch, granularity=granularity)
    for segment in program.segments:
        nodes = [name for part in segment.parts for name, _ in part.nodes]
        assert [name for name, _ in segment.refused] == nodes[:-1]
        reasons = {reason for _, reason in segment.refused}
        if granularity == "operator":
            assert Refusal.COARSER not in reasons
        else:
            assert reasons <= {Refusal.COARSER, Refusal.INSIDE_OPERATOR, Refusal.WRITTEN_LATER}
    count = sum(len(s.refused) for s in program.segments)
    assert (f"- {count} operators without a cut behind them: " in program.explain()) == (count > 0)


@pytest.mark.slow
def test_the_reasons_of_one_layer() -> None:
    """From the model: a norm in front of a projection, rotation in front of attention."""
    found = {s.name.removeprefix("model.layers.1."): s for s in program_of("llama").segments[8:]}
    reasons = {name: [reason for _, reason in s.refused] for name, s in found.items()}
    assert set(reasons["self_attn.q_proj"]) == {Refusal.NO_WORK}  # the norm
    assert reasons["self_attn.v_proj"][-1] is Refusal.BESIDE_ATTENTION
    assert reasons["self_attn"] == []
    assert reasons["mlp.up_proj"] == [Refusal.NO_WORK, Refusal.NO_SMALLER]  # the activation; the product
    assert set(reasons["mlp.down_proj"]) == {Refusal.NO_SMALLER}  # one row is kept for the head
    assert reasons["lm_head"] == []
    toy_reasons = {
        reason
        for s in fpcompile.segment(toy(written_in_place), route="packed", verify=False).segments
        for _, reason in s.refused
    }
    assert {Refusal.WRITTEN_LATER, Refusal.INSIDE_OPERATOR} <= toy_reasons


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["bloom", "mamba", "bert"])
def test_the_generic_route_says_it_too(arch: str) -> None:
    for granularity in ("operator", "layer"):
        program = fpcompile.segment(tiny_model(arch), route="generic", granularity=granularity, verify=False)
        for segment in program.segments:
            nodes = [name for part in segment.parts for name, _ in part.nodes]
            assert len(segment.refused) >= len(nodes) - 1
            assert all(isinstance(reason, Refusal) for _, reason in segment.refused)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_every_node_of_a_segment_knows_where_it_comes_from(arch: str) -> None:
    program = program_of(arch)
    sources = [source for s in program.segments for p in s.parts for _, source in p.nodes]
    lines = [source.line for source in sources if source.line]
    assert len(lines) > 0.9 * len(sources)
    assert sum(line.startswith(("modeling_", "masking_utils", "activations")) for line in lines) > 0.8 * len(
        lines
    )
    assert all(s.name for s in program.segments)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_a_weight_is_read_by_the_layer_that_owns_it(arch: str) -> None:
    """A function shared by layers must be given each layer's own weights."""
    for segment in program_of(arch).segments:
        layers = {
            path.split("layers.")[1].split(".")[0]
            for part in segment.parts
            for path in part.params
            if "layers." in path
        }
        if "layers." in segment.name and layers:
            assert segment.name.split("layers.")[1].split(".")[0] in layers
        assert len(layers) <= 2, "a segment reaches from one layer into the next at most"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "mixtral", "gpt_oss"])
def test_identical_layers_share_their_functions(arch: str) -> None:
    """Depth adds segments, not functions: the last layers differ from the first by nothing but weights."""
    counts, functions = [], []
    for layers in (4, 8):
        model = tiny_model(arch, overrides={"num_hidden_layers": layers})
        program = fpcompile.segment(model, route="packed", verify=False)
        counts.append(len(program.segments))
        functions.append({p.function for s in program.segments for p in s.parts})
    assert counts[1] > 1.8 * counts[0]
    assert functions[0] == functions[1]


@pytest.mark.slow
def test_depth_of_a_llama_does_not_change_its_functions() -> None:
    found = {
        layers: {
            p.function
            for s in fpcompile.segment(
                tiny_model("llama", overrides={"num_hidden_layers": layers}), route="packed", verify=False
            ).segments
            for p in s.parts
        }
        for layers in (2, 6)
    }
    assert found[2] == found[6]


def written_in_place(s: Spot) -> Tensor:
    """``h`` is read by a projection, then doubled in place, then read by another one."""
    h = s.layer.up(s.x)
    g = s.layer.down(torch.relu(h))
    h.mul_(2.0)
    result: Tensor = g + s.layer.down(h)
    return result


def written_through_a_view(s: Spot) -> Tensor:
    """The write goes through a slice of ``h``, behind two projections."""
    h = s.layer.up(s.x)
    left = h[..., :24]
    g = s.layer.out(s.layer.down(h))
    left.add_(1.0)
    result: Tensor = g + s.layer.down(h)
    return result


def written_at_once(s: Spot) -> Tensor:
    """An in-place operator right behind its value forbids nothing that was wanted."""
    result: Tensor = s.layer.down(s.layer.up(s.x).relu_())
    return result


def picked(s: Spot) -> Tensor:
    """Results of one operator, read on both sides of a projection."""
    a, b = s.layer.up(s.x).chunk(2, dim=-1)
    best, index = s.x.topk(4, dim=-1)
    c = s.layer.out(s.x)
    d = s.layer.down(torch.cat([b, a], dim=-1))
    result: Tensor = c + d + best.sum(-1, keepdim=True) * index.float().mean(-1, keepdim=True)
    return result


ALIASING: dict[str, tuple[Callable[[Spot], Tensor], int]] = {
    "written in place": (written_in_place, 1),
    "written through a view": (written_through_a_view, 2),
    "written at once": (written_at_once, 0),
    "picked": (picked, 0),
}
"""Name -> computation, and how many of each layer's cuts behind projections it makes illegal."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIASING)
def test_no_cut_separates_a_value_from_a_later_write(name: str) -> None:
    mix, lost = ALIASING[name]
    model = toy(mix)
    program = fpcompile.segment(model, route="packed")
    projections = {"written in place": 3, "written through a view": 4, "written at once": 2, "picked": 3}[
        name
    ]
    assert len(program.segments) == 2 * (3 + projections - lost) + 1
    in_place = [note for note in program.plan.notes if "writes in place" in note]
    assert bool(in_place) == (name != "picked")
    ids = sample_ids(19, seed=1)
    expected = reference(model, ids)
    assert differences(outcome(program(ids)), expected) == []
    assert differences(relay(program, program.start(ids)), expected) == []

    run = program.start(ids)
    snapshots, held = [], []
    for _ in cuts(run):
        snapshots.append(run.checkpoint())
        held += [(n, t, t._version, t.clone()) for n, t in run.values.items()]
    for value, tensor, version, bits in held:
        assert tensor._version == version, f"{value} was written after it had crossed a cut"
        assert torch.equal(tensor, bits)
    assert [differences(finish(program.resume(s)), expected) for s in snapshots] == [[]] * len(snapshots)


@pytest.mark.slow
def test_only_tensors_cross_cuts() -> None:
    program = fpcompile.segment(toy(picked), route="packed")
    run = program.start(sample_ids(7))
    for cut in cuts(run):
        assert all(isinstance(value, Tensor) for value in run.values.values())
        if cut:
            live = program.segments[cut - 1].live
            for value in live.values:
                sizes = [evaluate(size, tokens=7, rows=7) for size in value.shape]
                assert list(run.values[value.name].shape) == sizes
                assert str(run.values[value.name].dtype) == value.dtype


@pytest.mark.slow
def test_between_two_projections_the_cheapest_place_is_taken() -> None:
    """``up`` makes 48 values per token, its half 24: the cut stands behind the half."""

    def halved(s: Spot) -> Tensor:
        half = s.layer.up(s.x)[..., :24].relu()
        result: Tensor = s.layer.down(torch.cat([half, half], dim=-1))
        return result

    program = fpcompile.segment(toy(halved), route="packed")
    segment = next(s for s in program.segments if s.name == "layers.0.up")
    assert [tuple(map(str, v.shape)) for v in segment.live.values if v.shape[-1] in (24, 48)] == [
        ("1", "tokens", "24")
    ]


@pytest.mark.slow
def test_a_program_is_the_same_each_time() -> None:
    first, second = (fpcompile.segment(toy(mlp), route="packed", verify=False) for _ in range(2))
    assert first.plan == second.plan
    assert first.fingerprint == second.fingerprint
    assert first.weights_fingerprint == second.weights_fingerprint

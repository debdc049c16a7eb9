"""Tiles of experts: every pair of token and expert once, within the budget, with the bits of one call."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fpcompile
from fpcompile.errors import BudgetError, BudgetWarning, CheckpointError
from fpcompile.executor.cost_model import Samples
from fpcompile.executor.schedule import MIN_ROWS, SKEW, Heads, Launch, Shape, by_budget, launch_seconds
from fpcompile.executor.stages import Stage, Step
from fpcompile.executor.tile_costs import COLLECTED, PART, RANGE
from fpcompile.ir import Cost, Part, PartKind
from fpcompile.models.division import Division
from fpcompile.models.leaves import experts_leaf
from fpcompile.models.zoo import sample_ids, tiny_model
from tests.cpu.support import differences, finish, reference, relay, same_bits, through_file

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
IMPLEMENTATIONS = ("eager", "grouped_mm")
EXPERTS = 4


def experts_of(model: nn.Module) -> Any:
    return next(m for m in model.modules() if hasattr(m, "_is_expert_parallel"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("arch", MIXTURES)
def test_ranges_of_experts_give_the_bits_of_one_call(
    arch: str, implementation: str, dtype: torch.dtype
) -> None:
    leaf = experts_leaf(experts_of(tiny_model(arch, dtype=dtype)), implementation, top_k=2)
    division = leaf.division
    assert division is not None
    generator = torch.Generator().manual_seed(1)
    for tokens in (1, 7, 150):
        hidden = torch.randn(tokens, 64, generator=generator).to(dtype)
        scores = torch.rand(tokens, EXPERTS, generator=generator)
        scores[:, 2] *= 0.05  # an expert that hardly anybody chooses
        weights, choices = scores.topk(2, dim=-1)
        tensors = (hidden, choices, weights.to(dtype))
        with torch.no_grad():
            assert division.disagreement() is None
            (whole,) = leaf.run(tensors, (tokens,))
            for bounds in ((0, 1, 2, 3, 4), (0, 3, 4), (0, 4)):
                state = division.room(tensors)
                for start, stop in itertools.pairwise(bounds):
                    division.add(state, tensors, start, stop)
                assert same_bits(division.collect(state, tensors), whole)


def test_what_cannot_be_divided_is_left_whole() -> None:
    module = experts_of(tiny_model("mixtral"))
    for implementation in ("deepgemm", "batched_mm"):
        assert experts_leaf(module, implementation, top_k=2).division is None
    module._is_expert_parallel = True
    assert experts_leaf(module, "grouped_mm", top_k=2).division is None
    module._is_expert_parallel = False
    found = experts_leaf(module, "grouped_mm", top_k=2).division
    assert found is not None

    def mixing(module: nn.Module, hidden: Any, choices: Any, weights: Any) -> Any:
        return found.forward(module, hidden, choices, weights) + hidden.sum()

    mixed = Division(module, mixing, EXPERTS, "at once", 64, 2).disagreement()
    assert mixed is not None
    assert "other bits than one call at 9 tokens" in mixed
    assert Division(module, found.forward, EXPERTS, "in order", 64, 3).disagreement() is not None, "order"

    def refusing(module: nn.Module, hidden: Any, choices: Any, weights: Any) -> Any:
        raise ValueError("two choices are expected")

    refused = Division(module, refusing, EXPERTS, "at once", 64, 2).disagreement()
    assert refused is not None
    assert "rows of one choice (ValueError)" in refused

    def wide(module: nn.Module, hidden: Any, choices: Any, weights: Any) -> Any:
        return found.forward(module, hidden, choices, weights) * (2 if len(hidden) >= MIN_ROWS else 1)

    late = Division(module, wide, EXPERTS, "at once", 64, 2).disagreement()
    assert late is not None, "a kernel that changes with the number of rows"
    assert "at 64 tokens" in late


class Costs:
    """Seconds of experts: their weights, and their rows; ``sums`` for collecting the results of a token."""

    def __init__(self, fixed: float, each: float, sums: float = 0.0) -> None:
        self.fixed, self.each, self.sums = fixed, each, sums

    def stage(self, index: int, *, tokens: int, rows: int, context: float) -> float:
        return self.fixed + self.each * tokens

    def tile(self, index: int, *, tokens: int, context: float) -> float:
        return self.fixed + self.each * tokens

    def written(self, index: int, *, tokens: int) -> float:
        return 0.0

    def experts(self, index: int, *, tokens: int, share: float) -> float:
        return share * (self.fixed + self.each * tokens)

    def collected(self, index: int, *, tokens: int) -> float:
        return self.sums * tokens

    def columns(self, index: int, *, rows: int, units: int, of: int) -> float:
        raise AssertionError("there are none")


def stage_of(experts: int) -> Stage:
    part = Part("experts", PartKind.LEAF, "f", (), (), (), ("y",), 0, Cost(), (), "tokens")
    division = Division(nn.Module(), lambda m, h, c, w: h, experts, "at once", 8, 2)
    step = Step(part, lambda run, tensors, lengths: tensors, (), (), division)
    return Stage(0, (step,), "tokens", (), (("y", 0),), ())


@given(
    experts=st.integers(2, 40),
    tokens=st.integers(1, 3000),
    fixed=st.floats(0.0, 500.0),
    each=st.floats(0.001, 1.0),
    sums=st.floats(0.0, 0.5),
    budget=st.floats(0.5, 4000.0),
)
def test_a_plan_covers_every_pair_of_token_and_expert_once(
    experts: int, tokens: int, fixed: float, each: float, sums: float, budget: float
) -> None:
    stages, shape = (stage_of(experts),), Shape(tokens, 1, ((1, tokens, tokens),))
    costs = Costs(fixed, each, sums)
    plan = by_budget(stages, shape, costs, budget, [Heads()])
    if not plan[0].tiled:
        assert len(plan) == 1
        return
    collected, stop, expert = 0, 0, experts  # results so far; the range of tokens under way; its next expert
    for tile in plan:
        if tile.head_start < tile.head_stop:  # a range of experts
            if expert == experts:
                assert tile.start == stop == collected, "nothing is left of the range of tokens before"
                stop, expert = tile.stop, 0
            assert (tile.start, tile.stop, tile.head_start) == (collected, stop, expert)
            expert = tile.head_stop
        else:  # results: of all experts at once, or behind the last range
            assert expert == experts
            assert tile.head_start in (0, experts)
            assert tile.start == collected
            collected = tile.stop
            stop = max(stop, collected)
    assert (collected, expert) == (tokens, experts)
    assert [t.final for t in plan] == [False] * (len(plan) - 1) + [True]
    few = min(tokens, 2 * MIN_ROWS)
    smallest = max(SKEW * (fixed + each * few) / experts, sums * few)
    longest = max(launch_seconds(t, stages, shape, costs, [Heads()]) for t in plan)
    by_expert = any(t.head_stop for t in plan)
    assert longest <= budget * 1.0001 or (by_expert and smallest > budget) or tokens < 2 * MIN_ROWS


def test_experts_are_divided_wherever_one_of_them_keeps_the_budget() -> None:
    """Ranges of tokens would give an expert fewer rows, and its product other bits."""
    shape = Shape(2048, 1, ((1, 2048, 2048),))
    heavy = by_budget((stage_of(64),), shape, Costs(1000.0, 0.1), 100.0, [Heads()])
    assert {(t.start, t.stop) for t in heavy} == {(0, 2048)}, "no range of tokens reads the weights again"
    assert {t.head_stop - t.head_start for t in heavy[:-1]} == {2}, (
        "64 experts take 1205 s, twice as many in a skew"
    )
    assert (heavy[-1].head_start, heavy[-1].head_stop) == (64, 64)
    light = by_budget((stage_of(64),), shape, Costs(1.0, 1.0), 300.0, [Heads()])
    assert {(t.start, t.stop) for t in light} == {(0, 2048)}
    few = by_budget((stage_of(2),), shape, Costs(1.0, 1.0), 300.0, [Heads()])
    assert all(not t.head_stop for t in few), (
        "one expert is too much: ranges of tokens keep the budget exactly"
    )


def test_what_collecting_takes_is_part_of_the_plan() -> None:
    """The sum over the choices of all tokens takes 2048 s, that of 64 tokens 64 s."""
    shape, stages, costs = Shape(2048, 1, ((1, 2048, 2048),)), (stage_of(64),), Costs(1000.0, 0.1, sums=1.0)
    plan = by_budget(stages, shape, costs, 100.0, [Heads()])
    sums = [t for t in plan if t.head_start == 64]
    assert [(t.start, t.stop) for t in sums] == [(64 * i, 64 * i + 64) for i in range(32)]
    assert max(launch_seconds(t, stages, shape, costs, [Heads()]) for t in plan) <= 100.0
    assert launch_seconds(sums[0], stages, shape, costs, [Heads()]) == 64.0


@pytest.mark.slow
@pytest.mark.parametrize("arch", MIXTURES)
def test_a_run_over_ranges_of_experts_has_the_models_bits(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch)
    program = fpcompile.segment(model, route="packed", verify=False)
    ids = sample_ids(30)
    expected = reference(model, ids)
    schedule: list[Launch] = []
    for i, stage in enumerate(program.stages):
        if stage.experts:
            assert [s.part.kind for s in stage.steps] == [PartKind.LEAF]
            tiles = [Launch(i, i + 1, 0, 30, 0, e, e + 2, final=False) for e in (0, 2)]
            tiles += [Launch(i, i + 1, a, b, 0, 4, 4, final=b == 30) for a, b in ((0, 13), (13, 30))]
            schedule += tiles
        else:
            schedule.append(Launch(i, i + 1))
    assert any(launch.head_stop for launch in schedule)
    run = program.start(ids)
    run.schedule = tuple(schedule)
    assert differences(finish(run), expected) == []
    run = program.start(ids)
    run.schedule = tuple(schedule)
    assert differences(relay(program, run, through_file(tmp_path / "run.ckpt")), expected) == []


@pytest.mark.slow
def test_a_checkpoint_does_not_go_on_where_experts_are_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they are depends on the machine's kernels, and launches are numbered by stages."""
    model = tiny_model("mixtral")
    divided = fpcompile.segment(model, route="packed", granularity="model", verify=False)
    monkeypatch.setattr(Division, "disagreement", lambda self: "other bits at 64 tokens")
    whole = fpcompile.segment(model, route="packed", granularity="model", verify=False)
    assert len(divided.stages) > len(whole.stages)
    checkpoint = divided.start(sample_ids(9)).checkpoint()
    with pytest.raises(CheckpointError, match="another program"):
        whole.resume(checkpoint)


def test_memory_that_runs_out_while_kernels_are_compared_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Division, "add", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        fpcompile.segment(tiny_model("mixtral"), route="packed", verify=False)


@pytest.mark.slow
def test_a_budget_divides_experts_and_failures_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    program = fpcompile.segment(model, route="packed", verify=False)
    program.use_costs(
        {
            s.key: ((1, 1e-3 if s.experts else 1e-6), (512, 1.1e-3 if s.experts else 2e-6))
            for s in program.stages
        }
    )
    run = program.start(sample_ids(150), max_blocking_ms=0.6)
    ranges = [(t.start, t.stop, t.head_start, t.head_stop) for t in run.schedule if t.head_stop]
    results = (0, 150, EXPERTS, EXPERTS)
    assert ranges == [*((0, 150, e, e + 1) for e in range(EXPERTS)), results] * 2
    assert differences(finish(run), reference(model, sample_ids(150))) == []

    def fail(*args: object) -> None:
        raise RuntimeError("no memory")

    run = program.start(sample_ids(150), max_blocking_ms=0.6)
    monkeypatch.setattr(Division, "add", fail)
    with pytest.raises(fpcompile.errors.SegmentError, match=r"layers\.0\.mlp"):
        finish(run)


@pytest.mark.slow
def test_a_strict_budget_refuses_what_collecting_makes_impossible() -> None:
    """One expert of 150 tokens keeps 0.6 ms; summing the choices of 64 tokens may not."""
    program = fpcompile.segment(tiny_model("qwen3_moe"), route="packed", verify=False)
    ids = sample_ids(150)

    def measured(collecting: float) -> None:
        samples: Samples = {s.key: ((1, 1e-6), (512, 2e-6)) for s in program.stages}
        (key,) = {s.key for s in program.stages if s.experts}
        samples[key] = samples[(*key, RANGE)] = ((1, 1e-3), (512, 1.1e-3))
        samples[(*key, PART)] = ((1, 1e-3 / EXPERTS), (512, 1.1e-3 / EXPERTS))
        samples[(*key, COLLECTED)] = ((64, collecting), (512, 8 * collecting))
        program.use_costs(samples)

    measured(0.1e-3)
    run = program.start(ids, max_blocking_ms=0.6, strict_budget=True)
    assert any(t.head_start == EXPERTS for t in run.schedule)
    run.release()
    measured(5e-3)
    with pytest.raises(BudgetError) as refused:
        program.start(ids, max_blocking_ms=0.6, strict_budget=True)
    assert refused.value.seconds >= 5e-3
    with pytest.warns(BudgetWarning, match="experts"):
        program.start(ids, max_blocking_ms=0.6)


@pytest.mark.slow
def test_a_tile_plan_says_why_experts_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    divided = fpcompile.segment(model, route="packed", verify=False)
    assert "experts are not divided" not in divided.explain()
    assert "n * 2 * 64 more values: 0.524 MB at n = 1024" in flat(divided.explain(tokens=1024))
    monkeypatch.setattr(Division, "disagreement", lambda self: "other bits at 64 tokens")
    told = flat(fpcompile.segment(model, route="packed", verify=False).explain())
    assert "experts are not divided" in told
    assert "other bits at 64 tokens: model.layers.0.mlp.experts and 1 more" in told


def flat(text: str) -> str:
    """Without line breaks."""
    return " ".join(text.split())

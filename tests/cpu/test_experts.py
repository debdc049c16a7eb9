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
from fpcompile.errors import CheckpointError
from fpcompile.executor.schedule import MIN_ROWS, SKEW, Launch, Shape, by_budget, launch_seconds
from fpcompile.executor.stages import Stage, Step
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
            assert division.agrees()
            (whole,) = leaf.run(tensors, (tokens,))
            for bounds in ((0, 1, 2, 3, 4), (0, 3, 4), (0, 4)):
                state = division.room(tensors)
                for start, stop in itertools.pairwise(bounds):
                    division.add(state, tensors, start, stop)
                assert same_bits(division.result(state, tensors), whole)


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

    assert not Division(module, mixing, EXPERTS, "at once", 64, 2).agrees()
    assert not Division(module, found.forward, EXPERTS, "in order", 64, 3).agrees(), "another order of sums"

    def refusing(module: nn.Module, hidden: Any, choices: Any, weights: Any) -> Any:
        raise ValueError("two choices are expected")

    assert not Division(module, refusing, EXPERTS, "at once", 64, 2).agrees()


class Costs:
    """Seconds of experts: their weights, and their rows."""

    def __init__(self, fixed: float, each: float) -> None:
        self.fixed, self.each = fixed, each

    def stage(self, index: int, *, tokens: int, rows: int, context: float) -> float:
        return self.fixed + self.each * tokens


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
    budget=st.floats(0.5, 4000.0),
)
def test_a_plan_covers_every_pair_of_token_and_expert_once(
    experts: int, tokens: int, fixed: float, each: float, budget: float
) -> None:
    stages, shape, costs = (stage_of(experts),), Shape(tokens, 1, ((1, tokens, tokens),)), Costs(fixed, each)
    plan = by_budget(stages, shape, costs, budget, [0])
    if not plan[0].tiled:
        assert len(plan) == 1
        return
    whole = [(0, experts)]
    ranges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for tile in plan:
        ranges.setdefault((tile.start, tile.stop), []).append((tile.head_start, tile.head_stop or experts))
    bounds = [0, *(stop for _, stop in ranges)]
    assert list(ranges) == list(itertools.pairwise(bounds))
    assert bounds[-1] == tokens
    for found in ranges.values():
        assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])]
        assert found[-1][1] == experts
    assert [t.final for t in plan] == [False] * (len(plan) - 1) + [True]
    smallest = SKEW * costs.stage(0, tokens=min(tokens, 2 * MIN_ROWS), rows=1, context=1) / experts
    longest = max(launch_seconds(t, stages, shape, costs, [0]) for t in plan)
    by_expert = any(found != whole for found in ranges.values())
    assert longest <= budget * 1.0001 or (by_expert and smallest > budget) or tokens < 2 * MIN_ROWS


def test_experts_are_divided_where_reading_their_weights_is_the_work() -> None:
    shape = Shape(2048, 1, ((1, 2048, 2048),))
    heavy = by_budget((stage_of(64),), shape, Costs(1000.0, 0.1), 100.0, [0])
    assert {(t.start, t.stop) for t in heavy} == {(0, 2048)}, "no range of tokens reads the weights again"
    assert {t.head_stop - t.head_start for t in heavy} == {2}, (
        "64 experts take 1205 s, twice as many in a skew"
    )
    light = by_budget((stage_of(64),), shape, Costs(1.0, 1.0), 300.0, [0])
    assert all(not t.head_stop for t in light), "rows are the work: ranges of tokens keep the budget exactly"


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
            tiles = [Launch(i, i + 1, 0, 30, 0, e, e + 2, final=e == 2) for e in (0, 2)]
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
    monkeypatch.setattr(Division, "agrees", lambda self: False)
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
    assert ranges == [(0, 150, e, e + 1) for e in range(EXPERTS)] * 2
    assert differences(finish(run), reference(model, sample_ids(150))) == []

    def fail(*args: object) -> None:
        raise RuntimeError("no memory")

    run = program.start(sample_ids(150), max_blocking_ms=0.6)
    monkeypatch.setattr(Division, "add", fail)
    with pytest.raises(fpcompile.errors.SegmentError, match=r"layers\.0\.mlp"):
        finish(run)

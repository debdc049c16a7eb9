"""Ranges of a head's columns: every row and column once, within the budget, with the bits of the model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fpcompile
from fpcompile.errors import BudgetError, BudgetWarning, SegmentError
from fpcompile.executor import measure_tiles as tiles
from fpcompile.executor.columns import Columns
from fpcompile.executor.cost_model import Samples
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.schedule import MIN_ROWS, Heads, Shape, by_budget, launch_seconds
from fpcompile.executor.stages import Stage, Step
from fpcompile.executor.tile_costs import COLUMNS, tile_costs
from fpcompile.ir import Cost, Part, PartKind
from fpcompile.models.zoo import sample_ids, tiny_model
from fpcompile.passes import columns as units
from fpcompile.passes.prepack import can_prepack, pack
from tests.cpu.support import differences, finish, reference, relay, same_bits, through_file

WORDS = 4019  # a prime: no unit, block or vector divides it
BUDGET = 4.0  # milliseconds; a head takes 10 for a row
BF16 = can_prepack(torch.zeros(1, 1, dtype=torch.bfloat16))
needs_bf16 = pytest.mark.skipif(not BF16, reason="this CPU has no bf16 matrix kernel")
FORMS = (
    pytest.param(torch.float32, "shared", id="fp32"),
    pytest.param(torch.bfloat16, "shared", id="bf16"),
    pytest.param(torch.bfloat16, "packed", id="packed", marks=needs_bf16),
)
HEADS: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "phi": {},  # a bias
    "gemma2": {},  # tied, and a soft cap behind it
    "granite": {},  # scaled behind it
}


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have tiny heads."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1 << 16)


def model_with_head(arch: str, dtype: torch.dtype, **overrides: Any) -> Any:
    return tiny_model(arch, dtype=dtype, overrides={"vocab_size": WORDS, **HEADS[arch], **overrides})


def program_with_head(model: Any, weights: str = "shared") -> PackedProgram:
    """The head takes 10 ms and 0.1 for each row, every other stage a microsecond."""
    program = fpcompile.segment(model, route="packed", weights=weights, verify=False)
    assert isinstance(program, PackedProgram)
    program.use_costs(priced(program))
    return program


def priced(program: fpcompile.Program) -> Samples:
    samples: Samples = {s.key: ((1, 1e-6), (512, 2e-6)) for s in program.stages}
    return {**samples, **{s.key: ((1, 10.1e-3), (512, 61.2e-3)) for s in program.stages if s.columns}}


def head_of(program: fpcompile.Program) -> Stage:
    (stage,) = (s for s in program.stages if s.columns)
    return stage


def ranges_of(program: fpcompile.Program, run: fpcompile.Run) -> list[tuple[int, int, int, int]]:
    """(row, row, unit, unit) of each tile of the head."""
    found = [t for t in run.schedule if program.stages[t.first].columns and t.tiled]
    return [(t.start, t.stop, t.head_start, t.head_stop) for t in found]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "weights"), FORMS)
@pytest.mark.parametrize("arch", HEADS)
def test_ranges_of_columns_have_the_models_bits(
    arch: str, dtype: torch.dtype, weights: str, tmp_path: Path
) -> None:
    model = model_with_head(arch, dtype)
    program = program_with_head(model, weights)
    head = head_of(program)
    assert (len(head.steps), head.steps[0].part.name) == (1, "lm_head")
    ids = sample_ids(30)
    for rows in (1, 2, 5, 17):
        expected = reference(model, ids, logits_to_keep=rows)
        run = program.start(ids, logits_to_keep=rows, max_blocking_ms=BUDGET, strict_budget=True)
        found = ranges_of(program, run)
        assert len(found) >= 3
        assert [(a, b) for a, b, *_ in found] == [(0, rows)] * len(found)
        assert differences(finish(run), expected) == []
        assert differences(finish(program.start(ids, logits_to_keep=rows)), expected) == [], "whole"
    run = program.start(ids, logits_to_keep=2, max_blocking_ms=BUDGET)
    expected = reference(model, ids, logits_to_keep=2)
    assert differences(relay(program, run, through_file(tmp_path / "run.ckpt")), expected) == []


@needs_bf16
@pytest.mark.slow
@pytest.mark.parametrize("rows", [64, 100, 256, 513])
@pytest.mark.parametrize("width", [64, 896])
def test_a_weight_that_is_packed_by_units_gives_the_bits_of_the_whole(width: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(WORDS, width, generator=generator).bfloat16()
    x = torch.randn(1, rows, width, generator=generator).bfloat16()
    bounds = units.units_of(WORDS, width, 2)
    parts = tuple(pack(weight[a:b]) for a, b in itertools.pairwise(bounds))
    columns = Columns(weight, None, bounds, parts)
    out = columns.room(x)
    columns.write(out, x, 0, columns.units)
    assert same_bits(out, torch.nn.functional.linear(x, weight))


@needs_bf16
@pytest.mark.slow
def test_memory_is_not_doubled() -> None:
    model = model_with_head("qwen3", torch.bfloat16)
    table = model.get_input_embeddings().weight
    shared = head_of(program_with_head(model)).steps[0].columns
    assert shared is not None
    assert shared.weight.data_ptr() == table.data_ptr(), "tied"
    assert not shared.packed
    program = program_with_head(model, "packed")
    packed = head_of(program).steps[0].columns
    assert packed is not None
    assert len(packed.packed) == packed.units
    assert all(w.is_mkldnn for w in packed.packed)
    assert sum(w.shape[0] for w in packed.packed) == WORDS
    assert [p for p, w in program.weights.items() if w.is_mkldnn and w.shape[0] == WORDS] == []
    assert any(w.is_mkldnn for w in program.weights.values()), "the other ones are packed whole"


@pytest.mark.slow
def test_a_budget_that_a_head_exceeded_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_with_head("llama", torch.float32), sample_ids(9)
    program = program_with_head(model)
    run = program.start(ids, logits_to_keep=1, max_blocking_ms=BUDGET, strict_budget=True)
    longest = max(
        launch_seconds(t, program.stages, run.call.shape, program.costs, program.heads())
        for t in run.schedule
    )
    assert longest <= BUDGET / 1e3
    with pytest.raises(BudgetError, match="lm_head") as refused:
        program.start(ids, logits_to_keep=1, max_blocking_ms=0.1, strict_budget=True)
    assert refused.value.smallest_ms == pytest.approx(10.1 / head_of(program).columns)
    monkeypatch.setattr(units, "UNIT_BYTES", 1 << 30)
    whole = fpcompile.segment(model, route="packed", verify=False)
    assert not any(s.columns for s in whole.stages)
    last = whole.stages[-1].key
    whole.use_costs({s.key: ((1, 10e-3 if s.key == last else 1e-6), (512, 1.0)) for s in whole.stages})
    with pytest.warns(BudgetWarning, match="lm_head"):
        whole.start(ids, logits_to_keep=1, max_blocking_ms=BUDGET)


@pytest.mark.slow
def test_many_rows_are_tiled_by_rows_and_by_both_where_that_is_too_long() -> None:
    model, ids = model_with_head("llama", torch.bfloat16), sample_ids(200)
    program = program_with_head(model)
    expected = reference(model, ids)
    for budget, both in ((40.0, False), (6.0, True)):
        run = program.start(ids, max_blocking_ms=budget, strict_budget=True)
        found = ranges_of(program, run)
        assert any(last for *_, last in found) == both
        assert len({(a, b) for a, b, *_ in found}) > 1
        assert differences(finish(run), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "weights"), FORMS)
def test_a_decode_step_divides_its_head(dtype: torch.dtype, weights: str) -> None:
    model, ids = model_with_head("llama", dtype), sample_ids(20)
    program = program_with_head(model, weights)
    decoder = program.decoder()
    begun = decoder.begin(ids)
    finish(begun.run)
    sequence, _ = decoder.open(begun, begun.run.result())
    step = decoder.step([sequence], [7], [BUDGET])
    assert len(ranges_of(program, step.run)) >= 3
    while not step.run.done:
        assert step.cost() <= BUDGET / 1e3
        step.run.step()
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        expected = model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits
    assert same_bits(step.logits(), expected[0])


@pytest.mark.slow
def test_a_saved_program_has_the_same_units(tmp_path: Path) -> None:
    model = model_with_head("gemma2", torch.bfloat16)
    program = program_with_head(model, "packed" if BF16 else "shared")
    ids = sample_ids(9)
    run = program.start(ids, logits_to_keep=1, max_blocking_ms=BUDGET)
    while not run.partial:
        run.step()
    program.save(tmp_path / "program")
    again = fpcompile.load(tmp_path / "program", model)
    assert again.fingerprint == program.fingerprint
    assert head_of(again).columns == head_of(program).columns
    got = finish(again.resume(run.checkpoint()))
    assert differences(got, reference(model, ids, logits_to_keep=1)) == []


@pytest.mark.slow
def test_a_range_that_fails_names_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_with_head(model_with_head("llama", torch.float32))

    def fail(*args: object) -> None:
        raise RuntimeError("no memory")

    run = program.start(sample_ids(9), logits_to_keep=1, max_blocking_ms=BUDGET)
    monkeypatch.setattr(Columns, "write", fail)
    with pytest.raises(SegmentError, match="lm_head"):
        finish(run)


class Costs:
    """Seconds of a head: for each row and each column unit, and ``fixed`` for each launch."""

    def __init__(self, fixed: float) -> None:
        self.fixed = fixed

    def stage(self, index: int, *, tokens: int, rows: int, context: float) -> float:
        return self.columns(index, rows=rows, units=20, of=20)

    def tile(self, index: int, *, tokens: int, context: float) -> float:
        return self.columns(index, rows=tokens, units=20, of=20)

    def columns(self, index: int, *, rows: int, units: int, of: int) -> float:
        return self.fixed + (10 + rows) * units / of

    def written(self, index: int, *, tokens: int) -> float:
        raise AssertionError("there is no attention")

    def experts(self, index: int, *, tokens: int, share: float) -> float:
        raise AssertionError("there are none")

    def collected(self, index: int, *, tokens: int) -> float:
        raise AssertionError("there are none")


def stage_of(count: int) -> Stage:
    part = Part("lm_head", PartKind.GRAPH, "f", ("x",), ("w",), (), ("y",), -1, Cost(), (), "rows")
    columns = Columns(torch.empty(0), None, tuple(range(count + 1)))
    return Stage(
        0, (Step(part, lambda run, x, n: x, (), (), None, columns),), "rows", (("x", 1),), (("y", 1),), ()
    )


@given(rows=st.integers(1, 700), fixed=st.floats(0.0, 3.0), budget=st.floats(0.2, 800.0))
def test_a_plan_covers_every_row_and_column_once(rows: int, fixed: float, budget: float) -> None:
    stages, shape, costs = (stage_of(20),), Shape(1000, rows, ((1, 1000, 1000),)), Costs(fixed)
    plan = by_budget(stages, shape, costs, budget, [Heads()])
    if len(plan) == 1:
        assert not plan[0].tiled
        assert costs.stage(0, tokens=1000, rows=rows, context=1000) <= budget
        return
    row = column = 0
    for tile in plan:
        assert tile.tiled
        assert (tile.start, tile.head_start) == (row, column)
        column = (tile.head_stop or 20) % 20
        row = row if column else tile.stop
        seconds = launch_seconds(tile, stages, shape, costs, [Heads()])
        smallest = tile.head_stop - tile.head_start == 1 and tile.stop - tile.start < 2 * MIN_ROWS
        assert smallest or seconds <= budget * 1.0001
    assert (row, column) == (rows, 0)
    assert [t.final for t in plan] == [False] * (len(plan) - 1) + [True]


@given(
    columns=st.integers(1, 300_000),
    width=st.integers(1, 9000),
    itemsize=st.sampled_from((2, 4)),
)
def test_units_are_about_equal_and_begin_where_blocks_do(columns: int, width: int, itemsize: int) -> None:
    bounds = units.units_of(columns, width, itemsize)
    assert (bounds[0], bounds[-1]) == (0, columns)
    assert all(b % units.MULTIPLE == 0 for b in bounds[:-1])
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) < 2 * units.MULTIPLE
    if len(sizes) > 1:
        assert (columns // len(sizes)) * width * itemsize >= 1 << 16


def test_ranges_are_priced_as_they_were_measured() -> None:
    key = ("head",)
    samples: Samples = {
        (*key, COLUMNS, "1"): ((1, 3e-3), (5, 7e-3)),
        (*key, COLUMNS, "16"): ((1, 4e-3), (5, 8e-3)),
    }
    costs = tile_costs(key, samples, 0)
    for rows, count, seconds in ((1, 2, 4e-3), (1, 5, 7e-3), (2, 1, 4e-3), (16, 5, 8e-3), (32, 5, 16e-3)):
        assert costs.range_of_columns(rows, count) == pytest.approx(seconds)
    assert tile_costs(("other",), samples, 0).range_of_columns(1, 1) is None


@pytest.mark.slow
def test_ranges_are_measured_and_told_where_they_round_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with_head("llama", torch.float32, max_position_embeddings=256)
    program = program_with_head(model)
    samples, key = priced(program), head_of(program).key
    found, bits = tiles.measure_tiles(program, program.use_costs(samples), seconds=10.0)
    assert bits is not None
    assert {k[-1] for k in found if COLUMNS in k} == {"1", "16", "64"}
    assert [n for n, _ in found[*key, COLUMNS, "1"]] == [1, head_of(program).columns // 4]
    tried = dict(bits.compared[key])
    assert tried["ranges of columns of 1 row"]
    assert {"ranges of columns of 16 rows", "ranges of columns of 64 rows"} < set(tried)
    own = Columns.write

    def rounded(columns: Columns, out: torch.Tensor, x: torch.Tensor, first: int, last: int) -> None:
        own(columns, out, x, first, last)
        if x.shape[1] == 1 and last - first < columns.units:
            out += 1.0

    monkeypatch.setattr(Columns, "write", rounded)
    _, bits = tiles.measure_tiles(program, program.use_costs(samples), seconds=10.0)
    assert bits is not None
    program.use_costs(samples, bits)
    text = " ".join(program.explain().split())
    assert "tiles that round otherwise than the whole: ranges of columns of 1 row" in text

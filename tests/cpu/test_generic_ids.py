"""Ids that a table of the model has no row for are refused when a run of the generic route starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpcompile
from fpcompile.errors import InvalidInputError
from fpcompile.executor.inputs import check_range
from fpcompile.models.zoo import sample_ids, tiny_any, tiny_model
from fpcompile.passes.generic_capture import capture_generic
from tests.cpu.test_generic_toys import compiled, same

pytestmark = pytest.mark.slow

ROWS, WIDTH = 10, 8
Prepare = Callable[[Tensor], Tensor]


class Table(nn.Module):
    """An embedding of what ``prepare`` makes of the ids, and a projection."""

    def __init__(self, prepare: Prepare, rows: int = ROWS) -> None:
        super().__init__()
        self.prepare, self.table, self.out = prepare, nn.Embedding(rows, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, scale: bool = False) -> Tensor:
        found: Tensor = self.out(self.table(self.prepare(input_ids)))
        return found * 2 if scale else found


def written(ids: Tensor) -> Tensor:
    kept = ids.clone()
    kept[(ids >= ROWS) | (ids < 0)] = 0
    return kept


def written_by_way_of_a_view(ids: Tensor) -> Tensor:
    kept = ids.clone()
    kept.view(-1).clamp_(0, ROWS - 1)
    return kept


DIRECT: dict[str, Prepare] = {
    "as they are": lambda ids: ids,
    "by way of views": lambda ids: ids.view(-1, ids.shape[-1]).unsqueeze(0).transpose(1, 2),
    "copied": lambda ids: ids.clone().contiguous(),
    "as wider integers": lambda ids: ids.int().long() if ids.dtype is torch.int32 else ids.long(),
}
REPLACED: dict[str, Prepare] = {
    "filled": lambda ids: ids.masked_fill((ids >= ROWS) | (ids < 0), 0),
    "chosen": lambda ids: torch.where((ids >= ROWS) | (ids < 0), 0, ids),
    "written in place": written,
    "written by way of a view": written_by_way_of_a_view,
    "clamped": lambda ids: ids.clamp(0, ROWS - 1),
    "shifted": lambda ids: (ids + 3) % ROWS,
    "all but two": lambda ids: ids[:, 1:-1],
}
GOOD, BAD = torch.tensor([[3, 1, 9, 0]]), (torch.tensor([[-1, 3, 1, 2]]), torch.tensor([[2, 3, 1, ROWS]]))


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_what_the_table_is_given_is_checked(name: str, dtype: torch.dtype) -> None:
    model = Table(DIRECT[name])
    program = compiled(model, GOOD.to(dtype))
    same(model, program, GOOD.to(dtype))
    for bad, seen in zip(BAD, ("from -1 to 3", f"from 1 to {ROWS}"), strict=True):
        with pytest.raises(InvalidInputError, match="input_ids holds an id outside the vocabulary") as caught:
            program.start(bad.to(dtype))
        assert caught.value.expected == f"ids from 0 to {ROWS - 1}"
        assert seen in str(caught.value.got)
        assert "tokenizer" in str(caught.value.remedy)
    with pytest.raises(InvalidInputError, match="outside the vocabulary"):  # a call that compiles a variant
        program.start(BAD[0].to(dtype), scale=True)
    same(model, program, GOOD.to(dtype))


@pytest.mark.parametrize("name", REPLACED)
def test_what_the_model_replaces_first_may_be_anything(name: str) -> None:
    model = Table(REPLACED[name])
    program = compiled(model, GOOD)
    for ids in (GOOD, *BAD):
        same(model, program, ids)


def test_the_smallest_table_counts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.small = nn.Embedding(20, WIDTH), Table(lambda ids: ids, 6)

        def forward(self, kinds: Tensor) -> Tensor:
            found: Tensor = self.wide(kinds) + self.small(kinds)
            return found

    program = compiled(Two(), kinds=GOOD % 6)
    with pytest.raises(InvalidInputError, match="kinds holds a number") as caught:
        program.start(kinds=torch.tensor([[6, 1, 2, 3]]))
    assert caught.value.expected == "ids from 0 to 5"


def test_a_program_that_was_read_knows_it_too(tmp_path: Path) -> None:
    model = Table(nn.Identity()).eval()
    program = fpcompile.segment(model, example_inputs=(GOOD,))
    program.save(tmp_path / "program")
    with pytest.raises(InvalidInputError, match="vocabulary"):
        fpcompile.load(tmp_path / "program", model).start(BAD[0])


def test_models_of_transformers() -> None:
    model: Any = tiny_model("gpt2")
    program: Any = fpcompile.segment(model, route="generic")
    ids = sample_ids(9)
    count = int(model.config.vocab_size)
    with fpcompile.Engine(program) as engine:
        with pytest.raises(InvalidInputError, match=r"input_ids .* vocabulary"):
            engine.submit(input_ids=torch.full((1, 5), count))
        with pytest.raises(InvalidInputError, match="position_ids holds a number"):
            engine.submit(input_ids=ids, position_ids=torch.arange(9)[None] + int(model.config.n_positions))
        got = engine.submit(input_ids=ids).result(60)
    with torch.no_grad():
        assert torch.equal(got.logits, model(ids).logits)


def test_both_ids_of_an_encoder_and_a_decoder() -> None:
    case = tiny_any("T5ForConditionalGeneration")
    given: dict[str, Any] = dict(case.small)
    program: Any = fpcompile.segment(case.model, example_inputs=given)
    for name in ("input_ids", "decoder_input_ids"):
        with pytest.raises(InvalidInputError, match=f"^{name} holds"):
            program.start(**{**given, name: given[name] + int(case.model.config.vocab_size)})


def test_the_names_of_what_is_passed_by_position() -> None:
    program = compiled(Table(lambda ids: ids), GOOD)
    (table,) = program.variants[0].captured.tables
    assert table == (0, "input_ids", ROWS)


def test_calls_with_bad_ids_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []

    def counted(*given: Any) -> Any:
        traced.append(1)
        return capture_generic(*given)

    monkeypatch.setattr("fpcompile.executor.generic.capture_generic", counted)
    model = Table(lambda ids: ids)
    program = compiled(model, GOOD)
    for bad in BAD:
        with pytest.raises(InvalidInputError, match="outside the vocabulary"):
            program.start(bad, scale=True)
    assert len(program.variants) == 1
    same(model, program, GOOD, scale=True)
    assert len(program.variants) == len(traced) == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_ids_are_checked(dtype: torch.dtype) -> None:
    check_range("input_ids", torch.tensor([[0, 9]], dtype=dtype), ROWS)
    with pytest.raises(InvalidInputError, match="outside the vocabulary"):
        check_range("input_ids", torch.tensor([[0, 10]], dtype=dtype), ROWS)

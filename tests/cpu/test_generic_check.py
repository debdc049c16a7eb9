"""Variants that are compiled later are compared with the model as the first one is, and leave no trace."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import fpcompile
from fpcompile.errors import InvalidInputError, ProgramFileError, SegmentError, UnsupportedModelError
from fpcompile.executor import saving_generic
from fpcompile.executor.generic_check import _difference, compare
from fpcompile.executor.program_file import FORMAT, MANIFEST, read_folder
from fpcompile.executor.saving_generic import VARIANTS
from fpcompile.executor.saving_parts import CONSTANTS, FUNCTIONS
from fpcompile.executor.verify import _compare
from fpcompile.models.generic_trace import export
from fpcompile.models.zoo import sample_ids, tiny_model
from fpcompile.passes.generic_capture import capture_generic
from fpcompile.passes.generic_partition import compile_generic
from tests.cpu.test_generic_toys import WIDTH, Block, Loop, compiled, hidden, same

pytestmark = pytest.mark.slow


class Sly(nn.Module):
    """Computes something else while it is traced, in calls of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        mixed: Tensor = self.mix(x)
        return mixed * 2 if twice and type(x) is Tensor else mixed


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each variant that was traced."""
    found: list[str] = []
    real = capture_generic

    def counted(model: nn.Module, *rest: Any) -> Any:
        found.append(type(model).__name__)
        return real(model, *rest)

    monkeypatch.setattr("fpcompile.executor.generic.capture_generic", counted)
    return found


def test_a_later_variant_with_other_numbers_is_refused_and_the_others_go_on(traces: list[str]) -> None:
    model = Sly().eval()
    program = compiled(model, hidden(5))
    before = program.start(hidden(6))
    errors = []
    for length in (5, 9):
        with pytest.raises(UnsupportedModelError, match=r"a variant .* does not give the model's") as refused:
            program.start(hidden(length), twice=True)
        errors.append(refused.value)
    assert errors[0] is not errors[1], "each caller has an error of its own"
    assert "result 0 differs by" in errors[0].reason
    assert "of the model itself" in str(errors[0].remedy)
    assert len(traces) == 2, "what was refused is not tried again"
    assert len(program.variants) == 1
    while not before.done:
        before.step()
    assert torch.equal(before.result(), model(hidden(6)))
    same(model, program, hidden(7))
    same(model, program, hidden(1))


def test_each_variant_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def counted(*given: Any, which: str) -> None:
        checked.append(which)
        compare(*given, which=which)

    monkeypatch.setattr("fpcompile.executor.generic.compare", counted)
    program = compiled(Block(nn.GELU()), hidden(5))
    for x in (hidden(5), hidden(1), hidden(1), hidden(7, batch=2), hidden(9, batch=3)):
        program(x)
    assert len(program.variants) == 3
    assert len(checked) == 2


def test_it_is_switched_off_with_the_first_check() -> None:
    program: Any = fpcompile.segment(Sly().eval(), example_inputs=(hidden(5),), verify=False)
    program(hidden(5), twice=True)
    assert len(program.variants) == 2


def test_a_program_that_was_read_checks_what_it_compiles(tmp_path: Path) -> None:
    model = Sly().eval()
    fpcompile.segment(model, example_inputs=(hidden(5),)).save(tmp_path / "program")
    loaded: Any = fpcompile.load(tmp_path / "program", model)
    with pytest.raises(UnsupportedModelError, match="does not give the model's numbers"):
        loaded(hidden(5), twice=True)
    assert torch.equal(loaded(hidden(5)), model(hidden(5)))
    fpcompile.load(tmp_path / "program", model, verify=False)(hidden(5), twice=True)


@pytest.mark.usefixtures("traces")
def test_a_later_kind_of_call_that_keeps_something_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.calls = nn.Linear(WIDTH, WIDTH), 0

        def forward(self, x: Tensor, count: bool = False) -> Tensor:
            self.calls += count
            mixed: Tensor = self.mix(x) * (1 + self.calls)
            return mixed

    model = Counting().eval()
    program = compiled(model, hidden(5))
    with pytest.raises(UnsupportedModelError, match="same numbers twice"):
        program(hidden(5), count=True)
    assert model.calls == 0, "the model is left as found"
    same(model, program, hidden(6))


def test_nothing_that_a_caller_can_see_is_changed() -> None:
    """Random numbers, gradients, what is passed, and what the model holds."""

    class Seeding(Loop):
        def forward(self, x: Tensor, state: Any = None) -> Any:
            torch.manual_seed(3)
            self.last = x.sum()
            if state is not None:
                state["h"].mul_(1.0)
            return super().forward(x + torch.rand(WIDTH), state)

    model = Block(Seeding())
    program = compiled(model, hidden(5))
    _, state = program(hidden(5))
    kept = state["h"].clone()
    x = hidden(4).requires_grad_()
    torch.manual_seed(17)
    draws = torch.get_rng_state()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        run = program.start(x, state)
    assert len(program.variants) == 2
    assert torch.equal(torch.get_rng_state(), draws)
    assert torch.equal(state["h"], kept)
    assert (x.grad, x.requires_grad) == (None, True)
    assert not hasattr(model.inner, "last")
    while not run.done:
        run.step()
    with torch.no_grad():
        assert torch.equal(run.result()[0], model(hidden(4), {"h": kept, "_seen_tokens": 5})[0])


def test_whole_numbers_are_compared_too() -> None:
    class Codes(Sly):
        def forward(self, x: Tensor, twice: bool = False) -> Tensor:
            other = -1.0 if twice and type(x) is Tensor else 1.0
            codes: Tensor = (self.mix(x) * other).argmax(-1)
            return codes

    program = compiled(Codes(), hidden(50))
    with pytest.raises(UnsupportedModelError, match="a variant") as refused:
        program.start(hidden(50), twice=True)
    assert "whole numbers" in refused.value.reason


def test_a_cache_that_the_model_writes_into_may_be_changed_after_start() -> None:
    class Static(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, past_key_values: DynamicCache) -> Tensor:
            layer: Any = past_key_values.layers[0]
            keys = layer.keys
            keys.add_(self.mix(x).sum())
            summed: Tensor = x + keys.sum()
            return summed

    def cache() -> DynamicCache:
        made = DynamicCache()
        made.update(torch.ones(1, 1, 3, WIDTH), torch.ones(1, 1, 3, WIDTH), 0)
        return made

    model, given = Static().eval(), cache()
    program = compiled(model, hidden(5), cache())
    run = program.start(hidden(6), given)
    layer: Any = given.layers[0]
    keys = layer.keys
    assert torch.equal(keys, torch.ones(1, 1, 3, WIDTH))
    keys.zero_()
    while not run.done:
        run.step()
    assert torch.equal(run.result(), model(hidden(6), cache()))


class Picking(nn.Module):
    """Looks rows up without an embedding: what ids are allowed is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        mixed: Tensor = self.mix(x)
        return mixed if rows is None else mixed + self.mix.weight.index_select(0, rows)


def test_a_call_that_the_model_itself_fails_on_blames_the_call() -> None:
    model = Picking().eval()
    program = compiled(model, hidden(1))
    with pytest.raises(InvalidInputError, match="itself fails") as caught:
        program.start(hidden(1), rows=torch.tensor([WIDTH]))
    assert isinstance(caught.value.__cause__, IndexError)
    assert len(program.variants) == 1
    same(model, program, hidden(1), rows=torch.tensor([WIDTH - 1]))
    with pytest.raises(SegmentError):
        program(hidden(1), rows=torch.tensor([WIDTH]))


def test_a_variant_that_fails_where_the_model_does_not_is_not_used() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x.abs().sum() > 1e6).any()):
                return x[:, :1]
            return x * 2

    model = Block(Picky())
    program = compiled(model, hidden(5))
    with pytest.raises(SegmentError):
        program.start(hidden(5, batch=2) * 1e9)
    assert len(program.variants) == 1
    same(model, program, hidden(5, batch=2))


def test_a_program_stays_in_evaluation_mode() -> None:
    """What is compiled after ``model.train()`` too, inside opaque submodules and in the check."""

    class Dropping(Loop):
        def forward(self, x: Tensor, state: Any = None) -> Any:
            out, state = super().forward(x, state)
            return nn.functional.dropout(out, 0.5, self.training), state

    model = Block(Dropping())
    program = compiled(model, hidden(5))
    expected = model(hidden(4, batch=2))[0]
    model.train()
    got = program(hidden(4, batch=2))[0]
    assert program.variants[0].captured.opaque == ("inner",)
    assert len(program.variants) == 2
    assert torch.equal(got, expected)
    assert all(module.training for module in model.modules()), "the model is left as found"


def test_leaves_are_given_tensors_of_inference_mode() -> None:
    model = Block(Loop())
    program = compiled(model, hidden(5))
    with torch.inference_mode():
        out, state = model(hidden(12)[:, :7])
        own = model(hidden(12)[:, 7:], dict(state))[0]
        assert torch.equal(program(hidden(12)[:, :7])[0], out)
        assert torch.equal(program(hidden(12)[:, 7:], state)[0], own)
    assert torch.equal(program(hidden(12)[:, 7:], state)[0], own)


class Constant(nn.Module):
    """Has a constant of the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mix(x) * torch.tensor([0.1] * WIDTH)
        return mixed


def test_another_default_dtype_is_another_variant() -> None:
    model = Constant().eval()
    program = compiled(model, hidden(5))
    x = hidden(6)
    try:
        torch.set_default_dtype(torch.float64)
        own, got = model(x), program(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert own.dtype is got.dtype is torch.float64
    assert torch.equal(own, got)
    same(model, program, x)
    assert len(program.variants) == 2


def test_use_cache_is_left_out_only_where_that_says_the_same() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.config = nn.Linear(WIDTH, WIDTH), SimpleNamespace(use_cache=True)

        def forward(self, x: Tensor, use_cache: bool = False) -> Any:
            mixed = self.mix(x)
            cache = DynamicCache()
            cache.update(mixed[:, None], mixed[:, None], 0)
            return (mixed, cache) if use_cache else (mixed,)

    program: Any = fpcompile.segment(Caching().eval(), example_inputs=(hidden(5),), verify=False)
    assert [len(program(hidden(5), use_cache=u)) for u in (False, True)] == [1, 2]


def test_doubles_are_compared_as_doubles() -> None:
    """Both round to other floats, 1e-7 apart."""
    middle = torch.tensor([1 + 2**-24], dtype=torch.float64)
    _compare(None, "rounded", middle + 1e-12, middle - 1e-12)
    with pytest.raises(UnsupportedModelError):
        _compare(None, "another", middle, middle + 3e-8)


def test_a_default_dtype_that_is_set_during_a_trace_is_that_of_the_whole_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = iter(["first"])

    def interrupted(*given: Any) -> Any:
        exported = export(*given)
        if next(made, None):
            torch.set_default_dtype(torch.float64)  # as another thread does that loads a model
        return exported

    monkeypatch.setattr("fpcompile.passes.generic_capture.export", interrupted)
    model, example, x = Constant().eval(), hidden(5), hidden(6)
    try:
        program: Any = fpcompile.segment(model, example_inputs=(example,), verify=False)
        assert program.variants[0].captured.guards.default_dtype is torch.float64
        assert program(x).dtype is model(x).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    same(model, program, x)
    assert len(program.variants) == 2


def test_a_sequence_goes_on_whatever_default_dtype_others_set() -> None:
    program: Any = fpcompile.segment(tiny_model("gpt2"), route="generic", verify=False)
    decoder = program.decoder()
    begun = decoder.begin(sample_ids(9))
    while not begun.run.done:
        begun.run.step()
    sequence, _ = decoder.open(begun, begun.run.result())
    count = len(program.variants)
    try:
        torch.set_default_dtype(torch.bfloat16)
        step = decoder.step([sequence], [3])
    finally:
        torch.set_default_dtype(torch.float32)
    assert step.run.program.captured.guards.default_dtype is torch.float32
    assert len(program.variants) == count


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError()], ids=["device", "host"])
def test_memory_that_runs_out_in_the_check_is_logged_and_no_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Block(nn.GELU())
    program = compiled(model, hidden(5))

    def short(*given: Any) -> Any:
        raise error

    monkeypatch.setattr("fpcompile.executor.generic_check._called", short)
    same(model, program, hidden(5, batch=2))
    same(model, program, hidden(7, batch=3))
    assert len(program.variants) == 2
    (record,) = (r for r in caplog.records if r.name == "fpcompile.executor.generic")
    assert record.levelname == "WARNING"
    assert "used unchecked" in record.getMessage()
    assert "x [2, 5, 8]" in record.getMessage()


class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest tensor that is made, beside views of what is given."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in given}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return made


def test_results_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpcompile.executor.generic_check._PIECE", 16)
    for shape in ((7, 5, 8), (1, 1, 300), (40, 3), (90,)):
        own = torch.linspace(1, 2, torch.Size(shape).numel(), dtype=torch.bfloat16).view(shape)
        own = own.transpose(0, -1)
        with Sizes(own) as sizes:
            assert _difference([own], [own]) is None
        assert 0 < sizes.largest <= 16
        for place in (0, own.numel() // 2, own.numel() - 1):
            other = own.clone().flatten()
            other[place] += 1
            assert "differs by" in str(_difference([own], [other.view(own.shape)]))
            whole = [(100 * t).int() for t in (own, other.view(own.shape))]
            assert "1 of" in str(_difference(whole[:1], whole[1:]))


def test_whole_numbers_are_the_same_unless_something_was_rounded() -> None:
    one, two, exact = torch.tensor([1]), torch.tensor([2]), torch.ones(3)
    assert "1 of 1 whole numbers" in str(_difference([one, exact], [two, exact]))
    assert _difference([one, exact], [two, exact + 1e-6]) is None
    assert _difference([one, exact], [two, exact], rounds=True) is None
    assert "5 of 9" in str(_difference([one.repeat(9), exact], [torch.arange(4, 13) % 2, exact + 1e-6]))


def test_infinities_and_what_is_no_number_are_told_apart() -> None:
    inf, nan = float("inf"), float("nan")
    kinds = (inf, -inf, nan, 1.0)
    for a in kinds:
        for b in kinds:
            found = _difference([torch.tensor([a, 1.0])], [torch.tensor([b, 1.0])])
            assert (found is None) == (a is b), (a, b, found)


def test_a_model_that_draws_is_reported_as_such() -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand(WIDTH)

    state = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match="same numbers twice"):
        compare(Drawing(), torch.device("cpu"), ((hidden(5),), {}), lambda: hidden(5), which="it")
    assert torch.equal(torch.get_rng_state(), state)


def test_what_others_draw_while_it_compiles_stays_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def drawing(real: Any) -> Any:
        def wrapped(*given: Any) -> Any:
            drawn.append(float(torch.rand(1)))
            return real(*given)

        return wrapped

    monkeypatch.setattr("fpcompile.executor.generic.compile_generic", drawing(compile_generic))
    monkeypatch.setattr("fpcompile.executor.generic_check._difference", drawing(_difference))
    compiled(Block(nn.GELU()), hidden(5))(hidden(5, batch=2))
    assert len(drawn) == len(set(drawn)) == 6


def test_warnings_of_the_model_are_its_own() -> None:
    class Loud(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("of the model", stacklevel=2)
            return x

    x = hidden(5)
    with pytest.warns(UserWarning, match="of the model"):
        compare(Loud(), torch.device("cpu"), ((x,), {}), lambda: x, which="it")


def test_a_program_of_an_older_format_is_refused_as_such(tmp_path: Path) -> None:
    model, folder = Sly().eval(), tmp_path / "program"
    fpcompile.segment(model, example_inputs=(hidden(5),)).save(folder)
    manifest, files = read_folder(folder, (FUNCTIONS, CONSTANTS, VARIANTS), ())
    rows = json.loads(files[VARIANTS])
    for row in rows:
        del row["tables"]
    with pytest.raises(KeyError, match="tables"):
        saving_generic.load("", manifest, {**files, VARIANTS: json.dumps(rows).encode()}, model, False, True)
    name, _, number = FORMAT.rpartition("-")
    older = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**older, "format": f"{name}-{int(number) - 1}"}))
    with pytest.raises(ProgramFileError, match="no program of this version"):
        fpcompile.load(folder, model)

"""What a forward keeps, writes or reads besides its arguments: the model's numbers, or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import fpcompile
from fpcompile.errors import InvalidInputError, SegmentError, UnsupportedModelError
from fpcompile.models.zoo import tiny_any
from tests.cpu.support import Spot, Toy, toy

WIDTH = 8


def hidden(length: int) -> Tensor:
    """Random activations ``[1, length, WIDTH]``."""
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(length))


class Keeping(nn.Module):
    """Adds what ``keep`` keeps from call to call, behind a projection."""

    total: Tensor
    last: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.calls, self.last = 0, None
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mix(x) * self.keep(x)
        return mixed

    def keep(self, x: Tensor) -> Any:
        raise NotImplementedError


class Number(Keeping):
    def keep(self, x: Tensor) -> Any:
        self.calls += 1
        return self.calls


class Buffer(Keeping):
    def keep(self, x: Tensor) -> Any:
        self.total = self.total + 1.0
        return self.total


class Hidden(Keeping):
    def keep(self, x: Tensor) -> Any:
        before, self.last = self.last, x.mean()
        return 1.0 if before is None else before


class Looping(Keeping):
    """Opaque, as it loops over positions."""

    def keep(self, x: Tensor) -> Any:
        state = torch.zeros(WIDTH) if self.last is None else self.last
        for t in range(x.shape[1]):
            state = torch.tanh(state + x[0, t])
        self.last = state
        return state


@pytest.mark.parametrize("kind", [Number, Buffer, Hidden, Looping], ids=lambda kind: kind.__name__)
def test_a_model_whose_calls_depend_on_those_before_is_refused(kind: type[Keeping]) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), kind(), nn.Linear(WIDTH, WIDTH)).eval()
    with pytest.raises(UnsupportedModelError, match="same numbers twice") as refused:
        fpcompile.segment(model, example_inputs=(hidden(5),))
    assert "from call to call" in refused.value.reason
    kept: Any = model[1]
    assert (kept.calls, kept.last, float(kept.total)) == (0, None, 0.0), "the model is left as found"


def test_a_packed_model_whose_calls_depend_on_those_before_is_refused() -> None:
    def counts(s: Spot) -> Tensor:
        s.layer.calls = getattr(s.layer, "calls", 0) + 1
        result: Tensor = s.x.sin() * s.layer.calls
        return result

    with pytest.raises(UnsupportedModelError, match="does not give the model's numbers"):
        fpcompile.segment(toy(counts), route="packed")


class Offset(nn.Module):
    """Positions begin where the prompt's own call left an offset, as in multimodal models."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.offset: Tensor | None = None

    def forward(
        self, x: Tensor, past_key_values: DynamicCache | None = None, offset: Tensor | None = None
    ) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache() if past_key_values is None else past_key_values
        if cache.get_seq_length() == 0:
            self.offset = x.amax()
        elif offset is None and self.offset is not None:
            offset = self.offset
        keys = self.mix(x)[:, None]
        keys, _ = cache.update(keys, keys, 0)
        summed: Tensor = x + keys.sum(dim=(1, 2)) + (0.0 if offset is None else offset)
        return summed, cache


def test_a_call_does_not_go_on_from_what_another_call_left() -> None:
    model = Offset().eval()
    program: Any = fpcompile.segment(model, example_inputs=(hidden(5),))
    assert model.offset is None, "the model is left as found"
    with torch.no_grad():
        own, theirs = model(hidden(6))
        got, ours = program(hidden(6))
        assert torch.equal(own, got)
        with pytest.raises(UnsupportedModelError, match="keeps a state") as refused:
            program(hidden(1), ours)
        assert "offset" in str(refused.value)
        assert refused.value.remedy
        expected = model(hidden(1), copy.deepcopy(theirs))[0]
        assert torch.equal(
            program(hidden(1), ours, offset=own.new_tensor(float(hidden(6).amax())))[0], expected
        )


def _assigned(notes: Any, value: Tensor) -> Any:
    return [value] if isinstance(notes, list) else {"offset": [value]}


def _in_place(notes: Any, value: Tensor) -> Any:
    if isinstance(notes, list):
        notes[:] = [value]
    else:
        notes["offset"] = [value]
    return notes


class Noting(nn.Module):
    """As :class:`Offset`, with what it keeps inside a container."""

    def __init__(self, notes: Any, note: Any) -> None:
        super().__init__()
        self.mix, self.notes, self.note = nn.Linear(WIDTH, WIDTH), notes, note

    def forward(self, x: Tensor, past_key_values: DynamicCache | None = None) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache() if past_key_values is None else past_key_values
        if cache.get_seq_length() == 0:
            self.notes = self.note(self.notes, x.amax())
        elif self.notes:
            x = x + (self.notes[0] if isinstance(self.notes, list) else self.notes["offset"][0])
        keys = self.mix(x)[:, None]
        keys, _ = cache.update(keys, keys, 0)
        summed: Tensor = x + keys.sum(dim=(1, 2))
        return summed, cache


@pytest.mark.parametrize("note", [_assigned, _in_place])
@pytest.mark.parametrize("notes", [[], {}], ids=["list", "dict"])
def test_nor_from_what_another_call_left_in_a_container(notes: Any, note: Any) -> None:
    program: Any = fpcompile.segment(Noting(notes, note).eval(), example_inputs=(hidden(5),))
    _, ours = program(hidden(6))
    assert program.kept == {"notes"}
    with pytest.raises(UnsupportedModelError, match="keeps a state") as refused:
        program(hidden(1), ours)
    assert "notes" in str(refused.value)


class Recording(nn.Module):
    """Writes into containers what nobody reads from there, except for ``read``."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.mix, self.read = nn.Linear(WIDTH, WIDTH), read
        self.seen: list[Tensor] = []
        self.maps: dict[str, Any] = {"inner": {}, "name": "map"}

    def forward(self, x: Tensor, past_key_values: DynamicCache | None = None) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache() if past_key_values is None else past_key_values
        keys, _ = cache.update(self.mix(x)[:, None], self.mix(x)[:, None], 0)
        self.seen.append(x.mean())
        self.maps["layer0"] = x.amax()
        self.maps["inner"]["keys"] = keys
        summed: Tensor = x + keys.sum(dim=(1, 2)) + (0.0 if past_key_values is None else self.read(self))
        return summed, cache


@pytest.mark.parametrize("called", [False, True])
def test_a_module_may_record_into_a_container(called: bool) -> None:
    model = Recording(lambda m: m.seen[-1] + m.maps["layer0"] + (m.maps["name"] == "map")).eval()
    with torch.no_grad():
        if called:
            model(hidden(4))
        program: Any = fpcompile.segment(model, example_inputs=(hidden(5),))
        _, ours = program(hidden(6))
        assert program.kept == {"seen", "maps"}
        assert len(model.seen) == called
        for _ in range(2):
            assert torch.equal(program(hidden(1), ours)[0], model(hidden(1), copy.deepcopy(ours))[0])


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.seen[0],
        lambda m: len(m.seen),
        lambda m: sum(m.seen),
        lambda m: torch.stack(m.seen).sum(),
        lambda m: m.seen[-2:][0],
        lambda m: m.maps.get("other", 0.0),
        lambda m: len(m.maps["inner"]),
        lambda m: "other" in m.maps,
    ],
)
def test_but_not_read_what_others_recorded(read: Callable[[Any], Any]) -> None:
    program: Any = fpcompile.segment(Recording(read).eval(), example_inputs=(hidden(5),), verify=False)
    _, ours = program(hidden(6))
    with pytest.raises(UnsupportedModelError, match="keeps a state"):
        program(hidden(1), ours)


def test_what_is_cleared_is_known_again() -> None:
    def read(m: Any) -> Any:
        m.maps.clear()
        m.maps["new"] = m.seen[-1]
        m.seen[:] = [m.seen[-1], m.seen[-1]]
        return len(m.maps) * sum(m.seen) + len(m.seen)

    model = Recording(read).eval()
    program: Any = fpcompile.segment(model, example_inputs=(hidden(5),), verify=False)
    with torch.no_grad():
        _, ours = program(hidden(6))
        assert torch.equal(program(hidden(1), ours)[0], model(hidden(1), copy.deepcopy(ours))[0])


def test_what_was_compiled_before_a_state_was_known_is_not_trusted() -> None:
    """A step is compiled first, when nothing tells that prompts leave something behind."""
    model = Offset().eval()
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 3, WIDTH), torch.ones(1, 1, 3, WIDTH), 0)
    program: Any = fpcompile.segment(model, example_inputs=(hidden(1), cache))
    program(hidden(1), cache)
    _, ours = program(hidden(6))
    with pytest.raises(UnsupportedModelError, match="keeps a state"):
        program(hidden(1), ours)


class Noted(nn.Module):
    """Prompts with an image leave an offset, as in multimodal models; its text does not tell of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.offset: Tensor | None = None
        self.scale = torch.full((WIDTH,), 0.5)  # a constant

    def forward(
        self, x: Tensor, past_key_values: DynamicCache | None = None, image: Tensor | None = None
    ) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache() if past_key_values is None else past_key_values
        begins = cache.get_seq_length() == 0
        if image is not None:
            self.offset = image.sum()
        keys = self.mix(x)[:, None]
        keys, _ = cache.update(keys, keys, 0)
        summed: Tensor = x * self.scale + keys.sum(dim=(1, 2))
        if not begins and self.offset is not None:
            summed = summed + self.offset
        return summed, cache


@pytest.mark.parametrize("when", ["before", "after", "after a step"])
def test_nor_does_it_go_on_from_what_the_model_itself_was_called_with(when: str) -> None:
    """The program's own traces see no image: only the model's calls assign the offset."""
    model = Noted().eval()
    with torch.no_grad():
        if when == "before":
            model(hidden(4), image=torch.ones(3))
        program: Any = fpcompile.segment(model, example_inputs=(hidden(5),), verify=False)
        _, ours = program(hidden(6))
        if when == "after a step":
            assert torch.equal(program(hidden(1), ours)[0], model(hidden(1), copy.deepcopy(ours))[0])
        if when != "before":
            model(hidden(4), image=torch.ones(3))
        with pytest.raises(UnsupportedModelError, match="keeps a state"):
            program(hidden(1), ours)


class Memo(nn.Module):
    """Computes a table from its weights when it is first called."""

    def __init__(self, *, follows: bool) -> None:
        super().__init__()
        self.mix, self.follows = nn.Linear(WIDTH, WIDTH), follows
        self.table: Tensor | None = None

    def forward(self, x: Tensor, past_key_values: DynamicCache | None = None) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache() if past_key_values is None else past_key_values
        if self.table is None:
            self.table = self.mix.weight.sum(0) / 2 + (x.mean() if self.follows else 0.0)
        keys, _ = cache.update(self.mix(x)[:, None], self.mix(x)[:, None], 0)
        summed: Tensor = x * self.table + keys.sum(dim=(1, 2))
        return summed, cache


def test_what_is_computed_from_weights_alone_is_no_state(tmp_path: Any) -> None:
    model = Memo(follows=False).eval()
    made: Any = fpcompile.segment(model, example_inputs=(hidden(5),))
    made.save(tmp_path / "program")
    loaded: Any = fpcompile.load(tmp_path / "program", model)
    with torch.no_grad():
        for program in (made, loaded):
            assert program.kept == frozenset()
            _, ours = program(hidden(6))
            model(hidden(6))
            assert model.table is not None
            got = program(hidden(1), ours)[0]
            assert torch.equal(got, model(hidden(1), copy.deepcopy(ours))[0])


def test_but_a_table_that_follows_the_first_call_is() -> None:
    program: Any = fpcompile.segment(Memo(follows=True).eval(), example_inputs=(hidden(5),), verify=False)
    _, ours = program(hidden(6))
    with pytest.raises(UnsupportedModelError, match="keeps a state"):
        program(hidden(1), ours)


def test_an_opaque_leaf_keeps_nothing_between_runs() -> None:
    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(WIDTH)
            for t in range(x.shape[1]):
                state = torch.tanh(state + x[0, t])
            self.last = state  # as recurrent_gemma notes its state for the next token
            return x + state

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Noting(), nn.Linear(WIDTH, WIDTH)).eval()
    program: Any = fpcompile.segment(model, example_inputs=(hidden(5),))
    (leaf,) = program.variants[0].captured.leaves
    with torch.no_grad():
        assert torch.equal(program(hidden(7)), model(hidden(7)))
    assert program.kept == {"1.last"}
    assert not hasattr(leaf.recipe.arguments["signature"].module, "last")


class Masked(nn.Module):
    """Chooses a projection by a mask that it has written into, by way of a view."""

    def __init__(self, *, copies: bool) -> None:
        super().__init__()
        self.copies, self.some, self.all = copies, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        seen = mask.clone() if self.copies else mask
        seen[:, 0] = 1
        chosen: Tensor = self.all(x) if bool(seen.all()) else self.some(x)
        return chosen


@pytest.mark.parametrize("copies", [True, False])
def test_a_decision_sees_what_was_written_in_place(copies: bool) -> None:
    model = Masked(copies=copies).eval()
    example = torch.tensor([[0, 1, 1, 1]])
    program: Any = fpcompile.segment(model, example_inputs=(hidden(4), example))
    assert example.tolist() == [[0, 1, 1, 1]], "the caller's tensors are left alone"
    for bits in ([1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]):
        mask = torch.tensor([bits])
        with torch.no_grad():
            assert torch.equal(program(hidden(4), mask), model(hidden(4), mask.clone())), bits
        assert mask.tolist() == [bits]


def test_arguments_of_other_types_are_other_calls() -> None:
    class Filled(nn.Module):
        def forward(self, x: Tensor, value: Any) -> tuple[Tensor, Tensor]:
            return x.sin(), torch.full((2,), value)

    program: Any = fpcompile.segment(Filled().eval(), example_inputs=(hidden(3), 1))
    for value in (1, 1.0, True, 0, False):
        own, got = Filled()(hidden(3), value)[1], program(hidden(3), value)[1]
        assert own.dtype == got.dtype
        assert torch.equal(own, got)


def test_an_array_does_not_become_a_constant() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factors: Any) -> Tensor:
            return x * torch.as_tensor(factors)

    factors = np.ones(WIDTH, dtype=np.float32)
    with pytest.raises(InvalidInputError, match="array that is no tensor") as caught:
        fpcompile.segment(Scaled().eval(), example_inputs=(hidden(3), factors))
    assert "as_tensor" in str(caught.value.remedy)


def test_a_number_is_read_before_its_tensor_is_written() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            total = self.first(x).sum()
            before = total.item()
            total.add_(1.0)
            scaled: Tensor = self.last(torch.relu(self.last(x) + total)) * before
            return scaled

    model = Counted().eval()
    program: Any = fpcompile.segment(model, example_inputs=(hidden(5),))
    with torch.no_grad():
        for length in (5, 9):
            assert torch.equal(program(hidden(length)), model(hidden(length)))


@pytest.mark.slow
def test_a_single_token_that_goes_another_way_is_not_packed() -> None:
    """Traces take one for two or more, so that such a branch leaves no guard."""

    def alone(s: Spot) -> Tensor:
        return s.x * 3.0 if s.x.shape[1] == 1 else s.x.sin()

    model: Any = toy(alone)
    with pytest.raises(UnsupportedModelError, match="does not give the model's numbers") as refused:
        fpcompile.segment(model, route="packed")
    assert "one token" in refused.value.reason
    program = fpcompile.segment(model)
    assert program.route == "generic"
    with torch.no_grad():
        for length in (1, 2, 7):
            ids = torch.arange(length)[None]
            assert torch.equal(program(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_results_besides_logits_are_not_dropped() -> None:
    class Valued(Toy):  # type: ignore[no-untyped-call]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out: Any = super().forward(*args, **kwargs)
            out["values"] = out.logits.mean(-1)
            return out

    model: Any = toy(lambda s: s.x.sin())
    model.__class__ = Valued
    with pytest.raises(UnsupportedModelError, match="packed route") as refused:
        fpcompile.segment(model, route="packed")
    assert "values" in refused.value.reason


@pytest.mark.slow
def test_images_have_their_positions_in_a_generation() -> None:
    """Two generations in turns: the model itself would note the offset of the last one for both."""
    case = tiny_any("Qwen2_5_VLForConditionalGeneration")
    model: Any = case.model
    program = fpcompile.segment(model, example_inputs=dict(case.small), verify=False)
    calls: list[dict[str, Any]] = [dict(case.small), dict(case.large)]
    with torch.no_grad():
        own = [model.generate(**call, max_new_tokens=3, do_sample=False) for call in calls]
    with fpcompile.Engine(program) as engine:
        handles = [engine.submit(call.pop("input_ids"), max_new_tokens=3, **call) for call in calls]
        for handle, expected, call in zip(handles, own, (case.small, case.large), strict=True):
            assert list(handle.tokens(60)) == expected[0, call["input_ids"].shape[1] :].tolist()


def test_images_that_do_not_fit_their_prompt_are_an_input_error() -> None:
    case = tiny_any("Qwen2_5_VLForConditionalGeneration")
    program: Any = fpcompile.segment(case.model, example_inputs=dict(case.small), verify=False)
    decoder: Any = program.decoder()
    decoder._validated = True  # the prompts are not run
    call: dict[str, Any] = dict(case.small)
    ids, grid = call.pop("input_ids"), call["image_grid_thw"]
    for wrong in (grid[:0], grid * 2, grid.tolist()):
        with pytest.raises(InvalidInputError, match="positions of this prompt") as refused:
            decoder.begin(ids, **{**call, "image_grid_thw": wrong})
        assert "image_grid_thw" in str(refused.value.expected)
        assert refused.value.__cause__ is not None


def test_a_plain_value_that_a_leaf_returns_is_not_that_of_its_probe() -> None:
    class Signed(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, bool]:
            return x * 2, bool(x.sum() > 0)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.signed = nn.Linear(WIDTH, WIDTH), Signed()

        def forward(self, x: Tensor) -> Tensor:
            doubled, positive = self.signed(self.first(x))
            result: Tensor = doubled if positive else -doubled
            return result

    model = Around().eval()
    with torch.no_grad():
        model.first.bias.zero_()
        program: Any = fpcompile.segment(model, example_inputs=(hidden(5),), verify=False)
        probed = program.variants[0].captured.leaves[0].recipe.arguments["signature"].constants
        for x in (hidden(5), -hidden(5)):
            if (bool((model.first(x) * 2).sum() > 0),) == probed:
                assert torch.equal(program(x), model(x))
                continue
            with pytest.raises(SegmentError, match="opaque leaf returned"):
                program(x)

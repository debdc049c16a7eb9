"""The generic route on small modules, each of which has one trap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fpcompile.errors import InvalidInputError, SegmentError, UnsupportedModelError
from fpcompile.executor.generic import GenericProgram, Variant
from fpcompile.executor.generic_route import compile_generic_program
from fpcompile.ir import Granularity
from fpcompile.models.generic_tree import flatten, unflatten

WIDTH = 8


def compiled(model: nn.Module, *args: Any, **kwargs: Any) -> GenericProgram:
    """A program of ``model`` for the arguments of one call, checked against the model."""
    return compile_generic_program(
        model.eval(),
        granularity=Granularity.OPERATOR,
        max_blocking_ms=None,
        example_inputs=kwargs or args,
        blocked=None,
        verify=True,
    )


def same(model: nn.Module, program: GenericProgram, *args: Any, **kwargs: Any) -> None:
    """The program's results have the model's bits, uninterrupted and resumed from every cut's checkpoint."""
    with torch.no_grad():
        own = flatten(model(*args, **kwargs)).tensors
    run: Any = program.start(*args, **kwargs)
    variant = run.program
    while not run.done:
        run.step()
        run.validate()
        if not run.done:
            run = variant.resume(run.checkpoint())
    for got in (flatten(run.result()).tensors, flatten(program(*args, **kwargs)).tensors):
        assert len(own) == len(got)
        for a, b in zip(own, got, strict=True):
            assert torch.equal(a, b)


class Block(nn.Module):
    """Two projections around ``inner``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *rest: Any) -> Any:
        out = self.inner(self.first(x), *rest)
        return (self.last(out[0]), *out[1:]) if isinstance(out, tuple) else self.last(out)


class Loop(nn.Module):
    """A recurrence in Python, with a state that may be handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        state = {"h": x.new_zeros(x.shape[0], WIDTH), "_seen_tokens": 0} if state is None else state
        outputs = []
        for t in range(x.shape[1]):
            state["h"] = torch.tanh(self.mix(state["h"]) + x[:, t])
            outputs.append(state["h"])
        state["_seen_tokens"] += x.shape[1]
        return torch.stack(outputs, dim=1), state


def hidden(length: int, batch: int = 1) -> Tensor:
    """Random activations ``[batch, length, WIDTH]``."""
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length))


def test_one_variant_serves_every_length_and_another_every_batch() -> None:
    model = Block(nn.GELU())
    program = compiled(model, hidden(5))
    for length in (2, 9, 300):
        same(model, program, hidden(length))
    assert len(program.variants) == 1
    same(model, program, hidden(7, batch=2))
    same(model, program, hidden(9, batch=5))
    assert len(program.variants) == 2
    same(model, program, hidden(1))
    assert len(program.variants) == 3


def test_projections_are_segments() -> None:
    program = compiled(Block(nn.GELU()), hidden(5))
    assert [s.kind for s in program.segments] == ["projection", "projection"]
    assert program.route == "generic"


def test_a_loop_over_positions_is_an_opaque_leaf_with_its_state() -> None:
    model = Block(Loop())
    program = compiled(model, hidden(5))
    assert program.variants[0].captured.opaque == ("inner",)
    for length in (2, 4, 33):
        same(model, program, hidden(length))
    assert len(program.variants) == 1


def test_a_leaf_gives_its_result_in_its_own_layout() -> None:
    class Across(Loop):
        """Its result lies in memory as its argument does: positions innermost."""

        def forward(self, x: Tensor, state: Any = None) -> Any:
            out, state = super().forward(x)
            return torch.empty_like(x).copy_(out), state

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Across()

        def forward(self, x: Tensor) -> Any:
            out, _ = self.inner(x.transpose(1, 2).contiguous().transpose(1, 2))
            return out

    model = Transposed()
    program = compiled(nn.Sequential(nn.Linear(WIDTH, WIDTH), model), hidden(5))
    assert program.variants[0].captured.opaque
    with torch.no_grad():
        assert program(hidden(9)).stride() == model(hidden(9)).stride() == (9 * WIDTH, 1, 9)


def test_a_leaf_continues_a_state_and_leaves_the_callers_alone() -> None:
    model = Block(Loop())
    program = compiled(model, hidden(5))
    out, state = program(hidden(12)[:, :7])
    kept = state["h"].clone()
    again, after = program(hidden(12)[:, 7:], state)
    with torch.no_grad():
        own, own_state = model(hidden(12)[:, :7])
        own_again, _ = model(hidden(12)[:, 7:], own_state)
    assert torch.equal(out, own)
    assert torch.equal(again, own_again)
    assert (state["_seen_tokens"], after["_seen_tokens"]) == (7, 12)
    assert torch.equal(state["h"], kept)


def test_a_state_that_is_written_in_place_is_copied() -> None:
    class Accumulate(nn.Module):
        def forward(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
            total.add_(x.sum(dim=1))
            return x * total[:, None], total

    model = Block(Accumulate())
    total = torch.ones(1, WIDTH)
    program = compiled(model, hidden(5), total.clone())
    program(hidden(6), total)
    assert torch.equal(total, torch.ones(1, WIDTH))
    own = model(hidden(6), total.clone())
    got = program(hidden(6), total)
    assert torch.equal(own[0], got[0])
    assert torch.equal(own[1], got[1])


def test_a_decision_on_values_makes_variants() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x if bool((mask == 1).all()) else x * mask[..., None]

    model = Block(Masked())
    full, holes = torch.ones(1, 5, dtype=torch.long), torch.tensor([[1, 1, 0, 1, 0]])
    program = compiled(model, hidden(5), full)
    same(model, program, hidden(5), full)
    same(model, program, hidden(5), holes)
    same(model, program, hidden(5), full)
    assert len(program.variants) == 2
    assert sorted(v.captured.guards.decisions[0].value for v in program.variants) == [False, True]


def test_sizes_that_inputs_determine_are_decisions_also_0_and_1() -> None:
    class Picked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            at = torch.nonzero(mask)[:, 0]
            return torch.cat([p.cumsum(1) for p in torch.split(x, [len(at), 4 - len(at)], dim=1)], dim=1)

    model = Block(Picked())
    masks = [torch.tensor(bits) for bits in ([0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1])]
    program = compiled(model, hidden(4), masks[0])
    for mask in masks:
        same(model, program, hidden(4), mask)
    assert len(program.variants) == 2


def test_a_guard_on_the_length_makes_variants() -> None:
    class Window(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1) if x.shape[1] < 16 else x[:, -16:].flip(1)

    model = Block(Window())
    program = compiled(model, hidden(8))
    for length in (15, 16, 17, 40, 3):
        same(model, program, hidden(length))
    assert len(program.variants) == 2


def test_a_decision_on_activations_is_made_inside_a_leaf() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for expert in range(2):
                rows = torch.where(self.gate(x).argmax(-1) == expert)
                if rows[0].numel() > 0:
                    out[rows] = x[rows] * (expert + 1)
            return out

    model = Block(Router())
    program = compiled(model, hidden(5))
    assert program.variants[0].captured.opaque == ("inner",)
    for length in (2, 30):
        same(model, program, hidden(length))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_kernel_of_a_product_follows_whether_its_weight_is_frozen(frozen: bool) -> None:
    """torch folds the batch of a transposed input only for a weight that requires a gradient."""

    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.mix(x.transpose(0, 1)).sum(0)
            return mixed

    class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                products.append(func)
            return func(*args, **(kwargs or {}))

    products: list[Any] = []
    model = Across().requires_grad_(not frozen)
    x = torch.randn(3, 29, 64)
    program = compiled(model, x)
    with torch.no_grad(), Seen():  # type: ignore[no-untyped-call]
        own, got = model(x), program(x)
    assert len(products) == 2
    assert products[0] is products[1]
    assert torch.equal(own, got)


def test_random_numbers_are_refused_or_kept_inside_a_leaf() -> None:
    class Seeded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.manual_seed(3)
            return x + torch.randn(WIDTH)

    model = Block(Seeded())
    program = compiled(model, hidden(5))
    assert program.variants[0].captured.opaque == ("inner",)
    same(model, program, hidden(9))
    with pytest.raises(UnsupportedModelError, match="random numbers"):
        compiled(Seeded(), hidden(5))


def test_random_numbers_are_named_when_they_make_the_trace_fail_elsewhere() -> None:
    """The draw decides a size, so that the trace fails behind it; the error names the draw all the same."""

    class Drawn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            picked = torch.multinomial(torch.ones(x.shape[1]), 4)
            rows = [x[:, i] for i in picked.tolist()]
            return torch.stack(rows).cumsum(0)

    state = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match="random numbers") as refused:
        compiled(Drawn(), torch.ones(2, 9))
    assert "torch.multinomial" in str(refused.value.source_line)
    assert torch.equal(torch.get_rng_state(), state), "the generator is left as found"


def test_a_model_that_rewrites_its_weights_is_refused() -> None:
    class Rescaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.div_(2)
            return x * self.weight

    model = Rescaling()
    with pytest.raises(UnsupportedModelError, match="writes into"):
        compiled(model, hidden(5))
    assert torch.equal(model.weight, torch.ones(WIDTH))


def test_a_leaf_that_breaks_its_promise_fails_its_run_only() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x.abs().sum() > 1e6).any()):
                return x[:, :1]
            return x * 2

    model = Block(Picky())
    program = compiled(model, hidden(5))
    other = program.start(hidden(6))
    with pytest.raises(SegmentError):
        program(hidden(6) * 1e9)
    while not other.done:
        other.step()
    assert torch.equal(other.result(), model(hidden(6)))


def test_inputs_may_be_changed_after_start() -> None:
    model = Block(nn.GELU())
    program = compiled(model, hidden(5))
    x = hidden(6)
    run = program.start(x)
    x.zero_()
    while not run.done:
        run.step()
    assert torch.equal(run.result(), model(hidden(6)))


def test_without_tensors_or_examples_there_is_a_typed_error() -> None:
    with pytest.raises(InvalidInputError, match="example"):
        compile_generic_program(
            Block(nn.GELU()).eval(),
            granularity=Granularity.OPERATOR,
            max_blocking_ms=None,
            example_inputs=None,
            blocked=None,
            verify=True,
        )
    program = compiled(Block(nn.GELU()), hidden(5))
    with pytest.raises(InvalidInputError, match="no tensor"):
        program.start()


def test_trees_come_back_with_their_identities() -> None:
    shared = [torch.ones(2)]
    tree = {"a": shared, "b": (shared, 3, None), "c": {"_seen_tokens": 5}}
    flat = flatten(tree)
    back = unflatten(flat.spec, flat.tensors, [7])
    assert len(flat.tensors) == 1
    assert back["a"] is back["b"][0]
    assert back["c"] == {"_seen_tokens": 7}
    assert flatten(back).spec == flat.spec
    again = unflatten(flat.spec, flat.tensors, [9], flat.containers)
    assert again is tree
    assert tree["c"] == {"_seen_tokens": 9}


def test_a_checkpoint_of_another_variant_is_refused() -> None:
    model = Block(nn.GELU())
    program = compiled(model, hidden(5))
    program(hidden(1))
    run = program.start(hidden(6))
    run.step()
    checkpoint = run.checkpoint()
    resumed = program.resume(checkpoint)
    assert isinstance(resumed.program, Variant)
    while not resumed.done:
        resumed.step()
    assert torch.equal(resumed.result(), model(hidden(6)))

"""What may be passed to segment() besides a transformers model, and what is said about what may not."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, fx, nn
from torch.export import Dim

import fpcompile
from fpcompile.errors import InvalidInputError, UnsupportedModelError
from fpcompile.executor.generic import GenericProgram
from fpcompile.ir import TOKENS
from fpcompile.models.zoo import sample_ids, tiny_model
from fpcompile.serving.coverage_checks import preempted
from tests.cpu.support import mlp, toy

WIDTH = 8


def perceptron() -> nn.Module:
    """Two projections with an activation between them; not a transformers model."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).eval()


def rows(count: int) -> Tensor:
    """Random activations ``[count, WIDTH]``."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))


def agrees(model: Any, program: Any, *args: Any, **kwargs: Any) -> None:
    """The program has the model's bits, resumed from a checkpoint at every cut."""
    with torch.no_grad():
        own = model(*args, **kwargs)
    run = program.start(*args, **kwargs)
    while not run.done:
        run.step()
        run = program.resume(run.checkpoint())
    own, got = (out if isinstance(out, Tensor) else out.logits for out in (own, run.result()))
    assert torch.equal(own, got)


class Grid(nn.Module):
    """Sizes in places where the route does not look for lengths by itself, and one argument in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        mixed: Tensor = self.mix(x)
        return mixed.sum(dim=2) + parts[0].mean() * parts[1].sum()


GRID = (torch.ones(2, 3, 4, WIDTH), [torch.ones(5), torch.ones(6)])


def grid(tall: int, wide: int, long: int) -> tuple[Any, ...]:
    """Arguments of a :class:`Grid`."""
    return torch.ones(2, tall, wide, WIDTH), [torch.ones(long), torch.ones(6)]


@pytest.mark.parametrize(
    "shapes",
    [
        ({1: Dim("tall"), 2: Dim.AUTO}, [{0: Dim.DYNAMIC}, None]),
        {"x": (None, Dim("tall"), Dim("wide"), None), "parts": [(Dim("long"),), {}]},
    ],
)
def test_dynamic_shapes_say_which_sizes_vary(shapes: Any) -> None:
    model = Grid().eval()
    program: Any = fpcompile.segment(model, example_inputs=GRID, dynamic_shapes=shapes)
    for sizes in ((3, 4, 5), (7, 9, 2), (30, 2, 11)):
        agrees(model, program, *grid(*sizes))
    assert len(program.variants) == 1
    agrees(model, program, *grid(1, 4, 5))
    assert len(program.variants) == 2


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"y": None}, "expected: x, parts"),
        (7, "a dict by argument name"),
        ({"x": {4: Dim.AUTO}}, "dimension 4 of x"),
        ({"x": Dim.AUTO}, "does not fit x"),
        ({"parts": [None]}, "does not fit parts"),
        ({"x": {1: Dim("tall", min=4, max=9)}}, "do not fit dynamic_shapes"),
    ],
)
def test_wrong_dynamic_shapes_are_named(shapes: Any, says: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(says)):
        fpcompile.segment(Grid().eval(), example_inputs=GRID, dynamic_shapes=shapes)


def test_dynamic_shapes_need_an_example() -> None:
    with pytest.raises(InvalidInputError, match="without example_inputs"):
        fpcompile.segment(perceptron(), dynamic_shapes=({0: Dim.AUTO},))


class Square(nn.Module):
    """Its code makes the number of rows a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, 2, WIDTH // 2, -1) if x.shape[0] == 4 else x.sigmoid()


def test_a_promise_that_the_model_breaks_names_the_dimension() -> None:
    for dim in (Dim("rows"), Dim.DYNAMIC):
        with pytest.raises(UnsupportedModelError, match=r"rows|x\.shape\[0\]") as refused:
            fpcompile.segment(Square().eval(), example_inputs=(rows(4),), dynamic_shapes={"x": {0: dim}})
        assert "constant (4)" in refused.value.reason
        assert "Dim.AUTO" in str(refused.value.remedy)
    soft: Any = fpcompile.segment(
        Square().eval(), example_inputs=(rows(4),), dynamic_shapes={"x": {0: Dim.AUTO}}
    )
    agrees(Square(), soft, rows(4))
    agrees(Square(), soft, rows(6))


def test_an_exported_program_is_taken_with_its_own_example() -> None:
    model = perceptron()
    exported = torch.export.export(model, (rows(4),), dynamic_shapes=({0: Dim("rows", min=2, max=16)},))
    for given in (exported, exported.module()):
        program: Any = fpcompile.segment(given, example_inputs=None if given is exported else (rows(4),))
        assert len(program.segments) == 2
        agrees(model, program, rows(4))
        agrees(model, program, rows(11))
        for wrong, says in ((rows(40), r"shape\[0\] <= 16"), (torch.ones(4, 9), r"shape\[1\] == 8")):
            with pytest.raises(UnsupportedModelError, match=says) as refused:
                program(wrong)
            assert "dynamic_shapes" in str(refused.value.remedy)


def test_a_graph_module_is_taken() -> None:
    model = perceptron()
    program = fpcompile.segment(fx.symbolic_trace(model), example_inputs=(rows(4),))
    assert len(program.segments) == 2
    agrees(model, program, rows(9))


def test_a_dispatched_model_is_refused() -> None:
    model = dispatch_model(tiny_model("llama"), {"": "cpu"}, force_hooks=True)
    for route in ("auto", "packed", "generic"):
        with pytest.raises(UnsupportedModelError, match="device_map") as refused:
            fpcompile.segment(model, route=route)
        assert "remove_hook_from_module" in str(refused.value.remedy)


@pytest.mark.slow
@pytest.mark.parametrize("route", ["packed", "generic"])
def test_an_unmerged_lora_model_agrees(route: str) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model("llama")
    plain = base(input_ids=sample_ids(17)).logits
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for a deprecated property
        model = peft.get_peft_model(base, config).eval()
    program = fpcompile.segment(model, route=route)
    assert program.route == route
    assert not torch.equal(program(input_ids=sample_ids(17)).logits, plain), "the adapters count"
    for length in (1, 17, 40):
        agrees(model, program, input_ids=sample_ids(length))


@pytest.mark.slow
def test_a_prompt_learning_model_takes_the_generic_route() -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(tiny_model("llama"), config).eval()
    program = fpcompile.segment(model)
    assert program.route == "generic"
    agrees(model, program, input_ids=sample_ids(17))


@pytest.mark.slow
def test_a_model_of_int8_weights_agrees() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model("llama", dtype=torch.bfloat16)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    program = fpcompile.segment(model)
    assert [s.kind for s in program.segments].count("projection") == 15
    assert all(s.live.nbytes.subs(TOKENS, 0) == 0 for s in program.segments), "no weight is kept at a cut"
    for length in (1, 17, 40):
        agrees(model, program, input_ids=sample_ids(length))


def test_a_class_of_the_users_own_agrees_by_both_routes() -> None:
    model = toy(mlp)
    for route in ("packed", "generic"):
        program = fpcompile.segment(model, route=route)
        with torch.no_grad():
            own = model(sample_ids(17) % 128).logits
        assert torch.equal(own, preempted(program, input_ids=sample_ids(17) % 128).logits)


class Branching(nn.Module):
    """Branches on activations in its own forward, outside any submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if (h > 0).any():
            h = torch.relu(h)
        out: Tensor = self.down(h)
        return out


def test_a_failed_trace_names_the_line_and_the_remedy() -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        fpcompile.segment(Branching().eval(), example_inputs=(rows(4),))
    assert "if (h > 0).any()" in str(refused.value.source_line)
    assert "depends on activations" in refused.value.reason
    assert "docs/adapters.md" in str(refused.value.remedy)


@pytest.mark.slow
def test_the_adapter_of_the_documentation_works() -> None:
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    check = "\nx = torch.randn(2, 9, 64)\nassert torch.equal(program(x), program.model(x))\n"
    with torch.random.fork_rng(devices=[]):
        names: dict[str, Any] = {"__name__": "adapters"}
        exec(compile(code + check, "docs/adapters.md", "exec"), names)
    program: GenericProgram = names["program"]
    assert program.variants[0].captured.opaque == ("gated",)
    with pytest.raises(UnsupportedModelError, match="depends on activations"):
        fpcompile.segment(names["Model"]().eval(), example_inputs=(torch.randn(1, 16, 64),))


def test_nothing_turns_on_remote_code() -> None:
    package = Path(fpcompile.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in package.rglob("*.py")]
    assert len(sources) > 100
    assert not any(re.search(r"trust_remote_code *[=:] *True", text) for text in sources)

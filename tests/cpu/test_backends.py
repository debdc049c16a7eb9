"""Compiled functions: the model's numbers to rounding, the same bits paused or not, reasons for the rest."""

from __future__ import annotations

import copy
import functools
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fpcompile
from fpcompile.errors import CheckpointError, UnknownNameError, UsageError
from fpcompile.passes.codegen import Function, Functions
from fpcompile.passes.compiled import Compiled
from fpcompile.passes.lower_function import RefusedError, _Lengths, compile_function
from fpcompile.passes.prepack import can_prepack
from tests.cpu.support import differences, finish, model_of, program_of, reference, relative_error, relay

COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++")

pytestmark = [
    pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning"),
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler, which inductor needs"),
]

TINY = 0.02


@functools.cache
def compiled_of(arch: str, dtype: torch.dtype = torch.float32, weights: str = "shared") -> fpcompile.Program:
    return fpcompile.segment(model_of(arch, dtype), route="packed", backend="inductor", weights=weights)


def ids_of(program: fpcompile.Program, length: int, batch: int = 1) -> Tensor:
    return torch.randint(
        0, program.vocabulary, (batch, length), generator=torch.Generator().manual_seed(length)
    )


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that gives the generated code back: quick, and of the same bits."""
    monkeypatch.setattr(torch._inductor, "standalone_compile", lambda module, examples, **options: module)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "qwen3_moe", "gpt_oss"])
def test_compiled_fp32_is_the_model_to_rounding(arch: str) -> None:
    program, model = compiled_of(arch), model_of(arch)
    assert any(part.function.startswith("inductor") for s in program.segments for part in s.parts)
    for length in (1, 2, 17, 128):
        ids = ids_of(program, length)
        got, expected = finish(program.start(ids)), reference(model, ids)
        assert relative_error(got.logits, expected.logits) <= 2e-6
        for (k, v), (own_k, own_v) in zip(got.layers, expected.layers, strict=True):
            assert relative_error(k, own_k) <= 2e-6
            assert relative_error(v, own_v) <= 2e-6


@pytest.mark.slow
def test_compiled_bf16_is_as_close_to_fp32_as_the_model() -> None:
    """Root mean square of the logits' errors at all lengths together."""
    model, program = model_of("qwen3", torch.bfloat16), compiled_of("qwen3", torch.bfloat16)
    exact = copy.deepcopy(model).to(torch.float32)  # type: ignore[arg-type]
    own, ours = 0.0, 0.0
    for length in (1, 2, 17, 128, 200):
        ids = ids_of(program, length)
        truth = reference(exact, ids).logits.double()
        own += float((reference(model, ids).logits.double() - truth).square().sum())
        ours += float((finish(program.start(ids)).logits.double() - truth).square().sum())
    assert 0 < ours <= 1.1**2 * own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype"), [("qwen3", torch.bfloat16), ("gemma2", torch.float32), ("qwen3_moe", torch.float32)]
)
@pytest.mark.parametrize("budget", [None, TINY], ids=["segments", "tiles"])
def test_a_pause_changes_no_bit(arch: str, dtype: torch.dtype, budget: float | None) -> None:
    program = compiled_of(arch, dtype)
    ids = ids_of(program, 200)
    whole = finish(program.start(ids, max_blocking_ms=budget))
    run = program.start(ids, max_blocking_ms=budget)
    assert any(launch.tiled for launch in run.schedule) == (budget is not None)
    assert differences(relay(program, run), whole) == []
    if dtype is torch.float32:
        assert relative_error(whole.logits, reference(model_of(arch, dtype), ids).logits) <= 2e-6


@pytest.mark.slow
def test_a_batch_and_a_continuation_are_the_models_to_rounding() -> None:
    program, model = compiled_of("qwen3"), model_of("qwen3")
    ids = ids_of(program, 20, batch=3)
    expected = reference(model, ids)
    assert relative_error(finish(program.start(ids)).logits, expected.logits) <= 2e-6
    cache = program(ids[:, :13]).past_key_values
    rest = program(ids[:, 13:], past_key_values=cache).logits
    assert relative_error(rest, expected.logits[:, 13:]) <= 2e-6


@pytest.mark.slow
@pytest.mark.skipif(
    not can_prepack(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="this CPU has no bf16 matrix kernel"
)
def test_packed_weights_give_compiled_code_the_same_bits() -> None:
    shared, packed = (
        compiled_of("qwen3", torch.bfloat16, weights=weights) for weights in ("shared", "packed")
    )
    assert any(weight.is_mkldnn for weight in packed.weights.values())
    assert sum(p.function.startswith("inductor") for s in packed.segments for p in s.parts) > 2
    for length in (1, 2, 60):
        ids = ids_of(shared, length)
        assert differences(finish(packed.start(ids)), finish(shared.start(ids))) == []


@pytest.mark.slow
def test_the_generic_route_is_compiled_too() -> None:
    model = model_of("qwen3")
    program = fpcompile.segment(model, route="generic", backend="inductor", granularity="layer")
    assert program.route == "generic"
    assert any(part.function.startswith("inductor") for s in program.segments for part in s.parts)
    for length in (2, 17):
        ids = ids_of(program, length)
        assert relative_error(program(input_ids=ids).logits, reference(model, ids).logits) <= 2e-6


@pytest.mark.usefixtures("uncompiled")
def test_the_backend_is_part_of_the_fingerprint() -> None:
    eager = program_of("qwen3")
    compiled = fpcompile.segment(model_of("qwen3"), backend="inductor", verify=False)
    assert compiled.fingerprint != eager.fingerprint
    checkpoint = eager.start([[1, 2, 3]]).checkpoint()
    with pytest.raises(CheckpointError, match="another program"):
        compiled.resume(checkpoint)
    assert differences(finish(compiled.start([[1, 2, 3]])), finish(eager.start([[1, 2, 3]]))) == []


def test_depth_adds_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[fx.GraphModule] = []

    def count(module: fx.GraphModule, examples: Sequence[Any], **options: Any) -> fx.GraphModule:
        calls.append(module)
        return module

    monkeypatch.setattr(torch._inductor, "standalone_compile", count)
    counted = []
    for layers in (3, 9):
        config = model_of("qwen3").config.__class__.from_dict(model_of("qwen3").config.to_dict())
        config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
        model = type(model_of("qwen3"))(config)
        model.train(False)
        calls.clear()
        fpcompile.segment(model, backend="inductor", verify=False)
        counted.append(len(calls))
    assert counted[0] == counted[1] > 0


def test_what_does_not_compile_stays_eager_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: fx.GraphModule, examples: Sequence[Any], **options: Any) -> Any:
        raise NotImplementedError("no lowering for this\nsecond line")

    monkeypatch.setattr(torch._inductor, "standalone_compile", refuse)
    program = fpcompile.segment(model_of("qwen3"), backend="inductor")
    assert program.fingerprint == program_of("qwen3").fingerprint
    assert differences(finish(program.start([[5, 6]])), finish(program_of("qwen3").start([[5, 6]]))) == []
    told = program.explain()
    assert "0 of " in told
    assert "does not compile (NotImplementedError: no lowering for this)" in " ".join(told.split())


def test_compiled_code_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: fx.GraphModule, examples: Sequence[Any], **options: Any) -> Callable[..., Any]:
        return lambda *arguments: [result * 1.01 for result in module(*arguments)]

    monkeypatch.setattr(torch._inductor, "standalone_compile", wrong)
    program = fpcompile.segment(model_of("qwen3"), backend="inductor")
    assert any("compiled code differs by" in note for note in program.plan.notes)
    assert program.fingerprint == program_of("qwen3").fingerprint


def test_without_a_compiler_the_error_says_what_is_missing() -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/c++",)}),
        pytest.raises(UsageError, match=r"(?s)needs a C\+\+ compiler.*g\+\+.*backend='eager'"),
    ):
        fpcompile.segment(model_of("qwen3"), backend="inductor", verify=False)


def test_an_unknown_backend_lists_the_legal_ones() -> None:
    with pytest.raises(UnknownNameError, match="'eager', 'inductor'"):
        fpcompile.segment(model_of("qwen3"), backend="induktor")


def function_of(compute: Callable[[Tensor], Tensor], example: Tensor) -> Function:
    """Generated code of ``compute``, whose dimension 1 is a symbolic length."""

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return compute(x)

    dims = {1: torch.export.Dim("tokens", min=2, max=1 << 20)}
    graph = torch.export.export(Module(), (example,), dynamic_shapes=(dims,), strict=False).graph
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    values = [n for n in graph.nodes if n.op == "placeholder"]
    result = next(n for n in graph.nodes if n.op == "output").args[0][0]
    functions = Functions(lambda node: str(node.meta["val"].shape))
    return functions.found[functions.generate(nodes, values, [], [], [result])]


def test_another_layout_is_copied_into_the_expected_one() -> None:
    function = compile_function(
        function_of(lambda x: torch.nn.functional.silu(x) * 2 + 1, torch.zeros(2, 37, 8))
    )
    x = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    (got,) = function.call([x])
    assert got.shape == (2, 50, 8)
    torch.testing.assert_close(got, torch.nn.functional.silu(x) * 2 + 1)
    wide = torch.randn(2, 50, 8)
    (part,) = function.call([wide.narrow(1, 7, 20)])
    torch.testing.assert_close(part, torch.nn.functional.silu(wide[:, 7:27]) * 2 + 1)


def test_a_function_that_writes_into_its_input_is_refused() -> None:
    with pytest.raises(RefusedError, match="writes in place into its input"):
        compile_function(function_of(lambda x: x.view(-1).add_(1) * 2, torch.zeros(2, 37, 8)))


def test_matrix_products_alone_are_refused() -> None:
    with pytest.raises(RefusedError, match="nothing to fuse"):
        compile_function(
            function_of(lambda x: (x.reshape(-1, 8) @ x.reshape(-1, 8).t()).t(), torch.zeros(2, 37, 8))
        )


def test_guards_of_the_compiler_are_kept() -> None:
    lengths = _Lengths()
    function = function_of(lambda x: x + 1, torch.zeros(1, 37, 8))
    x = lengths.fake(next(n for n in function.graph.nodes if n.op == "placeholder").meta["val"])
    assert lengths.guards() == ()
    assert x.shape[1] < 1_000_000
    guards = lengths.guards()

    def doubled(*arguments: Any) -> list[Tensor]:
        return [2 * argument for argument in arguments]

    compiled = Compiled(doubled, tuple(lengths.fresh.values()), ((0, 1),), guards, (), ())
    call = compiled.call(lambda box: (box.pop() + 1,))
    assert torch.equal(call([torch.ones(1, 5, 8)])[0], torch.full((1, 5, 8), 2.0))
    assert torch.equal(call([torch.full((1, 2_000_000, 1), 3.0)])[0][0, :3, 0], torch.full((3,), 4.0)), (
        "eager"
    )
    assert x.shape[1] % 2 == 1
    with pytest.raises(RefusedError, match="does not hold at length 2"):
        lengths.guards()

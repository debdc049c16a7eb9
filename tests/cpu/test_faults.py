"""A segment that raises: its own run fails, with the node and the model's source line; other runs go on."""

from __future__ import annotations

import contextlib
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fpcompile
from fpcompile.errors import SegmentError, UsageError
from fpcompile.models.zoo import sample_ids, tiny_model
from tests.cpu.support import Spot, differences, finish, mlp, model_of, program_of, reference, toy


def _run_into(run: fpcompile.Run) -> SegmentError:
    with pytest.raises(SegmentError) as caught:
        finish(run)
    return caught.value


def test_the_error_names_segment_module_node_and_source_line() -> None:
    program = program_of("llama")
    run = program.start(sample_ids(9))
    with _Raise(RuntimeError("injected"), torch.ops.aten.mm.default, 13):
        error = _run_into(run)
    segment = next(s for s in program.segments if s.name == "model.layers.1.mlp.up_proj")
    assert error.segment == f"{segment.index} (model.layers.1.mlp.up_proj)"
    assert error.module_path == "model.layers.1.mlp.up_proj"
    assert error.node in {name for part in segment.parts for name, _ in part.nodes}
    assert error.source_line is not None
    assert error.source_line.startswith("modeling_llama.py:")
    assert "self.up_proj(x)" in error.source_line
    assert isinstance(error.__cause__, RuntimeError)
    assert error.got == "RuntimeError: injected"
    for part in (error.segment, error.node, "modeling_llama.py"):
        assert str(part) in str(error)


def test_a_failed_run_is_released_and_says_so() -> None:
    run = _poisoned(program_of("llama"))
    _run_into(run)
    assert run.live_bytes == run.kv_bytes == 0
    for action in (run.step, run.result, run.checkpoint):
        with pytest.raises(UsageError, match="failed"):
            action()


def test_the_error_crosses_a_process_boundary() -> None:
    error = _run_into(_poisoned(program_of("llama")))
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == str(error)
    assert (back.node, back.module_path, back.source_line) == (
        error.node,
        error.module_path,
        error.source_line,
    )


def _poisoned(program: fpcompile.Program, after: int = 2) -> fpcompile.Run:
    """A run one of whose live values was replaced by one of a wrong shape."""
    run = program.start(sample_ids(9))
    for _ in range(after):
        run.step()
    name = max(run.values, key=lambda n: run.values[n].numel())
    run.values[name] = torch.zeros(3, 5, 7)
    return run


def test_other_runs_go_on() -> None:
    program = program_of("llama")
    ids = [sample_ids(n, seed=n) for n in (9, 20, 3)]
    runs = [program.start(i) for i in ids]
    for run in runs:
        run.step()
        run.step()
    _run_into(_poisoned(program))
    expected = [reference(model_of("llama"), i) for i in ids]
    assert [differences(finish(r), e) for r, e in zip(runs, expected, strict=True)] == [[]] * 3
    assert differences(finish(program.start(ids[0])), expected[0]) == []


class _Raise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises ``error`` at the ``count``-th call of an operator (None: of any)."""

    def __init__(self, error: BaseException, operator: Any, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.error, self.operator, self.left = error, operator, count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.operator in (func, None):
            self.left -= 1
            if self.left == 0:
                raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("count", "module"),
    [
        (1, "model.layers.0.self_attn.q_proj"),
        (4, "model.layers.0.self_attn.o_proj"),
        (7, "model.layers.0.mlp.down_proj"),
        (15, "lm_head"),
    ],
)
def test_every_projection_is_told_apart(count: int, module: str) -> None:
    """Identical layers share one function: the error must still name the layer that failed."""
    run = program_of("llama").start(sample_ids(9))
    with _Raise(MemoryError("out of memory"), torch.ops.aten.mm.default, count):
        error = _run_into(run)
    assert error.module_path == module
    assert isinstance(error.__cause__, MemoryError)
    assert (error.source_line or "").startswith("modeling_llama.py:")


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_attention_that_raises_names_its_layer(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(arch)
    run = program.start(sample_ids(9))
    attentions = [s for s in program.segments if s.kind == "attention"]
    while run.cursor < attentions[1].index:
        run.step()
    operators = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._softmax.default,
    )
    with _Raise(RuntimeError("injected"), operators[arch == "gemma2"], 1):
        error = _run_into(run)
    assert error.module_path is not None
    assert "layers.1" in error.module_path
    assert error.node is not None
    assert "attention" in error.node


@pytest.mark.slow
def test_experts_that_raise_name_their_layer() -> None:
    model: Any = tiny_model("mixtral")
    program = fpcompile.segment(model, route="packed")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj.data = experts.down_proj.data[:, :5]
    error = _run_into(program.start(sample_ids(9)))
    assert error.module_path is not None
    assert "layers.1.mlp" in error.module_path
    assert (error.source_line or "").startswith("modeling_mixtral.py:")


@pytest.mark.slow
def test_a_models_own_check_fails_with_its_line() -> None:
    """A lookup that only some ids break: the natural failure of a model at run time."""

    def lookup(spot: Spot) -> Tensor:
        table: Tensor = torch.nn.functional.embedding(spot.ids, spot.layer.up.weight)  # 48 rows for 128 ids
        return table

    program = fpcompile.segment(toy(lookup), route="packed", verify=False)
    good, bad = torch.full((1, 6), 11), torch.full((1, 6), 99)
    assert program(good).logits.shape == (1, 6, 128)
    error = _run_into(program.start(bad))
    assert isinstance(error.__cause__, IndexError)
    assert "self.mix(Spot(" in str(error.source_line), "the line of the toy's forward"
    assert program(good).logits.shape == (1, 6, 128)


@pytest.mark.slow
def test_the_source_line_is_the_models_also_when_a_torch_module_failed() -> None:
    """Of the frames from the model's forward into torch's own layers, the model's is the one to name."""
    run = fpcompile.segment(toy(mlp), route="packed").start(sample_ids(5))
    with _Raise(RuntimeError("injected"), torch.ops.aten.addmm.default, 2):
        error = _run_into(run)
    assert error.module_path == "layers.0.out"
    assert (error.source_line or "").startswith("support.py:")
    assert "self.out(" in str(error.source_line)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["operator", "model"])
def test_interrupted_anywhere_a_run_goes_on_to_its_bits_or_says_that_it_cannot(granularity: str) -> None:
    """An interrupt passes through as itself; what must not be is a half-made step from which the run goes on
    to something else, such as keys that are written twice.
    """
    program = program_of("llama", granularity=granularity)
    ids = sample_ids(9)
    expected = reference(model_of("llama"), ids)
    for count in range(1, 1000):
        run = program.start(ids)
        interrupt = _Raise(KeyboardInterrupt(), None, count)
        with contextlib.suppress(KeyboardInterrupt), interrupt:
            finish(run, validate=False)
        if interrupt.left > 0:
            break
        with contextlib.suppress(UsageError):  # "was released"
            assert differences(finish(run, validate=False), expected) == [], f"interrupted at call {count}"
    assert count > 50, "the run makes many calls"


def test_a_step_without_gradients_leaves_the_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.is_grad_enabled()
    _run_into(_poisoned(program_of("llama")))
    assert torch.is_grad_enabled()
    with torch.enable_grad():
        assert not program_of("llama")(sample_ids(3)).logits.requires_grad


def test_runs_of_many_failures_hold_nothing() -> None:
    program = program_of("llama")
    runs = [_poisoned(program, after) for after in range(1, len(program.segments) - 1)]
    for run in runs:
        with pytest.raises(SegmentError):
            finish(run)
    held = functools.reduce(lambda total, run: total + run.live_bytes + run.kv_bytes, runs, 0)
    assert held == 0

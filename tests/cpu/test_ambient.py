"""What a caller has switched on, or does to the model afterwards: the same bits, or a typed error."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpcompile
from fpcompile.errors import (
    BudgetError,
    BudgetWarning,
    CheckpointError,
    InvalidInputError,
    UnsupportedModelError,
    UsageError,
)
from fpcompile.models.ambient import tracing
from fpcompile.models.zoo import sample_ids, tiny_model
from tests.cpu.support import differences, finish, model_of, outcome, program_of, reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning"),
]

MODES: dict[str, Any] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_a_mode_around_a_run_changes_nothing(arch: str, mode: str) -> None:
    ids = sample_ids(70, seed=2)
    expected = reference(model_of(arch), ids)
    with MODES[mode]():
        assert differences(outcome(program_of(arch)(ids)), expected) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_run_may_be_stepped_in_and_out_of_a_mode(mode: str) -> None:
    ids = sample_ids(200, seed=2)
    whole = outcome(program_of("llama")(ids, max_blocking_ms=0.01))
    run = program_of("llama").start(ids, max_blocking_ms=0.01)
    assert any(launch.tiled for launch in run.schedule)
    for number in range(len(run.schedule)):
        with MODES[mode]() if number % 2 else contextlib.nullcontext():
            run.step()
    assert differences(outcome(run.result()), whole) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_around_segment_is_not_baked_in(mode: str) -> None:
    ids = sample_ids(33, seed=3)
    model = tiny_model("qwen3")
    with MODES[mode]():
        program = fpcompile.segment(model, route="packed")
    assert differences(outcome(program(ids)), reference(model_of("qwen3"), ids)) == []


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = tiny_model("llama")
    with pytest.raises(InvalidInputError, match="inference_mode") as caught:
        fpcompile.segment(model)
    assert caught.value.remedy


REPLACED: dict[str, Any] = {
    "another dtype": lambda model: model.to(torch.bfloat16),
    "assigned": lambda model: model.load_state_dict(tiny_model("gpt_oss", seed=1).state_dict(), assign=True),
    "data replaced": lambda model: setattr(
        model.lm_head.weight, "data", model.lm_head.weight.data.clone() * 2
    ),
}


@pytest.mark.parametrize("how", REPLACED)
def test_replaced_weights_are_an_error(how: str) -> None:
    model: Any = tiny_model("gpt_oss")
    program = fpcompile.segment(model, route="packed")
    checkpoint = program.start(sample_ids(5)).checkpoint()
    REPLACED[how](model)
    for attempt in (lambda: program(sample_ids(5)), lambda: program.resume(checkpoint)):
        with pytest.raises(UsageError, match="replaced") as caught:
            attempt()
        assert "segment" in str(caught.value.remedy)


def test_weights_changed_in_place_are_followed_by_runs_but_not_by_checkpoints() -> None:
    model = tiny_model("mixtral")
    program = fpcompile.segment(model, route="packed")
    ids = sample_ids(9)
    run = program.start(ids)
    run.step()
    checkpoint = run.checkpoint()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    assert differences(outcome(program(ids)), reference(model, ids)) == []
    with pytest.raises(CheckpointError, match="another weights"):
        program.resume(checkpoint)


def test_packed_weights_that_were_changed_are_an_error() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    program = fpcompile.segment(model, route="packed", weights="packed")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(2)
    with pytest.raises(UsageError, match="packed"):
        program(sample_ids(5))


def in_place(model: Any) -> Any:
    """``model`` with a residual stream that attention's result is added to in place."""

    def forward(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        residual = hidden_states.mul(1.0)
        before = residual
        attended = layer.self_attn.o_proj(torch.zeros_like(attended)) + attended
        residual += attended
        result: Tensor = before + layer.mlp(layer.post_attention_layernorm(residual))
        return result

    def late(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        residual = hidden_states.mul(1.0)
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(residual), **kwargs)
        residual += attended
        result: Tensor = residual + layer.mlp(layer.post_attention_layernorm(residual))
        return result

    for number, layer in enumerate(model.model.layers):
        layer.forward = (late if number else forward).__get__(layer)
    return model


@pytest.mark.parametrize("budget", [None, 0.02])
@pytest.mark.parametrize("granularity", ["operator", "layer", "model"])
def test_a_model_that_writes_in_place_across_attention(granularity: str, budget: float | None) -> None:
    """No cut, stage or tile may end between a value and a later write into it: a snapshot would change."""
    model = in_place(tiny_model("llama"))
    ids = sample_ids(200, seed=5)
    program = fpcompile.segment(model, route="packed", granularity=granularity)
    whole = reference(model, ids)
    run = program.start(ids, max_blocking_ms=budget)
    snapshots = [run.checkpoint()]
    while not run.done:
        run.step()
        snapshots.append(run.checkpoint())
    expected = outcome(run.result())
    if budget is None:
        assert differences(expected, whole) == []
    for snapshot in snapshots:
        assert differences(finish(program.resume(snapshot)), expected) == [], snapshot.at


@pytest.mark.parametrize("budget", [None, 0.02])
def test_without_a_cache_nothing_is_held_at_the_end(budget: float | None) -> None:
    program = program_of("gemma3_text")
    run = program.start(sample_ids(100), use_cache=False, logits_to_keep=1, max_blocking_ms=budget)
    while not run.done:
        run.step()
        assert run.kv_bytes <= 2 * 100 * 2 * 16 * 4, "keys and values of one layer at most"
    assert run.kv_bytes == 0
    assert run.result().past_key_values is None


def test_a_budget_that_cannot_be_kept_is_told_once() -> None:
    program = fpcompile.segment(tiny_model("llama"), route="packed")
    with pytest.warns(BudgetWarning, match=r"max_blocking_ms=0.001 .* segment \d+ \(.*smallest bound"):
        program.start(sample_ids(300), max_blocking_ms=0.001)
    program.start(sample_ids(300), max_blocking_ms=0.001)


def test_a_strict_budget_that_cannot_be_kept_is_an_error() -> None:
    budget: dict[str, Any] = {"max_blocking_ms": 0.001, "strict_budget": True}
    program = fpcompile.segment(tiny_model("llama"), route="packed", **budget)
    told = r"max_blocking_ms=0.001 .*segment \d+ \(.*smallest bound"
    for _ in range(2):
        with pytest.raises(BudgetError, match=told) as caught:
            program.start(sample_ids(300))
    error = caught.value
    assert error.segment in {s.name for s in program.segments}
    assert error.seconds > 1e-6
    program.start(sample_ids(300), max_blocking_ms=1.001 * error.smallest_ms)
    program(sample_ids(300), max_blocking_ms=math.inf)
    with pytest.warns(BudgetWarning):
        program.start(sample_ids(300), strict_budget=False)
    with pytest.raises(BudgetError):
        fpcompile.segment(tiny_model("bloom")).start(
            sample_ids(30), max_blocking_ms=0.001, strict_budget=True
        )


def test_predictions_for_batches_are_sums() -> None:
    program = program_of("llama")
    costs = program.costs
    alone = program.start(sample_ids(128)).call.shape
    batch = program.start(sample_ids(128, batch=4)).call.shape
    assert alone.mean_context == 128
    for index, stage in enumerate(program.stages):
        one = costs.stage(index, tokens=128, rows=128, context=alone.mean_context)
        four = costs.stage(index, tokens=512, rows=512, context=batch.mean_context)
        fixed = costs.curves[index].fixed
        if stage.over == "attention":
            assert four == pytest.approx(4 * (one - fixed) + fixed)
        assert four >= one > 0


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_a_configuration_that_asks_for_more_outputs_is_not_packed(name: str) -> None:
    model = tiny_model("llama", overrides={"attn_implementation": "eager"})
    setattr(model.config, name, True)
    with pytest.raises(UnsupportedModelError, match=name) as caught:
        fpcompile.segment(model, route="packed")
    assert caught.value.remedy


@pytest.mark.parametrize(
    "given", [{"ttft_sloo": None}, {"return_dict": False}, {"use_cache": "no"}, {"labels": False}, {}]
)
def test_arguments_are_never_dropped(given: dict[str, Any]) -> None:
    ids = {"input_ids": sample_ids(3)} if given else {}
    with pytest.raises(InvalidInputError):
        program_of("llama").start(**ids, **given)
    with pytest.raises(InvalidInputError):
        program_of("llama")(**ids, **given)


def test_an_argument_of_the_model_may_be_none() -> None:
    program_of("llama").start(sample_ids(3), position_ids=None, inputs_embeds=None, labels=None)


def test_models_are_compiled_from_several_threads() -> None:
    archs = ["llama", "mixtral", "qwen3"]
    programs: dict[str, fpcompile.Program] = {}

    def compile_one(arch: str) -> None:
        programs[arch] = fpcompile.segment(tiny_model(arch), route="packed")

    threads = [threading.Thread(target=compile_one, args=(arch,)) for arch in archs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = sample_ids(9)
    for arch in archs:
        assert differences(outcome(programs[arch](ids)), reference(model_of(arch), ids)) == []


def test_attention_without_a_mask_function_is_refused() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = "fpcompile_test_unmasked"
    ALL_ATTENTION_FUNCTIONS.register(name, ALL_ATTENTION_FUNCTIONS["sdpa"])
    model = tiny_model("llama")
    model.config._attn_implementation_internal = name
    with pytest.raises(UnsupportedModelError, match="without a mask function"):
        fpcompile.segment(model, route="packed")


def test_a_checkpoint_file_has_the_modes_of_new_files(tmp_path: Path) -> None:
    program_of("llama").start(sample_ids(3)).checkpoint().save(tmp_path / "run.ckpt")
    (tmp_path / "plain").touch()
    assert os.stat(tmp_path / "run.ckpt").st_mode == os.stat(tmp_path / "plain").st_mode


@pytest.mark.slow
def test_a_variant_that_is_compiled_in_a_call_ignores_the_callers_autocast() -> None:
    model = tiny_model("bloom")
    program = fpcompile.segment(model, route="generic", verify=False)
    ids = sample_ids(9)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "output_hidden_states": True}
    with torch.no_grad():
        expected = model(**given)
    with torch.autocast("cpu", torch.bfloat16):
        got = program(**given)
    assert len(program.variants) == 2  # type: ignore[attr-defined]
    assert torch.equal(got.logits, expected.logits)


class Waiting(nn.Module):
    """Stands still in the middle of a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.go_on, self.exports = (threading.Event() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            self.exports.set()
        self.there.set()
        assert self.go_on.wait(60)
        return x + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trace_in_another_thread_changes_no_bits(dtype: torch.dtype) -> None:
    """torch.export raises flags of the process; transformers builds masks and chooses kernels by them."""
    ids = sample_ids(70, seed=2)
    expected, program = reference(model_of("llama", dtype), ids), program_of("llama", dtype)
    asked = torch.compiler.is_exporting
    slow = Waiting()

    def trace() -> None:
        with tracing("cpu"):
            torch.export.export(slow, (torch.zeros(3),), strict=False)

    thread = threading.Thread(target=trace)
    thread.start()
    try:
        assert slow.there.wait(60)
        assert not torch.compiler.is_exporting()
        assert not torch.compiler.is_compiling()
        run = program.start(ids)
        masks: list[Tensor | None] = []
        while not run.done:
            run.step()
            masks += run.masks.values()
        assert masks
        assert all(mask is None for mask in masks), "the causal kernel needs none"
        assert differences(outcome(run.result()), expected) == []
    finally:
        slow.go_on.set()
        thread.join()
    assert slow.exports.is_set(), "a model that is traced sees that it is"
    assert torch.compiler.is_exporting is asked

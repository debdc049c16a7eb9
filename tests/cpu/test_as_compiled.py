"""A model that is changed after it was compiled: what runs cannot see is an error, never another number."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpcompile
from fpcompile.errors import UsageError
from fpcompile.executor.weights import WeightWatch
from fpcompile.models.zoo import ROPE_THRESHOLD, sample_ids, tiny_model
from tests.cpu.support import Spot, differences, outcome, reference, toy

IDS = torch.arange(9)[None]
Change = Callable[[Any], object]


def counted(spot: Spot) -> Tensor:
    """Computes with a buffer of the layer's state dict."""
    up: Tensor = spot.layer.down(spot.layer.up(spot.x) * (1.0 + spot.layer.counts.sum()))
    return up


def other_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in model.state_dict().items()}


CHANGES: dict[str, tuple[Change, str]] = {
    "a buffer in place": (lambda m: m.layers[0].counts.add_(1), "buffers"),
    "a buffer replaced": (lambda m: setattr(m.layers[0], "counts", torch.ones(32)), "buffers"),
    "another state dict": (lambda m: m.load_state_dict(other_state(m)), "buffers"),
    "a submodule": (lambda m: setattr(m, "head", nn.Linear(32, 128, bias=False)), "submodules"),
    "a layer less": (lambda m: m.layers.pop(1), "submodules"),
    "a bias more": (lambda m: setattr(m.head, "bias", nn.Parameter(torch.ones(128))), "weights"),
    "a forward hook": (lambda m: m.layers[1].register_forward_hook(lambda *_: None), "hooks"),
    "a hook in front": (lambda m: m.register_forward_pre_hook(lambda *_: None), "hooks"),
    "a forward": (lambda m: setattr(m.layers[0].out, "forward", lambda x: x), "forward"),
    "the configuration": (lambda m: setattr(m.config, "hidden_size", 64), "hidden_size = 32"),
    "the attention": (lambda m: m.config.__setattr__("_attn_implementation_internal", "eager"), "attn"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_runs_cannot_see_is_found(name: str) -> None:
    change, says = CHANGES[name]
    model = toy(counted)
    watch = WeightWatch(model)
    watch.check()
    with torch.no_grad():
        change(model)
    with pytest.raises(UsageError, match=says) as caught:
        watch.check()
    assert "fpcompile.segment(model)" in str(caught.value.remedy)
    assert caught.value.expected
    assert caught.value.got


def test_a_hook_that_was_traced_and_is_gone_is_found() -> None:
    model: Any = toy(counted)
    handle = model.layers[0].register_forward_hook(lambda *_: None)
    watch = WeightWatch(model)
    watch.check()
    handle.remove()
    with pytest.raises(UsageError, match="hooks"):
        watch.check()


def test_what_is_put_back_is_no_change() -> None:
    model: Any = toy(counted)
    watch, head = WeightWatch(model), model.head
    model.head = nn.Linear(32, 128)
    with pytest.raises(UsageError, match="submodules"):
        watch.check()
    model.head = head
    with model.layers[0].register_forward_hook(lambda *_: None), pytest.raises(UsageError, match="hooks"):
        watch.check()
    watch.check()


@pytest.mark.slow
@pytest.mark.parametrize("route", ["packed", "generic"])
def test_no_run_starts_on_a_changed_model(route: str) -> None:
    model: Any = toy(counted)
    program = fpcompile.segment(model, route=route)
    assert differences(outcome(program(IDS)), reference(model, IDS)) == []
    with torch.no_grad():
        model.layers[0].counts.add_(1)
    for attempt in (program, program.start):
        with pytest.raises(UsageError, match="buffers"):
            attempt(IDS)
    again = fpcompile.segment(model, route=route)
    assert differences(outcome(again(IDS)), reference(model, IDS)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "rope"), [("llama", "dynamic"), ("phi3", "longrope"), ("mixtral", None)])
def test_what_the_model_itself_does_is_no_change(arch: str, rope: str | None) -> None:
    model: Any = tiny_model(arch, rope=rope)
    program = fpcompile.segment(model)
    short, long = sample_ids(9), sample_ids(2 * ROPE_THRESHOLD)
    expected = outcome(program(short))
    with torch.no_grad():
        for ids in (long, short):
            model(input_ids=ids, output_hidden_states=True)
        model.generate(short, max_new_tokens=3, do_sample=False)
    assert differences(outcome(program(short)), expected) == []


def adapted(base: Any) -> Any:
    """``base`` with LoRA adapters that count, one active and one not."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for a deprecated property
        model = peft.get_peft_model(base, config)
        model.add_adapter("other", config)
    return model.eval()


SWITCHES: dict[str, Change] = {
    "switched": lambda m: m.set_adapter("other"),
    "merged": lambda m: m.merge_adapter(),
    "scaled": lambda m: [
        module.scaling.update(default=9.0) for module in m.modules() if hasattr(module, "merged_adapters")
    ],
}


@pytest.mark.parametrize("name", SWITCHES)
def test_adapters_that_are_switched_are_found(name: str) -> None:
    model = adapted(tiny_model("llama"))
    watch = WeightWatch(model)
    watch.check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SWITCHES[name](model)
    with pytest.raises(UsageError, match="adapters"):
        watch.check()


@pytest.mark.slow
def test_adapters_that_are_switched_off_and_on_again() -> None:
    base: Any = tiny_model("llama")
    plain = fpcompile.segment(base, route="packed")
    model = adapted(base)
    with pytest.raises(
        UsageError, match="submodules"
    ):  # the layers that plain was made from are inside others
        plain(IDS)
    program = fpcompile.segment(model, route="packed")
    expected = program(IDS).logits
    with model.disable_adapter(), pytest.raises(UsageError, match="adapters"):
        program(IDS)
    with torch.no_grad():
        assert torch.equal(program(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)

"""A model that is changed after it was compiled: what runs cannot see is an error, never another number."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

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
    "a submodule": (lambda m: setattr(m, "head", nn.Linear(32, 128, bias=False)), "own forward"),
    "a layer less": (lambda m: m.layers.pop(1), "submodules"),
    "a bias more": (lambda m: setattr(m.head, "bias", nn.Parameter(torch.ones(128))), "weights"),
    "a forward hook": (lambda m: m.layers[1].register_forward_hook(lambda *_: None), "hooks"),
    "a hook in front": (lambda m: m.register_forward_pre_hook(lambda *_: None), "hooks"),
    "a forward": (lambda m: setattr(m.layers[0].out, "forward", lambda x: x), "forward"),
    "the configuration": (lambda m: setattr(m.config, "hidden_size", 64), "hidden_size = 32"),
    "a new field": (lambda m: setattr(m.config, "more", None), "more = "),
    "how many labels": (lambda m: setattr(m.config, "num_labels", 5), "num_labels = 2"),
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


class Plain:
    """A nested configuration that is no transformers configuration and equals itself only."""


def no_transformers(**fields: Any) -> Any:
    model: Any = toy(counted)
    model.config = SimpleNamespace(**fields)
    return model


ODD_FIELDS: dict[str, Callable[[], Any]] = {
    "a plain class": Plain,
    "an activation": nn.SiLU,
    "a tensor": lambda: torch.arange(3),
    "an array": lambda: np.arange(3),
    "a lock": threading.Lock,
    "a function": lambda: len,
    "objects in containers": lambda: {"a": [Plain(), (torch.arange(3), threading.Lock())], "b": {nn.SiLU()}},
    "not a number": lambda: [float("nan")],
}


@pytest.mark.parametrize("name", ODD_FIELDS)
def test_a_configuration_may_hold_anything(name: str) -> None:
    model = no_transformers(size=3, odd=ODD_FIELDS[name]())
    watch = WeightWatch(model)
    watch.check()
    model.config.odd = ODD_FIELDS[name]() if name != "a function" else max
    if name != "not a number":
        with pytest.raises(UsageError, match="odd = "):
            watch.check()


def test_a_configuration_that_holds_itself() -> None:
    model: Any = toy(counted)
    model.config.inner, model.config.loop = model.config, []
    model.config.loop.append(model.config.loop)
    WeightWatch(model).check()


def test_no_tensor_of_a_configuration_is_copied() -> None:
    class Uncopied(Tensor):
        def __deepcopy__(self, memo: object) -> Any:
            raise AssertionError("copied")

    WeightWatch(no_transformers(table=torch.arange(3).as_subclass(Uncopied))).check()


PLAIN_CHANGES: dict[str, Change] = {
    "a list": lambda c: c.kinds.append("full"),
    "in a list of dicts": lambda c: c.parts[0].update(size=2),
    "a set": lambda c: c.names.add("b"),
    "a dtype": lambda c: setattr(c, "kept_in", torch.float64),
    "a configuration inside": lambda c: setattr(c.text, "hidden_size", 7),
    "a configuration in a list": lambda c: setattr(c.texts[0], "hidden_size", 7),
}


@pytest.mark.parametrize("name", PLAIN_CHANGES)
def test_plain_data_of_a_configuration_is_compared_by_value(name: str) -> None:
    model = no_transformers(
        kinds=["sliding"],
        parts=[{"size": 1}],
        names={"a"},
        kept_in=torch.float32,
        text=LlamaConfig(),
        texts=[LlamaConfig()],
    )
    watch = WeightWatch(model)
    model.config.kinds, model.config.parts = ["sliding"], [{"size": 1}]  # equal ones
    watch.check()
    PLAIN_CHANGES[name](model.config)
    with pytest.raises(UsageError, match="configuration"):
        watch.check()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.id2label.update({0: "no"}),
        lambda c: setattr(c, "label2id", {"no": 0}),
        lambda c: setattr(c, "gradient_checkpointing", True),
    ],
)
def test_names_of_labels_are_no_change(change: Change) -> None:
    model: Any = toy(counted)
    watch = WeightWatch(model)
    change(model.config)
    watch.check()


def test_tables_that_others_change_meanwhile() -> None:
    model: Any = toy(counted)

    def toggle(table: dict[Any, Any], key: Any, value: Any) -> None:
        if table.pop(key, None) is None:
            table[key] = value

    class Field:
        def __getattribute__(self, name: str) -> Any:
            toggle(vars(model.config), "_commit_hash", "1")
            return object.__getattribute__(self, name)

    class Hook:
        def __getattribute__(self, name: str) -> Any:
            if name == "__module__":
                toggle(model._forward_hooks, 99, other)
                return "transformers.utils.output_capturing"
            return object.__getattribute__(self, name)

    other = SimpleNamespace(__module__="transformers.utils.output_capturing")
    model.config.first, model.config.second = Field(), 2
    model._forward_hooks[7] = Hook()
    watch = WeightWatch(model)
    for _ in range(3):
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


class Added(nn.Module):
    """A layer of PEFT's kind, with entries of adapters that are modules, parameters and numbers."""

    adapter_layer_names = ("down", "shift")
    other_param_names = ("scaling", "rank")

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        self.down, self.shift = nn.ModuleDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = "one"
        for name in ("one", "two"):
            self.add(name)

    def add(self, name: str) -> None:
        self.down[name] = nn.Linear(4, 4)
        self.shift[name] = nn.Parameter(torch.ones(4))
        self.scaling[name] = 2.0

    def delete(self, name: str) -> None:
        for table in (self.down, self.shift, self.scaling):
            del table[name]


UNHEARD: dict[str, Change] = {
    "an adapter more": lambda m: m.add("three"),
    "an adapter less": lambda m: m.delete("two"),
    "the same one": lambda m: setattr(m, "_active_adapter", ["one"]),
    "the same factor": lambda m: m.scaling.update(one=4.0 / 2),
}


@pytest.mark.parametrize("name", UNHEARD)
def test_adapters_that_are_not_active_come_and_go(name: str) -> None:
    model = Added()
    watch = WeightWatch(model)
    UNHEARD[name](model)
    watch.check()


HEARD: dict[str, tuple[Change, str]] = {
    "the active one deleted": (lambda m: m.delete("one"), "weights"),
    "the active one's module": (lambda m: m.down.update({"one": nn.Linear(4, 4)}), "submodules"),
    "the active one's parameter": (lambda m: m.shift.update({"one": nn.Parameter(torch.ones(4))}), "weights"),
    "the active one's factor": (lambda m: m.scaling.update(one=3.0), "adapters"),
    "other factors": (lambda m: setattr(m, "scaling", {"one": 3.0, "two": 2.0}), "adapters"),
    "another adapter of a name": (
        lambda m: (m.delete("two"), m.add("two")),
        "weights",
    ),  # mixed batches use it
    "one that was to come": (lambda m: (m.add("late"), m.__setattr__("_active_adapter", "late")), "adapters"),
    "the base layer": (lambda m: setattr(m, "base_layer", nn.Linear(4, 4)), "submodules"),
}


@pytest.mark.parametrize("name", HEARD)
def test_adapters_that_are_active_may_not(name: str) -> None:
    model = Added()
    watch = WeightWatch(model)
    watch.check()
    HEARD[name][0](model)
    with pytest.raises(UsageError, match=HEARD[name][1]):
        watch.check()


def test_an_active_adapter_that_a_layer_gets_later() -> None:
    model = Added()
    model._active_adapter = ["one", "late"]
    watch = WeightWatch(model)
    watch.check()
    model.add("late")
    with pytest.raises(UsageError, match="late"):
        watch.check()


def test_adapters_of_peft_come_and_go() -> None:
    model = adapted(tiny_model("llama"))
    watch = WeightWatch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("third", model.peft_config["other"])
        watch.check()
        model.delete_adapter("other")
        watch.check()
        model.set_adapter("third")
    with pytest.raises(UsageError, match="adapters") as caught:
        watch.check()
    assert "need two models" in str(caught.value.remedy)


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


@pytest.mark.parametrize("name", ["active_adapter", "_active_adapter", "_disable_adapters"])
def test_what_else_chooses_an_adapter(name: str) -> None:
    """Models of learned prompts and wrappers of whole modules are no layers of PEFT's kind."""
    model: Any = nn.Sequential(nn.Linear(4, 4))
    setattr(model[0], name, "one")
    watch = WeightWatch(model)
    setattr(model[0], name, ["one"])
    watch.check()
    setattr(model[0], name, "two")
    with pytest.raises(UsageError, match="adapters") as caught:
        watch.check()
    assert name in str(caught.value.expected)


@pytest.mark.slow
def test_learned_prompts_that_are_switched() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_model("llama"), config).eval()
        model.add_adapter("other", config)
        model.eval()
        program = fpcompile.segment(model)
        expected = program(input_ids=IDS).logits
        model.set_adapter("other")
        with pytest.raises(UsageError, match="adapters"):
            program(input_ids=IDS)
        model.set_adapter("default")
        assert torch.equal(program(input_ids=IDS).logits, expected)

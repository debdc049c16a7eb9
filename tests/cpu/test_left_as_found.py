"""``segment()`` leaves the model, its classes and configuration and the libraries' registries as they were.

Everything that can be reached from the model is described before and after: identities, bytes, versions,
plain attributes, hooks; then it must still return the bits that it returned before.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fpcompile.api  # registers its attention functions once and for all, before anything is described
from fpcompile.errors import UnsupportedModelError
from fpcompile.models.zoo import MAIN_ARCHS, ROPE_THRESHOLD, sample_ids, tiny_model
from tests.cpu.support import same_bits

State = dict[str, Any]


def state_of(model: PreTrainedModel) -> State:
    """Everything observable about ``model``, flattened to comparable values."""
    state: State = {}
    for path, module in model.named_modules(remove_duplicate=False):
        state[f"{path} is"] = (id(module), type(module), module.training)
        for name, value in vars(module).items():
            _describe(f"{path}.{name}", value, state)
        for name in ("forward", "__init__", "__call__"):
            state[f"{path} class {name}"] = getattr(type(module), name)
    return state


def _describe(path: str, value: Any, state: State) -> None:
    if isinstance(value, Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = (type(value), value.dtype, tuple(value.shape), value.stride(), value.requires_grad)
        state[path] = (id(value), value.data_ptr(), value._version, kind, value.grad is None, data)
    elif isinstance(value, nn.Module):
        state[path] = id(value)
    elif isinstance(value, PretrainedConfig):
        state[path] = (id(value), repr(sorted(vars(value).items(), key=lambda item: item[0])))
    elif isinstance(value, dict):
        state[path] = [(key, id(item)) for key, item in value.items()]
        for key, item in value.items():
            if not isinstance(item, nn.Module):
                _describe(f"{path}[{key!r}]", item, state)
    elif isinstance(value, (list, tuple, set, frozenset)):
        state[path] = (
            type(value),
            [item if isinstance(item, (int, float, str)) else id(item) for item in value],
        )
    elif isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        state[path] = value
    else:
        state[path] = id(value)


def surroundings() -> State:
    """State of the libraries that a trace could leave changed."""
    return {
        "attention": dict(_entries(ALL_ATTENTION_FUNCTIONS)),
        "masks": dict(_entries(ALL_MASK_ATTENTION_FUNCTIONS)),
        "experts": dict(_entries(ALL_EXPERTS_FUNCTIONS)),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": repr(np.random.get_state()),
        "python generator": random.getstate(),
        "sdpa": nn.functional.scaled_dot_product_attention,
        "sdp backends": (
            torch._C._get_flash_sdp_enabled(),
            torch._C._get_math_sdp_enabled(),
            torch._C._get_mem_efficient_sdp_enabled(),
        ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "compiling": torch.compiler.is_compiling(),
        "warnings": list(warnings.filters),
        "logging": transformers.logging.get_verbosity(),
        "mask functions": {
            name: value for name, value in vars(transformers.masking_utils).items() if callable(value)
        },
    }


def _entries(registry: Any) -> Iterator[tuple[str, Any]]:
    for key in registry:
        yield key, registry[key]


def changes(before: State, after: State) -> list[str]:
    """Names of what differs."""
    return [key for key in {**before, **after} if before.get(key, _MISSING) != after.get(key, _MISSING)]


_MISSING = object()


@contextlib.contextmanager
def left_as_found(model: PreTrainedModel, *, length: int = 40) -> Iterator[None]:
    """Assert that what happens inside leaves no trace, to the model's next output."""
    ids = sample_ids(length, seed=1)
    expected = _logits(copy.deepcopy(model), ids)
    before, around = state_of(model), surroundings()
    yield
    assert changes(before, state_of(model)) == []
    assert changes(around, surroundings()) == []
    assert same_bits(_logits(model, ids), expected)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits


VARIANTS = [
    *((arch, None) for arch in MAIN_ARCHS),
    ("phi3", "longrope"),
    ("llama", "longrope"),
    ("llama", "dynamic"),
    ("llama", "yarn"),
    ("gemma3_text", "dynamic"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "rope"), VARIANTS)
def test_a_compiled_model_is_left_as_found(arch: str, rope: str | None) -> None:
    model = tiny_model(arch, rope=rope)
    with left_as_found(model):
        program = fpcompile.segment(model, route="packed")
    with left_as_found(model):
        program(sample_ids(40))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "rope"), [("llama", "dynamic"), ("phi3", "longrope"), ("gemma3_text", "dynamic")]
)
@pytest.mark.parametrize("used", [ROPE_THRESHOLD - 2, 2 * ROPE_THRESHOLD])
def test_a_model_that_has_run_keeps_its_state(arch: str, rope: str, used: int) -> None:
    """A dynamic rotary buffer remembers the longest call; a look at the model must not make it forget."""
    model = tiny_model(arch, rope=rope)
    with torch.no_grad():
        model(input_ids=sample_ids(used))
    with left_as_found(model, length=ROPE_THRESHOLD + 4):
        fpcompile.segment(model, route="packed")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_in_other_dtypes_and_with_other_settings(dtype: torch.dtype) -> None:
    model = tiny_model("qwen3", dtype=dtype)
    model.requires_grad_(requires_grad=False)
    model.config.use_cache = False
    model.set_attn_implementation("eager")
    with left_as_found(model):
        fpcompile.segment(model, route="packed")


@pytest.mark.slow
def test_hooks_and_gradients_stay() -> None:
    model = tiny_model("llama")
    calls: list[str] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append("hook"))
    model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append("pre"))
    loss = model(input_ids=sample_ids(5)).logits.sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    calls.clear()
    with left_as_found(model):
        fpcompile.segment(model, route="packed")
        calls.clear()
    assert calls == ["hook", "pre"], "the hooks still run with the model"
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if p.grad is not None)


def _fails_while_traced(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, which raises when it is called by a trace and works as before otherwise."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, FakeTensor) for a in (*args, *kwargs.values())):
            raise RuntimeError("raised in the middle of a trace")
        return original(self, *args, **kwargs)

    return forward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "rope", "part"),
    [
        ("phi3", "longrope", lambda m: m.model.layers[1].mlp),
        ("llama", "dynamic", lambda m: m.model.norm),
        ("qwen3", None, lambda m: m.model.layers[1].self_attn),
        ("mixtral", None, lambda m: m.model.layers[1].mlp.gate),
        ("gpt_oss", None, lambda m: m.model.rotary_emb),
    ],
)
def test_also_when_tracing_fails_half_way(
    arch: str, rope: str | None, part: Callable[[Any], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(arch, rope=rope)
    cls = type(part(model))
    monkeypatch.setattr(cls, "forward", _fails_while_traced(cls.forward))
    with (
        left_as_found(model),
        pytest.raises(UnsupportedModelError, match="raised in the middle of a trace") as caught,
    ):
        fpcompile.segment(model, route="packed")
    assert caught.value.source_line
    assert caught.value.remedy


@pytest.mark.slow
@pytest.mark.parametrize("where", ["normalise", "place_cuts", "self_check", "Program"])
def test_also_when_a_later_stage_fails(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fpcompile.passes.pipeline

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError(where)

    home: Any = fpcompile.api if where in ("self_check", "Program") else fpcompile.passes.pipeline
    if where == "Program":
        where = "compile_packed"
    monkeypatch.setattr(home, where, broken)
    model = tiny_model("phi3", rope="longrope")
    with left_as_found(model), pytest.raises(ZeroDivisionError):
        fpcompile.segment(model, route="packed")


UNSUPPORTED = ("mamba", "rwkv", "bloom", "gpt_neo", "mpt", "jamba", "recurrent_gemma", "bamba")


@pytest.mark.slow
@pytest.mark.parametrize("arch", UNSUPPORTED)
def test_also_when_the_architecture_is_refused(arch: str) -> None:
    model = tiny_model(arch)
    with left_as_found(model), pytest.raises(UnsupportedModelError) as caught:
        fpcompile.segment(model, route="packed")
    assert caught.value.reason


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mamba", "bloom"])
def test_also_when_another_route_is_taken_instead(arch: str) -> None:
    model = tiny_model(arch)
    with left_as_found(model):
        program = fpcompile.segment(model)
    assert program.route == "generic"


@pytest.mark.slow
def test_the_description_sees_what_it_should() -> None:
    """Each kind of damage, done on purpose, is found."""
    damages: list[Callable[[PreTrainedModel], object]] = [
        lambda m: setattr(m.config, "rope_theta_note", 1),
        lambda m: setattr(m.config, "_attn_implementation_internal", "other"),
        lambda m: setattr(m.model.layers[0], "extra", 1),
        lambda m: m.model.layers[0].register_forward_hook(lambda *_: None),
        lambda m: m.model.rotary_emb.register_buffer("inv_freq", m.model.rotary_emb.inv_freq.clone()),
        lambda m: m.model.rotary_emb.inv_freq.mul_(1.0),
        lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.clone())),
        lambda m: setattr(m.model.layers[0].mlp, "forward", m.model.layers[0].mlp.forward),
        lambda m: m.train(),
    ]
    for damage in damages:
        model = tiny_model("llama")
        before = state_of(model)
        assert changes(before, state_of(model)) == []
        damage(model)
        assert changes(before, state_of(model)) != []

"""Models for demonstration and measurement: the shapes of real architectures, random weights.

Words
    *shape*  the configuration of a published model, or one of the same family at another size. The time of a
             prefill depends on it and not on the weights, so no download is needed to measure.

Typical use
    ``model = build_demo_model("qwen3-110m")``
    ``model = build_demo_model("qwen2-0.5b", device="meta")``  (no weights: for plans)

Invariants
    The classes are transformers' own. Same name, seed, dtype and device: same bits, whatever the state of
    torch's global generator, which is left as it was. Models come in evaluation mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fpcompile.errors import UnknownNameError

__all__ = ["DEFAULT_DEMO_MODEL", "DEMO_MODELS", "DemoModel", "build_demo_model"]


@dataclasses.dataclass(frozen=True, slots=True)
class DemoModel:
    """A named shape: ``model_type`` of transformers and the fields that differ from its default config."""

    name: str
    about: str
    model_type: str
    fields: Mapping[str, Any]

    def config(self) -> PretrainedConfig:
        """A fresh configuration."""
        config: PretrainedConfig = CONFIG_MAPPING[self.model_type](**self.fields)
        return config


def _shape(
    name: str,
    about: str,
    model_type: str,
    *,
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    **more: object,
) -> DemoModel:
    fields = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        **more,
    }
    return DemoModel(name, about, model_type, MappingProxyType(fields))


_ALL = (
    _shape(
        "qwen3-110m",
        "Qwen3 made small: 10 layers, heads of 128 with query and key norms, 3:1 grouped keys and values",
        "qwen3",
        layers=10, hidden=768, inner=2304, heads=6, kv_heads=2, vocabulary=49152, head_dim=128,
    ),
    _shape(
        "qwen2-0.5b",
        "the shape of Qwen2.5-0.5B: 24 layers",
        "qwen2",
        layers=24, hidden=896, inner=4864, heads=14, kv_heads=2, vocabulary=151936,
    ),
    _shape(
        "qwen3-0.6b",
        "the shape of Qwen3-0.6B: 28 layers",
        "qwen3",
        layers=28, hidden=1024, inner=3072, heads=16, kv_heads=8, vocabulary=151936, head_dim=128,
    ),
)  # fmt: skip

DEMO_MODELS: Mapping[str, DemoModel] = MappingProxyType({model.name: model for model in _ALL})
DEFAULT_DEMO_MODEL = "qwen3-110m"


def build_demo_model(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """The model of :data:`DEMO_MODELS` called ``name``, with random weights drawn on ``device``.

    On the ``meta`` device it has shapes but no values, and takes no memory. Raises :class:`UnknownNameError`.
    """
    if name not in DEMO_MODELS:
        raise UnknownNameError("demo model", name, known=DEMO_MODELS)
    device = torch.device(device)
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), device:
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(DEMO_MODELS[name].config(), dtype=dtype)  # type: ignore[no-untyped-call]
    model.train(False)
    return model

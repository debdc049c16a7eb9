"""Tiny configs and models of every causal LM architecture.

Typical use
    ``model = tiny_model("gemma2", seed=1)``
    ``model = tiny_model("phi3", rope="longrope", dtype=torch.bfloat16)``
    ``ids = sample_ids(40)``

Invariants
    Same arguments, same bits, whatever the state of torch's global generator, which is left as it was.
    The model is on CPU, in eval mode, and fits a few hundred thousand parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fpcompile.errors import UnknownNameError, UnsupportedModelError
from fpcompile.models.zoo import towers as _towers  # noqa: F401  (registers its classes)
from fpcompile.models.zoo.overrides import OVERRIDES, UNBUILDABLE
from fpcompile.models.zoo.rope import rope_changes
from fpcompile.models.zoo.shrink import END_PLAIN_ID, FIRST_PLAIN_ID, merged, shrunk_arguments
from fpcompile.models.zoo.weights import instantiate

__all__ = ["CAUSAL_ARCHS", "sample_ids", "tiny_config", "tiny_model"]

CAUSAL_ARCHS: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The entries of transformers' causal LM mapping, in its order."""

_NOTHING: Mapping[str, object] = MappingProxyType({})


def tiny_config(
    arch: str, *, rope: str | Mapping[str, object] | None = None, overrides: Mapping[str, object] = _NOTHING
) -> PretrainedConfig:
    """A tiny config of ``arch``, a ``model_type`` of :data:`CAUSAL_ARCHS`.

    ``overrides`` sets config fields (a mapping under the name of a nested config changes that one); ``rope``
    is described at :func:`fpcompile.models.zoo.rope.rope_changes` and wins over ``overrides``.
    Raises :class:`UnknownNameError` for other names, :class:`UnsupportedModelError` for the entries that
    cannot run on their own.
    """
    if arch not in CAUSAL_ARCHS:
        raise UnknownNameError("architecture", arch, known=CAUSAL_ARCHS)
    if arch in UNBUILDABLE:
        raise UnsupportedModelError(
            f"{arch} cannot be run as a causal language model", reason=UNBUILDABLE[arch]
        )
    config_class: type[PretrainedConfig] = CONFIG_MAPPING[arch]
    changes = merged(OVERRIDES.get(arch, _NOTHING), overrides)
    if rope is not None:
        plain = config_class(**shrunk_arguments(config_class, changes))
        changes = {**changes, **rope_changes(plain, rope)}
    return config_class(**shrunk_arguments(config_class, changes))


def tiny_model(
    arch: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rope: str | Mapping[str, object] | None = None,
    overrides: Mapping[str, object] = _NOTHING,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A tiny ``arch`` causal LM on CPU, in eval mode, with weights drawn from ``seed``.

    ``attn_implementation`` is passed on to transformers (None: its own choice).
    With another ``dtype`` the weights are the fp32 ones rounded; buffers that transformers computes in fp32
    (rotary frequencies) and modules that it keeps in fp32 are as ``from_pretrained(dtype=...)`` has them.
    Raises what :func:`tiny_config` raises.
    """
    config = tiny_config(arch, rope=rope, overrides=overrides)
    model_class: type[PreTrainedModel] = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[arch])
    for name, nested_class in config.sub_configs.items():
        if (
            nested_class is model_class.config_class
        ):  # a text-only class takes the text config, as with AutoModel
            config = getattr(config, name)
    return instantiate(model_class, config, dtype=dtype, seed=seed, attn_implementation=attn_implementation)


def sample_ids(length: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]`` without the special tokens of any zoo model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_PLAIN_ID, END_PLAIN_ID, (batch, length), generator=generator)

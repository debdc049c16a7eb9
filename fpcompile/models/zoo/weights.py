"""Models with deterministic random weights, wide enough that a wrong mask, position or state shows.

Words
    *kept*  a parameter whose scale carries meaning (decays, step sizes): it stays at the model's own init
           (unless that is zero, which real checkpoints are not).

Invariants
    Values depend on the seed and on the parameter's name and shape, not on the order of visits; those of kept
    ones on torch's global generator, which the caller seeds.
    Nothing is left at a value that hides a path: biases, sinks, gates, routing biases and expert tables that
    start at zero end nonzero.
"""

from __future__ import annotations

import re
import zlib

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["instantiate", "reinitialise", "restore_precision"]

_KEPT = re.compile(
    r"(A_log|dt_bias|dt_proj\.bias|(^|\.)D|time_decay|time_first|time_mix_\w+|decay|slope\w*|"
    r"lambda_\w+|recurrent_param|[if]gate_preact\.\w+|\.A)$"
)
"""Names of kept parameters: decays, step sizes, skip gains, gates with a range of their own."""

_ROUTING_BIAS = re.compile(r"(correction_bias|expert_bias)$")
"""Names of buffers that move the choice of experts; real checkpoints fill them."""

_EXPERT_TABLE = re.compile(r"tid2eid$")
"""Names of buffers ``[vocabulary, k]`` that name the experts of a token."""

_FIXED_FLOAT = frozenset({"reformer", "xlnet"})

MATRIX_STD = 0.1
CONVOLUTION_STD = 0.3
VECTOR_JITTER = 0.1
KEPT_STD = 1.0


def instantiate(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A ``model_class`` in eval mode, its weights drawn from ``seed`` in fp32, then rounded to ``dtype``.

    torch's global generator is left as it was.
    """
    chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}

    def build(precision: torch.dtype) -> PreTrainedModel:
        built: PreTrainedModel = model_class._from_config(  # type: ignore[no-untyped-call]
            config, dtype=precision, **chosen
        )
        return built

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(torch.float32)
        reinitialise(model, seed=seed)
        if dtype != torch.float32:
            values = model.state_dict()
            model = build(dtype)
            restore_precision(model, dtype)
            model.load_state_dict(values)
    model.train(False)
    return model


@torch.no_grad()
def reinitialise(model: nn.Module, *, seed: int, experts: int = 4) -> None:
    """Overwrite the parameters of ``model``, and the buffers that choose experts, in place.

    Matrices, embeddings and stacked experts: normal, std 0.1. Depthwise convolutions: std 0.3. Vectors (norm
    weights, biases, sinks): their own initial value plus normal jitter of std 0.1. Kept ones: untouched, or
    std 1 where their class leaves them at zero.
    ``experts`` bounds the ids in expert tables.
    """
    depthwise = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d) and module.groups > 1
    }
    for name, parameter in model.named_parameters():
        kept = bool(_KEPT.search(name))
        if not parameter.is_floating_point() or (kept and parameter.any()):
            continue
        noise = torch.randn(parameter.shape, generator=_generator(name, seed))
        if name in depthwise:
            parameter.copy_(noise * CONVOLUTION_STD)
        elif parameter.squeeze().ndim >= 2:
            parameter.copy_(noise * MATRIX_STD)
        else:
            parameter.add_(noise * (KEPT_STD if kept else VECTOR_JITTER))
    for name, buffer in model.named_buffers():
        if _ROUTING_BIAS.search(name):
            buffer.add_(torch.randn(buffer.shape, generator=_generator(name, seed)) * VECTOR_JITTER)
        elif _EXPERT_TABLE.search(name):
            scores = torch.rand(buffer.shape[0], experts, generator=_generator(name, seed))
            buffer.copy_(scores.argsort(dim=-1)[:, : buffer.shape[1]])


def restore_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters of a model that was constructed in ``dtype`` the dtypes that loading gives them.

    Loading keeps some modules in fp32, by patterns that the class declares. Parameters that a class makes in
    fp32 whatever the default (:data:`_FIXED_FLOAT`) take ``dtype``: their models run in no other way.
    """
    if model.config.model_type in _FIXED_FLOAT:
        nn.Module.to(model, dtype=dtype)
    strict = model._keep_in_fp32_modules_strict or ()
    if strict:
        pattern = re.compile("|".join(name.replace("*", ".*") for name in sorted(strict)))
        persistent = set(model.state_dict())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in persistent and tensor.is_floating_point() and pattern.search(name):
                tensor.data = tensor.data.to(torch.float32)


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1 & 0xFFFFFFFF))

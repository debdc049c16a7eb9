"""Deterministic random weights, wide enough that a wrong mask or position shows in the logits.

Words
    *kept*  a parameter whose scale carries meaning (decays, step sizes): it stays at the model's own init.

Invariants
    Values depend on the seed and the parameter's name and shape: not on the order of visits; kept ones on the
    global generator, which the caller seeds.
    No parameter is left at a value that hides a path: biases, sinks and gates that start at zero end nonzero.
"""

from __future__ import annotations

import re
import zlib

import torch
from torch import nn

__all__ = ["reinitialise"]

_KEPT = re.compile(
    r"(A_log|dt_bias|dt_proj\.bias|\.dt_b|(^|\.)D|time_decay|time_first|time_mix_\w+|decay|slope\w*|"
    r"lambda_\w+|recurrent_param|[if]gate_preact\.\w+|hc_\w*(base|scale)|\.A)$"
)
"""Names of kept parameters: decays, step sizes, skip gains, gates with a range of their own."""

MATRIX_STD = 0.1
CONVOLUTION_STD = 0.3
VECTOR_JITTER = 0.1


@torch.no_grad()
def reinitialise(model: nn.Module, *, seed: int) -> None:
    """Overwrite the parameters of ``model`` in place.

    Matrices, embeddings and stacked experts: normal, std 0.1. Depthwise convolutions: std 0.3. Vectors (norm
    weights, biases, sinks): their own initial value plus normal jitter of std 0.1. Kept ones: untouched.
    """
    convolutions = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d) and module.groups > 1
    }
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or _KEPT.search(name):
            continue
        generator = torch.Generator().manual_seed(
            zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1 & 0xFFFFFFFF)
        )
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if name in convolutions:
            parameter.copy_(noise * CONVOLUTION_STD)
        elif parameter.squeeze().ndim >= 2:
            parameter.copy_(noise * MATRIX_STD)
        else:
            parameter.add_(noise * VECTOR_JITTER)

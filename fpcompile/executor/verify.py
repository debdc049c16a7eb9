"""Self-check of a packed program on the model's own weights.

Two short sequences of different lengths are run by the unmodified model one at a time, and by the program
one at a time and packed together. A model whose sequences mix when packed (positions counted from ids,
state across tokens) differs by far more than rounding; the threshold only separates the two. So does one that
keeps a state from call to call, or that takes another way for a single token, which a trace cannot see.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fpcompile.errors import UnsupportedModelError
from fpcompile.models.shadow import shadow

if TYPE_CHECKING:
    from fpcompile.executor.program import Program

_LENGTHS = (7, 12)
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def self_check(program: Program, model: nn.Module) -> None:
    """Raise :class:`UnsupportedModelError` when the program's numbers are not the model's."""
    if program.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    ids = [
        torch.randint(program.vocabulary, (1, n), generator=generator).to(program.device) for n in _LENGTHS
    ]
    unmodified = shadow(model)  # its forward may write into buffers (dynamic rotary frequencies)
    with torch.no_grad():
        first = unmodified(input_ids=ids[0], use_cache=True)
        own = [unmodified(input_ids=i, use_cache=False).logits for i in ids]
        token = unmodified(input_ids=ids[0][:, :1], use_cache=False).logits
    cache = getattr(first, "past_key_values", None)
    if cache is not None and type(cache) is not DynamicCache:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot take the packed route",
            reason=f"its cache is a {type(cache).__name__}, that of a packed program a DynamicCache",
        )
    free: dict[str, Any] = {"use_cache": False, "max_blocking_ms": math.inf}
    _compare(model, "run by the model a second time", first.logits, own[0])
    alone = [program(i, **free).logits for i in ids]
    _compare(model, "of one token", token, program(ids[0][:, :1], logits_to_keep=1, **free).logits)
    width = max(_LENGTHS)
    batch = torch.zeros(len(ids), width, dtype=torch.long, device=program.device)
    mask = torch.zeros_like(batch)
    for row, i in enumerate(ids):
        batch[row, : i.shape[1]] = i[0]
        mask[row, : i.shape[1]] = 1
    packed = program(batch, attention_mask=mask, **free).logits
    for row, (expected, single) in enumerate(zip(own, alone, strict=True)):
        _compare(model, "run alone", expected, single)
        _compare(model, "packed with another", expected, packed[row : row + 1, : expected.shape[1]])


def _compare(model: Any, how: str, expected: Tensor, got: Tensor) -> None:
    limit = _ROUNDING.get(expected.dtype, 0.1)
    if expected.itemsize < 4:
        expected, got = expected.float(), got.float()
    scale = expected.abs().max().clamp_min(1e-6)
    error = float((expected - got).abs().max() / scale)
    if not error <= limit:
        raise UnsupportedModelError(
            f"the program of {type(model).__name__} does not give the model's numbers",
            reason=f"a sequence {how} differs by {error:.2g} of the largest logit (rounding: < {limit:g})",
            remedy="please report this model with its configuration",
        )

"""Whether two outputs of a model have the same bits, and by how much they differ when not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["Bits", "compare_outputs"]


@dataclasses.dataclass(frozen=True, slots=True)
class Bits:
    """``equal``: all tensors have the same shapes, dtypes and bits. ``compared`` names them.

    ``difference`` is the largest one of the logits, 0 when equal.
    """

    equal: bool
    difference: float
    compared: tuple[str, ...]


def compare_outputs(got: Any, expected: Any) -> Bits:
    """Compare the logits, and the keys and values of every layer when both outputs have a cache."""
    ours, theirs = dict(_tensors(got)), dict(_tensors(expected))
    both = [name for name in theirs if name in ours]
    cached = any(name != "logits" for name in ours) and any(name != "logits" for name in theirs)
    complete = set(ours) == set(theirs) or not cached
    return Bits(
        equal=complete and "logits" in both and all(_same(ours[name], theirs[name]) for name in both),
        difference=_difference(ours["logits"], theirs["logits"]) if "logits" in both else float("nan"),
        compared=tuple(both),
    )


def _tensors(output: Any) -> Iterator[tuple[str, Tensor]]:
    yield "logits", output.logits
    cache = getattr(output, "past_key_values", None)
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if getattr(layer, "is_initialized", False):
            yield f"keys {index}", layer.keys
            yield f"values {index}", layer.values


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit equality: NaN equals the same NaN, 0.0 does not equal -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("nan")
    return float((a.double() - b.double()).abs().max())

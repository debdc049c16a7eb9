"""Keys and values of a bare run: contiguous tensors per layer, and their exchange with transformers caches.

A run never writes into a tensor that it was given and never in place: appending makes a new tensor, so a
checkpoint may hold the old one. Layers are numbered as in the model's own cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from fpcompile.errors import InvalidInputError


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LayerKV:
    """Keys ``[B, Hkv, n, D]`` and values ``[B, Hkv, n, Dv]`` of one group, from position ``start``."""

    keys: Tensor
    values: Tensor
    start: int = 0

    def append(self, keys: Tensor, values: Tensor) -> LayerKV:
        """With new tokens behind the old ones."""
        return LayerKV(
            torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2), self.start
        )


def read_cache(past: Any, batch: int) -> tuple[int, dict[int, LayerKV]]:
    """Length and layers of a transformers cache that a run continues. The cache itself is not changed."""
    if past is None:
        return 0, {}
    if not isinstance(past, DynamicCache):
        raise InvalidInputError(
            "past_key_values is of an unsupported class",
            expected="a transformers DynamicCache",
            got=type(past).__name__,
            remedy="continue from the cache that the program or model.generate returned",
        )
    length = int(past.get_seq_length())
    layers: dict[int, LayerKV] = {}
    for index, entry in enumerate(past.layers):
        layer: Any = entry
        if not getattr(layer, "is_initialized", False):
            continue
        if layer.keys.shape[0] != batch:
            raise InvalidInputError(
                "past_key_values has another batch size", expected=str(batch), got=str(layer.keys.shape[0])
            )
        seen = int(getattr(layer, "cumulative_length", layer.keys.shape[2]))
        layers[index] = LayerKV(layer.keys, layer.values, seen - int(layer.keys.shape[2]))
    return length, layers


def write_cache(config: Any, layers: dict[int, LayerKV]) -> Cache:
    """A transformers cache of the model's own class that :meth:`generate` can go on with."""
    cache = DynamicCache(config=config)
    for index, kv in sorted(layers.items()):
        cache.update(kv.keys, kv.values, index)
        layer = cache.layers[index]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = kv.start + kv.keys.shape[2]
    return cache


def pad_layers(groups: list[dict[int, LayerKV]], mask: Tensor) -> dict[int, LayerKV]:
    """Join single sequences into the padded form ``[B, H, columns, D]`` that ``mask`` describes."""
    joined: dict[int, LayerKV] = {}
    for index in groups[0]:
        tensors: list[list[Tensor]] = [[], []]
        for row, group in enumerate(groups):
            for which, source in enumerate((group[index].keys, group[index].values)):
                padded = source.new_zeros(*source.shape[:2], mask.shape[1], source.shape[3])
                padded[:, :, mask[row]] = source
                tensors[which].append(padded)
        joined[index] = LayerKV(torch.cat(tensors[0]), torch.cat(tensors[1]))
    return joined

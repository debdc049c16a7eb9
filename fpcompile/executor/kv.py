"""Keys and values of a bare run: contiguous tensors per layer, and their exchange with transformers caches.

A run never writes into a tensor that it was given and never in place: appending makes a new tensor, so a
checkpoint may hold the old one. Layers are numbered as in the model's own cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from fpcompile.errors import InvalidInputError
from fpcompile.models.attention import AttentionCall


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


def owned(tensor: Tensor) -> Tensor:
    """``tensor`` contiguous and alone in its memory: a view would keep a whole fused projection alive."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def read_cache(
    past: Any, batch: int, calls: Iterable[AttentionCall], dtype: torch.dtype
) -> tuple[int, dict[int, LayerKV]]:
    """Length and layers of a transformers cache that a run continues. The cache itself is not changed.

    ``calls`` are the attention calls that will read it. A layer without its past would attend to the new
    tokens alone, so every layer is checked. Raises :class:`InvalidInputError`.
    """
    if past is None:
        return 0, {}
    if not isinstance(past, DynamicCache):
        raise InvalidInputError(
            "past_key_values is of an unsupported class",
            expected="a transformers DynamicCache",
            got=type(past).__name__,
            remedy="continue from the cache that the program or model.generate returned",
        )
    entries: list[Any] = list(past.layers)
    filled: dict[int, Any] = {
        i: layer
        for i, layer in enumerate(entries)
        if getattr(layer, "is_initialized", False) and layer.keys is not None  # None: it reads another's
    }
    if not filled:
        return 0, {}
    length = int(past.get_seq_length())
    written = {call.layer: call for call in calls if call.writes}
    if set(filled) != set(written):
        raise _foreign(f"layers {sorted(written)}", f"layers {sorted(filled)}")
    return length, {i: _read_layer(i, filled[i], call, batch, length, dtype) for i, call in written.items()}


def _read_layer(
    index: int, layer: Any, call: AttentionCall, batch: int, length: int, dtype: torch.dtype
) -> LayerKV:
    keys, values = layer.keys, layer.values
    if keys.shape[0] != batch:
        raise InvalidInputError(
            "past_key_values has another batch size", expected=str(batch), got=str(int(keys.shape[0]))
        )
    held = int(keys.shape[2])
    for name, tensor, width in (("keys", keys, call.dims[0]), ("values", values, call.dims[1])):
        shape = [batch, call.kv_heads, held, width]
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            raise _foreign(
                f"{name} {shape} of {dtype} in layer {index}", f"{list(tensor.shape)} of {tensor.dtype}"
            )
    seen = int(getattr(layer, "cumulative_length", held))
    needed = min(length, call.mask.span - 1) if call.mask.span else length
    if seen != length or held < needed:
        raise _foreign(
            f"{length} tokens in layer {index}, as in layer 0", f"{seen} seen and {held} of them kept"
        )
    return LayerKV(keys, values, seen - held)


def _foreign(expected: str, got: str) -> InvalidInputError:
    return InvalidInputError(
        "past_key_values does not belong to this model",
        expected=expected,
        got=got,
        remedy="continue from the cache that this program or its model returned",
    )


def write_cache(config: Any, layers: dict[int, LayerKV]) -> Cache:
    """A transformers cache of the model's own class that :meth:`generate` can go on with.

    Its plain layers hold the run's tensors themselves: ``update`` would copy them once more.
    """
    cache = DynamicCache(config=config)
    for index, kv in sorted(layers.items()):
        plain: Any = cache.layers[index] if index < len(cache.layers) else None
        if type(plain) is DynamicLayer:
            plain.lazy_initialization(kv.keys, kv.values)
            plain.keys, plain.values = kv.keys, kv.values
            continue
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

"""Keys and values of a bare run: contiguous tensors per layer, and their exchange with transformers caches.

A prefill never writes into a tensor that it was given and never in place: appending to :class:`LayerKV` makes
a new tensor, so a checkpoint may hold the old one. Decoding appends one token at a time, to memory of its own
with room behind the last one: :class:`GrowingKV`. Layers are numbered as in the model's own cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, final

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from fpcompile.errors import InvalidInputError
from fpcompile.models.attention import AttentionCall


class KV(Protocol):
    """One layer's keys ``[B, Hkv, n, D]`` and values ``[B, Hkv, n, Dv]``, as far as attention reads them.

    ``start`` is the position of the first of them. ``append`` puts new tokens behind the last one and returns
    what holds all of them. ``storages`` are address and bytes of the memory that it owns, ``pooled_bytes``
    what it holds of a memory that is not its own; ``kept`` is the same in memory of its own, for results and
    checkpoints.
    """

    @property
    def keys(self) -> Tensor: ...

    @property
    def values(self) -> Tensor: ...

    @property
    def start(self) -> int: ...

    @property
    def storages(self) -> Mapping[int, int]: ...

    @property
    def pooled_bytes(self) -> int: ...

    def append(self, keys: Tensor, values: Tensor) -> KV: ...

    def kept(self) -> LayerKV: ...


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LayerKV:
    """Keys ``[B, Hkv, n, D]`` and values ``[B, Hkv, n, Dv]`` of one group, from position ``start``."""

    keys: Tensor
    values: Tensor
    start: int = 0
    _storages: dict[int, int] | None = dataclasses.field(default=None, init=False, repr=False)

    def append(self, keys: Tensor, values: Tensor) -> LayerKV:
        """Another one, in new memory."""
        return LayerKV(
            torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2), self.start
        )

    @property
    def pooled_bytes(self) -> int:
        """None."""
        return 0

    @property
    def storages(self) -> Mapping[int, int]:
        """Asked for at every pause, and always the same."""
        if self._storages is None:
            object.__setattr__(self, "_storages", storages_of((self.keys, self.values)))
        assert self._storages is not None
        return self._storages

    def kept(self) -> LayerKV:
        """It is in memory of its own."""
        return self


NO_STORAGES: Final[Mapping[int, int]] = {}
"""Of what lies in memory that is not its own."""


def storages_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and bytes of each storage behind ``tensors``."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def kv_storages(groups: Iterable[Mapping[int, KV]]) -> dict[int, int]:
    """Address and bytes of each storage that these caches own."""
    found: dict[int, int] = {}
    for group in groups:
        for kv in list(group.values()):  # statistics are read by any thread
            found.update(kv.storages)
    return found


def kv_bytes(groups: Sequence[Mapping[int, KV]]) -> int:
    """Bytes of the memory behind these caches, each storage once."""
    pooled = sum(kv.pooled_bytes for group in groups for kv in list(group.values()))
    return sum(kv_storages(groups).values()) + pooled


_ROOM: Final = 64  # tokens: growing by less would copy a short cache too often


@final
class GrowingKV:
    """Keys and values that are written behind one another, in memory that grows by a quarter when it is full.

    The tensors that it begins with are only read: the first ``append`` copies them. ``span`` (tokens, 0 for
    none) is the sliding window or chunk of the layer: what lies further back than a new token can see is not
    visible, and dropped when memory is next moved, so that at most ``2 * span + 64`` tokens are held.
    ``keys``, ``values`` and ``start`` are views and a position that the next ``append`` makes obsolete.
    """

    __slots__ = ("_first", "_keys", "_origin", "_span", "_stop", "_values")

    def __init__(self, kv: KV, span: int = 0) -> None:
        kept = kv.kept()  # the memory of a pool is somebody else's tomorrow
        self._keys, self._values, self._origin = kept.keys, kept.values, kept.start
        self._span = span
        self._first, self._stop = 0, int(kept.keys.shape[2])

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``."""
        return self._keys[:, :, self._first : self._stop]

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, n, Dv]``."""
        return self._values[:, :, self._first : self._stop]

    @property
    def start(self) -> int:
        """Position of the first visible token."""
        return self._origin + self._first

    @property
    def nbytes(self) -> int:
        """Bytes held, room for more included."""
        return self._keys.untyped_storage().nbytes() + self._values.untyped_storage().nbytes()

    @property
    def storages(self) -> Mapping[int, int]:
        """Both, with their room."""
        return storages_of((self._keys, self._values))

    @property
    def pooled_bytes(self) -> int:
        """None."""
        return 0

    def kept(self) -> LayerKV:
        """A copy of what is visible: the next ``append`` may write over it."""
        return LayerKV(self.keys.clone(), self.values.clone(), self.start)

    def append(self, keys: Tensor, values: Tensor) -> GrowingKV:
        """Write new tokens in place; behind a span, what the first of them cannot see goes out of view."""
        new = int(keys.shape[2])
        if self._span:
            self._first = max(self._first, self._stop - self._span + 1)
        if self._stop + new > int(self._keys.shape[2]):
            self._move(new)
        stop = self._stop + new
        self._keys[:, :, self._stop : stop] = keys
        self._values[:, :, self._stop : stop] = values
        self._stop = stop
        return self

    def crop(self, end: int) -> None:
        """Forget what was appended at position ``end`` and behind it, by the newest ``append`` at most."""
        self._stop = min(self._stop, end - self._origin)

    def _move(self, new: int) -> None:
        """To memory of its own with room for ``new`` tokens and more; what is out of view stays behind."""
        seen = self._stop - self._first
        room = seen + new + max(_ROOM, min(seen // 4, self._span or seen))
        tensors = []
        for old in (self._keys, self._values):
            grown = old.new_empty(*old.shape[:2], room, old.shape[3])
            grown[:, :, :seen] = old[:, :, self._first : self._stop]
            tensors.append(grown)
        self._keys, self._values = tensors
        self._origin, self._first, self._stop = self._origin + self._first, 0, seen


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


def write_cache(config: Any, layers: Mapping[int, KV]) -> Cache:
    """A transformers cache of the model's own class that :meth:`generate` can go on with.

    Its plain layers hold the run's tensors themselves: ``update`` would copy them once more.
    """
    cache = DynamicCache(config=config)
    for index in sorted(layers):
        kv = layers[index].kept()
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


def pad_layers(groups: Sequence[Mapping[int, KV]], mask: Tensor) -> dict[int, LayerKV]:
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

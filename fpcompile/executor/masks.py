"""Which keys a block of queries is given, and its mask: built once for all blocks of all layers.

Torch's kernel on a CPU walks keys in blocks of 512. A block of queries has the bits of the whole, whatever
its size, dtype or heads, when it is given whole blocks of keys, those behind it masked (seen; calibration
compares them on each machine). With the last block cut short its sums are grouped otherwise, and round.

What a query sees under a causal or a sliding mask depends on how far back a key lies, and on nothing else. So
the mask of any block is a part of that of a larger one, a *band*, in the form that the kernel adds. The
model's own mask would be built, and converted by the kernel, for each block of each layer: about as much work
as the attention of a block of few heads. Bands of up to :data:`SHARED_BYTES` belong to the program and serve
all its runs, also after a pause; larger ones, and other masks, are kept with the run until it is suspended.
There is one for each height, a power of two: far behind, blocks have few rows and many keys. One that a
higher band serves as well is dropped. What a program keeps (up to 130 MB after prompts of 32k keys) is no
part of an engine's memory budget.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from torch import Tensor

from fpcompile.executor.inputs import Group
from fpcompile.executor.kv import KV
from fpcompile.executor.schedule import KEY_BLOCK, Launch, keys_given
from fpcompile.models.attention import AttentionCall, MaskKind

if TYPE_CHECKING:
    from fpcompile.executor.run import Run

SHARED_BYTES = 72 << 20
"""Of the largest band that a program keeps: 1024 queries of 32k keys in bf16. One for each kind of mask
and size of blocks.
"""
_BAND = "band"
_HEIGHTS = 8  # of bands, each twice the one before: where one that serves is looked for


def keys_of(call: AttentionCall, group: Group, kv: KV, tile: Launch, device: str) -> slice:
    """The keys, counted from the first one held, that the block ``tile`` of a group is given: none before a
    window, in whole blocks, and none behind the block of queries but the rest of a block of keys.
    """
    held, cached = int(kv.keys.shape[2]), group.past - kv.start
    if call.mask.kind is MaskKind.BIDIRECTIONAL:
        return slice(0, held)
    low = 0
    if call.mask.kind is MaskKind.SLIDING:
        low = max(0, cached + tile.start - call.mask.span + 1) // KEY_BLOCK * KEY_BLOCK
    stop = cached + tile.stop
    if banded(call, device):
        stop = min(held, keys_given(stop))
    return slice(low, stop)


def banded(call: AttentionCall, device: str) -> bool:
    """Whether attention adds a band: torch's own on a CPU, under a mask that follows distances. A function
    that is registered in its place is given the model's own mask.
    """
    kinds = (MaskKind.CAUSAL, MaskKind.SLIDING)
    return device == "cpu" and call.torch_kernel and call.mask.kind in kinds


def block_mask(
    run: Run, call: AttentionCall, group: Group, kv: KV, tile: Launch, seen: slice, like: Tensor
) -> Tensor | None:
    """The mask of the block ``tile`` of a group over the keys ``seen``; None where causal is enough."""
    rows, width = tile.stop - tile.start, seen.stop - seen.start
    if banded(call, like.device.type):
        ahead = seen.stop - (group.past - kv.start + tile.stop)
        return _band(run, call, rows, width - ahead, ahead, int(kv.keys.shape[2]), like)
    key: Hashable = (call.mask, call.implementation, kv.start, group, tile.start, tile.stop)
    if key not in run.masks:
        for old in [k for k in run.masks if not isinstance(k, tuple) or k[0] != _BAND]:
            del run.masks[old]  # the newest one serves the block's other heads
        run.masks[key] = call.mask.build(
            call.implementation,
            queries=rows,
            q_offset=group.past + tile.start,
            keys=width,
            k_offset=kv.start + seen.start,
            like=like,
            config=run.program.config,
        )
    return run.masks[key]


def _band(
    run: Run, call: AttentionCall, rows: int, width: int, ahead: int, longest: int, like: Tensor
) -> Tensor | None:
    """``[1, 1, rows, width + ahead]`` for the last ``rows`` of ``width`` positions out of ``longest`` at
    most, and ``ahead`` keys behind them.
    """
    span = call.mask.span
    if not ahead and rows in (1, width) and (not span or width < span):
        return None
    kind: tuple[Hashable, ...] = (_BAND, call.mask, like.dtype)
    least = 1 << (rows - 1).bit_length()
    for height in (least << i for i in range(_HEIGHTS)):
        for kept in (run.masks, run.program.bands):
            band = kept.get((*kind, height))
            if band is not None and int(band.shape[2]) >= rows and int(band.shape[3]) >= width + KEY_BLOCK:
                return _part(band, rows, width, ahead)
    return _part(_build(run, call, (*kind, least), rows, width, longest, like), rows, width, ahead)


def _build(
    run: Run,
    call: AttentionCall,
    key: tuple[Hashable, ...],
    rows: int,
    width: int,
    longest: int,
    like: Tensor,
) -> Tensor:
    """A band for as many rows as the next power of two; one that the program would not keep is for ``rows``
    and for what the one before it served.
    """
    height = least = 1 << (rows - 1).bit_length()
    length = max(width, least, min(1 << (width - 1).bit_length(), longest))
    kept = run.program.bands
    if least * (length + KEY_BLOCK) * like.element_size() > SHARED_BYTES:
        kept, least = run.masks, rows
        old = kept.get(key)
        if old is not None:
            least, length = max(rows, int(old.shape[2])), max(length, int(old.shape[3]) - KEY_BLOCK)
    kept[key] = band = call.mask.band(least, length, KEY_BLOCK, like)
    for lower in ((*key[:-1], height >> i) for i in range(1, _HEIGHTS)):
        other = kept.get(lower)
        if other is not None and int(other.shape[3]) <= int(band.shape[3]):
            kept.pop(lower, None)  # what it served is a part of this one
    return band


def _part(band: Tensor, rows: int, width: int, ahead: int) -> Tensor:
    """The mask of fewer rows and positions than a band has."""
    height, length = int(band.shape[2]), int(band.shape[3]) - KEY_BLOCK
    return band[:, :, height - rows :, length - width : length + ahead]

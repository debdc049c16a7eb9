"""Attention of a packed run: each sequence over its own context, with explicit keys, values and boundaries.

Shapes: the packed row gives q ``[1, Hq, tokens, D]``, k and v ``[1, Hkv, tokens, D]``; sequences of equal
length are attended as one batch, as the unmodified model would.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fpcompile.executor.inputs import Group, Layout
from fpcompile.executor.kv import KV, LayerKV, owned
from fpcompile.executor.masks import banded, block_mask, keys_of
from fpcompile.executor.racks import Abreast
from fpcompile.executor.run import Run
from fpcompile.executor.schedule import Launch
from fpcompile.models.attention import AttentionCall, MaskKind


def attend(run: Run, layout: Layout, call: AttentionCall, q: Tensor) -> Tensor:
    """Attend to the run's cache, new keys included; returns ``[1, tokens, Hq, Dv]``."""
    outputs: list[Tensor] = []
    for group, layers, queries in zip(layout.groups, run.kv, _parts(q, layout), strict=True):
        kv = layers[call.layer]
        out = call.attend(queries, kv.keys, kv.values, mask_of(run, call, group, kv, queries))
        outputs.append(out.reshape(1, group.batch * group.length, *out.shape[2:]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def write(run: Run, layout: Layout, call: AttentionCall, k: Tensor, v: Tensor) -> None:
    """Put the new keys and values of one layer behind the cached ones."""
    if not call.writes:
        return
    for layers, keys, values in zip(run.kv, _parts(k, layout), _parts(v, layout), strict=True):
        past = layers.get(call.layer)
        layers[call.layer] = past.append(keys, values) if past else LayerKV(owned(keys), owned(values))


def mask_of(run: Run, call: AttentionCall, group: Group, kv: KV, like: Tensor) -> Tensor | None:
    """The mask of one group, built once and kept until the run is suspended."""
    if isinstance(kv, Abreast) and kv.rows.ragged:
        return _ragged_mask(run, call, kv, like)
    if group.length == 1 and call.mask.hides_nothing(call.implementation):
        return _nothing_hidden(run, call, kv, like)
    key: Hashable = (call.mask, call.implementation, kv.start, group)
    if key not in run.masks:
        run.masks[key] = call.mask.build(
            call.implementation,
            queries=group.length,
            q_offset=group.past,
            keys=int(kv.keys.shape[2]),
            k_offset=kv.start,
            like=like,
            config=run.program.config,
        )
    return run.masks[key]


def _nothing_hidden(run: Run, call: AttentionCall, kv: KV, like: Tensor) -> Tensor | None:
    """None, as the model has it, for a sequence alone. Beside others a mask that hides nothing: with one,
    transformers folds grouped heads into rows, which the kernel for CPUs does in a fraction of the time.
    """
    if len(run.kv) == 1 or call.heads == call.kv_heads or like.device.type != "cpu":
        return None
    length = int(kv.keys.shape[2])
    key: Hashable = ("nothing hidden", length)
    known = run.masks.get(key)
    if known is None:
        known = run.masks[key] = like.new_zeros(1, 1, 1, length)
    return known


def _ragged_mask(run: Run, call: AttentionCall, kv: Abreast, like: Tensor) -> Tensor:
    """For all layers alike."""
    key: Hashable = (call.mask, call.implementation, kv.rows)
    known = run.masks.get(key)
    if known is None:
        known = run.masks[key] = kv.mask(call, like.dtype)
    return known


def _parts(packed: Tensor, layout: Layout) -> Sequence[Tensor]:
    """Every group's part, as :func:`unpack` gives it; in one go where groups are single sequences."""
    if len(layout.groups) > 1 and all(group.batch == 1 for group in layout.groups):
        return torch.split(packed, [group.length for group in layout.groups], dim=2)
    return [unpack(packed, group) for group in layout.groups]


def unpack(packed: Tensor, group: Group) -> Tensor:
    """A group's part of ``[1, H, tokens, D]`` as ``[batch, H, length, D]``, without a copy."""
    whole = packed.shape[2] == group.stop - group.start
    part = packed if whole else packed[:, :, group.start : group.stop]
    if group.batch == 1:
        return part
    heads, _, dim = part[0].shape
    return part[0].view(heads, group.batch, group.length, dim).transpose(0, 1)


def attend_tile(run: Run, layout: Layout, call: AttentionCall, q: Tensor, tile: Launch, out: Tensor) -> None:
    """Attend one block of query rows and heads, and write it into ``out [1, tokens, Hq, Dv]``.

    Keys behind the block are left out; keys before a sliding window too, in whole blocks, so that the
    kernel walks the same blocks as for the whole. Sequences side by side have one new token each, and differ
    in what they see: there all of the group's keys are attended under its mask.
    """
    for q_heads, heads in _by_group(tile.head_start, tile.head_stop, call.heads // call.kv_heads):
        _attend_heads(run, layout, call, q, tile, out, q_heads, heads)


def heads_in_front(call: AttentionCall, device: str, threads: int) -> int:
    """How many query heads a block that begins a sequence is attended with at a time, without a mask; 0 where
    it has one (:attr:`fpcompile.executor.schedule.Heads.first`).

    Torch's kernel on a CPU gives each of its threads as many blocks of queries, those of one head behind the
    other's, and without a mask the last ones of a head have most keys. So each thread is given one head,
    where they can be shared out in such parts and each part is one call; else all heads go together, as they
    do in the whole.
    """
    if call.head_unit != 1 or call.mask.kind is not MaskKind.CAUSAL or not banded(call, device):
        return 0
    return threads if _one_call_each(call.heads, call.heads // call.kv_heads, threads) else call.heads


@functools.cache
def _one_call_each(heads: int, fold: int, threads: int) -> bool:
    """Whether heads can be shared out in parts of ``threads``, each attended in one call."""
    parts = range(0, heads, threads)
    return heads % threads == 0 and all(len(_by_group(at, at + threads, fold)) == 1 for at in parts)


def _by_group(start: int, stop: int, fold: int) -> list[tuple[slice, slice]]:
    """Query heads ``start`` to ``stop`` and their key/value heads: at once where each of these has as many of
    them, else one after the other; all of them where ``stop`` is 0.
    """
    if not stop:
        return [(slice(None), slice(None))]
    groups = range(start // fold, math.ceil(stop / fold))
    parts = [slice(max(start, g * fold), min(stop, (g + 1) * fold)) for g in groups]
    if len({part.stop - part.start for part in parts}) == 1:
        return [(slice(start, stop), slice(groups.start, groups.stop))]
    return [(part, slice(g, g + 1)) for part, g in zip(parts, groups, strict=True)]


def _attend_heads(
    run: Run,
    layout: Layout,
    call: AttentionCall,
    q: Tensor,
    tile: Launch,
    out: Tensor,
    q_heads: slice,
    heads: slice,
) -> None:
    group, kv = layout.groups[tile.group], run.kv[tile.group][call.layer]
    if isinstance(kv, Abreast) and kv.rows.ragged:
        mask = _ragged_mask(run, call, kv, q)
        block = call.attend_block(unpack(q, group)[:, q_heads], kv.keys[:, heads], kv.values[:, heads], mask)
        out[0, group.start : group.stop].view(group.batch, 1, *out.shape[2:])[:, :, q_heads] = block
        return
    visible = keys_of(call, group, kv, tile, q.device.type)
    queries = unpack(q, group)[:, q_heads, tile.start : tile.stop]
    keys, values = kv.keys[:, heads, visible], kv.values[:, heads, visible]
    block = call.attend_block(queries, keys, values, block_mask(run, call, group, kv, tile, visible, queries))
    rows = out[0, group.start : group.stop].view(group.batch, group.length, *out.shape[2:])
    rows[:, tile.start : tile.stop, q_heads] = block

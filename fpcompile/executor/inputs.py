"""Check and normalise what the caller passes to a packed program: ids, padding mask, cache, rows to keep.

Everything is checked before anything runs. The result, :class:`Inputs`, is one packed row of tokens and the
:class:`Layout` that says which part of it belongs to which sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fpcompile.errors import InvalidInputError

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # they have no kernel for the smallest and largest


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """``batch`` sequences of ``length`` new tokens, at ``start`` in the packed row, after ``past`` tokens."""

    start: int
    batch: int
    length: int
    past: int

    @property
    def stop(self) -> int:
        """End of the group in the packed row."""
        return self.start + self.batch * self.length

    @property
    def context(self) -> int:
        """Tokens that the last new token may look back to, itself included."""
        return self.past + self.length


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How sequences lie in the packed row; ``columns`` is the width of the caller's ``input_ids``."""

    groups: tuple[Group, ...]
    columns: int

    @property
    def tokens(self) -> int:
        """Length of the packed row."""
        return self.groups[-1].stop

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return sum(g.batch for g in self.groups)

    @property
    def lengths(self) -> tuple[int, ...]:
        """New tokens of each sequence."""
        return tuple(g.length for g in self.groups for _ in range(g.batch))

    @property
    def context(self) -> int:
        """Longest context of any sequence."""
        return max(g.context for g in self.groups)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The graph's inputs and the layout.

    ``token_ids`` and ``position_ids`` ``[1, N]``, ``keep`` ``[rows]`` (indices into the packed row);
    ``scatter`` ``[rows]`` maps each kept row to its place in ``[batch * kept columns]``, None when it is the
    identity; ``kept`` is the number of columns of the logits.
    """

    token_ids: Tensor
    position_ids: Tensor
    keep: Tensor
    scatter: Tensor | None
    kept: int
    layout: Layout
    padding: Tensor | None


def check_ids(input_ids: Any, vocabulary: int, device: torch.device) -> Tensor:
    """``input_ids`` as an int64 tensor ``[batch, length]`` on ``device``; a vector is one sequence."""
    if isinstance(input_ids, (list, tuple)):
        try:
            input_ids = torch.tensor(input_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                "input_ids cannot be made a tensor",
                expected="token ids of equal-length sequences",
                got=str(error),
                remedy="pad the sequences and pass attention_mask",
            ) from error
    if not isinstance(input_ids, Tensor):
        raise InvalidInputError(
            "input_ids has a wrong type", expected="a torch.Tensor or a list", got=type(input_ids).__name__
        )
    if input_ids.numel() == 0:
        raise InvalidInputError(
            "input_ids is empty", expected="at least one token", got=f"shape {list(input_ids.shape)}"
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InvalidInputError(
            "input_ids has a wrong dtype", expected="torch.int64 or torch.int32", got=str(input_ids.dtype)
        )
    if input_ids.dim() == 1:
        input_ids = input_ids[None]
    if input_ids.dim() != 2:
        raise InvalidInputError(
            "input_ids has a wrong rank",
            expected="[length] or [batch, length]",
            got=f"shape {list(input_ids.shape)}",
        )
    check_range("input_ids", input_ids, vocabulary)
    ids: Tensor = input_ids.to(device=device, dtype=torch.int64)
    return ids


def check_range(name: str, ids: Tensor, rows: int) -> None:
    """Raise :class:`InvalidInputError` unless the argument ``name`` holds rows of a table of ``rows``."""
    if ids.numel() == 0 or ids.is_meta:
        return
    if ids.dtype in _UNSIGNED:
        ids = ids.to(torch.int64)
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= rows:
        raise InvalidInputError(
            f"{name} holds an id outside the vocabulary"
            if name.endswith("input_ids")
            else f"{name} holds a number that the model's table has no row for",
            expected=f"ids from 0 to {rows - 1}",
            got=f"ids from {low} to {high}",
            remedy="use the tokenizer that belongs to the model"
            if name.endswith("input_ids")
            else "pass what the model's processor makes",
        )


def check_mask(attention_mask: Any, ids: Tensor, past: int) -> Tensor | None:
    """The padding mask as bool ``[batch, length]``, or None when it hides nothing.

    Behind ``past`` cached tokens it covers them too, as in transformers, and must not hide any.
    """
    if attention_mask is None:
        return None
    shape = [ids.shape[0], past + ids.shape[1]]
    if not isinstance(attention_mask, Tensor) or list(attention_mask.shape) != shape:
        got = (
            list(attention_mask.shape)
            if isinstance(attention_mask, Tensor)
            else type(attention_mask).__name__
        )
        raise InvalidInputError(
            "attention_mask does not fit input_ids", expected=f"a tensor of shape {shape}", got=str(got)
        )
    mask = attention_mask.to(device=ids.device) != 0
    if bool(mask.all()):
        return None
    if past:
        raise InvalidInputError(
            "a padded batch cannot continue a cache",
            expected="an attention_mask that hides nothing, or no past_key_values",
            got=f"{past} cached tokens and hidden ones",
            remedy="continue each sequence by itself",
        )
    if not bool(mask.any(dim=1).all()):
        raise InvalidInputError(
            "attention_mask hides a whole sequence",
            expected="at least one visible token in each row",
            got="none",
        )
    if bool(((mask[:, 1:] != mask[:, :-1]).sum(dim=1) > 1).any()):
        raise InvalidInputError(
            "attention_mask has holes",
            expected="padding on the left or on the right of each row",
            got="hidden tokens between visible ones",
        )
    return mask


def check_positions(position_ids: Any, ids: Tensor, mask: Tensor | None, limit: int | None) -> Tensor | None:
    """The caller's positions as int64 ``[batch, length]``, or None; those of visible tokens rise by one.

    transformers takes a row in which they do not for several sequences side by side.
    """
    if position_ids is None:
        return None
    batch, columns = ids.shape
    expected = f"integers of shape [{batch}, {columns}] or [1, {columns}]"
    if not isinstance(position_ids, Tensor) or position_ids.dtype not in (torch.int64, torch.int32):
        got = str(position_ids.dtype) if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise InvalidInputError("position_ids has a wrong type", expected=expected, got=got)
    if list(position_ids.shape) not in ([batch, columns], [1, columns]):
        raise InvalidInputError(
            "position_ids does not fit input_ids", expected=expected, got=f"shape {list(position_ids.shape)}"
        )
    positions: Tensor = position_ids.to(device=ids.device, dtype=torch.int64).expand(batch, columns)
    visible = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    steps = (positions[:, 1:] - positions[:, :-1])[visible[:, 1:] & visible[:, :-1]]
    if bool((steps != 1).any()):
        raise InvalidInputError(
            "position_ids does not count",
            expected="positions that rise by one from each visible token of a row to the next",
            got="another step",
            remedy="run sequences that lie side by side in one row as rows of a padded batch",
        )
    low, high = (int(x) for x in positions[visible].aminmax())
    if low < 0 or (limit is not None and high >= limit):
        raise InvalidInputError(
            "position_ids holds a position that the model does not have",
            expected=f"0 to {'any number' if limit is None else limit - 1}",
            got=f"{low} to {high}",
        )
    return positions


def check_rows(logits_to_keep: Any, columns: int) -> list[int]:
    """Columns of ``input_ids`` whose logits are kept: 0 for all, n for the last n, or a tensor."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1 or logits_to_keep.dtype not in (torch.int64, torch.int32):
            raise InvalidInputError(
                "logits_to_keep has a wrong form",
                expected="an int, or a vector of int64 indices",
                got=f"{logits_to_keep.dtype} of shape {list(logits_to_keep.shape)}",
            )
        rows = [int(r) + (columns if r < 0 else 0) for r in logits_to_keep.tolist()]
        if not rows or min(rows) < 0 or max(rows) >= columns:
            raise InvalidInputError(
                "logits_to_keep names a position that is not there",
                expected=f"0 to {columns - 1}",
                got=str(rows[:8]),
            )
        return rows
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise InvalidInputError(
            "logits_to_keep has a wrong value",
            expected="an int >= 0 or a tensor of indices",
            got=repr(logits_to_keep),
        )
    return list(range(columns))[-logits_to_keep:]


def check_length(longest: int, limit: int | None) -> None:
    """Refuse contexts that are longer than the model has positions for."""
    if limit is not None and longest > limit:
        raise InvalidInputError(
            "the sequence is longer than the model's positions",
            expected=f"at most {limit} tokens (max_position_embeddings), cached ones included",
            got=f"{longest} tokens",
            remedy="shorten the prompt, or load the model with a configuration that scales its positions",
        )


def pack(
    ids: Tensor, mask: Tensor | None, *, past: int, rows: list[int], positions: Tensor | None = None
) -> Inputs:
    """Lay the visible tokens of ``ids [batch, length]`` out in one row, without padding.

    Without ``positions`` they are counted from each row's first visible token, behind ``past`` ones.
    """
    batch, columns = ids.shape
    device = ids.device
    picked = torch.tensor(rows, device=device)
    if mask is None:
        layout = Layout((Group(0, batch, columns, past),), columns)
        if positions is None:
            positions = torch.arange(past, past + columns, device=device).expand(batch, columns)
        keep = (torch.arange(batch, device=device)[:, None] * columns + picked).reshape(-1)
        row = positions.reshape(1, -1).clone()
        return Inputs(ids.reshape(1, -1).clone(), row, keep, None, len(rows), layout, None)
    lengths = mask.sum(dim=1).tolist()
    groups: list[Group] = []
    for length in lengths:
        groups.append(Group(groups[-1].stop if groups else 0, 1, int(length), past))
    if positions is None:
        positions = mask.cumsum(dim=1) - 1 + past
    row_of = torch.full((batch, columns), -1, device=device, dtype=torch.int64)
    row_of[mask] = torch.arange(int(sum(lengths)), device=device)
    wanted = row_of[:, picked].reshape(-1)
    scatter = torch.nonzero(wanted >= 0)[:, 0]
    return Inputs(
        ids[mask][None],
        positions[mask][None],
        wanted[scatter],
        scatter,
        len(rows),
        Layout(tuple(groups), columns),
        mask,
    )

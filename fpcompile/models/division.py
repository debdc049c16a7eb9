"""An experts module executed range by range of its experts, with the bits of one call.

The model's own implementation is called on the (token, choice) pairs that a range of experts was chosen by,
each as a token of its own with one choice: the matrix product of an expert then has the rows, in the order,
that it has in the whole call. What differs between implementations is how a token's choices are added up:

- ``eager`` goes through the experts in order and adds each one's weighted rows to the result, in the dtype of
  the result. The state is that result so far.
- ``grouped_mm`` weights all choices and adds up a token's in one reduction, in the order of its choices.
  Adding ranges would round differently, so the state holds every choice's unweighted rows: n * k * d elements
  while n tokens are executed. The reduction is a step of its own, and any range of tokens may be collected.

Other implementations are not divided: fused kernels are given everything at once, and the products of
``batched_mm`` round by the number of rows in the batch (seen on CPU in fp32). Nor is a module for which
:meth:`Division.disagreement` finds other bits.

Which rows belong to a range is known on the device only: on a GPU the host waits for it once in each range,
as it does for ``eager`` in the whole call.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Experts = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
_ADDING: dict[str, Literal["in order", "at once"]] = {
    "eager": "in order",
    "grouped_mm": "at once",
}
PROBES = (9, 64, 128)
"""Tokens of the comparison with one call: few rows for each expert, and as many as tiles have."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Division:
    """How the ``experts`` experts of a module are executed in ranges.

    ``tensors`` are those of a whole call: hidden ``[n, d]``, choices ``[n, k]`` and their weights ``[n, k]``.
    Ranges must be added in order, each once; then the tokens are collected. ``width`` is d, ``top_k`` is k.
    """

    module: nn.Module
    forward: Experts
    experts: int
    adding: Literal["in order", "at once"]
    width: int
    top_k: int

    @property
    def rows(self) -> int:
        """Rows of the state for each token."""
        return 1 if self.adding == "in order" else self.top_k

    def room(self, tensors: Sequence[Tensor]) -> Tensor:
        """The state ``[n * rows, d]`` before the first range.

        Where every choice writes a row of its own nothing is cleared: that would take longer than a range
        may.
        """
        hidden = tensors[0]
        shape = hidden.shape[0] * self.rows, hidden.shape[1]
        return hidden.new_zeros(shape) if self.adding == "in order" else hidden.new_empty(shape)

    def add(self, state: Tensor, tensors: Sequence[Tensor], start: int, stop: int) -> None:
        """Execute experts ``start`` to ``stop``."""
        hidden, choices, weights = tensors
        if self.adding == "in order":
            for expert in range(start, stop):
                choice, token = torch.where(choices.t() == expert)
                if token.numel():
                    state.index_add_(0, token, self._rows(hidden[token], expert, weights[token, choice]))
            return
        chosen = choices.reshape(-1)
        pairs = torch.where((chosen >= start) & (chosen < stop))[0]
        if pairs.numel():
            rows = hidden[pairs // choices.shape[1]]
            ones = rows.new_ones(len(pairs))
            state[pairs] = self._rows(rows, chosen[pairs], ones)

    def _rows(self, hidden: Tensor, choices: Tensor | int, weights: Tensor) -> Tensor:
        """The model's own experts, each row a token with one choice."""
        if isinstance(choices, int):
            choices = torch.full((hidden.shape[0],), choices, device=hidden.device)
        return self.forward(self.module, hidden, choices[:, None], weights[:, None])

    def collect(self, state: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The results ``[m, d]`` of m tokens from their rows ``[m * rows, d]`` of the state behind the last
        range; ``tensors`` are theirs.
        """
        if self.adding == "in order":
            return state
        hidden, choices, weights = tensors
        weighted = state * weights.reshape(-1).unsqueeze(-1)
        total = weighted.view(*choices.shape, hidden.shape[1]).sum(dim=1)
        return total.to(hidden.dtype)

    def disagreement(self) -> str | None:
        """What ranges do otherwise than one call, on made-up rows; None where they give its bits."""
        bounds = sorted({0, 1, self.experts // 2, self.experts})
        for tokens in PROBES:
            tensors = self._made_up(tokens)
            try:
                same = torch.equal(self._in_ranges(tensors, bounds), self.forward(self.module, *tensors))
            except torch.OutOfMemoryError:
                raise  # says nothing about the code, and another process would find another plan
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                return f"its code does not take rows of one choice ({type(error).__name__})"
            if not same:
                sizes = ", ".join(str(b - a) for a, b in itertools.pairwise(bounds))
                tried = ", ".join(map(str, PROBES))
                return (
                    f"ranges of {sizes} experts gave other bits than one call at {tokens} tokens "
                    f"(compared at {tried})"
                )
        return None

    def _in_ranges(self, tensors: tuple[Tensor, Tensor, Tensor], bounds: Sequence[int]) -> Tensor:
        """The result by ranges of experts between ``bounds``, collected in two ranges of tokens."""
        state = self.room(tensors)
        for start, stop in itertools.pairwise(bounds):
            self.add(state, tensors, start, stop)
        tokens = tensors[0].shape[0]
        return torch.cat(
            [
                self.collect(state[low * self.rows : high * self.rows], [t[low:high] for t in tensors])
                for low, high in itertools.pairwise((0, tokens // 2, tokens))
            ]
        )

    def _made_up(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        like = next(p for p in self.module.parameters() if p.is_floating_point())
        generator = torch.Generator().manual_seed(tokens)
        hidden = torch.randn(tokens, self.width, generator=generator)
        scores = torch.rand(tokens, self.experts, generator=generator)
        weights, choices = scores.topk(self.top_k, dim=-1)
        hidden, weights = (t.to(like.device, like.dtype) for t in (hidden, weights))
        return hidden, choices.to(like.device), weights


def divide(module: nn.Module, forward: Any, implementation: str, top_k: int) -> Division | None:
    """The division of an experts module under one of transformers' implementations, if it has one."""
    count, down = getattr(module, "num_experts", None), getattr(module, "down_proj", None)
    adding = _ADDING.get(implementation)
    if adding is None or not isinstance(count, int) or count < 2:
        return None
    if not isinstance(down, Tensor) or down.dim() != 3 or not down.is_floating_point():
        return None  # weights of another form, or quantised
    if getattr(module, "_is_expert_parallel", False):
        return None  # some choices belong to another device
    width = down.shape[2] if getattr(module, "is_transposed", False) else down.shape[1]
    return Division(module, forward, count, adding, int(width), top_k)

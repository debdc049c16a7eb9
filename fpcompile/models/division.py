"""An experts module executed range by range of its experts, with the bits of one call.

The model's own implementation is called on the (token, choice) pairs that a range of experts was chosen by,
each as a token of its own with one choice: the matrix product of an expert then has the rows, in the order,
that it has in the whole call. What differs between implementations is how a token's choices are added up:

- ``eager`` goes through the experts in order and adds each one's weighted rows to the result, in the dtype of
  the result. The state is that result so far.
- ``grouped_mm`` weights all choices and adds up a token's in one reduction, in the order of its choices.
  Adding ranges would round differently, so the state holds every choice's unweighted rows, and the reduction
  is the last step.

Other implementations are not divided: fused kernels are given everything at once, and the products of
``batched_mm`` round by the number of rows in the batch (seen on CPU in fp32). Nor is a module for which
:meth:`Division.agrees` finds other bits.

Which rows belong to a range is known on the device only: on a GPU the host waits for it once in each range,
as it does for ``eager`` in the whole call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Experts = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
_ADDING: dict[str, Literal["in order", "at once"]] = {
    "eager": "in order",
    "grouped_mm": "at once",
}
_PROBE = 9  # tokens


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Division:
    """How the ``experts`` experts of a module are executed in ranges.

    ``tensors`` are those of a whole call: hidden ``[n, d]``, choices ``[n, k]`` and their weights ``[n, k]``.
    Ranges must be added in order, each once. ``width`` is d and ``top_k`` is k.
    """

    module: nn.Module
    forward: Experts
    experts: int
    adding: Literal["in order", "at once"]
    width: int
    top_k: int

    def room(self, tensors: Sequence[Tensor]) -> Tensor:
        """The state before the first range."""
        hidden, choices, _ = tensors
        rows = hidden.shape[0] * (1 if self.adding == "in order" else choices.shape[1])
        return hidden.new_zeros(rows, hidden.shape[1])

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

    def result(self, state: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The result ``[n, d]`` from the state behind the last range."""
        if self.adding == "in order":
            return state
        hidden, choices, weights = tensors
        weighted = state * weights.reshape(-1).unsqueeze(-1)
        total = weighted.view(*choices.shape, hidden.shape[1]).sum(dim=1)
        return total.to(hidden.dtype)

    def agrees(self) -> bool:
        """Whether ranges give the bits of one call, on made-up rows."""
        like = next(p for p in self.module.parameters() if p.is_floating_point())
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(_PROBE, self.width, generator=generator)
        scores = torch.rand(_PROBE, self.experts, generator=generator)
        weights, choices = scores.topk(self.top_k, dim=-1)
        hidden, weights = (t.to(like.device, like.dtype) for t in (hidden, weights))
        tensors = (hidden, choices.to(like.device), weights)
        try:
            whole = self.forward(self.module, *tensors)
            state = self.room(tensors)
            middle = self.experts // 2
            for start, stop in ((0, middle), (middle, self.experts)):
                self.add(state, tensors, start, stop)
            return torch.equal(self.result(state, tensors), whole)
        except torch.OutOfMemoryError:
            raise  # says nothing about the code, and another process would find another plan
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False  # the module's code does not take rows of one choice


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

"""What other systems do, as policies on the same plane: same core, same device, other grain and packing.

| spec                    | order           | grain                     | packing         | memory       |
|-------------------------|-----------------|---------------------------|-----------------|--------------|
| `chunked:N[,order]`     | fcfs by default | N tokens                  | none            | evict        |
| `vllm:N[,T]`            | fcfs            | steps of N shared tokens  | by token slices | wait         |
| `layered:G[,order]`     | fcfs by default | G groups of layers        | none            | evict        |
| `flowprefill-published` | s-edf           | half layers, synchronised | 2048, lead only | started only |
| `flowprefill`           | s-edf           | operators                 | 2048, lead only | started only |

Sources: chunked prefill, Sarathi-Serve (arXiv 2403.02310); vLLM's `max_num_batched_tokens` and
`long_prefill_token_threshold`; Layered Prefill (arXiv 2510.08055); FlowPrefill (arXiv 2602.16603).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.batching import published_batching
from fpcompile.scheduler.job import RequestView
from fpcompile.scheduler.policies.orders import SlackEdf
from fpcompile.scheduler.policy import (
    Grain,
    KeyedPolicy,
    StepPolicy,
    StepView,
    make_policy,
    register,
    whole,
)
from fpcompile.scheduler.states import State

__all__ = ["Chunked", "FlowPrefill", "FlowPrefillPublished", "Layered", "Vllm"]


class _Ordered(KeyedPolicy):
    """An order at another grain."""

    def __init__(self, order: str, grain: Grain) -> None:
        inner = make_policy(order)
        if not isinstance(inner, KeyedPolicy):
            raise InvalidInputError(
                "the order must be a keyed policy", expected="fcfs, edf, s-edf...", got=order
            )
        self._inner = inner
        self.grain = grain
        self.preemptive = inner.preemptive

    def key(self, view: RequestView, now: float) -> Any:
        return self._inner.key(view, now)

    def key_expires(self, view: RequestView) -> float:
        return self._inner.key_expires(view)

    def arrived(self, view: RequestView, now: float) -> None:
        self._inner.arrived(view, now)

    def joined(self, view: RequestView, lead: RequestView, now: float) -> None:
        self._inner.joined(view, lead, now)

    def launched(self, view: RequestView, now: float) -> None:
        self._inner.launched(view, now)

    def stopped(self, view: RequestView, now: float) -> None:
        self._inner.stopped(view, now)

    def ended(self, view: RequestView, outcome: State, now: float) -> None:
        self._inner.ended(view, outcome, now)


@register("chunked")
class Chunked(_Ordered):
    """A prompt is executed in chunks of ``tokens``; another request may go first between two chunks."""

    def __init__(self, tokens: int = 512, order: str = "fcfs") -> None:
        super().__init__(order, Grain("tokens", whole("chunk size", tokens)))


@register("layered")
class Layered(_Ordered):
    """A prompt is executed in ``groups`` of layers (0: 1, 2, 4, 8 or 16 by its length, as published)."""

    def __init__(self, groups: int = 0, order: str = "fcfs") -> None:
        super().__init__(order, Grain("layers", whole("groups", groups, 0)))


@register("flowprefill-published")
class FlowPrefillPublished(SlackEdf):
    """What the authors' code does: two checks per layer, each synchronising the device."""

    grain = Grain("half-layer", synchronises=True)
    batching = published_batching()
    eviction = False


@register("flowprefill")
class FlowPrefill(SlackEdf):
    """What the paper describes: a check after every operator; here without the synchronisation."""

    grain = Grain("operator")
    batching = published_batching()
    eviction = False


@register("vllm")
class Vllm(StepPolicy):
    """Continuous batching: each step has a budget of ``tokens``, started requests first, then by arrival.

    ``threshold`` bounds the tokens that one prompt may take of a step; 0 is no bound.
    """

    eviction = False

    def __init__(self, tokens: int = 2048, threshold: int = 0) -> None:
        self.tokens = whole("token budget", tokens)
        self.threshold = whole("threshold", threshold, 0) or self.tokens
        self.grain = Grain("tokens", self.tokens)

    def compose(self, views: Sequence[StepView], now: float) -> list[tuple[str, int]]:
        budget, slices = self.tokens, []
        for view in views:
            take = min(view.tokens_left, self.threshold, budget)
            if take < 1:
                break
            slices.append((view.request.id, take))
            budget -= take
        return slices

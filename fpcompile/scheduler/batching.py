"""Which waiting requests are packed into a new run, beside the one that won.

Packing shares the fixed cost of a launch, at the price that every member waits for all of them. A rule is
asked only when the winner has not started yet, and scans the waiting requests in the policy's order.

Words
    *lead*   the request that won; the run has its name.
    *mates*  the requests packed with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from fpcompile.scheduler.job import Job

__all__ = ["Batching", "PackCost", "published_batching", "slo_batching"]


class PackCost(Protocol):
    """Predicts a packed run."""

    def predict(self, tokens: int, context: int = 0) -> float:
        """Device seconds of a prefill of ``tokens`` after ``context`` cached ones."""

    def predict_pack(self, lengths: Iterable[int]) -> float:
        """Device seconds of one launch of several prompts of these lengths."""


@dataclass(frozen=True, slots=True)
class Batching:
    """SLO-aware batching.

    A batch holds at most ``max_tokens`` tokens. ``margin`` times the lead's SLO must be left before its
    deadline once the batch has run. ``every_member``: the deadline of every member counts (with the
    exact cost of the pack), not only the lead's (with the cost of one prompt as long as all
    together). A mate that would break a deadline ends the scan when ``stop_at_first``, else it is skipped.
    At most ``scanned`` waiting requests are looked at, so that a decision costs the same in any backlog.
    """

    max_tokens: int = 2048
    margin: float = 0.1
    every_member: bool = True
    stop_at_first: bool = False
    scanned: int = 128

    def mates(
        self,
        lead: Job,
        waiting: Iterable[Job],
        now: float,
        free_blocks: float,
        costs: PackCost,
        pace: float = 1.0,
    ) -> tuple[list[Job], float]:
        """The mates in order, and the predicted seconds of the pack (the lead's own when there is none).

        ``pace``: seconds that a device second of a prefill takes, beside decode steps.
        """
        request = lead.request
        chosen: list[Job] = []
        cost = lead.cost
        alpha = self.margin * request.slo if request.slo < float("inf") else 0.0
        if request.tokens > self.max_tokens or request.deadline - now < alpha:
            return chosen, cost
        total, room = request.tokens, free_blocks - request.kv_blocks
        lengths = [request.tokens]
        due = request.deadline - alpha
        for job in islice(waiting, self.scanned):
            if total >= self.max_tokens:
                break
            other = job.request
            if job is lead or job.started or total + other.tokens > self.max_tokens or other.kv_blocks > room:
                continue
            longer = pace * (
                costs.predict_pack([*lengths, other.tokens])
                if self.every_member
                else costs.predict(total + other.tokens)
            )
            limit = min(due, other.deadline) if self.every_member else due
            if now + longer > limit:
                if self.stop_at_first:
                    break
                continue
            chosen.append(job)
            lengths.append(other.tokens)
            total, room, cost, due = total + other.tokens, room - other.kv_blocks, longer, limit
        return chosen, cost


def published_batching() -> Batching:
    """FlowPrefill's: 2048 tokens, 10 % of the lead's SLO, only the lead's deadline, stop at the first."""
    return Batching(every_member=False, stop_at_first=True)


def slo_batching(max_tokens: int = 2048) -> Batching:
    """The rule that checks the deadline of every member."""
    return Batching(max_tokens=max_tokens, margin=0.0)

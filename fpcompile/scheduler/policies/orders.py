"""Orders: whole requests ranked by one number. Each class is one published rule, without any addition.

| name       | smallest key first                                    | source                                |
|------------|-------------------------------------------------------|---------------------------------------|
| `fcfs`     | arrival; never preempts                               | every server's default                |
| `edf`      | deadline                                              | Liu and Layland 1973                  |
| `s-edf`    | -(sgn(slack) / D)                                     | FlowPrefill, arXiv 2602.16603         |
| `srpt`     | remaining device seconds                              | Schrage 1968, at the operator's grain |
| `priority` | -priority (higher first)                              | SGLang's direction (vLLM: opposite)   |
| `wfq`      | the tenant's virtual finish time                      | fair queueing, Demers 1989            |
"""

from __future__ import annotations

from collections import Counter
from math import inf

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.job import RequestView
from fpcompile.scheduler.policy import Grain, KeyedPolicy, register

__all__ = ["Edf", "Fcfs", "Priority", "SlackEdf", "Srpt", "Wfq"]


@register("fcfs")
class Fcfs(KeyedPolicy):
    """First come, first served; a run is never paused."""

    preemptive = False
    grain = Grain("model")

    def key(self, view: RequestView, now: float) -> float:
        return view.request.arrival


@register("edf")
class Edf(KeyedPolicy):
    """Earliest deadline first, late or not: collapses in overload."""

    def key(self, view: RequestView, now: float) -> float:
        return view.deadline


_TENANTS = 4096
_LATE_ORDERS = ("latest-deadline", "earliest-deadline", "shortest", "arrival")


@register("s-edf")
class SlackEdf(KeyedPolicy):
    """Slack-aware EDF: priority = sgn(slack) / D with sgn(0) = -1, highest first.

    slack = (D - now) - max(remaining, 0), remaining = predicted - executed. So feasible requests go first,
    the earliest deadline first; then the infeasible ones, the latest deadline first (the published order;
    ``late`` chooses another one). A request is feasible while now < D - remaining: the two forms of the rule
    agree, and this one says when the key changes.
    """

    def __init__(self, late: str = "latest-deadline") -> None:
        if late not in _LATE_ORDERS:
            raise InvalidInputError(
                "unknown order of late requests", expected=repr(_LATE_ORDERS), got=repr(late)
            )
        self.late = late

    def key(self, view: RequestView, now: float) -> tuple[int, float]:
        # -(1 / D) sorts as D does for D of one sign, and D itself neither divides by zero nor loses digits.
        deadline = view.deadline
        left = view.remaining(now)
        if now < deadline - left:
            return (0, deadline)
        if self.late == "latest-deadline":
            return (1, -deadline)
        if self.late == "earliest-deadline":
            return (1, deadline)
        return (1, left) if self.late == "shortest" else (1, view.request.arrival)

    def key_expires(self, view: RequestView) -> float:
        return view.deadline - view.remaining(view.deadline)


@register("srpt")
class Srpt(KeyedPolicy):
    """Shortest remaining processing time first: the least mean TTFT."""

    def key(self, view: RequestView, now: float) -> float:
        return view.remaining(now)


@register("priority")
class Priority(KeyedPolicy):
    """The number that the caller gave, higher first."""

    def key(self, view: RequestView, now: float) -> int:
        return -view.request.priority


@register("wfq")
class Wfq(KeyedPolicy):
    """Fair shares of device time between tenants: the earliest virtual finish time first.

    ``weights`` are given as ``wfq:tenant=2.5`` (others have 1). A request's virtual finish time is its cost /
    weight behind that of the tenant's request before it, and behind the virtual time of its arrival: a tenant
    that was idle saves up no credit. Virtual time goes on by 1 / (sum of the weights of all tenants that have
    unended requests). So a short prompt overtakes a long one of another tenant, as often as that tenant's
    share allows, and a flood delays its own tenant only.
    """

    def __init__(self, **weights: float) -> None:
        for tenant, weight in weights.items():
            if not 0 < weight < inf:
                raise InvalidInputError(f"weight of {tenant!r}", expected="a number > 0", got=repr(weight))
        self._weights = weights
        self._finish: dict[str, float] = {}
        self._tags: dict[str, float] = {}
        self._live: Counter[str] = Counter()
        self._active = 0.0
        """Weights of the tenants that have unended requests."""
        self._virtual = self._at = 0.0
        self._most = _TENANTS

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _advance(self, now: float) -> None:
        if self._live:
            self._virtual += max(now - self._at, 0.0) / self._active
        self._at = now

    def arrived(self, view: RequestView, now: float) -> None:
        self._advance(now)
        request, tenant = view.request, view.request.tenant
        if len(self._finish) > self._most:  # what has finished in virtual time says no more than no entry
            self._finish = {name: tag for name, tag in self._finish.items() if tag > self._virtual}
            self._most = max(_TENANTS, 2 * len(self._finish))
        start = max(self._virtual, self._finish.get(tenant, 0.0))
        self._tags[request.id] = self._finish[tenant] = start + request.cost / self._weight(tenant)
        if not self._live[tenant]:
            self._active += self._weight(tenant)
        self._live[tenant] += 1

    def ended(self, view: RequestView, outcome: object, now: float) -> None:
        self._advance(now)
        tenant = view.request.tenant
        del self._tags[view.request.id]
        self._live[tenant] -= 1
        if not self._live[tenant]:
            del self._live[tenant]
            self._active = self._active - self._weight(tenant) if self._live else 0.0

    def key(self, view: RequestView, now: float) -> float:
        return self._tags[view.request.id]

"""Many replicas: a router sends each request to one of several independent devices when it arrives.

A router sees arrivals only, as one in front of real replicas would; each replica is then simulated on its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fpcompile.errors import InvalidInputError, UnknownNameError
from fpcompile.scheduler.costs import CostTable
from fpcompile.scheduler.events import Request
from fpcompile.scheduler.policy import whole
from fpcompile.scheduler.simulator import SimulationResult, simulate

__all__ = ["ROUTERS", "least_work", "round_robin", "simulate_replicas"]


def round_robin(requests: Sequence[Request], replicas: int) -> list[int]:
    """In turn."""
    return [index % replicas for index in range(len(requests))]


def least_work(requests: Sequence[Request], replicas: int) -> list[int]:
    """To the replica with the least predicted work left, assuming each works it off without a pause."""
    work = [0.0] * replicas
    before = requests[0].arrival if requests else 0.0
    chosen = []
    for request in requests:
        passed, before = request.arrival - before, request.arrival
        work = [max(0.0, left - passed) for left in work]
        index = min(range(replicas), key=work.__getitem__)
        work[index] += request.cost
        chosen.append(index)
    return chosen


ROUTERS: dict[str, Callable[[Sequence[Request], int], list[int]]] = {
    "round-robin": round_robin,
    "least-work": least_work,
}


def simulate_replicas(
    policy: str,
    requests: Sequence[Request],
    table: CostTable,
    *,
    replicas: int = 1,
    router: str = "least-work",
    **options: Any,
) -> list[SimulationResult]:
    """One result per replica; ``policy`` is a spec, so that each replica gets its own instance.

    ``options`` are those of :func:`simulate`. Raises :class:`UnknownNameError` for a router,
    :class:`InvalidInputError` for what else is wrong.
    """
    if router not in ROUTERS:
        raise UnknownNameError("router", router, known=ROUTERS)
    whole("replicas", replicas)
    spec: Any = policy
    if not isinstance(spec, str):
        raise InvalidInputError(
            "a policy of replicas is a spec, for each has its own instance",
            expected="a registered name with its arguments, such as 's-edf'",
            got=repr(spec),
        )
    places = ROUTERS[router](requests, replicas)
    parts: list[list[Request]] = [[] for _ in range(replicas)]
    for request, place in zip(requests, places, strict=True):
        parts[place].append(request)
    return [simulate(policy, part, table, **options) for part in parts]

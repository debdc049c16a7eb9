"""An upper bound on what any scheduler of one device can reach: a linear program.

x in [0, 1] is the part of a request that is served in time. On one device, whatever the order and however
often it is preempted, the requests that arrive at or after r and are due by d cannot use more than d - r
seconds:

    maximise t   with   sum of x over class c >= t * n_c          for every class c
                        sum of p * x over jobs inside [r, d] <= d - r   for every interval

p is the marginal cost (the fixed cost of a launch can be shared by packing). Requests that cannot be in time
even alone are left out, as goodput leaves them out. There are O(n^2) intervals; they are added only when the
present solution violates them. Every intermediate optimum is a valid, looser bound, so stopping early is
safe.

Needs scipy (the extra `bench`). A clairvoyant scheduler may reach it; an online one in general cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.events import Request

__all__ = ["Bound", "attainment_bound"]

_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Bound:
    """``attainment``: no scheduler has a higher minimum class attainment (or overall, without classes)."""

    attainment: float
    cuts: int
    rounds: int
    converged: bool


def attainment_bound(
    requests: Sequence[Request],
    costs: Mapping[str, float] | None = None,
    *,
    per_class: bool = True,
    max_rounds: int = 60,
    enough: float = 0.0,
) -> Bound:
    """Solve the program; ``costs`` gives marginal seconds by request id (default: each ``cost``).

    Below ``enough`` the value is not made any tighter: for the question whether so much can be attained.
    """
    jobs = [request for request in requests if request.arrival + request.cost <= request.deadline]
    if not jobs:
        raise InvalidInputError("no request could be in time even alone", got=f"{len(requests)} requests")
    seconds = np.array([request.cost if costs is None else costs[request.id] for request in jobs])
    release = np.array([request.arrival for request in jobs])
    due = np.array([min(request.deadline, 1e15) for request in jobs])
    by_class: dict[str, list[int]] = {}
    for index, request in enumerate(jobs):
        by_class.setdefault(request.klass if per_class else "", []).append(index)
    program = _Program(seconds, release, due, by_class)
    value, solution = program.solve()
    for number in range(1, max_rounds + 1):
        if not program.cut(solution):
            return Bound(value, program.count, number, True)
        if value < enough:
            return Bound(value, program.count, number, False)
        value, solution = program.solve()
    return Bound(value, program.count, max_rounds, False)


class _Program:
    """The linear program with the cuts found so far; variables are x of each job, then t."""

    def __init__(self, seconds: Any, release: Any, due: Any, by_class: Mapping[str, list[int]]) -> None:
        from scipy import sparse

        self._seconds, self._release, self._due = seconds, release, due
        size = len(seconds)
        self._by_due = np.argsort(due, kind="stable")
        self._objective = np.zeros(size + 1)
        self._objective[-1] = -1.0
        rows, columns, values = [], [], []
        for row, members in enumerate(by_class.values()):
            rows += [row] * (len(members) + 1)
            columns += [*members, size]
            values += [-1.0] * len(members) + [float(len(members))]
        self._matrix: Any = sparse.csr_matrix((values, (rows, columns)), shape=(len(by_class), size + 1))
        self._limits = np.zeros(len(by_class))
        self._classes = len(by_class)

    @property
    def count(self) -> int:
        """Interval constraints so far."""
        return int(self._matrix.shape[0]) - self._classes

    def solve(self) -> tuple[float, Any]:
        """The optimum and the jobs' parts."""
        from scipy.optimize import linprog

        answer = linprog(
            self._objective, A_ub=self._matrix, b_ub=self._limits, bounds=(0.0, 1.0), method="highs"
        )
        if answer.status != 0:
            raise RuntimeError(f"linprog: {answer.message}")
        return float(-answer.fun), answer.x[:-1]

    def cut(self, solution: Any) -> bool:
        """Add, for each release time, the most violated interval that starts there; whether there was any."""
        from scipy import sparse

        order = self._by_due
        used = (self._seconds * solution)[order]
        release, due = self._release[order], self._due[order]
        found: list[tuple[float, float, float]] = []
        for start in np.unique(self._release):
            load = np.cumsum(np.where(release >= start, used, 0.0))
            excess = load - (due - start)
            excess[due <= start] = -1.0
            worst = int(np.argmax(excess))
            if excess[worst] > _TOLERANCE:
                found.append((float(excess[worst]), float(start), float(due[worst])))
        found.sort(reverse=True)
        rows, limits = [], []
        for _, start, end in found[:400]:
            inside = (self._release >= start) & (self._due <= end)
            rows.append(np.append(np.where(inside, self._seconds, 0.0), 0.0))
            limits.append(end - start)
        if not rows:
            return False
        self._matrix = sparse.vstack([self._matrix, sparse.csr_matrix(np.array(rows))], format="csr")
        self._limits = np.append(self._limits, limits)
        return True

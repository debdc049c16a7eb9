"""The terms of one submission: when it came, until when, for whom. Checked before anything else happens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

from fpcompile.errors import InvalidInputError

__all__ = ["Terms"]


@dataclass(frozen=True, slots=True)
class Terms:
    """``arrival`` and ``deadline`` in seconds on the engine's clock; ``slo`` is the time between them.

    Without a promise ``slo`` and ``deadline`` are inf. ``timeout``: seconds after ``arrival``, inf for none.
    """

    arrival: float
    deadline: float
    slo: float
    tenant: str
    priority: int
    request_id: str | None
    slo_class: str | None = None
    timeout: float = math.inf

    @classmethod
    def check(
        cls,
        *,
        now: float,
        ttft_slo: Any,
        arrival: Any,
        deadline: Any,
        tenant: Any,
        priority: Any,
        request_id: Any,
        slo_class: Any = None,
        timeout: Any = None,
    ) -> Self:
        """The terms, or :class:`InvalidInputError` for the first argument that is wrong."""
        came = now if arrival is None else _seconds("arrival", arrival)
        if not (math.isfinite(came) and came <= now):
            raise InvalidInputError(
                "arrival is wrong",
                expected=f"seconds on the engine's clock, not after now ({now:.6f})",
                got=repr(arrival),
                remedy="measure it by engine.now()",
            )
        slo, due = _promise(came, ttft_slo, deadline)
        if not isinstance(tenant, str):
            raise InvalidInputError("tenant is wrong", expected="a str", got=repr(tenant))
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidInputError("priority is wrong", expected="an int, higher first", got=repr(priority))
        if request_id is not None and (not isinstance(request_id, str) or not request_id):
            raise InvalidInputError(
                "request_id is wrong", expected="a non-empty str, or None", got=repr(request_id)
            )
        if slo_class is not None and (not isinstance(slo_class, str) or not slo_class):
            raise InvalidInputError(
                "slo_class is wrong", expected="a non-empty str, or None", got=repr(slo_class)
            )
        longest = math.inf if timeout is None else _seconds("timeout", timeout)
        if not longest > 0:
            raise InvalidInputError("timeout is wrong", expected="seconds > 0, or None", got=repr(timeout))
        return cls(came, due, slo, tenant, priority, request_id, slo_class, longest)


def _promise(arrival: float, ttft_slo: Any, deadline: Any) -> tuple[float, float]:
    """(SLO, deadline) out of either."""
    if ttft_slo is not None and deadline is not None:
        raise InvalidInputError(
            "ttft_slo and deadline say the same in two ways",
            expected="one of them",
            got=f"ttft_slo={ttft_slo!r}, deadline={deadline!r}",
        )
    if ttft_slo is not None:
        slo = _seconds("ttft_slo", ttft_slo)
        if not slo > 0:
            raise InvalidInputError("ttft_slo is wrong", expected="seconds > 0", got=repr(ttft_slo))
        return slo, arrival + slo
    if deadline is None:
        return math.inf, math.inf
    due = _seconds("deadline", deadline)
    if not due > arrival:
        raise InvalidInputError(
            "deadline is wrong",
            expected=f"seconds on the engine's clock, after the arrival ({arrival:.6f})",
            got=repr(deadline),
            remedy="engine.now() + seconds, or ttft_slo=seconds",
        )
    return due - arrival, due


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidInputError(f"{name} is wrong", expected="a number of seconds", got=repr(value))
    return float(value)

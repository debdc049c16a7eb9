"""What our policy remembers: how each class fares, what it asks for, and the late requests' share."""

from __future__ import annotations

from math import exp, inf

__all__ = ["TARGET", "ClassBook", "LateShare"]

TARGET = 0.9
"""A class is served when this part of its requests is in time."""

_LOAD_WINDOW_S = 30.0
_PRIOR = 20  # requests that the first estimate counts as
_QUANTUM_S = 0.02
_MOST_CREDIT_S = 1.0
_MOST_DEBT_S = 2.0
_LEAST_S = 1e-6


class ClassBook:
    """Recent attainment and load of one class; both forget exponentially."""

    __slots__ = ("_load", "_load_at", "_memory", "_seen", "attainment", "slo")

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._load, self._load_at, self._seen = 0.0, 0.0, 0
        self.attainment = TARGET
        self.slo = inf

    def arrived(self, cost: float, slo: float, now: float) -> None:
        """A request of ``cost`` seconds has arrived."""
        self._load = self.load(now) + cost / _LOAD_WINDOW_S
        self._load_at = now
        self.slo = slo

    def load(self, now: float) -> float:
        """Device seconds asked for per second, over about the last half minute."""
        return self._load * exp((self._load_at - now) / _LOAD_WINDOW_S)

    def learn(self, met: bool) -> None:
        """A request was in time, or can no longer be."""
        self._seen += 1
        self.attainment += (met - self.attainment) / min(self._memory, self._seen + _PRIOR)

    def forgive(self) -> None:
        """A miss that was learnt, the last one or one of the last, does not come true."""
        weight = 1 / max(min(self._memory, self._seen + _PRIOR), 2)
        self.attainment = min(self.attainment / (1 - weight), 1.0)

    def harm(self, strength: float) -> float:
        """Relative harm of one more miss: 1 a little above the target, more below it, less far above."""
        need = (TARGET + 0.02 - self.attainment) / (1 - TARGET)
        return exp(strength * min(max(need, -1.0), 2.0))


class LateShare:
    """Credit of the late requests: while they wait they earn a share of busy time, and pay for all they use.

    They spend it in turns of at most two quanta, when the others have the slack for one; only when the credit
    has reached its cap, they take a turn anyway. Debt is forgiven beyond two seconds.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.credit = 0.0
        self._turn = 0.0
        self._since: float | None = None
        self._late = False

    def begin(self, now: float, late: bool) -> None:
        """A run begins on the device."""
        self._since, self._late = now, late

    def idle(self) -> None:
        """The device has nothing."""
        self._since = None

    def spend(self, now: float, waiting: bool) -> None:
        """Settle the time since the last call; ``waiting``: late requests were there."""
        if self._since is None:
            return
        seconds = now - self._since
        self._since = now
        if waiting:
            self.credit = min(self.credit + self.share * seconds, _MOST_CREDIT_S)
        if self._late:
            self.credit = max(self.credit - seconds, -_MOST_DEBT_S)
            self._turn -= seconds

    @property
    def left(self) -> float:
        """Seconds left of the present turn; 0 when rounding is all that is left."""
        left = min(self.credit, self._turn)
        return left if left > _LEAST_S else 0.0

    def take(self, slack: float) -> bool:
        """Whether the late requests get a turn now, the others having this slack."""
        turn = min(self.credit, 2 * _QUANTUM_S)
        if turn < _QUANTUM_S or (slack <= turn and self.credit < _MOST_CREDIT_S - _LEAST_S):
            return False
        self._turn = turn
        return True

"""What our policy remembers: how each class fares, what it asks for, and the late requests' share."""

from __future__ import annotations

from math import exp, inf

__all__ = ["TARGET", "ClassBook", "LateShare"]

TARGET = 0.9
"""A class is served when this part of its requests is in time."""

_LOAD_WINDOW_S = 30.0
_QUANTUM_S = 0.02
_MOST_DEBT_S = 2.0


class ClassBook:
    """Recent attainment and load of one class; both forget exponentially."""

    __slots__ = ("_load", "_load_at", "_memory", "attainment", "slo")

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._load, self._load_at = 0.0, 0.0
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
        self.attainment += (met - self.attainment) / self._memory

    def harm(self, strength: float) -> float:
        """Relative harm of one more miss: 1 a little above the target, more below it, less far above."""
        need = (TARGET + 0.02 - self.attainment) / (1 - TARGET)
        return exp(strength * min(max(need, -1.0), 2.0))


class LateShare:
    """Credit of the late requests: they earn a share of the busy time, and pay for all that they use.

    Credit is held to two quanta, debt to two seconds: neither long quiet nor long idle times are settled
    in one piece.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.credit = 0.0
        self._since: float | None = None
        self._late = False

    def begin(self, now: float, late: bool) -> None:
        """A run begins on the device."""
        self._since, self._late = now, late

    def idle(self) -> None:
        """The device has nothing."""
        self._since = None

    def spend(self, now: float) -> None:
        """Settle the time since the last call."""
        if self._since is None:
            return
        seconds = now - self._since
        self._since = now
        self.credit = min(self.credit + self.share * seconds, 2 * _QUANTUM_S)
        if self._late:
            self.credit = max(self.credit - seconds, -_MOST_DEBT_S)

    def turn(self, slack: float) -> bool:
        """Whether it is the late requests' turn: earlier when the others have slack."""
        return self.credit >= 2 * _QUANTUM_S - 1e-9 or (self.credit >= _QUANTUM_S and slack > 2 * _QUANTUM_S)

"""What goes into the scheduler core (requests and events) and what comes out (commands).

Words
    *run*   one execution in flight, named by its first member's request id. Packing makes runs of several
            members; ``Launch.requests`` lists them in order.
    *cost*  predicted device seconds of the whole prefill when executed alone.

All times are seconds on the driver's clock; deadlines are absolute. Values are frozen and check themselves:
a negative length, a NaN or an infinite time raises :class:`fpcompile.errors.InvalidInputError`.

Order of events
    The driver hands events over in the order of :func:`event_order`: time, then rank (what frees the device
    before what asks for it), then sequence. The core refuses time going backwards.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from math import inf, isfinite
from numbers import Integral, Real

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.future import Growing

__all__ = [
    "Arrival",
    "Cancelled",
    "Command",
    "Completed",
    "Decoding",
    "Dropped",
    "Event",
    "Evict",
    "Failed",
    "Launch",
    "Memory",
    "Pause",
    "Reject",
    "Request",
    "Reserved",
    "Restore",
    "SetTimer",
    "Timer",
    "Yielded",
    "event_order",
]


def _bad(where: str, field: str, expected: str, got: object) -> InvalidInputError:
    return InvalidInputError(f"{where}.{field} is wrong", expected=expected, got=repr(got))


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class Request:
    """One prefill that somebody waits for.

    ``arrival`` and ``deadline`` are absolute seconds (``deadline`` may be inf: no promise). ``tokens`` are
    the new tokens of the prompt, ``cost`` their predicted device seconds. ``slo`` is the promised TTFT in
    seconds, ``priority`` higher first, ``tenant`` and ``klass`` group requests for fairness and for
    attainment, ``kv_blocks`` is the cache that the whole prompt needs, ``decode_tokens`` what it
    generates afterwards.
    """

    id: str
    arrival: float
    deadline: float
    tokens: int
    cost: float
    _: KW_ONLY
    slo: float = inf
    priority: int = 0
    tenant: str = ""
    klass: str = ""
    kv_blocks: int = 0
    decode_tokens: int = 0

    def __post_init__(self) -> None:
        name: object = self.id
        arrival, deadline, cost, slo = self.arrival, self.deadline, self.cost, self.slo
        for field, good, expected in (
            ("id", isinstance(name, str) and name != "", "a non-empty string"),
            ("arrival", _number(arrival) and isfinite(arrival), "finite seconds"),
            ("deadline", _number(deadline) and deadline > -inf, "seconds, or inf for none"),
            ("tokens", _whole(self.tokens) and self.tokens >= 1, "a whole number >= 1"),
            ("cost", _number(cost) and 0 <= cost < inf, "finite seconds >= 0"),
            ("slo", _number(slo) and slo > 0, "seconds > 0, or inf for none"),
            ("priority", _whole(self.priority), "a whole number, higher first"),
            ("tenant", isinstance(self.tenant, str), "a string"),
            ("klass", isinstance(self.klass, str), "a string"),
            ("kv_blocks", _whole(self.kv_blocks) and self.kv_blocks >= 0, "a whole number >= 0"),
            ("decode_tokens", _whole(self.decode_tokens) and self.decode_tokens >= 0, "a whole number >= 0"),
        ):
            if not good:
                raise _bad("Request", field, expected, getattr(self, field))


@dataclass(frozen=True, slots=True)
class Arrival:
    """A new request; its id must not have been used before.

    ``again``: one whose prompt was completed, and whose cache was dropped while it decoded. Its prompt is
    everything that it has so far.
    """

    time: float
    request: Request
    again: bool = False

    def __post_init__(self) -> None:
        request: object = self.request
        if not isinstance(request, Request):
            raise _bad("Arrival", "request", "a Request", request)


@dataclass(frozen=True, slots=True)
class Yielded:
    """The device is free at a cut: a pause was acknowledged, or the launch quota was used up.

    ``remaining`` = predicted device seconds left; None lets the core subtract the executed time.
    """

    time: float
    run: str
    remaining: float | None = None

    def __post_init__(self) -> None:
        if self.remaining is not None and not 0 <= self.remaining < inf:
            raise _bad("Yielded", "remaining", "finite seconds >= 0, or None", self.remaining)


@dataclass(frozen=True, slots=True)
class Completed:
    """The run has finished; serves as the acknowledgement of a pause that came too late."""

    time: float
    run: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Somebody no longer wants the request (not the run: other members go on)."""

    time: float
    request: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The run raised; it ends, and nothing else does."""

    time: float
    run: str
    reason: str


@dataclass(frozen=True, slots=True)
class Memory:
    """The device's cache has this many free blocks, after all commands so far have been carried out."""

    time: float
    free_blocks: int

    def __post_init__(self) -> None:
        if self.free_blocks < 0:
            raise _bad("Memory", "free_blocks", "blocks >= 0", self.free_blocks)


@dataclass(frozen=True, slots=True)
class Reserved:
    """Blocks that no run of the core has: what requests that decode hold, and what they need at once.

    ``growing``: for each of them (blocks, tokens to come); see :mod:`fpcompile.scheduler.future`.
    """

    time: float
    blocks: int
    growing: tuple[Growing, ...] = ()

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise _bad("Reserved", "blocks", "blocks >= 0", self.blocks)


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a run had computed is lost: it begins again, with ``remaining`` predicted device seconds left."""

    time: float
    run: str
    remaining: float

    def __post_init__(self) -> None:
        if not 0 <= self.remaining < inf:
            raise _bad("Dropped", "remaining", "finite seconds >= 0", self.remaining)


@dataclass(frozen=True, slots=True)
class Decoding:
    """From now on decode steps take this share of the device: what is left of a prefill takes longer by it.

    ``share`` is at least 0 and less than 1. No reason to decide anything by itself.
    """

    time: float
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise _bad("Decoding", "share", "a number in [0, 1)", self.share)


@dataclass(frozen=True, slots=True)
class Timer:
    """The time asked for by the last :class:`SetTimer` has come."""

    time: float


Event = (
    Arrival | Yielded | Completed | Cancelled | Failed | Memory | Reserved | Dropped | Decoding | Timer
)  # fmt: skip

_RANK: dict[type[object], int] = {
    Completed: 0, Failed: 0, Yielded: 0, Memory: 1, Reserved: 1, Dropped: 1, Decoding: 1,
    Cancelled: 2, Arrival: 3, Timer: 4,
}  # fmt: skip


def event_order(event: Event, sequence: int) -> tuple[float, int, int]:
    """Sort key of simultaneous events: ends before cancels before arrivals before timers, then sequence."""
    return (event.time, _RANK[type(event)], sequence)


@dataclass(frozen=True, slots=True)
class Launch:
    """Start or go on with a run; stop at the latest after ``max_segments`` segments (None: run on).

    ``tokens`` is None for a whole run. A step policy (``vllm:N,T``) gives the new tokens of each member for
    this launch: the whole program is executed once on these token slices, each continuing its own cache.
    """

    run: str
    requests: tuple[str, ...]
    max_segments: int | None = None
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Raise the run's preemption flag; answered by Yielded, Completed or Failed."""

    run: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Move a paused run's memory off the device (to the host, or drop it and recompute)."""

    run: str


@dataclass(frozen=True, slots=True)
class Restore:
    """Bring an evicted run's memory back; its Launch follows."""

    run: str


@dataclass(frozen=True, slots=True)
class Reject:
    """The request ends without being served, for this reason."""

    request: str
    reason: str


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Send :class:`Timer` at this time; replaces the timer asked for before."""

    time: float


Command = Launch | Pause | Evict | Restore | Reject | SetTimer

"""The life of a run as a literal table: what may happen in which state, and where it leads.

A run starts as a waiting request, is launched and paused any number of times, and ends in exactly one of
four ways. A waiting request that is packed into another one's run is *joined*: it shares that run's fate.
A pair that the table lacks is a defect of the driver or of the core, and raises
:class:`fpcompile.scheduler.errors.TransitionError` with the request's story.
"""

from __future__ import annotations

from enum import Enum
from types import MappingProxyType

__all__ = ["ENDED", "TRANSITIONS", "State", "diagram", "legal_kinds"]


class State(Enum):
    """Where a run is. The last four are ends."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    EVICTED = "evicted"
    JOINED = "joined"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    FAILED = "failed"


_S = State

TRANSITIONS = MappingProxyType(
    {
        (_S.NEW, "arrival"): _S.WAITING,
        (_S.NEW, "reject"): _S.REJECTED,
        (_S.WAITING, "launch"): _S.RUNNING,
        (_S.WAITING, "join"): _S.JOINED,
        (_S.WAITING, "reject"): _S.REJECTED,
        (_S.WAITING, "cancelled"): _S.CANCELLED,
        (_S.RUNNING, "pause"): _S.PAUSING,
        (_S.RUNNING, "yielded"): _S.PAUSED,
        (_S.RUNNING, "completed"): _S.COMPLETED,
        (_S.RUNNING, "failed"): _S.FAILED,
        (_S.RUNNING, "cancelled"): _S.CANCELLING,
        (_S.PAUSING, "yielded"): _S.PAUSED,
        (_S.PAUSING, "completed"): _S.COMPLETED,
        (_S.PAUSING, "failed"): _S.FAILED,
        (_S.PAUSING, "cancelled"): _S.CANCELLING,
        (_S.PAUSED, "launch"): _S.RUNNING,
        (_S.PAUSED, "evict"): _S.EVICTED,
        (_S.PAUSED, "cancelled"): _S.CANCELLED,
        (_S.PAUSED, "failed"): _S.FAILED,
        (_S.EVICTED, "restore"): _S.PAUSED,
        (_S.EVICTED, "cancelled"): _S.CANCELLED,
        (_S.EVICTED, "failed"): _S.FAILED,
        (_S.JOINED, "completed"): _S.COMPLETED,
        (_S.JOINED, "failed"): _S.FAILED,
        (_S.JOINED, "cancelled"): _S.CANCELLED,
        (_S.CANCELLING, "yielded"): _S.CANCELLED,
        (_S.CANCELLING, "completed"): _S.CANCELLED,
        (_S.CANCELLING, "failed"): _S.FAILED,
        (_S.CANCELLING, "cancelled"): _S.CANCELLING,
    }
)

ENDED = frozenset({_S.COMPLETED, _S.CANCELLED, _S.REJECTED, _S.FAILED})


def legal_kinds(state: State) -> list[str]:
    """The events and commands that are possible in ``state``, sorted."""
    return sorted(kind for origin, kind in TRANSITIONS if origin is state)


def diagram() -> str:
    """The table as a Mermaid state diagram (docs/scheduling.md shows it; a test compares the two)."""
    lines = ["stateDiagram-v2", "    [*] --> new"]
    lines += [f"    {origin.value} --> {to.value}: {kind}" for (origin, kind), to in TRANSITIONS.items()]
    lines += [f"    {state.value} --> [*]" for state in State if state in ENDED]
    return "\n".join(lines)

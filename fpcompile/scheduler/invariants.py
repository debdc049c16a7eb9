"""What must be true of a scheduler core after every event. Tests call it; it costs O(n)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fpcompile.scheduler.errors import InvariantError
from fpcompile.scheduler.states import ENDED, State

if TYPE_CHECKING:
    from fpcompile.scheduler.core import Scheduler

__all__ = ["check"]

_FLYING = {State.RUNNING, State.PAUSING, State.CANCELLING}
_QUEUED = {State.WAITING, State.PAUSED, State.EVICTED}


def check(core: Scheduler) -> None:
    """Raise :class:`InvariantError` naming the first invariant that does not hold."""
    flight = {job.id for job in core.flight}
    _need(core, len(flight) == len(core.flight), "a run is in flight once")
    for name, job in core.jobs.items():
        _need(core, name == job.id, "jobs are filed under their own id", name)
        _need(core, job.state not in ENDED and job.state is not State.NEW, "only live runs are kept", name)
        _need(core, (job.state in _FLYING) == (name in flight), "running exactly when in flight", name)
        _need(core, (job.state in _QUEUED) == (name in core.queue.jobs), "queued exactly when not", name)
        _need(core, (job.state is State.PAUSED) == (name in core.paused), "paused runs are known", name)
        _need(core, (job.state is State.JOINED) == (job.host is not None), "joined has a host", name)
        _need(core, (job.launched_at is not None) == (name in flight), "clock runs in flight only", name)
        _need(core, job.left >= 0 and job.executed >= 0, "times are not negative", name)
        _need(core, job.state not in (State.WAITING, State.EVICTED) or not job.held, "no memory held", name)
        if job.host is not None:
            _need(core, job.host.id in core.jobs, "the host is alive", name)
            _need(core, job in job.host.joined, "the host knows its member", name)
    _need(core, all(name in core.jobs for name in core.queue.jobs), "the queue holds live runs only")
    _need(core, all(name in core.jobs for name in core.paused), "only live runs are paused")
    core.queue.validate()
    _need(core, all(job.state in ENDED for job in core.ended.values()), "ended runs are in an end state")
    if core.memory.limited:
        held = sum(job.held for job in core.jobs.values())
        _need(core, held + max(core.memory.free, 0) <= core.memory.capacity, "memory held fits the cache")
        _need(core, core.memory.free >= 0 or core.memory.outside > 0, "free memory is not negative")
    if not core.flight and core.queue.jobs and not core.memory.limited:
        _need(core, core.may_idle, "the device is not idle while a run could go")


def _need(core: Scheduler, ok: bool, what: str, name: str = "") -> None:
    if not ok:
        story = core.story(name) if name else ()
        raise InvariantError(
            f"invariant broken: {what}", got=name or None, where=str(story) if story else None
        )

"""A device for tests: acknowledges pauses at once, executes what was predicted, checks the invariants."""

from __future__ import annotations

from math import inf

from fpcompile.scheduler import (
    Arrival,
    Completed,
    CostTable,
    Event,
    Evict,
    Launch,
    Pause,
    Policy,
    Reject,
    Request,
    Restore,
    Scheduler,
    SetTimer,
    Timer,
    TtftPredictor,
    Yielded,
)

LINEAR = CostTable.from_segments([("all", (0.0, 0.01, 0.0))])
"""10 ms per token, nothing else."""


def job(name: str, at: float, due: float, cost: float, **more: object) -> Request:
    """A request on the LINEAR table: its tokens are its cost in units of 10 ms."""
    return Request(name, at, due, max(1, round(cost * 100)), cost, slo=max(due - at, 1e-9), **more)  # type: ignore[arg-type]


def run_all(
    policy: Policy | str,
    requests: list[Request],
    predictor: TtftPredictor | None = None,
    **options: object,
) -> list[str]:
    """Feed everything at its arrival; the log of commands and completions."""
    core = Scheduler(policy, predictor=predictor, **options)  # type: ignore[arg-type]
    log: list[str] = []
    pending = sorted(requests, key=lambda request: request.arrival)
    left = {request.id: request.cost for request in requests}
    now, flying, timer = 0.0, "", inf
    while True:
        ends = now + left[flying] if flying else inf
        arrives = pending[0].arrival if pending else inf
        at = min(ends, arrives, timer)
        if at == inf:
            return log
        if flying:
            left[flying] -= at - now
        now = at
        events: list[Event] = []
        if ends == at:
            log.append(f"{now:g} done {flying}")
            events.append(Completed(now, flying))
            flying = ""
        while pending and pending[0].arrival == at:
            events.append(Arrival(now, pending.pop(0)))
        if timer == at:
            timer = inf
            events.append(Timer(now))
        while events:
            commands = core.handle_all(events)
            core.validate()
            events = []
            for command in commands:
                if isinstance(command, SetTimer):
                    timer = command.time
                    continue
                if isinstance(command, Launch):
                    flying = command.run
                    if len(command.requests) > 1:
                        left[flying] = core.jobs[flying].left
                    log.append(f"{now:g} launch {'+'.join(command.requests)}")
                elif isinstance(command, Pause):
                    log.append(f"{now:g} pause {command.run}")
                    events.append(Yielded(now, flying, max(left[flying], 0.0)))
                    flying = ""
                else:
                    assert isinstance(command, Evict | Restore | Reject)
                    name = command.request if isinstance(command, Reject) else command.run
                    log.append(f"{now:g} {type(command).__name__.lower()} {name}")


def finished(log: list[str]) -> list[str]:
    """The names in the order in which they were done."""
    return [line.split()[-1] for line in log if " done " in line]

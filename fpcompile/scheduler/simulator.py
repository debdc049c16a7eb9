"""The scheduler against a simulated device: same core and policies, a clock that jumps.

The device executes one launch at a time on its timeline (:mod:`timeline`), stops at the stop points of the
policy's grain, has a cache of ``kv_blocks``, and takes time to evict and restore. Replicas are independent
cores behind a router; each sees only its own requests.

Words
    *blocking time*  from the Pause to the moment the device is free.
    *outcome*        what became of a request; :class:`Outcome` is immutable and complete.

Invariants
    The same requests, policy and options give the same outcomes, on any machine. Every request ends: it is
    completed or rejected. Device time is conserved: busy time = executed time of all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise
from math import inf
from time import perf_counter
from typing import Any

from fpcompile.errors import InternalError, InvalidInputError
from fpcompile.scheduler.core import Scheduler
from fpcompile.scheduler.costs import CostTable
from fpcompile.scheduler.events import (
    Arrival,
    Command,
    Completed,
    Decoding,
    Event,
    Evict,
    Launch,
    Memory,
    Pause,
    Reject,
    Request,
    Restore,
    SetTimer,
    Timer,
    Yielded,
)
from fpcompile.scheduler.policy import Policy, StepPolicy, make_policy
from fpcompile.scheduler.predictor import CostPredictor
from fpcompile.scheduler.timeline import Timeline, Timelines

__all__ = ["Outcome", "SimulationResult", "Simulator", "simulate"]

Log = Callable[[Event, tuple[Command, ...]], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. ``ttft`` is None when it was rejected."""

    request: Request
    ttft: float | None
    started: float | None
    preemptions: int
    reason: str = ""

    @property
    def met(self) -> bool:
        """Whether the first token came by the deadline."""
        ttft = self.ttft
        return ttft is not None and self.request.arrival + ttft <= self.request.deadline + 1e-9


@dataclass(slots=True)
class SimulationResult:
    """Outcomes in order of arrival, and what was seen on the device."""

    outcomes: list[Outcome] = field(default_factory=list)
    blocking: list[float] = field(default_factory=list)
    pauses: int = 0
    launches: int = 0
    evictions: int = 0
    busy_s: float = 0.0
    late_s: float = 0.0
    """Device time given to requests that could no longer meet their deadline when it was given."""
    end: float = 0.0
    events: int = 0
    scheduler_s: float = 0.0
    peak_waiting: int = 0
    peak_paused_tokens: int = 0
    """The most tokens of paused runs that were on the device at once; evicted ones are not."""


@dataclass(slots=True)
class _Run:
    """A run on the device, or paused: how far it is on its timeline."""

    timeline: Timeline
    requests: list[Request]
    predicted: float
    offset: float = 0.0
    ready_at: float = 0.0
    preemptions: int = 0


class Simulator:
    """One device under one core.

    ``slowdown``: actual = predicted x slowdown(request), to study wrong predictions; None: exact. With
    ``learnt`` the core hears what is really left of a paused run, as from a predictor that was corrected.
    ``wake_s(request)``: seconds >= 0 by which a run is later that finds the device idle (a sleeping core,
    cold caches); no decision knows of it; None: none.
    ``decode_s``: seconds between two tokens of a generating request; ``decode_step`` (a, b): a step that
    generates one token of each of B requests takes a + b*B seconds out of every ``decode_s``, which slows the
    prefill on the device down, as the core is told. Steps fit between its stop points; their lateness is not
    modelled.
    ``evict_s`` and ``restore_s``: seconds per cache block moved. ``time_decisions`` measures ``handle`` by
    the wall clock (the only use of a clock, and it changes no decision). ``log`` sees every event with its
    commands. ``core``: in place of a fresh one; it has its ``options`` already. Raises
    :class:`InvalidInputError` for wrong ones.
    """

    def __init__(
        self,
        policy: Policy | str,
        table: CostTable,
        *,
        core: Scheduler | None = None,
        slowdown: Callable[[Request], float] | None = None,
        learnt: bool = False,
        wake_s: Callable[[Request], float] | None = None,
        evict_s: float = 0.0,
        restore_s: float = 0.0,
        decode_s: float = 0.0,
        decode_step: tuple[float, float] = (0.0, 0.0),
        time_decisions: bool = False,
        log: Log | None = None,
        **options: Any,
    ) -> None:
        chosen = make_policy(policy)
        _check(table, decode_step, evict_s=evict_s, restore_s=restore_s, decode_s=decode_s)
        if core is None:
            options.setdefault("move_s", evict_s + restore_s)
            core = Scheduler(chosen, predictor=CostPredictor(table), **options)
        elif options:
            raise InvalidInputError(
                "options of a core that is made already", expected="core= or options", got=", ".join(options)
            )
        self.core = core
        self.table = table
        self.result = SimulationResult()
        self._timelines = Timelines(table, self.core.policy.grain)
        self._steps = isinstance(self.core.policy, StepPolicy)
        self._learnt, self._wake_s = learnt, wake_s
        self._slowdown, self._decode_s, self._decode_step = slowdown, decode_s, decode_step
        self._decoding = 0
        self._speed = self._told = 1.0  # of a prefill beside decode steps; what the core knows of it
        self._move_s = {Evict: evict_s, Restore: restore_s}
        self._timed, self._log = time_decisions, log
        self._requests: dict[str, Request] = {}
        self._runs: dict[str, _Run] = {}
        self._context: dict[str, int] = {}
        self._first: dict[str, float] = {}
        self._done: dict[str, Outcome] = {}
        self._paused_tokens = 0
        self._releases: list[tuple[float, int]] = []
        self._running: _Run | None = None
        self._name = ""
        self._began = 0.0
        self._landed = -inf  # when the device stopped last
        self._since = 0.0  # progress: _base + (now - _since) / _pace, until _stops_at, at the time _end
        self._base = 0.0
        self._pace = 1.0
        self._stops_at = 0.0
        self._end = inf
        self._asked = inf  # when the pause was asked for
        self._slices: tuple[int, ...] = ()
        self._members: tuple[str, ...] = ()
        self._busy_until = 0.0  # transfers
        self._timer = inf

    def run(self, requests: Sequence[Request]) -> SimulationResult:
        """Simulate until every request has ended. Requests must be sorted by arrival, each with its own id.

        Raises :class:`InvalidInputError` for others, :class:`EventOrderError` for an id that comes twice.
        """
        _check_requests(requests)
        self._requests = {request.id: request for request in requests}
        arrivals = [*requests]
        index, count = 0, len(arrivals)
        while True:
            at = arrivals[index].arrival if index < count else inf
            release = self._releases[0][0] if self._releases else inf
            now = min(at, self._end, self._timer, release)
            if now == inf:
                break
            events: list[Event] = []
            if self._end <= now:
                events.append(self._land(now))
            while self._releases and self._releases[0][0] <= now:
                self._release(now, events)
            while index < count and arrivals[index].arrival <= now:
                events.append(Arrival(now, arrivals[index]))
                index += 1
            if self._timer <= now:
                self._timer = inf
                events.append(Timer(now))
            if events and self._speed != self._told:
                self._told = self._speed
                events.insert(0, Decoding(now, 1.0 - self._speed))
            if events:
                self._give(events, now)
        return self._finish(arrivals)

    def _finish(self, arrivals: list[Request]) -> SimulationResult:
        missing = [request.id for request in arrivals if request.id not in self._done]
        if missing:
            state = self.core.state(missing[0]).value
            raise InternalError(f"{len(missing)} requests never ended", got=f"{missing[0]!r} is {state}")
        self.result.outcomes = [self._done[request.id] for request in arrivals]
        return self.result

    def _give(self, events: list[Event], now: float) -> None:
        """Hand events to the core and carry out its commands."""
        result = self.result
        started = perf_counter() if self._timed else 0.0
        commands = self.core.handle_all(events)
        if self._timed:
            result.scheduler_s += perf_counter() - started
        result.events += len(events)
        result.end = now
        waiting = self.core.waiting
        if waiting > result.peak_waiting:
            result.peak_waiting = waiting
        if self._log is not None:
            for event in events[:-1]:
                self._log(event, ())
            self._log(events[-1], commands)
        for command in commands:
            self._carry_out(command, now)

    def _carry_out(self, command: Command, now: float) -> None:
        if isinstance(command, Launch):
            self._launch(command, now)
        elif isinstance(command, Pause):
            self._pause(now)
        elif isinstance(command, SetTimer):
            self._timer = command.time
        elif isinstance(command, Reject):
            request = self._requests[command.request]
            self._done[request.id] = Outcome(request, None, None, 0, command.reason)
        else:
            members, evicted = self._runs[command.run].requests, isinstance(command, Evict)
            blocks, tokens = sum(r.kv_blocks for r in members), sum(r.tokens for r in members)
            self._paused_tokens += -tokens if evicted else tokens
            self.result.evictions += evicted
            self._busy_until = max(self._busy_until, now) + self._move_s[type(command)] * blocks

    # ---- the device

    def _launch(self, command: Launch, now: float) -> None:
        begin = max(now, self._busy_until)
        if self._wake_s is not None and self._landed < now:
            begin += self._wake_s(self._requests[command.requests[0]])
        self.result.launches += 1
        self._name, self._began, self._since, self._asked = command.run, begin, begin, inf
        self._members, self._slices = command.requests, command.tokens or ()
        for name in command.requests:
            self._first.setdefault(name, begin)
        if command.tokens is not None:
            slices = [
                (n, self._context.get(r, 0)) for r, n in zip(command.requests, command.tokens, strict=True)
            ]
            self._base, self._stops_at = 0.0, self.table.pack_seconds(slices)
            self._pace_of(self._requests[command.run])
            return
        run = self._runs.get(command.run)
        if run is None:
            members = [self._requests[name] for name in command.requests]
            timeline = self._timelines.of([request.tokens for request in members])
            run = self._runs[command.run] = _Run(timeline, members, timeline.length)
        else:
            self._paused_tokens -= sum(request.tokens for request in run.requests)
        self._running = run
        self._base, self._stops_at = run.offset, run.timeline.length
        if command.max_segments is not None:
            self._stops_at = run.timeline.after(run.offset, command.max_segments)
        self._pace_of(run.requests[0])
        if self.core.jobs[command.run].deadline < self._end:
            self.result.late_s += self._end - begin

    def _pace_of(self, request: Request) -> None:
        """Seconds that one predicted second of the run on the device takes now, and when it will stop."""
        self._pace = (1.0 if self._slowdown is None else self._slowdown(request)) / self._speed
        self._end = self._since + self._pace * (self._stops_at - self._base)

    def _decode_load(self, change: int, now: float) -> None:
        """Requests begin or end to generate: the prefill on the device gets another share of it."""
        if self._decode_step == (0.0, 0.0) or not self._decode_s:
            return
        self._decoding += change
        fixed, each = self._decode_step
        step = fixed + each * self._decoding if self._decoding else 0.0
        self._speed = max(1.0 - step / self._decode_s, 0.05)
        if self._end < inf and self._end > now:
            begun = max(now, self._since)
            self._base += (begun - self._since) / self._pace
            self._since = begun
            self._pace_of(self._requests[self._name])

    def _pause(self, now: float) -> None:
        run = self._running
        assert run is not None
        self.result.pauses += 1
        self._asked = now
        reached = self._base + max(now - self._since, 0.0) / self._pace
        stop = min(run.timeline.next_stop(reached), self._stops_at)
        if self.core.jobs[self._name].deadline < self._end:
            self.result.late_s -= self._pace * (self._stops_at - stop)
        self._stops_at = stop
        self._end = max(now, self._since + self._pace * (stop - self._base))

    def _land(self, now: float) -> Event:
        """The device has stopped: what it reports."""
        self.result.busy_s += now - self._began
        self._end, self._landed = inf, now
        if self._asked < inf:
            self.result.blocking.append(now - self._asked)
        if self._slices:
            return self._land_step(now)
        run = self._running
        assert run is not None
        self._running = None
        if self._stops_at >= run.timeline.length - 1e-12:
            del self._runs[self._name]
            for request in run.requests:
                self._served(request, now, run.preemptions)
            return Completed(now, self._name)
        run.offset = self._stops_at
        run.preemptions += self._asked < inf
        self._paused_tokens += sum(request.tokens for request in run.requests)
        self.result.peak_paused_tokens = max(self.result.peak_paused_tokens, self._paused_tokens)
        left = run.timeline.length - run.offset
        if self._learnt and self._slowdown is not None:
            left *= self._slowdown(run.requests[0])
        return Yielded(now, self._name, left)

    def _land_step(self, now: float) -> Event:
        unfinished = False
        for name, tokens in zip(self._members, self._slices, strict=True):
            request = self._requests[name]
            done = self._context[name] = self._context.get(name, 0) + tokens
            if done >= request.tokens:
                self._served(request, now, 0)
            else:
                unfinished = True
        return Yielded(now, self._name) if unfinished else Completed(now, self._name)

    def _served(self, request: Request, now: float, preemptions: int) -> None:
        self._done[request.id] = Outcome(request, now - request.arrival, self._first[request.id], preemptions)
        if request.decode_tokens and self._decode_s:
            self._decode_load(1, now)
            heappush(self._releases, (now + request.decode_tokens * self._decode_s, request.kv_blocks))
        elif request.decode_tokens and self.core.memory.limited:
            heappush(self._releases, (now, request.kv_blocks))

    def _release(self, now: float, events: list[Event]) -> None:
        """A request has been decoded to its end: its blocks are free.

        The report comes first: it does not know of what ends at the same moment, and that is counted then.
        """
        _, blocks = heappop(self._releases)
        if self._decode_s:
            self._decode_load(-1, now)
        if not self.core.memory.limited:
            return
        first = events[0] if events else None
        if isinstance(first, Memory):
            events[0] = Memory(now, first.free_blocks + blocks)
        else:
            events.insert(0, Memory(now, int(self.core.memory.free) + blocks))


def _check(table: Any, decode_step: Any, **seconds: Any) -> None:
    """Raise :class:`InvalidInputError` for the first argument of a simulator that is wrong."""
    if not isinstance(table, CostTable):
        raise InvalidInputError(
            "table is no cost table",
            expected="a CostTable: profile(), load_costs(path), CostTable.from_segments(...)",
            got=repr(table),
        )
    if not isinstance(decode_step, tuple) or len(decode_step) != 2:
        raise InvalidInputError(
            "decode_step of a simulation",
            expected="(seconds of a step, seconds more for each request in it)",
            got=repr(decode_step),
        )
    fixed, each = decode_step
    for name, value in {**seconds, "decode_step[0]": fixed, "decode_step[1]": each}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < inf:
            raise InvalidInputError(
                f"{name} of a simulation", expected="finite seconds >= 0", got=repr(value)
            )


def _check_requests(requests: Any) -> None:
    given = requests if isinstance(requests, Sequence) else [requests]
    for request in given:
        if not isinstance(request, Request):
            raise InvalidInputError(
                "a simulation serves requests", expected="a sequence of Request", got=repr(request)
            )
    for before, behind in pairwise(requests):
        if behind.arrival < before.arrival:
            raise InvalidInputError(
                "the requests are not sorted by arrival",
                expected=f"{behind.id!r} not before {before.arrival!r} s",
                got=f"{behind.arrival!r} s",
                remedy="sorted(requests, key=lambda request: request.arrival)",
            )


def simulate(
    policy: Policy | str, requests: Sequence[Request], table: CostTable, **options: Any
) -> SimulationResult:
    """One device, from empty to empty; ``options`` are those of :class:`Simulator` and of the scheduler."""
    return Simulator(policy, table, **options).run(requests)

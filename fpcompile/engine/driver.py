"""Scheduler and executor put together: events in, commands carried out, one run at a time on the device.

Whoever owns the loop calls ``turn``: the engine's device thread, an asyncio task, another server. There is
no thread and no waiting here. Between two segments the driver reads the inbox's flag; when something has
come, the scheduler hears of it at once, and only if *it* asks for a pause does the run give way.

Words
    *flight*  the run that has the device, from Launch to its Yielded, Completed or Failed.
    *lane*    the tickets whose prompt is done and that decode: unknown to the scheduler.

Invariants (``validate``)
    The flight is the scheduler's; what is known is exactly what the scheduler holds; see
    :mod:`fpcompile.engine.hearing`. Every ticket ends once, by ``_finish``. A segment that raises ends its
    own request.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any, final

from fpcompile.engine import journal
from fpcompile.engine.decoding import DecodeOptions, Lane
from fpcompile.engine.errors import twin
from fpcompile.engine.flight import Boarding, Flight
from fpcompile.engine.health import Launching, Watchdog
from fpcompile.engine.hearing import Hearing
from fpcompile.engine.loads import UNFINISHED, Load
from fpcompile.engine.memory import Memory
from fpcompile.engine.metrics import Ended, Ticket
from fpcompile.engine.modes import Shape, whole
from fpcompile.engine.pilot import Ending, Landing, Pilot
from fpcompile.engine.prices import Prices, launch_of
from fpcompile.engine.programs import Programs
from fpcompile.engine.promises import affordable
from fpcompile.engine.recorder import Recorder, joined
from fpcompile.engine.registry import Registry
from fpcompile.engine.relief import Relief
from fpcompile.engine.renewal import renew
from fpcompile.engine.reports import Reports
from fpcompile.engine.rides import Rides
from fpcompile.engine.statistics import Counts, EngineStatistics
from fpcompile.errors import (
    DeviceFailedError,
    InternalError,
    RequestCancelledError,
    RequestRejectedError,
    RequestTimeoutError,
)
from fpcompile.executor.device import Device
from fpcompile.executor.loop import Hook
from fpcompile.executor.offload import settle
from fpcompile.scheduler.core import Scheduler
from fpcompile.scheduler.events import (
    Arrival,
    Cancelled,
    Command,
    Completed,
    Decoding,
    Event,
    Evict,
    Failed,
    Launch,
    Pause,
    Reject,
    Reserved,
    Restore,
    SetTimer,
    Yielded,
)
from fpcompile.scheduler.job import Job
from fpcompile.scheduler.states import State

__all__ = ["Driver"]

logger = logging.getLogger(__name__)

_SHORTEST = 1e-3  # seconds; nobody is told to come back sooner
_REFUSED = 0.01  # seconds for which nothing is to spare for streams, unless something happens


@final
class Driver(Hearing):
    """The state of one device. ``turn`` and ``abort`` belong to one thread at a time."""

    def __init__(
        self,
        programs: Programs,
        make_core: Callable[[], Scheduler],
        device: Device,
        *,
        registry: Registry,
        prices: Prices,
        clock: Callable[[], float],
        decoding: DecodeOptions,
        memory: Memory,
        shape: Shape = whole,
        max_blocking: float | None = None,
        recorder: Recorder | None = None,
        on_segment: Hook | None = None,
        record: str | Path | None = None,
    ) -> None:
        hook = joined(recorder, on_segment)
        self.pilot = Pilot(device, clock=clock, max_blocking=max_blocking, on_segment=hook)
        super().__init__(make_core, registry=registry, clock=clock, recorder=recorder, record=record)
        self.watchdog = Watchdog(clock, self._launching)
        self.counts = Counts()
        self.prices = prices
        self.memory = memory
        self._relief = Relief(memory, device, self._last_first)
        self.lane = Lane(
            self.pilot, decoding, programs.names, clock=clock, finish=self._finish,
            make_room=self._relief.make_room, recorder=recorder, rooms=memory.rooms, renew=self._renew,
            affords=self._affords, took=memory.took,
        )  # fmt: skip
        self._rides = Rides(self.lane, self.pilot, prices)
        if memory.decoding is not None:
            memory.decoding.give_way = self._give_way
        if memory.budgeted is not None:
            memory.budgeted.relieve = self._relief.relieve
        self._programs, self._shape = programs, shape
        self.abandoned = False
        """Whether the engine is closed without waiting for its requests."""
        self._flight: Flight | None = None
        self._refused = -inf
        self._boarding = Boarding(self.pilot, memory, programs, registry, recorder)
        self._reports = Reports(memory, self.lane, prices)

    # ---- for the owner of the loop

    def turn(self, max_segments: int | None = None) -> bool:
        """Hear what has happened, then go on with the run that has the device until it gives it back.

        ``max_segments`` returns to the caller after so many segments; the run keeps the device. False when
        the device is idle. Raises :class:`DeviceFailedError`.
        """
        now = self.clock()
        self.watchdog.at_cut(now)
        try:
            with self.pilot.ready():
                if self._called(now) or self.memory.freed:
                    self._hear()
                busy = self._go_on(max_segments)
        except Exception as error:
            self.pilot.check(error)
            raise
        self.watchdog.left()
        return busy

    def _go_on(self, max_segments: int | None) -> bool:
        if self.lane and self._borrows() and self.lane.ready():  # may tell the scheduler that memory is short
            self._decode(self._flight, max_segments)
        elif self._flight is not None:
            self._fly(self._flight, max_segments)
        else:
            return self.inbox.flag or self.memory.freed
        return True

    def _borrows(self) -> bool:
        """Whether a decode step may have the device now."""
        flight = self._flight
        return flight is None or flight.lends or not self.lane.lets(flight.load)

    def retry_after(self) -> float:
        """Estimated seconds until the next request is launched: what the present run has left."""
        flight = self._flight
        if flight is None:
            return _SHORTEST
        load = flight.load
        whole = self.prices.corrected(load.owner, load.tokens, load.seconds)
        left = whole - load.executed - (self.clock() - flight.begun)
        return max(left / (1 - self._reports.share), _SHORTEST)

    def statistics(self) -> EngineStatistics:
        """A snapshot; from any thread."""
        live = self.registry.live()
        states = [ticket.state for ticket in live]
        return self.counts.snapshot(
            running=states.count("running"),
            waiting=states.count("waiting"),
            paused=states.count("paused"),
            paused_bytes=self.memory.bytes_of(live),
            decoding=states.count("decoding"),
            decoding_bytes=sum(t.generation.nbytes for t in live if t.generation is not None),
            tokens=self.lane.tokens,
            error=self.prices.error,
            memory=self.memory.statistics(),
        )

    def cancel_all(self) -> None:
        """Cancel everything that is live; from any thread, takes effect at the next cut."""
        self.abandoned = True
        for ticket in self.registry.live():
            ticket.handle.cancel()

    def give_up_what_is_held(self) -> None:
        """Cancel what a policy holds back on an idle device, once nothing can come that would change it."""
        if self.registry.closed and self.registry.live() and not self.inbox.flag and self._timer == inf:
            self.cancel_all()

    def abort(self, error: BaseException) -> None:
        """The loop is broken: everybody hears of it, and nobody is admitted any more."""
        logger.critical("the engine's loop is broken", exc_info=error)
        self.watchdog.broke(error)
        self.registry.close(error)
        if self._flight is not None and self._flight.ride is not None:
            with contextlib.suppress(Exception):
                self._flight.ride.run.again()
        self._flight = None
        self.lane.clear()
        for ticket in self.registry.live():
            broken: Exception
            if isinstance(error, DeviceFailedError):
                broken = twin(error)
            else:
                broken = InternalError("the engine's loop is broken", got=f"{type(error).__name__}: {error}")
                broken.__cause__ = error
            try:
                self._finish(ticket, "failed", error=broken)
            except Exception:
                about = {"request_id": ticket.id}
                logger.exception("request %r could not be ended properly", ticket.id, extra=about)

    def validate(self) -> None:
        """Check the invariants; raises :class:`InternalError` or the scheduler's own error."""
        self.core.validate()
        flown = self._flight.load.name if self._flight is not None else None
        if flown != self.core.in_flight:
            raise InternalError(
                "driver and scheduler disagree", expected=repr(self.core.in_flight), got=repr(flown)
            )
        held = {name for name, job in self.core.jobs.items() if not job.withdrawn}
        if set(self._known) != held:
            raise InternalError(
                "the scheduler holds other requests than the driver",
                expected=str(sorted(held)),
                got=str(sorted(self._known)),
            )
        self.lane.validate()
        self.memory.validate(self.core.memory.free + self.core.memory.outside)

    # ---- the flight

    def _fly(self, flight: Flight, max_segments: int | None) -> None:
        if flight.error is not None and self._relief.before_launch(flight.load, flight.error):
            self._boarding.again(flight)
        load, quota = flight.load, flight.quota
        limit = max_segments if quota is None else quota
        if quota is not None and max_segments is not None:
            limit = min(quota, max_segments)
        last = quota is not None and limit == quota
        stop = self._stop_behind if self.core.policy.grain.synchronises else self._stop
        flight.begun, flight.made, flight.lends = self.clock(), 0, False
        self._rides.begin(flight, lambda: self._flight is flight and not flight.pause)
        if self._flight is not flight:
            return  # the scheduler failed when it heard that memory is short
        if self.recorder is not None:
            self.recorder.lanes = load.names
        landing = (
            Landing(Ending.FAILED, error=flight.error)
            if flight.error is not None
            else self.pilot.fly(flight.run, stop, limit, cost=flight.cost, gives_back=last)
        )
        now = self._now()
        self.watchdog.at_cut(now)
        load.executed += now - flight.begun  # without what a host does between two turns
        flight.begun = now
        if self._flight is not flight:
            return  # the scheduler failed meanwhile, and these requests with it
        if landing.ending is Ending.UNDERWAY or (landing.ending is Ending.STOPPED and flight.lends):
            made = flight.made if flight.lends else limit or 0
            flight.quota = None if quota is None else quota - made
            return
        rode = flight.ride
        if (landed := self._rides.landed(flight, landing)) is None:
            return
        landing, own = landed, 1.0 if rode is None else rode.own
        self._land(flight, now)
        if landing.ending is Ending.STOPPED:
            self._yield(load, now)
        elif landing.error is not None:
            self._failed(load, landing.error)
        else:
            self._completed(load, landing.value, own=own)

    def _at_cut(self) -> None:
        """Between two launches: hear what has come, and let go of what was copied away."""
        now = self.clock()
        self.watchdog.at_cut(now)
        if self.memory.flying:
            settle(self.memory.flying)
        if self._called(now):
            self._hear()

    def _stop(self) -> bool:
        """The question between two segments: has anything come that takes the device away?"""
        self._at_cut()
        flight = self._flight
        if flight is None or flight.pause:
            return True
        if not self.lane.lets(flight.load, flight.load.next_launch):
            flight.lends = True
            return True
        flight.made += 1
        return False

    def _decode(self, beside: Flight | None, max_segments: int | None) -> None:
        """Go on with the lane's step, or make a new one, while the flight ``beside`` it waits."""
        start = self.clock()

        def stop() -> bool:
            self._at_cut()
            if not self.lane.stepping:
                return True
            flight = self._flight
            gives_way = flight is not None and (flight is not beside or flight.pause)
            return gives_way and flight is not None and self.lane.lets(flight.load)

        if beside is not None:
            beside.lends = False
        self.lane.fly(stop, max_segments)
        now = self.clock()
        self.watchdog.at_cut(now)
        if self._flight is not None:
            for ticket in self._flight.load.served:
                ticket.lent(start, now)

    def _affords(self, stretch: float) -> bool:
        """Whether promises to prompts are kept if what is left of each takes ``stretch`` times as long.

        Asked at every cut while streams wait: a no holds for 10 ms, or until something happens.
        """
        flight, now = self._flight, self._now()
        if now < self._refused:
            return False
        alone = 1 - self._reports.share  # of what the scheduler predicts

        def left(job: Job) -> float:
            if flight is None or flight.load.shared or flight.load.name != job.id:
                return job.remaining(now) * alone
            load = flight.load
            return self.prices.corrected(load.owner, load.tokens, load.left())

        affords = affordable(self.core.jobs.values(), now, stretch, left)
        self._refused = -inf if affords else now + _REFUSED
        return affords

    def _launching(self, behind: int) -> Launching | None:
        """For the watchdog: what is under way, or (``behind`` 1) what was before the last cut."""
        if (under := self.lane.launching()) is not None:
            return under
        flight = self._flight
        if flight is None:
            return None
        name, seconds = launch_of(flight.load.program, flight.run, behind=behind)
        return Launching(flight.load.name, name, seconds)

    def _stop_behind(self) -> bool:
        """The same for a policy that waits for the device at every check."""
        self.pilot.wait()
        return self._stop()

    def _land(self, flight: Flight, now: float) -> None:
        self._rides.leave(flight)
        for ticket in flight.load.served:
            ticket.stopped(now)
        if flight.requested is not None:
            self.counts.blocking.append(now - flight.requested)
        self._flight = None

    def _yield(self, load: Load, now: float) -> None:
        """Stopped at a cut: by a pause, or at the end of its quota; a step only to be cancelled."""
        left = None if load.slices else self.prices.corrected(load.owner, load.tokens, load.left())
        if not load.served:
            load.release()
            self.memory.release(load.tickets)
        self._hear(Yielded(now, load.name, left), landed=load.names)
        served = load.served
        if not served or self._has_device(load):
            return
        load.run.suspend()
        self.memory.paused(load)
        next_one = self._flight.load.name if self._flight is not None else None
        self.counts.preemptions += 1
        for ticket in served:
            ticket.paused(next_one)
            journal.preempted(ticket, next_one)
            if self.recorder is not None:
                self.recorder.preempted(ticket, now)
        if self.memory.over:
            self._relief.relieve()

    def _failed(self, load: Load, error: Exception) -> None:
        """The run raised: that ends everybody in it, each with an error of its own."""
        if self._relief.begin_again(load, error):
            self._yield(load, self._now())
            return
        for number, ticket in enumerate(load.served):
            self._finish(ticket, "failed", error=twin(error) if number else error)
        load.release()
        self.memory.release(load.tickets)
        reason = f"{type(error).__name__}: {error}"
        self._hear(Failed(self._now(), load.name, reason), landed=load.names)

    def _last_first(self) -> list[str]:
        """Whose memory is moved first; by latest deadline when the policy fails to say."""
        try:
            return self.core.last_first(self._now())
        except Exception:
            logger.exception("policy %r failed to say who is last in line", self.core.policy.name)
            waiting = sorted(self._known.values(), key=lambda ticket: -ticket.request.deadline)
            return [ticket.id for ticket in waiting]

    def _completed(self, load: Load, value: Any, *, own: float) -> None:
        """The run is done: hand out results; a step may leave requests that go on.

        ``own``: the part of its seconds that was not a step's that rode with it.
        """
        self.prices.learn(load.owner, load.tokens, load.whole(), own * load.executed)
        going_on: list[Ticket] = []
        for ticket, result in zip(load.tickets, load.results(value), strict=True):
            if ticket.ended is not None:
                continue
            if self.core.state(ticket.id) in (State.CANCELLING, State.CANCELLED):
                self._cancelled(ticket)  # withdrawn while a step went on to its end for the others
            elif result is UNFINISHED:
                going_on.append(ticket)
            elif isinstance(result, Exception):
                self._finish(ticket, "failed", error=result)
            elif ticket.generation is not None:
                del self._known[ticket.id]
                self.memory.completed(ticket)
                self.lane.adopt(ticket, result)
            else:
                self._finish(ticket, "completed", result)
        self.memory.release([ticket for ticket in load.tickets if ticket not in going_on])
        ended = Yielded if going_on else Completed
        self._hear(ended(self._now(), load.name), landed=load.names)
        for ticket in going_on:
            if ticket.ended is None and ticket.state == "running" and not self._serves(ticket):
                ticket.rested()

    def _has_device(self, load: Load) -> bool:
        return self._flight is not None and self._flight.load is load

    def _serves(self, ticket: Ticket) -> bool:
        return self._flight is not None and ticket in self._flight.load.tickets

    # ---- events and commands

    def _carry_out(self, command: Command, events: Sequence[Event]) -> None:
        if isinstance(command, Launch):
            self._launch(command)
        elif isinstance(command, Pause):
            self._pause(command, events)
        elif isinstance(command, Reject):
            error = RequestRejectedError(command.request, reason=command.reason, remedy="submit it later")
            self._finish(self._known[command.request], "rejected", error=error)
        elif isinstance(command, SetTimer):
            self._timer = command.time
        elif isinstance(command, Evict):
            self.memory.evict(command.run)
        elif isinstance(command, Restore):
            pass  # its Launch follows: that brings back whatever is not there
        else:
            raise InternalError("a command that this engine does not know", got=repr(command))

    def _launch(self, command: Launch) -> None:
        tickets = [self._known[name] for name in command.requests if name in self._known]
        self._flight = self._boarding.board(command, tickets, self._now())

    def _besides(self, now: float) -> list[Event]:
        self._refused = -inf
        return self._reports.besides(self.core, now, self._last)

    def _news(self, now: float) -> list[Reserved]:
        return self._reports.reserved(now) if self.memory.freed else []

    def _give_way(self) -> None:
        """What decodes needs more blocks than are free."""
        self._hear(*self._reports.reserved(self._now()))

    def _renew(self, ticket: Ticket) -> None:
        """Its cache was dropped while it decoded: what it has so far comes again, as a prompt."""
        try:
            now, share = self._now(), self._reports.share
            request = self._relief.once_more(
                lambda: renew(ticket, self._programs, self._shape, self.memory, self.prices, now, share)
            )
            self.inbox.put(Arrival(self._now(), request, again=True))
        except Exception as error:
            self.pilot.check(error)
            self._finish(ticket, "failed", error=error)

    def _pause(self, command: Pause, events: Sequence[Event]) -> None:
        flight = self._flight
        if flight is None or flight.load.name != command.run:
            return  # it has landed already
        flight.pause = True
        names = flight.load.names
        if not [e for e in events if isinstance(e, Cancelled) and e.request in names]:
            flight.requested = next(event.time for event in events if not isinstance(event, Decoding))

    # ---- ends

    def _beyond(self, request_id: str) -> Ticket | None:
        return self.lane.get(request_id)

    def _check(self, error: Exception) -> None:
        self.pilot.check(error)

    def _cancelled(self, ticket: Ticket) -> None:
        if ticket.timed_out:
            late = RequestTimeoutError(ticket.id, timeout=ticket.timeout)
            self._finish(ticket, "failed", error=late)
            return
        where = "the engine was closed" if self.abandoned else None
        self._finish(ticket, "cancelled", error=RequestCancelledError(ticket.id, where=where))

    def _finish(
        self, ticket: Ticket, outcome: Ended, value: Any = None, *, error: BaseException | None = None
    ) -> None:
        """The one place where a request ends."""
        handle, run, now = ticket.handle, ticket.run, self._now()
        if handle.seal() and outcome != "cancelled":
            outcome, value = "cancelled", None
            error = RequestCancelledError(ticket.id)
        if self.recorder is not None:
            self.recorder.ended(ticket, outcome, now)
        load = ticket.load
        if outcome == "completed":
            self.memory.completed(ticket)
        elif load is None or not load.shared:
            run.release()  # a pack goes on for the others, with the inputs of all
        self._known.pop(ticket.id, None)
        self.lane.drop(ticket)
        self.registry.remove(ticket)
        ticket.end(outcome, now)
        journal.ended(ticket, error)
        if load is None:
            self.memory.release([ticket])
        elif not load.served and not self._has_device(load):
            load.release()
            self.memory.release(load.tickets)
        self.counts.ended[outcome] += 1
        if error is None:
            handle.resolve(value)
        else:
            handle.fail(error)

    def _forsaken(self) -> None:
        """The scheduler has failed: the flight was its own."""
        self._reports.forsaken()
        if self._flight is not None:
            self.pilot.clear()
            self._land(self._flight, self._now())

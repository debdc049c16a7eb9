"""The decode lane: requests whose prompt is done, continued by shared steps between the cuts of prefills.

The scheduler knows prefills only. What it launches is the *flight*; the lane borrows the device from it for a
step, and nobody tells the scheduler: the prefill waits a little, and is not charged.

When a step begins
    * No prefill has the device: at once; steps follow one another.
    * One has: at the latest cut from which the earliest token deadline is still met, that is as soon as
      ``now + step + one launch of the prefill >= due``, all predicted. So prefills run as far as the slack of
      the streams allows, and decode runs when it must.
    * A token is *wanted* before it is due (:mod:`fpcompile.engine.generation`), and comes then as long as
      that costs nobody a first token in time that was promised (``affords``).
    * Who asks for no time between tokens is due its next one ``2 q + b`` behind the last: ``q`` is what a
      token of every member is predicted to take, which is its time between tokens on a device without
      prefills, and ``b`` a launch. The prefill gets about as long as the step that follows, however fast the
      device is. That is on the same condition;
      else it waits as one that asked for :data:`DEFAULT_TBT_SLO`, and is ahead: also for members who were
      promised a time and share no step with it.
    * Behind each step the prefill makes at least one launch, so that late streams do not starve it.
    * With a prefill that has not begun and is short enough it *rides* (:mod:`fpcompile.engine.rides`): its
      tokens join the prompt's, for less than a step of its own takes.
    * A step for which there was no memory is made once more, when what is paused has made room.
    * Who has no memory for its next token is left out, see :mod:`fpcompile.engine.decode_memory`.
    * ``decode_first=False``: a step waits if it would make a prefill late that is not late yet.

A step that began is a run like others: it stops at its cuts, for a prefill that came meanwhile, if the
deadlines of its tokens allow that.

Words
    *member*  a request of the lane.
    *away*    a request that was a member, and will be when its cache is back from the host.
    *due*     when its next token must be there: where a time between tokens is asked for, see
              :mod:`fpcompile.engine.generation`.
    *round*   steps that give each member of a program a token.

Invariants
    A member is live, and unknown to the scheduler. At most one step is under way; its tickets are members, or
    have ended. A step holds requests of one program, those that are due first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Final, Protocol, final

from fpcompile.engine.decode_memory import Reserve, Rooms
from fpcompile.engine.errors import twin
from fpcompile.engine.generation import DEFAULT_TBT_SLO, Generation, check_tbt_slo
from fpcompile.engine.health import Launching
from fpcompile.engine.loads import Load
from fpcompile.engine.metrics import Ended, Ticket
from fpcompile.engine.pilot import Ending, Pilot
from fpcompile.engine.prices import Prices
from fpcompile.engine.recorder import Recorder
from fpcompile.engine.rides import Offer, fits
from fpcompile.engine.steps import TokenStep
from fpcompile.errors import InternalError, InvalidInputError, RequestRejectedError
from fpcompile.executor.decode import Step
from fpcompile.executor.faults import forget_frames, out_of_memory

__all__ = ["DecodeOptions", "Lane"]

logger = logging.getLogger(__name__)

_MOST: Final = 0.9  # of the device: behind each step a prompt makes a launch


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """``max_batch``: sequences of one step. ``tbt_slo``: seconds, for requests that name none; None: they are
    kept within two steps and ``budget``, seconds of a launch.

    ``first``: decode goes first where TTFT and time between tokens cannot both be kept. ``piggyback``: steps
    may ride with prompts, unless ``max_batch`` is 1.
    """

    tbt_slo: float | None = None
    max_batch: int = 256
    first: bool = True
    budget: float = 0.0
    piggyback: bool = True

    def __post_init__(self) -> None:
        if self.tbt_slo is not None:
            check_tbt_slo(self.tbt_slo)
        batch: Any = self.max_batch
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise InvalidInputError("max_decode_batch is wrong", expected="an int >= 1", got=repr(batch))
        for name, value in (("decode_first", self.first), ("piggyback", self.piggyback)):
            given: Any = value
            if not isinstance(given, bool):
                raise InvalidInputError(f"{name} is wrong", expected="a bool", got=repr(given))


class Finish(Protocol):
    """How the driver ends a request."""

    def __call__(
        self, ticket: Ticket, outcome: Ended, value: Any = None, *, error: BaseException | None = None
    ) -> None: ...


@final
class Lane:
    """The members and their step. Used by the driver's thread; ``len`` and ``tokens`` by anybody."""

    def __init__(
        self,
        pilot: Pilot,
        options: DecodeOptions,
        programs: Iterable[str],
        *,
        clock: Callable[[], float],
        finish: Finish,
        make_room: Callable[[], object],
        recorder: Recorder | None,
        rooms: Sequence[Rooms] = (),
        renew: Callable[[Ticket], object] = lambda ticket: None,
        affords: Callable[[float], bool] = lambda stretch: True,
        took: Callable[[Ticket], object] = lambda ticket: None,
    ) -> None:
        self.options = options
        self.tokens = 0
        """Tokens that were made, of all requests, ended ones included."""
        self._pilot, self._clock, self._finish, self._recorder = pilot, clock, finish, recorder
        self._prices = Prices(programs)
        self._members: dict[str, Ticket] = {}
        self._step: TokenStep | None = None
        self._rides = False
        """Whether the step under way is executed with a prompt."""
        self._owed = False
        """What was owed to prompts before it."""
        self._plans: dict[bool, tuple[list[Ticket], float, float]] = {}
        self._share: float | None = None
        self._rounds: dict[str, float] = {}
        self._wishes: tuple[frozenset[bool], float] | None = None
        self._owes = False
        self._flies = False
        self._again = False
        self._make_room = make_room
        self._rooms, self._renew, self._affords, self._count = rooms, renew, affords, took
        self._away: dict[str, Ticket] = {}

    def __len__(self) -> int:
        return len(self._members) + len(self._away)

    def get(self, request_id: str) -> Ticket | None:
        """The member of this id, or who is away."""
        return self._members.get(request_id) or self._away.get(request_id)

    def launching(self) -> Launching | None:
        """For the watchdog, from any thread: the launch of a step under way, if one has the device."""
        step = self._step
        if step is None or not self._flies or step.done:
            return None
        return Launching(step.tickets[0].id, f"decode: {step.next_segment.name}", step.cost())

    @property
    def stepping(self) -> bool:
        """Whether a step is under way."""
        return self._step is not None

    # ---- joining and leaving

    def adopt(self, ticket: Ticket, output: Any) -> None:
        """The prompt of a request is done: its first token, and it is a member, unless that ended it."""
        if (token := self._first(ticket, output)) is None:
            return
        ticket.prefilled(_generation(ticket))
        self._members[ticket.id] = ticket
        self._changed()
        self._took(ticket, token)

    def _first(self, ticket: Ticket, output: Any, *, again: bool = False) -> int | None:
        """The first token, None when there was none: then the request has failed."""
        try:
            return _generation(ticket).open(output)
        except Exception as error:
            self._pilot.check(error)
            if again or not out_of_memory(error):
                self._finish(ticket, "failed", error=error)
                return None
            forget_frames(error)
        self._make_room()
        return self._first(ticket, output, again=True)

    def drop(self, ticket: Ticket) -> None:
        """A request has ended."""
        self._away.pop(ticket.id, None)
        if self._members.pop(ticket.id, None) is None:
            return
        self._changed()
        self._forsake()

    @property
    def share(self) -> float:
        """The share of device time that the streams ask for beside prompts; 0 where prompts go first.

        That is what the steps of each program take, once in the shortest of its times between tokens: what a
        stream is ahead of its deadlines is not counted on. Who asks for none counts with the default one, or
        with the longer one that it gets: what it has beyond that no promise to a prompt pays for.
        """
        return self._claimed() if self._members and self.options.first else 0.0

    def _claimed(self) -> float:
        """The same wherever prompts go."""
        if self._share is None:
            programs = dict.fromkeys(ticket.program for ticket in self._members.values())
            self._share = min(sum(map(self._asked, programs)), _MOST)
        return self._share

    def _asked(self, program: str) -> float:
        members = [ticket for ticket in self._members.values() if ticket.program == program]
        nothing = max(DEFAULT_TBT_SLO, self._gap)
        return self._round(program) / min(_generation(t).tbt_slo or nothing for t in members)

    def _round(self, program: str) -> float:
        """Predicted seconds in which each member of ``program`` gets a token."""
        if program not in self._rounds:
            tickets = [ticket for ticket in self._members.values() if ticket.program == program]
            decoder = _generation(tickets[0]).decoder
            batch = tickets[: self.options.max_batch if decoder.together else 1]
            predicted = decoder.seconds([_generation(t).sequence for t in batch], _budgets(batch))
            seconds = self._prices.corrected(program, len(batch), predicted)
            self._rounds[program] = seconds * len(tickets) / len(batch)
        return self._rounds[program]

    @property
    def _gap(self) -> float:
        """Seconds between two tokens of a member that asks for no time, at most."""
        return self._wished()[1]

    def _wished(self) -> tuple[frozenset[bool], float]:
        """Whether members ask for a time between tokens: True, False or both; and :attr:`_gap`."""
        if self._wishes is None:
            members = self._members.values()
            programs = dict.fromkeys(ticket.program for ticket in members)
            asks = frozenset(_generation(ticket).tbt_slo is not None for ticket in members)
            self._wishes = asks, 2 * sum(map(self._round, programs)) + self.options.budget
        return self._wishes

    def _changed(self) -> None:
        """There are other members, or steps have another price."""
        self._share = None
        self._wishes = None
        self._plans.clear()
        self._rounds.clear()

    def clear(self) -> None:
        """Everybody has ended."""
        self._members.clear()
        self._away.clear()
        self._changed()
        self._step, self._rides = None, False

    def validate(self) -> None:
        """Check that members are generating and live, and that a step serves somebody."""
        for ticket in self._members.values():
            if ticket.ended is not None or ticket.state != "decoding" or ticket.generation is None:
                raise InternalError("a member that does not decode", got=f"{ticket.id}: {ticket.state}")
        if self._rides and self._step is None:
            raise InternalError("nobody rides")
        for ticket in self._away.values():
            if ticket.ended is not None or ticket.state != "paused" or ticket.id in self._members:
                raise InternalError("somebody is away who is not", got=f"{ticket.id}: {ticket.state}")
        step = self._step
        if step is not None and not self._rides and not any(t.id in self._members for t in step.tickets):
            raise InternalError("a step without members", got=str([t.id for t in step.tickets]))

    # ---- when

    def lets(self, load: Load, launch: Callable[[], float] | None = None) -> bool:
        """Whether the prefill ``load`` may make another launch, predicted by ``launch()``, before a step."""
        if self._away and self._step is None:
            self._recall(last=False)
        if not self._members or self._rides:
            return True
        if self._owes:
            if launch is not None:
                self._owes = False
            return True
        now = self._clock()
        then = now + (0.0 if launch is None else launch())
        _, due, seconds = self._plan(spared=True)
        if then + seconds < due:
            return True
        if not self._spared():
            _, due, seconds = self._plan(spared=False)
            if then + seconds < due:
                return True
        return not self.options.first and _made_late(load, now, seconds)

    def _spared(self) -> bool:
        """Whether promises to prompts leave streams what they want, and those that ask for nothing a turn."""
        asks, gap = self._wished()
        stretch = 1.0
        if True in asks:
            stretch = 1 / (1 - self._claimed())
        if False in asks:
            turn = (gap + self.options.budget) / 2  # of a prompt, between two steps
            stretch = max(stretch, gap / turn if turn else 1.0)
        return stretch == 1.0 or self._affords(stretch)

    def _plan(self, *, spared: bool) -> tuple[list[Ticket], float, float]:
        """(members, when the first of all is due, predicted seconds) of the step under way, or the next.

        ``spared``: see :meth:`_spared`. A step is due as well in time for the one that has to follow it.
        """
        if spared not in self._plans:
            self._plans[spared] = self._next(spared=spared)
        tickets, due, seconds = self._plans[spared]
        step = self._step
        if step is None:
            return tickets, due, seconds
        if tickets[0] not in step.tickets:
            due -= seconds
        return list(step.tickets), min(due, step.due) if spared else due, step.left

    def _next(self, *, spared: bool) -> tuple[list[Ticket], float, float]:
        """The same for a step that begins now: of those that are due first, of one program."""
        gap = self._gap
        dues = {ticket.id: _due(ticket, gap, spared=spared) for ticket in self._members.values()}
        tickets = sorted(self._members.values(), key=lambda ticket: dues[ticket.id])
        first = tickets[0]
        decoder = _generation(first).decoder
        size = self.options.max_batch if decoder.together else 1
        tickets = [ticket for ticket in tickets if ticket.program == first.program][:size]
        predicted = decoder.seconds([_generation(t).sequence for t in tickets], _budgets(tickets))
        return tickets, dues[first.id], self._prices.corrected(first.program, len(tickets), predicted)

    # ---- riding

    def ride(self, offer: Offer) -> TokenStep | None:
        """A step that rides with a prompt that begins, or None; ``arrive`` or ``alight`` must follow."""
        options = self.options
        if not options.piggyback or options.max_batch == 1 or self._step is not None or not self._members:
            return None
        tickets, due, seconds = self._plan(spared=True)
        if tickets[0].program != offer.program or not _generation(tickets[0]).decoder.together:
            return None
        now, both = self._clock(), offer.both(tickets)
        _, latest, _ = self._plan(spared=False)
        if now + both > due and not self._spared():
            due = latest
        owes = self._owes
        if not fits(offer, now, both, seconds, due, latest) or (step := self._begin()) is None:
            return None
        self._rides, self._owed = True, owes
        if step.tickets[0].program != offer.program:
            self.alight()
            return None
        return step

    def arrive(self, seconds: float) -> None:
        """What the step rides with is done; ``seconds`` of it were the step's. Its tokens are chosen."""
        step, self._rides = self._step, False
        assert step is not None
        step.executed = step.seconds = seconds  # nothing is left of it but choosing
        step.rode = True
        self.fly(lambda: False, 1)  # who wants the argmax: before the prompt's sequence is put beside them
        self._forsake()

    def _forsake(self) -> None:
        """Drop a step that serves nobody any more."""
        step = self._step
        if step is not None and not self._rides and not any(t.id in self._members for t in step.tickets):
            self._step = None
            step.release()

    def alight(self) -> None:
        """What the step rides with has stopped: it has not been, and another one is made when it is due."""
        step, self._step, self._rides = self._step, None, False
        self._owes = self._owed
        self._plans.clear()
        if step is not None:
            step.release()
            step.undo()

    # ---- the step

    def ready(self) -> bool:
        """Whether there is a step to go on with: else one is begun, if anybody has the memory for it."""
        while self._step is None:
            if self._away:
                self._recall(last=True)
            if not self._members:
                break
            before = len(self._members), len(self._away)
            if self._begin() is None and before == (len(self._members), len(self._away)):
                self._owes = True  # who holds the memory goes on
                break
        return self._step is not None

    def _recall(self, *, last: bool) -> None:
        """Who was sent away is a member again, if its cache is back.

        ``last``: nobody but members would give memory back later. Who is alone then, and does not come back
        when what is paused has made room, fails.
        """
        for rooms in self._rooms:
            roomy = False
            while (failed := self._back(rooms)) is not None and last and not self._members:
                ticket, error = failed
                if roomy:
                    self._fail([ticket], error)
                else:
                    forget_frames(error)
                    self._make_room()
                roomy = True

    def _back(self, rooms: Rooms) -> tuple[Ticket, Exception] | None:
        """See :attr:`Reserve.failed`."""
        try:
            found = rooms.back(self._away.values(), self._members.values())
        except Exception as error:
            self._pilot.check(error)
            self._fail(list(self._away.values()), error)  # some may have a cache again, unheard
            return None
        for ticket in found.ready:
            self._members[ticket.id] = self._away.pop(ticket.id)
            ticket.came_back(self._clock())
            self._changed()
        for ticket in found.dropped:
            self._renew(self._away.pop(ticket.id))
        return found.failed

    def _with_rooms(self, tickets: list[Ticket]) -> list[Ticket]:
        """Those that have room for their next token; for that, some give theirs up."""
        for rooms in self._rooms:
            members = list(self._members.values())
            try:
                found = rooms.reserve(tickets, members)
            except Exception as error:
                self._pilot.check(error)
                live = [ticket for ticket in members if ticket.ended is None]
                self._fail(live, error)  # some may have lost their cache, unheard
                return []
            self._gave_way(found)
            tickets = [ticket for ticket in found.ready if ticket.ended is None]
        return tickets

    def _gave_way(self, found: Reserve) -> None:
        for ticket in (*found.away, *found.dropped):
            self._members.pop(ticket.id, None)
            self._changed()
            ticket.gave_way(self._clock())
        self._away.update((ticket.id, ticket) for ticket in found.away)
        for ticket in found.dropped:
            self._renew(ticket)
        for ticket in found.stuck:
            reason = "the cache has no block for its next token, and nobody will give one back"
            remedy = "Engine(kv_blocks=...) or host_memory= of more"
            error = RequestRejectedError(ticket.id, reason=reason, remedy=remedy)
            self._finish(ticket, "failed", error=error)

    def fly(self, stop: Callable[[], bool], max_segments: int | None) -> None:
        """Go on with the step, or with a new one, until it is done, ``stop()``, or so many launches."""
        step = self._step or self._begin()
        if step is None:
            return
        if self._recorder is not None:
            self._recorder.lanes = ()
        begun, self._flies = self._clock(), True
        try:
            landing = self._pilot.fly(step, stop, max_segments, cost=step.cost, gives_back=False)
        finally:
            self._flies = False
        now = self._clock()
        step.executed += now - begun
        live = [ticket for ticket in step.tickets if ticket.ended is None]
        if self._recorder is not None:
            self._recorder.decoded(live, begun, now)
        if self._step is not step or landing.ending in (Ending.UNDERWAY, Ending.STOPPED):
            return
        self._step, self._owes = None, True
        self._plans.clear()
        if landing.error is not None:
            if not self._retries(landing.error, step):
                self._fail(live, landing.error)
            return
        self._again = False
        self._learn(step)
        for ticket, token in zip(step.tickets, landing.value, strict=True):
            if ticket.ended is not None:
                continue
            if isinstance(token, Exception):
                self._finish(ticket, "failed", error=token)
            else:
                ticket.executed += step.executed
                self._took(ticket, token)

    def _begin(self) -> TokenStep | None:
        tickets, due, seconds = self._plan(spared=self._spared())
        tickets = self._with_rooms(tickets)
        if not tickets:
            return None
        if (made := self._made(tickets)) is None:
            return None
        if len(tickets) > 1:
            for ticket in tickets:
                ticket.shared = True
        self._owes = False
        self._step = TokenStep(tickets, made, due=due, seconds=seconds)
        return self._step

    def _made(self, tickets: list[Ticket]) -> Step | None:
        """A step, None when it cannot be made: then they have failed."""
        generations = [_generation(ticket) for ticket in tickets]
        try:
            return generations[0].decoder.step(
                [generation.sequence for generation in generations],
                [generation.tokens[-1] for generation in generations],
                _budgets(tickets),
            )
        except Exception as error:
            self._pilot.check(error)
            if not self._retries(error):
                self._plans.clear()
                self._fail(tickets, error)
                return None
        return self._made(tickets)

    def _retries(self, error: Exception, step: TokenStep | None = None) -> bool:
        """Whether what raised is done once more: memory was short, and what is paused has made room."""
        if self._again or not out_of_memory(error):
            return False
        self._again = True
        forget_frames(error)
        if step is not None:
            step.release()
            step.undo()
        self._make_room()
        return True

    def _learn(self, step: TokenStep) -> None:
        self._changed()
        if step.rode:
            return
        name = step.tickets[0].program
        self._prices.learn(name, len(step.tickets), step.predicted, step.executed)

    def _fail(self, tickets: Iterable[Ticket], error: Exception) -> None:
        """What raised ends everybody in it, each with an error of its own."""
        self._again = False
        for number, ticket in enumerate(tickets):
            self._finish(ticket, "failed", error=twin(error) if number else error)

    def _took(self, ticket: Ticket, token: int) -> None:
        """A token is there: told at once, and perhaps the last one."""
        generation = _generation(ticket)
        first = generation.first is None
        generation.took(token, self._clock(), ticket.request.deadline)
        self._count(ticket)
        self.tokens += 1
        if first and self._recorder is not None:
            self._recorder.first_token(ticket, generation.last)
        if generation.finish_reason is None:
            ticket.handle.put(token)
            return
        try:
            output = generation.output()
            self._pilot.deliver(output)
        except Exception as error:
            self._pilot.check(error)
            self._finish(ticket, "failed", error=error)
            return
        ticket.handle.put(token)
        self._finish(ticket, "completed", output)


def _generation(ticket: Ticket) -> Generation:
    assert ticket.generation is not None
    return ticket.generation


def _due(ticket: Ticket, gap: float, *, spared: bool) -> float:
    """When the next token must be there, or should be, where that is ``spared``; ``gap``: of who asked for no
    time, the longest one that is spared.
    """
    generation = _generation(ticket)
    if generation.tbt_slo is not None:
        return generation.wanted if spared else generation.due
    return generation.last + gap if spared else max(generation.last + gap, generation.due)


def _budgets(tickets: Iterable[Ticket]) -> set[float | None]:
    return {ticket.budget for ticket in tickets}


def _made_late(load: Load, now: float, seconds: float) -> bool:
    """Whether waiting for ``seconds`` would make a prefill late that is in time now."""
    left = load.left()
    slacks = [ticket.request.deadline - now - left for ticket in load.served]
    return any(0 <= slack < min(seconds, inf) for slack in slacks)

"""The memory of requests that decode: blocks of the pool, taken one by one, given up when they run out.

Words
    *member*  a request whose prompt is done and whose cache lies in the pool.
    *away*    a member without blocks: its cache is on the host. A member whose cache was *dropped* is none
              any more: what it has so far becomes a prompt, of which the scheduler is told as of any other.
    *wanted*  blocks that a member needs to go on: when it is away those of its whole cache.

When blocks run out
    Before each step every request in it gets the block that its next token needs, those that are due first
    before the others. If there is none, paused prompts give way (the scheduler says which: it is told that
    more is held outside). Then members do, the last in line first: whose next token is due latest. Their
    cache goes to the host if there is room, and comes back with the same bits; else it is dropped, and
    computed again from all tokens, which agrees to rounding. Who still has no block is left out of this
    step: somebody else holds them and goes on. Members come back in the order of their deadlines when the
    predicted peak allows it, or when nobody else generates, so that each of them comes to its end.

Invariants
    A request is admitted only if the pool can hold it to its end, so one alone always can go on.
    With ``deterministic`` nothing is predicted: all that requests may need is kept free, nothing is dropped.
    When a request has ended, its blocks are nobody's; full ones may be found again by their contents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from fpcompile.engine.generation import Generation
from fpcompile.engine.holdings import Holdings
from fpcompile.engine.memory_facts import Prompt
from fpcompile.engine.metrics import Ticket
from fpcompile.errors import InternalError
from fpcompile.executor.blocks import prefix_keys
from fpcompile.executor.faults import out_of_memory, unless_out_of_memory
from fpcompile.executor.offload import Parking, unstashed
from fpcompile.executor.pool import KVPool, Room
from fpcompile.executor.pool_growing import Tail
from fpcompile.scheduler.events import Reserved
from fpcompile.scheduler.future import FILLED, Growing, OutputLengths, everything, peak

__all__ = ["DecodeMemory", "Host", "Reserve", "Rooms"]


class Host(Protocol):
    """Memory of the host, which is limited."""

    def room_for(self, nbytes: int) -> bool:
        """Make room for so many bytes more; whether there is."""


@dataclass(slots=True)
class _Member:
    """``host``: bytes of its copy there, which is kept when it comes back."""

    ticket: Ticket
    tail: Tail
    parking: Parking
    host: int = 0

    @property
    def room(self) -> Room:
        return self.tail.room

    @property
    def away(self) -> bool:
        return self.room.parked

    @property
    def due(self) -> float:
        due: float = _generation(self.ticket).due
        return due

    @property
    def wanted(self) -> int:
        return self.tail.missing + (self.room.per if self.away else 0)


@dataclass(slots=True)
class Reserve:
    """Who can be stepped, who lost its cache to the host or for good, and who can neither go on nor yield.

    ``failed``: who is away as before, for there was no memory to bring its cache back.
    """

    ready: list[Ticket] = field(default_factory=list)
    away: list[Ticket] = field(default_factory=list)
    dropped: list[Ticket] = field(default_factory=list)
    stuck: list[Ticket] = field(default_factory=list)
    failed: tuple[Ticket, Exception] | None = None


class Rooms(Protocol):
    """Who has memory for the next step; ``members``: all that decode now."""

    def reserve(self, tickets: Sequence[Ticket], members: Iterable[Ticket]) -> Reserve:
        """Memory for a step of ``tickets``, those due first in front; others may have to give way."""

    def back(self, away: Iterable[Ticket], members: Iterable[Ticket]) -> Reserve:
        """Who of those that gave way has its cache again (``ready``), or may compute it (``dropped``)."""


@final
class DecodeMemory:
    """The members of one engine. Used by its driver; ``to_come``, ``check`` and the counts by any thread.

    ``begun()``: what prompts in the pool will grow to. ``give_way()``: tell the scheduler what is reserved
    now, so that paused runs are evicted. It may end requests.
    """

    def __init__(
        self,
        pool: KVPool,
        host: Host,
        parking: Callable[[], Parking],
        begun: Callable[[], Iterable[Growing]],
        *,
        deterministic: bool,
        spans: dict[str, int],
    ) -> None:
        self.pool, self.deterministic = pool, deterministic
        self.give_way: Callable[[], object] = lambda: None
        self.freed = False
        """Whether blocks were given back that the scheduler has not heard of."""
        self.evictions = 0
        """How often a member gave its blocks up."""
        self._host, self._parking, self._begun = host, parking, begun
        self._spans = spans
        self._lengths = {name: OutputLengths() for name in spans}
        self._members: dict[str, _Member] = {}
        self._holdings = Holdings(lambda name: self.growing(self._members[name]))
        self._asked = 0
        self._looked = -1
        self._told: tuple[int, tuple[Growing, ...]] = (0, ())

    # ---- what is known

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket.id in self._members

    @property
    def blocks(self) -> int:
        """Blocks that members hold, each once."""
        return self._holdings.blocks

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(member.host for member in list(self._members.values()))

    def forget_copies(self) -> None:
        """The host keeps only what is nowhere else."""
        for member in self._members.values():
            if not member.away:
                member.parking.forget([member.room])
                member.host = 0

    @property
    def rooms(self) -> Iterator[Room]:
        """Where the members' caches are."""
        for member in self._members.values():
            yield member.room

    def to_come(self, name: str, generation: Generation) -> int:
        """Tokens that will still be put into the cache of a generation, as the past of this program says."""
        most, made = generation.sampler.max_new_tokens, len(generation.tokens)
        surely = self.deterministic or not generation.renewable
        total = most if surely else self._lengths[name].expected(made, most)
        return max(total - max(made, 1), 0)

    def check(self, name: str, context: int, generation: Generation) -> None:
        """Raise :class:`InvalidInputError` if the pool can never hold what ``generation`` may come to."""
        pool, span, made = self.pool, self._spans[name], len(generation.tokens)  # made: in the context
        most = generation.sampler.max_new_tokens
        tokens = context + max(most - made, 1) - 1
        if span:
            tokens = max(context, min(tokens, span + 2 * pool.block_tokens))
        got = f"{context} tokens of context and max_new_tokens={most}"
        pool.check(pool.needed(tokens), what="generation", got=got, instead="fewer tokens")

    def growing(self, member: _Member) -> Growing:
        """What a member holds or wants, and how many tokens are to come."""
        ticket, pool = member.ticket, self.pool
        held = member.wanted if member.away else len(member.room.blocks)
        tokens = self.to_come(ticket.program, _generation(ticket))
        if span := self._spans[ticket.program]:  # what lies behind the window is given back
            tokens = min(tokens, max(pool.needed(span) + 2 - held, 0) * pool.block_tokens)
        return held, tokens

    def reserved(self, now: float, *, changed: bool = False) -> Reserved | None:
        """For the scheduler; None if ``changed`` is asked for and nothing has."""
        blocks, growing = self._holdings.told()
        told = blocks + self._asked, growing
        if changed and told == self._told:
            return None
        self._told, self.freed = told, False
        return Reserved(now, *told)

    def forsaken(self) -> None:
        """A scheduler that has heard nothing is asked from now on."""
        self._told = (0, ())

    def validate(self) -> None:
        """Check that what is kept up is what a look at every member gives."""
        members = list(self._members.values())
        blocks = len({block for member in members for block in member.room.blocks})
        wanted = sum(member.wanted for member in members if member.away)
        looked = blocks + wanted, tuple(self.growing(member) for member in members)
        if (self._holdings.told(), self.blocks) != (looked, blocks):
            raise InternalError(
                "what decodes is counted wrongly",
                expected=f"{blocks} blocks, {looked}",
                got=f"{self.blocks} blocks, {self._holdings.told()}",
            )

    # ---- joining and leaving

    def keep(self, ticket: Ticket, room: Room) -> None:
        """A prompt is done: its blocks are the member's. What is scattered is gathered if more is to come."""
        spare = self.pool.needed(self.to_come(ticket.program, _generation(ticket)))
        room.stash.pieces.clear()
        if spare and not room.contiguous:
            room.move(len(room.blocks), spare)
        self._members[ticket.id] = _Member(ticket, Tail(room, spare), self._parking())
        self._holdings.count(ticket.id, room.blocks)

    def took(self, ticket: Ticket) -> None:
        """A member has another token."""
        self._holdings.stale([ticket.id])

    def ended(self, ticket: Ticket) -> None:
        """A request is over: its blocks are free, and its length is remembered. Again is no mistake."""
        member = self._members.pop(ticket.id, None)
        if member is not None:
            self._holdings.forget(ticket.id)
            if ticket.state == "cancelled":
                self.learn(ticket, whole=False)
            member.room.release()
            self.freed = True

    def learn(self, ticket: Ticket, *, whole: bool) -> None:
        """A request is about to end: how long it became. What a ``whole`` one holds may be found again."""
        generation = ticket.generation
        if generation is None or not generation.tokens or ticket.program not in self._lengths:
            return
        cut = generation.finish_reason == "length"
        self._lengths[ticket.program].ended(len(generation.tokens), cut=cut)
        if not self.deterministic:  # else nothing is expected of them that was learnt
            names = [name for name, one in self._members.items() if one.ticket.program == ticket.program]
            self._holdings.stale(names)
        member = self._members.get(ticket.id)
        if whole and member is not None and not member.away and ticket.prompt.salt is not None:
            self._file(member, ticket.prompt, generation)

    def _file(self, member: _Member, prompt: Prompt, generation: Generation) -> None:
        room = member.room
        if room.dropped or prompt.salt is None:
            return
        written = min(member.tail.lengths.values(), default=0)
        tokens = [*generation.prompt[0].tolist(), *generation.tokens][:written]
        keys = prefix_keys(tokens, self.pool.block_tokens, prompt.salt)
        for block, key in zip(room.blocks, keys, strict=False):
            self.pool.blocks.file(block, key)

    # ---- steps

    def reserve(self, tickets: Sequence[Ticket], members: Iterable[Ticket] = ()) -> Reserve:
        """Before a step of ``tickets``, those due first in front: a block for each that needs one."""
        found = Reserve()
        for ticket in tickets:
            if (member := self._members.get(ticket.id)) is not None:
                member.tail.drop_behind()
                self._holdings.count(ticket.id, member.room.blocks)
                member.host = member.host if member.room.stash.pieces else 0
        missing = sum(self._missing(ticket) for ticket in tickets)
        asked = missing > self.pool.blocks.available
        if asked:
            self._asked = missing
            try:
                self.give_way()
            finally:
                self._asked = 0
        for ticket in tickets:
            member = self._members.get(ticket.id)
            if ticket.ended is not None or (member is not None and member.away):
                continue
            if member is None:
                if ticket not in found.dropped:
                    found.ready.append(ticket)
                continue
            while member.tail.missing > self.pool.blocks.available and self._evict(member, found):
                pass
            if member.tail.missing <= self.pool.blocks.available:
                member.tail.make_room()
                self._holdings.count(ticket.id, member.room.blocks)
                found.ready.append(ticket)
        if asked and len(found.ready) < len(tickets):
            self.freed = True  # the scheduler still counts what it was asked for as held
        if not found.ready and not found.dropped and self.pool.blocks.used == self.blocks:
            found.stuck += self._stuck(tickets)
        return found

    def _missing(self, ticket: Ticket) -> int:
        member = self._members.get(ticket.id)
        return 0 if member is None else member.tail.missing

    def _stuck(self, tickets: Sequence[Ticket]) -> list[Ticket]:
        """Nobody else will ever give blocks back: who is last in line has to."""
        active = [t for t in tickets if t.id in self._members and not self._members[t.id].away]
        return active[-1:]

    def _evict(self, for_whom: _Member, found: Reserve) -> bool:
        """The last in line behind ``for_whom`` gives its blocks up; False when there is nobody."""
        behind = [m for m in self._members.values() if m is not for_whom and not m.away]
        behind = [m for m in behind if m.due >= for_whom.due and m.ticket not in found.ready]
        for member in sorted(behind, key=lambda m: -m.due):
            room, lengths = member.room, member.tail.lengths
            if self._fits_on_host(room, lengths) and _put_away(member):
                member.host = room.stash.nbytes
                room.free()
                self._holdings.count(member.ticket.id, room.blocks)
                member.ticket.offloads += 1
                found.away.append(member.ticket)
            elif self._renewable(_generation(member.ticket)):
                del self._members[member.ticket.id]
                self._holdings.forget(member.ticket.id)
                room.release()
                member.ticket.recomputations += 1
                found.dropped.append(member.ticket)
            else:
                continue
            self.evictions += 1
            self.freed = True
            return True
        return False

    def _fits_on_host(self, room: Room, lengths: dict[int, int]) -> bool:
        """Room for what the host lacks of a cache; what it has of that may be dropped to make room."""
        asked = -1
        while asked != (asked := unstashed(room, lengths)):
            if not self._host.room_for(asked):
                return False
        return True

    def back(self, away: Iterable[Ticket], members: Iterable[Ticket] = ()) -> Reserve:
        """Who of those that are away has its blocks again, in the order of their deadlines.

        Asked at every cut: nobody is looked at again before a block has changed hands.
        """
        found = Reserve()
        if self._looked == self.pool.blocks.changes:
            return found
        waiting = [self._members[ticket.id] for ticket in away if ticket.id in self._members]
        for member in sorted(waiting, key=lambda m: m.due):
            if member.wanted > self.pool.blocks.available or not self._admits(member):
                break
            member.room.take(member.tail.spare)
            try:
                member.parking.restore([member.room])
            except Exception as error:
                member.room.free()
                if not out_of_memory(error):
                    raise
                found.failed = member.ticket, error
                return found
            self._holdings.count(member.ticket.id, member.room.blocks)
            found.ready.append(member.ticket)
        self._looked = self.pool.blocks.changes
        return found

    def _renewable(self, generation: Generation) -> bool:
        """Whether all of its tokens may be a prompt: behind windows one can have more than the pool holds."""
        tokens = int(generation.prompt.shape[1]) + len(generation.tokens)
        fits = self.pool.needed(tokens) <= self.pool.blocks.total
        return generation.renewable and fits and not self.deterministic

    def _admits(self, member: _Member) -> bool:
        others = [*self._begun(), *(self.growing(m) for m in self._members.values() if not m.away)]
        if not others:
            return True
        batch, size = [*others, self.growing(member)], self.pool.block_tokens
        if self.deterministic:
            return everything(batch, size) <= self.pool.blocks.total
        return peak(batch, size) <= FILLED * self.pool.blocks.total


def _put_away(member: _Member) -> bool:
    """Copy what is new of its cache to the host; False where there is no memory for the copy."""
    copied = unless_out_of_memory(lambda: member.parking.put_away(member.room, member.tail.lengths))
    return copied is not None


def _generation(ticket: Ticket) -> Any:
    assert ticket.generation is not None
    return ticket.generation

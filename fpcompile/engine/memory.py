"""What paused runs hold, and where: cache blocks of a pool, and a budget for everything else.

Words
    *seat*, *held*: see :mod:`fpcompile.engine.memory_seats`.
    *evict*    the scheduler wants the blocks of a paused run: its tensors and blocks are parked on the host.
    *relieve*  paused runs hold more than ``memory_budget``: their own tensors are parked, from the end of the
               scheduler's order on; blocks in the pool are not the budget's business, the pool is as large as
               it is.
    *drop*     in place of parking, where that is predicted to take longer than what the run has executed, or
               where the host's memory is full: the run starts again from its origin. Its tile plan is the one
               that it began with, so its bits are too.

Invariants
    A run that is launched has its blocks: the scheduler counts those of whole prompts, and is told what
    requests that decode have (:mod:`fpcompile.engine.decode_memory`), so the pool never has fewer. What is
    parked or dropped is back before the run is stepped (``board``). Host memory is never above
    ``host_memory``: copies of runs that are on the device go first, then runs are dropped. A run that cannot
    be dropped (its inputs are not tokens alone) stays on the device when the host is full.
    When the last request has ended, no block and no byte is held; cached prefixes are nobody's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fpcompile.engine.decode_budget import DecodeBudget
from fpcompile.engine.decode_memory import DecodeMemory, Rooms
from fpcompile.engine.generation import Generation
from fpcompile.engine.loads import Load
from fpcompile.engine.memory_facts import NOTHING, MemoryStatistics, Prompt
from fpcompile.engine.memory_moves import Moves
from fpcompile.engine.memory_options import USUAL_RATE, MemoryOptions, copy_rate, make_pools
from fpcompile.engine.memory_seats import Held, Seat, contexts, core_of, install, written
from fpcompile.engine.metrics import Ticket
from fpcompile.engine.prices import seconds_left
from fpcompile.engine.programs import Programs
from fpcompile.engine.recorder import Recorder
from fpcompile.errors import InternalError
from fpcompile.executor.device import Device
from fpcompile.executor.offload import Flying, Origin, Parking, settle
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.pool import KVPool
from fpcompile.executor.pool_growing import longest_span
from fpcompile.executor.prefix import go_on_behind, prompt_keys, reusable
from fpcompile.executor.run import Run
from fpcompile.executor.slices import Chunks, Sliced
from fpcompile.scheduler.future import Growing

__all__ = ["Memory"]


class Memory:
    """The memory of one engine. Used by its driver; ``prompt`` and ``statistics`` by any thread."""

    def __init__(
        self,
        device: Device,
        programs: Programs,
        options: MemoryOptions,
        clock: Callable[[], float],
        recorder: Recorder | None = None,
    ) -> None:
        self.options = options
        self._device = device
        self._programs = programs
        self._pools = make_pools(programs, options)
        self._seats: dict[str, Seat] = {}
        self._held: dict[str, Held] = {}
        self.flying: Flying = []
        """Copies to the host or back that may be under way."""
        self.moves = Moves(copy_rate(device, clock) if self.active else USUAL_RATE, clock, recorder)
        """Copies and new beginnings of paused runs."""
        self._reused = 0
        self.decoding = self._decoding(self.pool)
        """What decodes in the pool; None without one."""
        self.budgeted = self._budgeted(options)
        """What decodes elsewhere, where that is bounded."""
        self._bounded = options.memory_budget is not None
        self._paused_bytes = 0
        self.host_bytes = 0
        """Bytes of host memory that copies take."""

    def _decoding(self, pool: KVPool | None) -> DecodeMemory | None:
        if pool is None:
            return None
        programs = {name: self._programs[name] for name in self._pools}
        return DecodeMemory(
            pool,
            self,
            lambda: Parking(self._device, self.flying),
            self._begun,
            deterministic=self.options.deterministic,
            spans={n: longest_span(p) for n, p in programs.items() if isinstance(p, PackedProgram)},
        )

    def _budgeted(self, options: MemoryOptions) -> DecodeBudget | None:
        if options.memory_budget is None:
            return None
        return DecodeBudget(
            options.memory_budget,
            self,
            lambda: Parking(self._device, self.flying),
            lambda: self.paused_bytes,
            lambda ticket: self.decoding is not None and ticket in self.decoding,
            deterministic=options.deterministic,
        )

    @property
    def rooms(self) -> tuple[Rooms, ...]:
        """Who is asked before a decode step."""
        return tuple(rooms for rooms in (self.decoding, self.budgeted) if rooms is not None)

    @property
    def _decoding_on_host(self) -> int:
        return sum(rooms.host_bytes for rooms in (self.decoding, self.budgeted) if rooms is not None)

    def _begun(self) -> Iterator[Growing]:
        """Of each prompt in the pool that will generate: its blocks, and the tokens to come."""
        for seat in self._seats.values():
            generation = seat.ticket.generation
            if generation is not None and self.decoding is not None and any(r.blocks for r in seat.rooms):
                yield seat.ticket.prompt.blocks, self.decoding.to_come(seat.ticket.program, generation)

    @property
    def freed(self) -> bool:
        """Whether blocks were given back that the scheduler has not heard of."""
        return self.decoding is not None and self.decoding.freed

    @property
    def active(self) -> bool:
        """Whether memory is limited; else it is moved only when the device has none left."""
        return bool(self._pools) or self.options.memory_budget is not None

    @property
    def pool(self) -> KVPool | None:
        """The pool, if there is one."""
        return next(iter(self._pools.values()), None)

    @property
    def scheduler_options(self) -> dict[str, Any]:
        """What the scheduler has to know of the pool."""
        pool = self.pool
        if pool is None:
            return {}
        return {
            "kv_blocks": pool.blocks.total,
            "block_tokens": pool.block_tokens,
            "lockstep": not self.options.deterministic,
            "move_s": 2 * pool.block_bytes / self.moves.rate,
        }

    # ---- at submission

    def prompt(self, name: str, run: Any, tenant: str, generation: Generation | None = None) -> Prompt:
        """What a run asks of the pool. Raises :class:`InvalidInputError` when the pool can never hold it."""
        pool = self._pools.get(name)
        if pool is None:
            return NOTHING
        core, options = core_of(run), self.options
        keeps = core is not run or options.reuses or getattr(core.call, "use_cache", True)
        if not keeps:
            return NOTHING  # a layer's cache is dropped as soon as it is read
        blocks = sum(batch * pool.needed(tokens) for batch, tokens in contexts(run))
        got = f"{sum(batch * tokens for batch, tokens in contexts(run))} tokens of context"
        pool.check(blocks, what="request", got=got, instead="a shorter prompt")
        to_come = 0
        if generation is not None and self.decoding is not None:
            self.decoding.check(name, core.context, generation)
            to_come = self.decoding.to_come(name, generation)
        if not options.reuses:
            return Prompt(blocks, to_come=to_come)
        salt = f"{name}\0{core.program.watch.version}\0{tenant}".encode()
        found = prompt_keys(core, pool.block_tokens, salt)
        if found is None:
            return Prompt(blocks, to_come=to_come)
        keys = tuple(found)
        most = min(reusable(core, pool.block_tokens), len(keys)) if core is run else 0
        cached = pool.block_tokens * pool.blocks.known(keys[:most])
        return Prompt(blocks, keys, most, cached, to_come=to_come, salt=salt)

    # ---- launches

    def seat(self, ticket: Ticket) -> None:
        """Before a request's first launch: blocks for its whole prompt, or for what is not cached of it.

        If it raises, the run is as it was and holds no block: it may be seated again.
        """
        try:
            self._seat(ticket)
        except Exception:
            seat = self._seats.pop(ticket.id, None)
            for room in () if seat is None else seat.rooms:
                room.release()
            if seat is not None and seat.origin is not None:
                seat.origin.again()
            raise

    def _seat(self, ticket: Ticket) -> None:
        run, prompt = ticket.run, ticket.prompt
        core = core_of(run) if isinstance(run, (Run, Chunks, Sliced)) else None
        pool = self._pools.get(ticket.program) if prompt.blocks else None
        if core is None:
            return
        sliced = run.sliced if isinstance(run, Chunks) else run
        origin = sliced if isinstance(sliced, Sliced) else Origin(core)
        small = Origin(core).plain
        seat = Seat(ticket, origin if small or pool is not None else None)
        self._seats[ticket.id] = seat
        if pool is None:
            return
        spare = pool.needed(prompt.to_come)
        shared = pool.blocks.share(prompt.keys[: prompt.reusable])
        if shared:
            reused = len(shared) * pool.block_tokens
            seat.rooms = [pool.room(1, core.tokens, shared, spare=spare)]
            go_on_behind(core, reused, ticket.budget)
            install(seat, reused)
            ticket.reused_tokens = reused
            ticket.predicted = seconds_left(self._programs[ticket.program], core)
            self._reused += reused
            return
        for batch, tokens in contexts(run):
            seat.rooms.append(pool.room(batch, tokens, spare=spare))
        install(seat)

    def board(self, load: Load) -> bool:
        """A run gets the device, for the first time or again: everything is there.

        Whether it begins again, so that its launches may be others.
        """
        if self.flying:
            settle(self.flying)
        held = self._of(load)
        if held is None:
            self._hold(load)
            return False
        again, moved = held.dropped, held.evicted or held.parked or held.dropped
        if moved:
            self.moves.bring_back(held)
        held.paused = held.evicted = held.dropped = False
        (self._moved if moved else self._note)(held)
        return again

    def _hold(self, load: Load) -> None:
        seats = [self._seats[t.id] for t in load.tickets if t.id in self._seats]
        if seats and not load.slices:  # the members of a step are never moved
            held = self._held[load.name] = Held(load, seats, Parking(self._device, self.flying))
            for seat in seats:
                seat.held = held

    def _of(self, load: Load) -> Held | None:
        held = self._held.get(load.name)
        return held if held is not None and held.load is load else None

    # ---- pauses

    @property
    def paused_bytes(self) -> int:
        """Bytes on the device that paused runs hold, besides blocks; from any thread.

        Where they have a budget they are counted at each pause, else when somebody asks first.
        """
        if self._bounded:
            return self._paused_bytes
        return sum(held.own for held in list(self._held.values()) if held.paused)

    @property
    def over(self) -> bool:
        """Whether paused runs hold more than the budget."""
        return self._bounded and self._paused_bytes > self.options.budget

    def paused(self, load: Load) -> None:
        """A run has given the device back at a cut."""
        held = self._of(load)
        if held is not None:
            held.paused = True
            self._note(held)

    def bytes_of(self, tickets: Iterable[Ticket]) -> int:
        """Bytes on the device that these requests hold while they are paused, blocks included; from any
        thread.
        """
        found: dict[int, int] = {}  # what several share is counted once
        for ticket in tickets:
            seat, run = self._seats.get(ticket.id), ticket.run
            if ticket.state != "paused" or not ticket.seated or run is None or isinstance(run, Generation):
                continue
            held = None if seat is None else seat.held
            if held is None:
                found[id(run)] = run.live_bytes + run.kv_bytes if seat is None else seat.between(run)
            else:
                found[id(held)] = held.own + held.in_blocks
        return sum(found.values())

    def evict(self, name: str) -> None:
        """The scheduler takes the blocks of this paused run."""
        held = self._held[name]
        if held.evicted:
            for room in held.rooms:  # an attempt to bring it back has taken some
                if not room.parked:
                    room.free()
            return
        held.load.run.suspend()
        if not held.dropped:
            copying = held.parking.unstashed(held.load.run, held.rooms)
            if not held.parked:
                copying += held.parking.new_bytes(held.load.run)
            again = self.moves.better_again(held, copying) or not self._room_on_host(copying, held)
            if again or not self.moves.put_away(held, "evicted", held.rooms):
                self.moves.drop(held)
        for room in held.rooms:
            room.free()
        held.evicted = True
        self._moved(held)

    def relieve(self, last_first: Iterable[str], budget: float | None = None) -> None:
        """Bring what paused runs hold below the budget; ``last_first``: their names, last in line first.

        ``budget``: bytes, in place of the engine's own.
        """
        over = self.paused_bytes - (self.options.budget if budget is None else budget)
        if over <= 0:
            return
        chosen: list[tuple[Held, int]] = []
        for name in last_first:
            held = self._held.get(name)
            if over <= 0:
                break
            if held is None or not held.paused or held.parked or held.dropped:
                continue
            gain = held.own - sum(held.inputs.values())
            if gain > 0:
                chosen.append((held, gain))
                over -= gain
        for held, gain in reversed(chosen):
            if over + gain <= 0:
                over += gain  # those behind it are enough
            else:
                self._move(held)

    def droppable(self, load: Load) -> bool:
        """Whether this run has had the device, and can be computed again."""
        held = self._of(load)
        return held is not None and held.droppable

    def begin_again(self, load: Load) -> bool:
        """A launch of this run failed, and it holds nothing any more; whether it can be computed again."""
        held = self._of(load)
        if held is None or not held.droppable:
            return False
        if not held.dropped:
            self.moves.drop(held)
        self._moved(held)
        return True

    def _move(self, held: Held) -> None:
        copying = held.parking.new_bytes(held.load.run)
        again = self.moves.better_again(held, copying) or not self._room_on_host(copying, held)
        if (again or not self.moves.put_away(held, "offloaded")) and held.droppable:
            self.moves.drop(held)
        self._moved(held)

    def _note(self, held: Held) -> None:
        """Keep the sum of what is on the device as ``held`` is now, where there is a budget for it."""
        held.changes += 1
        if self._bounded:
            device = held.own if held.paused else 0
            self._paused_bytes += device - held.device
            held.device = device

    def _moved(self, held: Held) -> None:
        """The same, and the sum of the copies on the host."""
        self._note(held)
        host = held.parking.host_bytes(held.rooms)
        self.host_bytes += host - held.host
        held.host = host

    # ---- the host

    def room_for(self, nbytes: int) -> bool:
        """See :class:`fpcompile.engine.decode_memory.Host`."""
        return self._room_on_host(nbytes, None)

    def _room_on_host(self, nbytes: int, spared: Held | None) -> bool:
        """Make room for more copies by dropping those of runs that are on the device."""
        limit = self.options.host_limit
        decoding = self._decoding_on_host
        for held in list(self._held.values()) if nbytes <= limit else ():
            if self.host_bytes + decoding + nbytes <= limit:
                break
            if held.host and held is not spared and not held.parked and not held.evicted:
                held.parking.forget(held.rooms)
                self._moved(held)
        if self.decoding is not None and self.host_bytes + decoding + nbytes > limit:
            self.decoding.forget_copies()
        return self.host_bytes + self._decoding_on_host + nbytes <= limit

    # ---- ends

    def completed(self, ticket: Ticket) -> None:
        """A prompt is done: others may begin behind it, and what it generates goes on in its blocks.

        Of a request that decodes: it is about to end.
        """
        seat = self._seats.get(ticket.id)
        generation, decoding = ticket.generation, self.decoding
        if decoding is not None and generation is not None and generation.finish_reason is not None:
            decoding.learn(ticket, whole=True)
        if seat is not None and len(seat.rooms) == 1 and not seat.rooms[0].parked:
            room = seat.rooms[0]
            full = written(seat.run, room) // room.pool.block_tokens
            for block, key in zip(room.blocks[:full], ticket.prompt.keys, strict=False):
                room.pool.blocks.file(block, key)
            if generation is not None and decoding is not None:
                seat.rooms = []
                decoding.keep(ticket, room)

    def took(self, ticket: Ticket) -> None:
        """A request that decodes has another token."""
        if self.decoding is not None:
            self.decoding.took(ticket)

    def release(self, tickets: Sequence[Ticket]) -> None:
        """Nobody executes these requests any more: their blocks and copies are free. Again is no mistake."""
        settle(self.flying)
        for ticket in tickets:
            for rooms in (self.decoding, self.budgeted) if ticket.ended is not None else ():
                if rooms is not None:
                    rooms.ended(ticket)
            seat = self._seats.pop(ticket.id, None)
            if seat is None:
                continue
            for room in seat.rooms:
                room.release()
            held = seat.held
            if held is not None and not any(s.ticket.id in self._seats for s in held.seats):
                held.parking.forget(held.rooms)
                self._paused_bytes -= held.device
                self.host_bytes -= held.host
                del self._held[held.load.name]

    # ---- what is known

    def statistics(self) -> MemoryStatistics:
        """A snapshot; from any thread."""
        pool = self.pool
        blocks = None if pool is None else pool.blocks
        decoding = self.decoding
        return MemoryStatistics(
            paused_bytes=self.paused_bytes,
            host_bytes=self.host_bytes + self._decoding_on_host,
            blocks=0 if blocks is None else blocks.total,
            blocks_free=0 if blocks is None else blocks.free,
            blocks_used=0 if blocks is None else blocks.used,
            blocks_cached=0 if blocks is None else blocks.cached,
            block_bytes=0 if pool is None else pool.block_bytes,
            blocks_decoding=0 if decoding is None else decoding.blocks,
            decode_evictions=sum(r.evictions for r in (decoding, self.budgeted) if r is not None),
            offloads=self.moves.offloads,
            copied_bytes=self.moves.copied_bytes,
            recomputations=self.moves.recomputations,
            reused_tokens=self._reused,
        )

    def validate(self, free: float) -> None:
        """Check the invariants; ``free``: blocks that the scheduler believes free, without what decodes."""
        runs = list(self._held.values())
        sums = sum(held.measured() for held in runs if held.paused), sum(held.host for held in runs)
        on_host = self.host_bytes + self._decoding_on_host
        if sums != (self.paused_bytes, self.host_bytes) or on_host > self.options.host_limit:
            raise InternalError(
                "memory is counted wrongly, or the host's is exceeded",
                expected=f"{sums}, at most {self.options.host_limit} on the host",
                got=f"{self.paused_bytes} on the device, {self.host_bytes} ({on_host}) on the host",
            )
        pool = self.pool
        if pool is None:
            return
        pool.blocks.validate()
        assert self.decoding is not None
        self.decoding.validate()
        every = [room for seat in self._seats.values() for room in seat.rooms]
        rooms = {block for room in (*every, *self.decoding.rooms) for block in room.blocks}
        if len(rooms) != pool.blocks.used:
            raise InternalError(
                "blocks are used by nobody", expected=str(len(rooms)), got=str(pool.blocks.used)
            )
        if free - self.decoding.blocks > pool.blocks.available:
            raise InternalError(
                "the scheduler counts more free blocks than there are",
                expected=f"<= {pool.blocks.available}",
                got=str(free - self.decoding.blocks),
            )

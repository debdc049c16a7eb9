"""What paused runs hold, and where: cache blocks of a pool, and a budget for everything else.

Words
    *seat*     one request's part: its rooms in the pool, and its origin (as it was before its first launch).
    *held*     a run that was launched and has not ended, under the scheduler's name: its seats, and its copy
               on the host.
    *evict*    the scheduler wants the blocks of a paused run: its tensors and blocks are parked on the host.
    *relieve*  paused runs hold more than ``memory_budget``: their own tensors are parked, from the end of the
               scheduler's order on; blocks in the pool are not the budget's business, the pool is as large as
               it is.
    *drop*     in place of parking, where that is predicted to take longer than what the run has executed, or
               where the host's memory is full: the run starts again from its origin. Its tile plan is the one
               that it began with, so its bits are too.

Invariants
    A run that is launched has its blocks: the scheduler counts those of whole prompts, and the pool never has
    fewer. What is parked or dropped is back before the run is stepped (``board``). Host memory is never above
    ``host_memory``: copies of runs that are on the device go first, then runs are dropped. A run that cannot
    be dropped (its inputs are not tokens alone) stays on the device when the host is full.
    When the last request has ended, no block and no byte is held; cached prefixes are nobody's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fpcompile.engine.loads import Load
from fpcompile.engine.memory_facts import NOTHING, MemoryStatistics, Prompt
from fpcompile.engine.memory_options import USUAL_RATE, MemoryOptions, copy_rate, make_pools
from fpcompile.engine.metrics import Ticket
from fpcompile.engine.prices import seconds_left
from fpcompile.engine.programs import Programs
from fpcompile.engine.recorder import Recorder
from fpcompile.errors import InternalError, InvalidInputError
from fpcompile.executor.device import Device
from fpcompile.executor.offload import (
    Flying,
    Origin,
    Parking,
    caches_of,
    own_bytes,
    settle,
    storage_bytes,
)
from fpcompile.executor.packed import PackedCall
from fpcompile.executor.pool import KVPool, PooledKV, Room
from fpcompile.executor.prefix import go_on_behind, prompt_keys, reusable
from fpcompile.executor.run import Run
from fpcompile.executor.slices import Chunks, Sliced
from fpcompile.executor.together import Together

__all__ = ["Memory"]


@dataclass(slots=True)
class _Seat:
    ticket: Ticket
    origin: Origin | Sliced | None
    rooms: list[Room] = field(default_factory=list)
    held: _Held | None = None

    @property
    def run(self) -> Any:
        return self.origin.run if isinstance(self.origin, Origin) else self.origin


@dataclass(slots=True)
class _Held:
    """``parked``: its own tensors are on the host. ``evicted``: its blocks are given back.

    ``dropped``: it begins again. ``device`` and ``host``: bytes that it holds, besides blocks, while paused.
    """

    load: Load
    seats: list[_Seat]
    parking: Parking
    paused: bool = False
    evicted: bool = False
    dropped: bool = False
    device: int = 0
    host: int = 0

    @property
    def parked(self) -> bool:
        return self.parking.parked

    @property
    def rooms(self) -> list[Room]:
        return [room for seat in self.seats for room in seat.rooms]

    @property
    def droppable(self) -> bool:
        """Whether it can be computed again."""
        return all(seat.origin is not None for seat in self.seats)

    @property
    def inputs(self) -> list[Tensor]:
        """Tensors that are kept so that it can be computed again."""
        return [t for seat in self.seats if isinstance(seat.origin, Origin) for t in seat.origin.tensors()]

    @property
    def own(self) -> int:
        """Bytes on the device besides blocks."""
        return storage_bytes(self.inputs) if self.dropped else own_bytes(self.load.run, self.inputs)

    @property
    def in_blocks(self) -> int:
        """Bytes of its blocks."""
        return sum(len(room.blocks) * room.pool.block_bytes for room in self.rooms)


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
        self._clock, self._recorder = clock, recorder
        self._pools = make_pools(programs, options)
        self._seats: dict[str, _Seat] = {}
        self._held: dict[str, _Held] = {}
        self._dropped: list[tuple[Load, float]] = []
        self._flying: Flying = []
        self._rate = copy_rate(device, clock) if self.active else USUAL_RATE
        self._counts = {"offloads": 0, "recomputations": 0, "copied_bytes": 0, "reused_tokens": 0}
        self.paused_bytes = 0
        """Bytes on the device that paused runs hold, besides blocks."""
        self.host_bytes = 0
        """Bytes of host memory that copies take."""

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
        return {"kv_blocks": pool.blocks.total, "move_s": 2 * pool.block_bytes / self._rate}

    # ---- at submission

    def prompt(self, name: str, run: Any, tenant: str) -> Prompt:
        """What a run asks of the pool. Raises :class:`InvalidInputError` when the pool can never hold it."""
        pool = self._pools.get(name)
        if pool is None:
            return NOTHING
        core, options = _core(run), self.options
        keeps = core is not run or options.reuses or getattr(core.call, "use_cache", True)
        if not keeps:
            return NOTHING  # a layer's cache is dropped as soon as it is read
        blocks = sum(batch * pool.needed(tokens) for batch, tokens in _contexts(run))
        if blocks > pool.blocks.total:
            raise InvalidInputError(
                f"the request needs {blocks} cache blocks of {pool.block_tokens} tokens",
                expected=f"at most {pool.blocks.total}, the size of the pool",
                got=f"{sum(batch * tokens for batch, tokens in _contexts(run))} tokens of context",
                remedy=f"Engine(kv_blocks={blocks}) or more, or a shorter prompt",
            )
        if not options.reuses:
            return Prompt(blocks)
        salt = f"{name}\0{core.program.watch.version}\0{tenant}".encode()
        keys = tuple(prompt_keys(core, pool.block_tokens, salt))
        most = min(reusable(core, pool.block_tokens), len(keys)) if core is run else 0
        return Prompt(blocks, keys, most, pool.block_tokens * pool.blocks.known(keys[:most]))

    # ---- launches

    def seat(self, ticket: Ticket) -> None:
        """Before a request's first launch: blocks for its whole prompt, or for what is not cached of it."""
        run, prompt = ticket.run, ticket.prompt
        core = _core(run) if isinstance(run, (Run, Chunks, Sliced)) else None
        pool = self._pools.get(ticket.program) if prompt.blocks else None
        if core is None:
            return
        sliced = run.sliced if isinstance(run, Chunks) else run
        origin = sliced if isinstance(sliced, Sliced) else Origin(core)
        small = Origin(core).plain
        seat = _Seat(ticket, origin if small or pool is not None else None)
        self._seats[ticket.id] = seat
        if pool is None:
            return
        shared = pool.blocks.share(prompt.keys[: prompt.reusable])
        if shared:
            reused = len(shared) * pool.block_tokens
            seat.rooms = [pool.room(1, core.tokens, shared)]
            go_on_behind(core, reused, ticket.budget)
            _install(seat, reused)
            ticket.reused_tokens = reused
            ticket.predicted = seconds_left(self._programs[ticket.program], core)
            self._counts["reused_tokens"] += reused
            return
        seat.rooms = [pool.room(batch, tokens) for batch, tokens in _contexts(run)]
        _install(seat)

    def board(self, load: Load) -> bool:
        """A run gets the device, for the first time or again: everything is there.

        Whether it begins again, so that its launches may be others.
        """
        settle(self._flying)
        held = self._of(load)
        if held is None:
            self._hold(load)
            return False
        again = held.dropped
        moved = held.evicted
        for room in held.rooms if moved else ():
            if room.parked:  # not one that was taken before an earlier attempt failed
                room.take()
        if again:
            for seat in held.seats:
                _install(seat)
            if isinstance(load.run, Together):
                load.run.again()  # who asked it meanwhile has joined it without its blocks
            load.begin_again()
        elif moved or held.parked:
            with self._copying(held, "restored"):
                if moved:
                    held.parking.restore(held.rooms)
                if held.parked:
                    held.parking.bring_back()
        held.paused = held.evicted = held.dropped = False
        self._note(held)
        return again

    def _hold(self, load: Load) -> None:
        seats = [self._seats[t.id] for t in load.tickets if t.id in self._seats]
        if seats and not load.slices:  # the members of a step are never moved
            held = self._held[load.name] = _Held(load, seats, Parking(self._device, self._flying))
            for seat in seats:
                seat.held = held

    def _of(self, load: Load) -> _Held | None:
        held = self._held.get(load.name)
        return held if held is not None and held.load is load else None

    # ---- pauses

    @property
    def over(self) -> bool:
        """Whether paused runs hold more than the budget."""
        return self.paused_bytes > self.options.budget

    def paused(self, load: Load) -> int:
        """A run has given the device back at a cut; returns the bytes that it holds there."""
        held = self._of(load)
        if held is None:
            return int(load.run.live_bytes + load.run.kv_bytes)
        held.paused = True
        self._note(held)
        return held.device + held.in_blocks

    def evict(self, name: str) -> None:
        """The scheduler takes the blocks of this paused run."""
        held = self._held[name]
        if held.evicted:
            return
        held.load.run.suspend()
        if not held.dropped:
            copying = held.parking.unstashed(held.load.run, held.rooms)
            if not held.parked:
                copying += held.parking.new_bytes(held.load.run)
            if self._better_again(held, copying) or not self._room_on_host(copying, held):
                self._drop(held)
            else:
                with self._copying(held, "evicted"):
                    self._counts["copied_bytes"] += held.parking.stash(held.load.run, held.rooms)
                    self._park(held)
        for room in held.rooms:
            room.free()
        held.evicted = True
        self._note(held)

    def relieve(self, last_first: Iterable[str], budget: float | None = None) -> None:
        """Bring what paused runs hold below the budget; ``last_first``: their names, last in line first.

        ``budget``: bytes, in place of the engine's own.
        """
        over = self.paused_bytes - (self.options.budget if budget is None else budget)
        if over <= 0:
            return
        chosen: list[tuple[_Held, int]] = []
        for name in last_first:
            held = self._held.get(name)
            if over <= 0:
                break
            if held is None or not held.paused or held.parked or held.dropped:
                continue
            gain = held.device - storage_bytes(held.inputs)
            if gain > 0:
                chosen.append((held, gain))
                over -= gain
        for held, gain in reversed(chosen):
            if over + gain <= 0:
                over += gain  # those behind it are enough
            else:
                self._move(held)

    def begin_again(self, load: Load) -> bool:
        """A launch of this run failed, and it holds nothing any more; whether it can be computed again."""
        held = self._of(load)
        if held is None or not held.droppable:
            return False
        if not held.dropped:
            self._drop(held)
        self._note(held)
        return True

    def _move(self, held: _Held) -> None:
        copying = held.parking.new_bytes(held.load.run)
        if self._better_again(held, copying):
            self._drop(held)
        elif self._room_on_host(copying, held):
            with self._copying(held, "offloaded"):
                self._park(held)
        elif held.droppable:
            self._drop(held)
        self._note(held)

    def take_dropped(self) -> list[tuple[Load, float]]:
        """Runs that begin again, with their predicted seconds, since this was asked last."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _better_again(self, held: _Held, copying: int) -> bool:
        """Whether computing again is predicted to take less than copying there and back."""
        moved = copying + held.own + held.in_blocks
        return held.droppable and held.load.executed < moved / self._rate

    def _park(self, held: _Held) -> None:
        if not held.parked:
            self._counts["copied_bytes"] += held.parking.park(held.load.run)
            self._counts["offloads"] += 1
            for seat in held.seats:
                seat.ticket.offloads += 1

    def _drop(self, held: _Held) -> None:
        if not held.droppable:
            raise InternalError("a run that cannot be computed again is dropped", got=held.load.name)
        held.parking.forget(held.rooms)
        for seat in held.seats:
            if seat.origin is not None:
                seat.origin.again()
            seat.ticket.recomputations += 1
            if seat.ticket.reused_tokens:  # what is shared is not written again
                for room in held.rooms:
                    room.free()
                held.evicted = True
        if isinstance(held.load.run, Together):
            held.load.run.again()
        held.dropped = True
        self._counts["recomputations"] += 1
        load = held.load
        self._dropped.append((load, load.seconds if load.shared else seconds_left(load.program, load.run)))

    @contextlib.contextmanager
    def _copying(self, held: _Held, name: str) -> Iterator[None]:
        """A span of the timeline."""
        start = self._clock()
        yield
        if self._recorder is not None:
            for seat in held.seats:
                self._recorder.copied(seat.ticket, name, start, self._clock())

    def _note(self, held: _Held) -> None:
        """Keep the sums, and the first member's metrics, as ``held`` is now."""
        device = held.own if held.paused else 0
        host = held.parking.host_bytes(held.rooms)
        self.paused_bytes += device - held.device
        self.host_bytes += host - held.host
        held.device, held.host = device, host
        served = held.load.served
        if held.paused and served and served[0].state == "paused":
            served[0].paused_bytes = device + held.in_blocks

    # ---- the host

    def _room_on_host(self, nbytes: int, spared: _Held) -> bool:
        """Make room for more copies by dropping those of runs that are on the device."""
        limit = self.options.host_limit
        for held in list(self._held.values()) if nbytes <= limit else ():
            if self.host_bytes + nbytes <= limit:
                break
            if held.host and held is not spared and not held.parked and not held.evicted:
                held.parking.forget(held.rooms)
                self._note(held)
        return self.host_bytes + nbytes <= limit

    # ---- ends

    def completed(self, ticket: Ticket) -> None:
        """A prompt is done: others may begin behind it."""
        seat = self._seats.get(ticket.id)
        if seat is not None and len(seat.rooms) == 1 and not seat.rooms[0].parked:
            room = seat.rooms[0]
            written = _written(seat.run, room) // room.pool.block_tokens
            for block, key in zip(room.blocks[:written], ticket.prompt.keys, strict=False):
                room.pool.blocks.file(block, key)

    def release(self, tickets: Sequence[Ticket]) -> None:
        """Nobody executes these requests any more: their blocks and copies are free. Again is no mistake."""
        settle(self._flying)
        for ticket in tickets:
            seat = self._seats.pop(ticket.id, None)
            if seat is None:
                continue
            for room in seat.rooms:
                room.release()
            held = seat.held
            if held is not None and not any(s.ticket.id in self._seats for s in held.seats):
                held.parking.forget(held.rooms)
                self.paused_bytes -= held.device
                self.host_bytes -= held.host
                del self._held[held.load.name]

    # ---- what is known

    def statistics(self) -> MemoryStatistics:
        """A snapshot; from any thread."""
        pool = self.pool
        blocks = None if pool is None else pool.blocks
        return MemoryStatistics(
            paused_bytes=self.paused_bytes,
            host_bytes=self.host_bytes,
            blocks=0 if blocks is None else blocks.total,
            blocks_free=0 if blocks is None else blocks.free,
            blocks_used=0 if blocks is None else blocks.used,
            blocks_cached=0 if blocks is None else blocks.cached,
            block_bytes=0 if pool is None else pool.block_bytes,
            **self._counts,
        )

    def validate(self, free: float) -> None:
        """Check the invariants; ``free``: blocks that the scheduler believes free."""
        sums = (sum(h.device for h in self._held.values()), sum(h.host for h in self._held.values()))
        if sums != (self.paused_bytes, self.host_bytes) or self.host_bytes > self.options.host_limit:
            raise InternalError(
                "memory is counted wrongly, or the host's is exceeded",
                expected=f"{sums}, at most {self.options.host_limit} on the host",
                got=f"{self.paused_bytes} on the device, {self.host_bytes} on the host",
            )
        pool = self.pool
        if pool is None:
            return
        pool.blocks.validate()
        rooms = {block for seat in self._seats.values() for room in seat.rooms for block in room.blocks}
        if len(rooms) != pool.blocks.used:
            raise InternalError(
                "blocks are used by nobody", expected=str(len(rooms)), got=str(pool.blocks.used)
            )
        if free > pool.blocks.available:
            raise InternalError(
                "the scheduler counts more free blocks than there are",
                expected=f"<= {pool.blocks.available}",
                got=str(free),
            )


def _core(run: Any) -> Run:
    """The run that was started, whatever form it is executed in."""
    if isinstance(run, Chunks):
        run = run.sliced
    core: Run = run.run if isinstance(run, Sliced) else run
    return core


def _contexts(run: Any) -> list[tuple[int, int]]:
    """(sequences, tokens of each with its past) of every room that a run needs."""
    if isinstance(run, Chunks):
        run = run.sliced
    if isinstance(run, Sliced):
        return [(1, tokens) for tokens in run.contexts]
    call = run.call
    assert isinstance(call, PackedCall)
    return [(group.batch, group.context) for group in call.layout.groups]


def _written(run: Any, room: Room) -> int:
    """Tokens at the beginning of a room that the run has written in every layer."""
    (cache,) = caches_of(run)
    caches = [cache.get(layer) for layer, *_ in room.pool.layout.entries]
    lengths = [kv.length if isinstance(kv, PooledKV) and kv.room is room else 0 for kv in caches]
    return min(lengths, default=0)


def _install(seat: _Seat, reused: int = 0) -> None:
    """Let the run's caches lie in its rooms; what it continues is copied there."""
    if not seat.rooms:
        return
    caches = caches_of(seat.run)
    for cache, room in zip(caches, seat.rooms, strict=True):
        for layer, *_ in room.pool.layout.entries:
            past = cache.get(layer)
            pooled = PooledKV(room, layer, reused, 0 if past is None else past.start)
            cache[layer] = pooled if past is None else pooled.append(past.keys, past.values)

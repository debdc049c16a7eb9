"""The parts of a request's memory: where its cache lies, what it began with, and what is held of its run.

Words
    *seat*  one request's part: its rooms in the pool, and its origin (as it was before its first launch).
    *held*  a run that was launched and has not ended, under the scheduler's name: its seats, and its copy
            on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fpcompile.engine.loads import Load
from fpcompile.engine.metrics import Ticket
from fpcompile.executor.offload import Origin, Parking, caches_of, own_bytes
from fpcompile.executor.packed import PackedCall
from fpcompile.executor.pool import PooledKV, Room
from fpcompile.executor.run import Run
from fpcompile.executor.slices import Chunks, Sliced

__all__ = ["Held", "Seat", "contexts", "core_of", "install", "written"]


@dataclass(slots=True)
class Seat:
    """``origin`` is None for a run that cannot be computed again."""

    ticket: Ticket
    origin: Origin | Sliced | None
    rooms: list[Room] = field(default_factory=list)
    held: Held | None = None
    _known: tuple[int, int] = (-1, 0)

    @property
    def run(self) -> Any:
        """The run whose caches lie in the rooms."""
        return self.origin.run if isinstance(self.origin, Origin) else self.origin

    def between(self, run: Any) -> int:
        """Bytes that ``run``, executed in slices, holds while it waits: the same until the next one."""
        at = run.at if isinstance(run, Sliced) else -1
        if at < 0 or self._known[0] != at:
            self._known = at, run.live_bytes + run.kv_bytes
        return self._known[1]


@dataclass(eq=False)
class Held:
    """``parked``: its own tensors are on the host. ``evicted``: its blocks are given back.

    ``dropped``: it begins again. ``device`` and ``host``: bytes that it holds, besides blocks, while paused.
    ``changes``: how often it may have come to hold something else; what it holds while it is paused is looked
    at once for each of them, however often somebody asks.
    """

    load: Load
    seats: list[Seat]
    parking: Parking
    paused: bool = False
    evicted: bool = False
    dropped: bool = False
    device: int = 0
    host: int = 0
    changes: int = 0
    _known: tuple[int, int] = (-1, 0)

    @property
    def parked(self) -> bool:
        """Whether its own tensors are on the host."""
        return self.parking.parked

    @property
    def rooms(self) -> list[Room]:
        """Of all seats."""
        return [room for seat in self.seats for room in seat.rooms]

    @property
    def droppable(self) -> bool:
        """Whether it can be computed again."""
        return all(seat.origin is not None for seat in self.seats)

    @cached_property
    def inputs(self) -> Mapping[int, int]:
        """Address and bytes of each storage that is kept so that it can be computed again; they stay."""
        origins = [seat.origin for seat in self.seats if isinstance(seat.origin, Origin)]
        return {address: size for origin in origins for address, size in origin.storages.items()}

    @property
    def own(self) -> int:
        """Bytes on the device besides blocks; from any thread."""
        changes = self.changes  # before all: whoever goes on meanwhile changes it, and nobody believes this
        if not self.paused:
            return self.measured()
        known, size = self._known
        if known != changes:
            size = self.measured()
            self._known = changes, size
        return size

    def measured(self) -> int:
        """The same, looked at anew."""
        return sum(self.inputs.values()) if self.dropped else own_bytes(self.load.run, self.inputs)

    @property
    def in_blocks(self) -> int:
        """Bytes of its blocks."""
        return sum(len(room.blocks) * room.pool.block_bytes for room in self.rooms)


def core_of(run: Any) -> Run:
    """The run that was started, whatever form it is executed in."""
    if isinstance(run, Chunks):
        run = run.sliced
    core: Run = run.run if isinstance(run, Sliced) else run
    return core


def contexts(run: Any) -> list[tuple[int, int]]:
    """(sequences, tokens of each with its past) of every room that a run needs."""
    if isinstance(run, Chunks):
        run = run.sliced
    if isinstance(run, Sliced):
        return [(1, tokens) for tokens in run.contexts]
    call = run.call
    assert isinstance(call, PackedCall)
    return [(group.batch, group.context) for group in call.layout.groups]


def written(run: Any, room: Room) -> int:
    """Tokens at the beginning of a room that the run has written in every layer."""
    (cache,) = caches_of(run)
    caches = [cache.get(layer) for layer, *_ in room.pool.layout.entries]
    lengths = [kv.length if isinstance(kv, PooledKV) and kv.room is room else 0 for kv in caches]
    return min(lengths, default=0)


def install(seat: Seat, reused: int = 0) -> None:
    """Let the run's caches lie in its rooms; what it continues is copied there."""
    if not seat.rooms:
        return
    caches = caches_of(seat.run)
    for cache, room in zip(caches, seat.rooms, strict=True):
        for layer, *_ in room.pool.layout.entries:
            past = cache.get(layer)
            pooled = PooledKV(room, layer, reused, 0 if past is None else past.start)
            cache[layer] = pooled if past is None else pooled.append(past.keys, past.values)

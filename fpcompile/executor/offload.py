"""A paused run's tensors moved to host memory and back, or dropped and computed again.

Words
    *park*    move a run's own tensors to the host: live values, partial outputs, caches that are its own.
    *stash*   copy the contents of its rooms in a pool to the host, so that the blocks can be given away.
    *copy*    what is on the host. It is kept when the run comes back: tensors that cross a cut never change,
              so the next park moves only what is new. ``forget`` drops it.
    *origin*  a run as it was before its first launch: enough to drop everything else and compute it again.

Typical use
    ``parking = Parking(device)``; ``parking.park(run)``; ``parking.bring_back()``
    ``parking.stash(run, rooms)``, ``room.free()``; ``room.take()``, ``parking.restore(rooms)``

Invariants
    Storages, offsets, sizes and strides come back as they were, so the run goes on with the same bits. A
    parked run must not be stepped. On an asynchronous device nothing here waits: copies run on the copy
    stream behind what was launched, their sources are kept until they are complete (``flying``), and what is
    launched after ``bring_back`` or ``restore`` is ordered behind the copies that it needs. Small tensors
    travel together.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fpcompile.executor.checkpoint import Packer, Placement
from fpcompile.executor.device import Device, Event
from fpcompile.executor.faults import unless_out_of_memory
from fpcompile.executor.kv import KV, LayerKV, kv_storages, storages_of
from fpcompile.executor.pool import PooledKV, Room
from fpcompile.executor.run import Run
from fpcompile.executor.slices import Chunks, Sliced
from fpcompile.executor.together import Together

__all__ = ["Flying", "Origin", "Parking", "caches_of", "own_bytes", "settle", "unstashed"]

_TOGETHER = 1 << 20  # bytes: smaller tensors are copied in one piece with others

Shelf = MutableMapping[Any, Tensor]
Flying = list[tuple[Event, list[Tensor]]]
"""Copies under way, and their sources, which must live as long."""


def settle(flying: Flying) -> None:
    """Let go of the sources of copies that are complete."""
    flying[:] = [(event, kept) for event, kept in flying if not event.done()]


def caches_of(run: Any) -> list[dict[int, KV]]:
    """The caches of a run's groups of sequences, as the run itself holds them."""
    if isinstance(run, Together):
        return run.joined.kv
    if isinstance(run, Chunks):
        run = run.sliced
    caches: list[dict[int, KV]] = run.caches if isinstance(run, Sliced) else run.kv
    return caches


def _shelves(run: Any) -> list[Shelf]:
    """Where a run keeps its tensors, other than caches and small inputs that are needed to begin again."""
    if isinstance(run, Together):
        return [run.joined.values, run.joined.partial]
    if isinstance(run, Chunks):
        run = run.sliced
    return [run.pieces] if isinstance(run, Sliced) else [run.values, run.partial]


def own_bytes(run: Any, more: Mapping[int, int]) -> int:
    """Bytes on the device that a run holds besides blocks of a pool, with ``more`` storages; each once."""
    found = {**more, **kv_storages(caches_of(run))}
    for shelf in _shelves(run):
        found.update(storages_of(list(shelf.values())))
    return sum(found.values())


@final
class Origin:
    """A run before its first launch. Holds its inputs: tokens, positions, and a cache that it continues."""

    __slots__ = ("_caches", "_call", "_schedule", "_values", "run")

    def __init__(self, run: Run) -> None:
        self.run = run
        self._values, self._caches = dict(run.values), [dict(group) for group in run.kv]
        self._call, self._schedule = run.call, run.schedule

    @property
    def plain(self) -> bool:
        """Whether the inputs are small: whole numbers (tokens, positions, masks), and no cache."""
        return not any(self._caches) and not any(t.is_floating_point() for t in self._values.values())

    @property
    def storages(self) -> Mapping[int, int]:
        """Address and bytes of each storage of the inputs."""
        return {**storages_of(self._values.values()), **kv_storages(self._caches)}

    def again(self) -> None:
        """The run is as it was before its first launch; what it held is dropped."""
        caches = [dict(group) for group in self._caches]
        self.run.begin_again(self._call, dict(self._values), caches, self._schedule)


@final
class Parking:
    """The host's side of one run."""

    __slots__ = ("_copied", "_device", "_flying", "_partial", "_placed", "_storages", "parked")

    def __init__(self, device: Device, flying: Flying | None = None) -> None:
        self._device = device
        self.parked = False
        self._storages: list[Tensor] = []  # host copies, flat bytes
        self._copied: dict[int, tuple[StorageWeakRef, Tensor]] = {}  # by storage on the device
        self._partial: list[bool] = []  # of the host copies: outputs of which some tiles are written
        self._placed: list[tuple[Any, Any, Any]] = []  # (shelf, name, placement or placements)
        self._flying: Flying = [] if flying is None else flying

    # ---- what it costs

    def host_bytes(self, rooms: Sequence[Room]) -> int:
        """Bytes of host memory that are taken now."""
        copies = self._storages if self.parked else [host for _, host in self._copied.values()]
        return sum(host.nbytes for host in copies) + sum(room.stash.nbytes for room in rooms)

    def new_bytes(self, run: Any) -> int:
        """Bytes that ``park`` would have to copy."""
        packer = Packer()
        _pack(run, packer)
        return sum(s.nbytes for s in packer.storages if self._known(s) is None)

    def unstashed(self, run: Any, rooms: Sequence[Room]) -> int:
        """Bytes that ``stash`` would have to copy."""
        return sum(unstashed(room, _lengths(run, room)) for room in rooms)

    def _known(self, storage: Tensor) -> Tensor | None:
        """The host's copy of a storage that has not changed since."""
        entry = self._copied.get(storage.untyped_storage()._cdata)
        if entry is None or entry[0].expired():  # type: ignore[no-untyped-call]
            return None
        return entry[1]

    # ---- moving

    def park(self, run: Any) -> int:
        """Move the run's own tensors to the host; returns the bytes that were copied."""
        run.suspend()
        packer = Packer()
        self._placed, partial = _pack(run, packer)
        known = [self._known(storage) for storage in packer.storages]
        new = [s for s, host in zip(packer.storages, known, strict=True) if host is None]
        moving = iter(self.to_host(new))
        self._storages = [next(moving) if host is None else host for host in known]
        self._copied = {}
        self._partial = [storage.untyped_storage()._cdata in partial for storage in packer.storages]
        for shelf, name, _ in self._placed:
            shelf.pop(name)
        self.parked = True
        return sum(s.nbytes for s in new)

    def bring_back(self) -> None:
        """The run's own tensors are on the device again; the host's copy is kept."""
        moved = self.to_device(self._storages)
        for shelf, name, placed in self._placed:
            if isinstance(placed, Placement):
                shelf[name] = _view(moved, placed)
            else:
                keys, values, start = placed
                shelf[name] = LayerKV(_view(moved, keys), _view(moved, values), start)
        self._copied = {
            device.untyped_storage()._cdata: (StorageWeakRef(device.untyped_storage()), host)  # type: ignore[no-untyped-call]
            for device, host, partial in zip(moved, self._storages, self._partial, strict=True)
            if not partial  # the next tile is written into it
        }
        self._storages, self._placed, self.parked = [], [], False

    def stash(self, run: Any, rooms: Sequence[Room]) -> int:
        """Copy what the rooms' stashes lack to the host; returns the bytes."""
        return sum(self.put_away(room, _lengths(run, room)) for room in rooms)

    def put_away(self, room: Room, lengths: dict[int, int]) -> int:
        """Copy what the room's stash lacks of the ``lengths`` tokens of each layer; returns the bytes."""
        new = room.copies(lengths)
        tensors = [t for pair in new.values() for t in pair]
        host = self.to_host(tensors, fresh=True)
        for layer, keys, values in zip(new, host[::2], host[1::2], strict=True):
            room.stash.pieces.setdefault(layer, []).append((keys, values))
        return sum(t.nbytes for t in tensors)

    def restore(self, rooms: Sequence[Room]) -> None:
        """Write the stashes into the rooms' blocks, which may be other ones; the stashes are kept."""
        for room in rooms:
            for layer, pieces in room.stash.pieces.items():
                at, moved = room.dropped, self.to_device([t for pair in pieces for t in pair])
                for keys, values in zip(moved[::2], moved[1::2], strict=True):
                    room.write(layer, at, keys, values)
                    at += int(keys.shape[2])

    def forget(self, rooms: Sequence[Room]) -> None:
        """Drop the host's copies: the run is on the device, or is given up."""
        self._copied, self._storages, self._placed, self.parked = {}, [], [], False
        for room in rooms:
            room.stash.pieces.clear()

    def to_host(self, tensors: Sequence[Tensor], *, fresh: bool = False) -> list[Tensor]:
        """Copies on the host, in order. ``fresh``: nobody else has these contiguous tensors."""
        device = self._device
        if not device.asynchronous:
            return list(tensors) if fresh else [t.clone() for t in tensors]
        small = [t for t in tensors if t.nbytes < _TOGETHER]
        joined = None
        if len(small) > 1:  # where there is no memory for that, they travel one by one
            joined = unless_out_of_memory(lambda: torch.cat([t.reshape(-1).view(torch.uint8) for t in small]))
        large = [t for t in tensors if joined is None or t.nbytes >= _TOGETHER]
        sources = large if joined is None else [*large, joined]
        copies, event = device.copy_to_host(sources)
        self._flying.append((event, list(sources)))
        if joined is None:
            return copies
        parts = iter(torch.split(copies[-1], [t.nbytes for t in small]))
        rest = iter(copies)
        return [
            next(parts).view(t.dtype).view(t.shape) if t.nbytes < _TOGETHER else next(rest) for t in tensors
        ]

    def to_device(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the device, in order; what is launched from now on finds them complete."""
        if not tensors:
            return []
        copies, event = self._device.copy_to_device(tensors)
        if self._device.asynchronous:
            self._device.order_after(event)
            self._flying.append((event, list(tensors)))
        return copies


def _pack(run: Any, packer: Packer) -> tuple[list[tuple[Any, Any, Any]], set[int]]:
    """Where each tensor of a run lies, and the storages that are still being written (partial outputs)."""
    placed: list[tuple[Any, Any, Any]] = []
    for shelf in _shelves(run):
        placed += [(shelf, name, packer.place(tensor)) for name, tensor in shelf.items()]
    for group in caches_of(run):
        for layer, kv in group.items():
            if not isinstance(kv, PooledKV):
                placed.append((group, layer, (packer.place(kv.keys), packer.place(kv.values), kv.start)))
    core = run.joined if isinstance(run, Together) else run
    partial = core.partial.values() if isinstance(core, Run) else ()
    return placed, {t.untyped_storage()._cdata for t in partial}


def _lengths(run: Any, room: Room) -> dict[int, int]:
    """Written tokens of each layer in a room that are still to be read."""
    return {
        layer: kv.length
        for group in caches_of(run)
        for layer, kv in group.items()
        if isinstance(kv, PooledKV) and kv.room is room
    }


def unstashed(room: Room, lengths: dict[int, int]) -> int:
    """Bytes of the ``lengths`` tokens of each layer that the room's stash lacks."""
    layout = room.pool.layout
    return sum(
        (length - room.dropped - room.stash.tokens(layer)) * room.batch * layout.layer_bytes(layer)
        for layer, length in lengths.items()
    )


def _view(storages: Sequence[Tensor], p: Placement) -> Tensor:
    flat = storages[p.storage]
    dtype: torch.dtype = getattr(torch, p.dtype)
    return torch.empty(0, dtype=dtype, device=flat.device).set_(
        flat.untyped_storage(), p.offset, p.sizes, p.strides
    )

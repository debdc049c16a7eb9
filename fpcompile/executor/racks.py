"""Keys and values of sequences that decode together: those of similar length lie side by side, so that one
attention call of a layer serves all of them.

Words
    *rack*    for each cache layer keys ``[slots, Hkv, room, D]`` and values alike. A sequence has one slot,
              the same in all layers, and is its *tenant*.
    *room*    tokens of a slot. Layers with a window have less: what lies before the window is moved out.
    *origin*  position of the token that lies first in a slot, in the layers of one *span* (window or chunk in
              tokens, 0 for none).
    *flight*  a step under way. While there is one over a rack, its tensors and slots stay as they are.

Typical use
    ``racks.put(sequence, layers)``; ``racks.groups(sequences, flight)`` gives the caches of a step

Invariants
    A step writes behind the end of its sequences, and ``past`` is counted up by whoever made the step, when
    it is done: until then nothing can be seen of it.
    Attention computes with everything in a slot, under a mask: what nobody wrote is zero, for a NaN that
    happens to lie there would come through.
    A rack lives as long as one of its tenants: nobody has to release it.
    At most :data:`TOKENS` tokens are copied when a rack grows; sequences that do not fit begin another one.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, final

import torch
from torch import Tensor

from fpcompile.executor.kv import KV, NO_STORAGES, LayerKV
from fpcompile.models.attention import AttentionCall, MaskKind

__all__ = ["TOKENS", "Abreast", "Flight", "Place", "Racks", "Tenant", "room_for"]

TOKENS: Final = 8192
_SPARE: Final = 64  # tokens: to move for less would copy a short sequence too often
_SMALLEST: Final = 128
_ONE_CALL: Final = 512  # tokens up to which rooms are powers of two: few calls matter more than padding


class Flight:
    """A step under way, until it has landed or nobody holds it any more."""

    __slots__ = ("__weakref__",)


@dataclasses.dataclass(slots=True, eq=False)
class Place:
    """Where a sequence lies; ``origins`` by span."""

    rack: Rack
    slot: int
    origins: dict[int, int]


class Tenant(Protocol):
    """A sequence of ``past`` tokens; ``place`` is None before it is put on a rack."""

    past: int
    place: Place | None


def room_for(tokens: int) -> int:
    """Room of a sequence of so many tokens: a quarter more, 64 at least; in few sizes."""
    wanted = tokens + max(_SPARE, tokens // 4)
    room = max(_SMALLEST, 1 << (wanted - 1).bit_length())
    return room * 3 // 4 if room > _ONE_CALL and wanted <= room * 3 // 4 else room


@final
class Rack:
    """Slots of ``room`` tokens, ``rooms[s]`` in the layers of span s. ``tensors``: keys, values by layer."""

    __slots__ = ("__weakref__", "flights", "room", "rooms", "tenants", "tensors")

    def __init__(self, room: int, spans: Mapping[int, int], like: Mapping[int, KV]) -> None:
        self.room = room
        self.rooms = {span: min(room, 2 * span + _SPARE) if span else room for span in set(spans.values())}
        self.tenants: list[weakref.ref[Tenant]] = []
        """By slot."""
        self.flights: weakref.WeakSet[Flight] = weakref.WeakSet()
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, kv in like.items():
            keys, values = kv.keys, kv.values
            held = self.rooms[spans[layer]]
            self.tensors[layer] = (
                keys.new_zeros(1, keys.shape[1], held, keys.shape[3]),
                values.new_zeros(1, values.shape[1], held, values.shape[3]),
            )

    @property
    def slots(self) -> int:
        """How many there are."""
        keys, _ = next(iter(self.tensors.values()))
        return int(keys.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(t.nbytes for pair in self.tensors.values() for t in pair)

    def tenant(self, slot: int) -> Tenant | None:
        """Who lies in ``slot``; None when it has gone."""
        tenant = self.tenants[slot]()
        place = None if tenant is None else tenant.place
        return tenant if place is not None and place.rack is self and place.slot == slot else None

    def vacant(self) -> int | None:
        """A slot that can be taken now, None when there is none."""
        if not self.flights:
            self.tidy()
            if len(self.tenants) == self.slots and 2 * self.slots * self.room <= TOKENS:
                self._resize(2 * self.slots)
        return len(self.tenants) if len(self.tenants) < self.slots else None

    def tidy(self) -> None:
        """Fill gaps with the last tenants, so that they have the first slots; give back what few need."""
        if self.flights:
            return
        slot = 0
        while slot < len(self.tenants):
            last = self.tenant(len(self.tenants) - 1)
            if last is None:
                self.tenants.pop()
                continue
            if self.tenant(slot) is None:
                place = place_of(last)
                for t in (t for pair in self.tensors.values() for t in pair):
                    t[slot].copy_(t[place.slot])
                self.tenants[slot], place.slot = self.tenants.pop(), slot
            slot += 1
        if self.slots > 4 * max(len(self.tenants), 1):
            self._resize(2 * max(len(self.tenants), 1))

    def _resize(self, slots: int) -> None:
        """All layers or none: where memory ends on the way, the rack stays as it is."""
        kept, grown = len(self.tenants), dict[int, tuple[Tensor, Tensor]]()
        for layer, (keys, values) in self.tensors.items():
            pair = keys.new_zeros(slots, *keys.shape[1:]), values.new_zeros(slots, *values.shape[1:])
            pair[0][:kept], pair[1][:kept] = keys[:kept], values[:kept]
            grown[layer] = pair
        self.tensors = grown


@final
class Racks:
    """All racks of one decoder. ``spans`` by cache layer."""

    def __init__(self, spans: Mapping[int, int]) -> None:
        self._spans = dict(spans)
        self._racks: dict[int, list[weakref.ref[Rack]]] = {}
        self._lock = threading.Lock()  # a program may be in several engines

    def put(self, tenant: Tenant, layers: Mapping[int, KV]) -> None:
        """Copy ``layers``, caches ``[1, Hkv, n, D]`` of its ``past`` tokens, to a slot."""
        with self._lock:
            self._put(tenant, layers)

    def layers(self, tenant: Tenant) -> dict[int, LayerKV]:
        """A copy of what lies in its slot."""
        with self._lock:
            place, found = place_of(tenant), dict[int, LayerKV]()
            for layer, pair in place.rack.tensors.items():
                origin = place.origins[self._spans[layer]]
                keys, values = (
                    t[place.slot : place.slot + 1, :, : tenant.past - origin].clone() for t in pair
                )
                found[layer] = LayerKV(keys, values, origin)
            return found

    def nbytes(self, tenant: Tenant) -> int:
        """Its part of its rack, slots without tenants shared out; from any thread."""
        place = tenant.place
        return 0 if place is None else place.rack.nbytes // max(len(place.rack.tenants), 1)

    def groups(
        self, tenants: Sequence[Tenant], flight: Flight, *, ragged: bool
    ) -> list[tuple[list[int], dict[int, KV]]]:
        """The caches with which a step over ``tenants`` attends: (members by index, caches by layer).

        There is room behind each of them for one token. ``flight`` is that step: until it has landed, racks
        stay as they are. ``ragged`` False: ``tenants`` is one, that is to be attended as if alone.
        """
        with self._lock:
            for tenant in tenants:
                self._make_room(tenant)
            by_rack: dict[int, list[int]] = {}
            for index, tenant in enumerate(tenants):
                by_rack.setdefault(id(place_of(tenant).rack), []).append(index)
            found = []
            for members in by_rack.values():
                rack = place_of(tenants[members[0]]).rack
                rack.tidy()
                rack.flights.add(flight)
                members.sort(key=lambda index: place_of(tenants[index]).slot)
                group = [tenants[index] for index in members]
                rows = {span: _Rows.of(rack, group, span, ragged, flight) for span in rack.rooms}
                caches: dict[int, KV] = {
                    layer: Abreast(rows[self._spans[layer]], keys, values)
                    for layer, (keys, values) in rack.tensors.items()
                }
                found.append((members, caches))
            return found

    def landed(self, tenants: Sequence[Tenant], flight: Flight) -> None:
        """The step is done, or undone."""
        with self._lock:
            for tenant in tenants:
                place_of(tenant).rack.flights.discard(flight)

    def _put(self, tenant: Tenant, layers: Mapping[int, KV]) -> None:
        origins = {span: max(0, tenant.past - span + 1) if span else 0 for span in self._spans.values()}
        for layer, kv in layers.items():
            origins[self._spans[layer]] = max(origins[self._spans[layer]], kv.start)
        room = room_for(max(tenant.past - origin for origin in origins.values()))
        rack, slot = self._vacant(room, layers)
        for layer, kv in layers.items():
            origin = origins[self._spans[layer]]
            held = tenant.past - origin
            for store, old in zip(rack.tensors[layer], (kv.keys, kv.values), strict=True):
                store[slot, :, :held] = old[0, :, origin - kv.start : tenant.past - kv.start]
                store[slot, :, held:] = 0
        rack.tenants.append(weakref.ref(tenant))
        tenant.place = Place(rack, slot, origins)

    def _vacant(self, room: int, like: Mapping[int, KV]) -> tuple[Rack, int]:
        known = self._racks.setdefault(room, [])
        known[:] = [ref for ref in known if ref() is not None]
        for ref in known:
            rack = ref()
            if rack is not None and (slot := rack.vacant()) is not None:
                return rack, slot
        rack = Rack(room, self._spans, like)
        known.append(weakref.ref(rack))
        return rack, 0

    def _make_room(self, tenant: Tenant) -> None:
        """For one token behind ``past``: windows slide in their slot, for others another rack has room."""
        place = place_of(tenant)
        for span, room in place.rack.rooms.items():
            held = tenant.past - place.origins[span]
            if held < room:
                continue
            if span and room_for(span - 1) <= place.rack.room:
                self._slide(place, span, held)
                continue
            slot = slice(place.slot, place.slot + 1)
            layers: dict[int, KV] = {
                layer: LayerKV(keys[slot], values[slot], place.origins[self._spans[layer]])
                for layer, (keys, values) in place.rack.tensors.items()
            }
            self._put(tenant, layers)
            return

    def _slide(self, place: Place, span: int, held: int) -> None:
        """Keep of ``held`` tokens what the next one sees, at the beginning of the slot.

        Piece by piece, from the first one on, so that none is read and written at once: nothing is allocated,
        so memory cannot run out with some layers moved and others not.
        """
        kept, by = span - 1, held - span + 1
        for layer, pair in place.rack.tensors.items():
            if self._spans[layer] == span:
                for t in (t[place.slot] for t in pair):
                    for low in range(0, kept, by):
                        high = min(low + by, kept)
                        t[:, low:high] = t[:, low + by : high + by]
        place.origins[span] += by


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """What the layers of one span have in common in a step over some tenants of a rack.

    ``slots``, ``at`` and ``origins`` ``[B]``: where each lies, where its new token is written, the position
    of the first token there. ``low`` to ``stop`` (exclusive) is what any of them sees; ``adjacent``: they lie
    side by side, from slot ``first``. ``start``: position of what lies at ``low`` there. ``flight`` is held
    as long as anybody can write.
    """

    slots: Tensor
    at: Tensor
    origins: Tensor
    first: int
    low: int
    stop: int
    start: int
    adjacent: bool
    ragged: bool
    flight: Flight

    @classmethod
    def of(cls, rack: Rack, tenants: Sequence[Tenant], span: int, ragged: bool, flight: Flight) -> _Rows:
        """Of the layers of ``span``."""
        places = [place_of(tenant) for tenant in tenants]
        origins = [place.origins[span] for place in places]
        slots = [place.slot for place in places]
        at = [tenant.past - origin for tenant, origin in zip(tenants, origins, strict=True)]
        low = max(0, min(at) - span + 1) if span else 0
        device = next(iter(rack.tensors.values()))[0].device
        table = torch.tensor([slots, at, origins], device=device)
        return cls(
            table[0], table[1], table[2], slots[0], low, max(at) + 1, origins[0] + low,
            slots == list(range(slots[0], slots[0] + len(slots))), ragged, flight,
        )  # fmt: skip

    def mask(self, call: AttentionCall, dtype: torch.dtype) -> Tensor:
        """Additive, ``[B, 1, 1, keys]``: what each new token sees of its own slot."""
        places = torch.arange(self.low, self.stop, device=self.at.device)
        at = self.at[:, None]
        seen = places <= at
        if call.mask.kind is MaskKind.SLIDING:
            seen &= places > at - call.mask.span
        elif call.mask.kind is MaskKind.CHUNKED:
            origins = self.origins[:, None]
            seen &= (origins + places) // call.mask.span == (origins + at) // call.mask.span
        hidden = -torch.inf if call.implementation == "sdpa" else torch.finfo(dtype).min
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, hidden)
        return mask[:, None, None]


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Abreast:
    """One layer of the members of a group, newest tokens included, as :class:`fpcompile.executor.kv.KV`.

    ``rows.ragged``: all slots up to the longest, to be attended under :meth:`mask`. Else exactly the tokens
    that one sequence sees, as the unmodified model would attend to them.
    """

    rows: _Rows
    _keys: Tensor
    _values: Tensor

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``: a view, unless others lie between the members."""
        return self._of(self._keys)

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, n, Dv]``."""
        return self._of(self._values)

    @property
    def start(self) -> int:
        """Position of the first key, of one alone."""
        return self.rows.start

    @property
    def storages(self) -> Mapping[int, int]:
        """None: the memory is the rack's."""
        return NO_STORAGES

    @property
    def pooled_bytes(self) -> int:
        """Bytes of the members' slots."""
        return sum(t[0].nbytes for t in (self._keys, self._values)) * int(self.rows.at.shape[0])

    def append(self, keys: Tensor, values: Tensor) -> Abreast:
        """Write the new tokens ``[B, Hkv, 1, D]``, each behind its own sequence."""
        rows = self.rows
        for store, new in ((self._keys, keys), (self._values, values)):
            if rows.ragged:
                store[rows.slots, :, rows.at] = new[:, :, 0]
            else:
                store[rows.first, :, rows.stop - 1 : rows.stop] = new[0]
        return self

    def kept(self) -> LayerKV:
        """A copy."""
        return LayerKV(self.keys.clone(), self.values.clone(), self.start)

    def mask(self, call: AttentionCall, dtype: torch.dtype) -> Tensor:
        """Additive, ``[B, 1, 1, n]``, for :attr:`keys`."""
        return self.rows.mask(call, dtype)

    def _of(self, store: Tensor) -> Tensor:
        rows = self.rows
        seen = store[:, :, rows.low : rows.stop]
        return seen[rows.first : rows.first + rows.at.shape[0]] if rows.adjacent else seen[rows.slots]


def place_of(tenant: Tenant) -> Place:
    """Of a sequence that has been put."""
    assert tenant.place is not None
    return tenant.place

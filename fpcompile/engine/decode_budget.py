"""A bound in bytes on what requests hold that decode outside a pool: ``memory_budget``, where it is given.

What decodes and what is paused share the budget. Before each step: if they hold more, paused runs are moved
first, then decoding requests, whose next token is due latest first; their caches go to the host, or are
dropped where that is full, to be computed again as prompts. At least one goes on. They come back, those that
are due first before others, when the predicted peak (:mod:`fpcompile.scheduler.future`, in bytes) stays
within the budget, or nobody else decodes.

A cache counts with what is seen of it, the next token included: room for more is the decoder's, which lets
sequences of similar length lie side by side. A cache that cannot be taken out of its decoder (the generic
route's) never goes to the host: it is dropped if it depends on tokens alone, else it stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, final

from torch import Tensor

from fpcompile.engine.decode_memory import Host, Reserve
from fpcompile.engine.metrics import Ticket
from fpcompile.executor.faults import out_of_memory, unless_out_of_memory
from fpcompile.executor.kv import LayerKV
from fpcompile.executor.offload import Parking
from fpcompile.scheduler.future import FILLED, OutputLengths, peak_of

__all__ = ["DecodeBudget"]


@dataclass(frozen=True, slots=True)
class _Away:
    """A cache on the host, ``nbytes`` of it, or a dropped one; ``held`` bytes were held on the device."""

    tensors: dict[int, tuple[Tensor, Tensor, int]] | None
    nbytes: int
    held: int


@final
class DecodeBudget:
    """Used by the driver's thread. ``paused()``: bytes of paused runs; ``relieve(budget)`` moves some.

    ``pooled(ticket)``: whether its cache is a pool's business.
    """

    def __init__(
        self,
        budget: int,
        host: Host,
        parking: Callable[[], Parking],
        paused: Callable[[], int],
        pooled: Callable[[Ticket], bool],
        *,
        deterministic: bool,
    ) -> None:
        self.budget, self.evictions = budget, 0
        self.relieve: Callable[[float], object] = lambda budget: None
        self._host, self._parking, self._paused, self._pooled = host, parking, paused, pooled
        self._deterministic = deterministic
        self._lengths = OutputLengths()
        self._away: dict[str, _Away] = {}
        self._looked = inf
        """What paused runs held when nobody could come back; inf when that may have changed."""
        self._coming: dict[str, tuple[int, int, float]] = {}  # prompts that restore what was dropped

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(away.nbytes for away in list(self._away.values()))

    def reserve(self, tickets: Sequence[Ticket], members: Iterable[Ticket]) -> Reserve:
        """Who of ``tickets`` can be stepped, once what all ``members`` hold is within the budget."""
        found, self._looked = Reserve(), inf
        own = sorted((t for t in members if not self._pooled(t)), key=_due)
        for ticket in own:
            self._coming.pop(ticket.id, None)
        held = {ticket.id: _cache_bytes(ticket) for ticket in own}
        decoding = sum(held.values())
        if decoding + self._paused() > self.budget:
            self.relieve(max(self.budget - decoding, 0))
        over = decoding + self._paused() - self.budget
        for ticket in reversed(own[1:]):
            if over <= 0:
                break
            if self._evict(ticket, held[ticket.id], found):
                over -= held[ticket.id]
        gone = {ticket.id for ticket in found.away}
        found.ready += [t for t in tickets if t.id not in gone and t.ended is None]
        return found

    def _evict(self, ticket: Ticket, held: int, found: Reserve) -> bool:
        generation: Any = ticket.generation
        if (kept := self._on_host(generation, held)) is not None:
            self._away[ticket.id] = kept
            generation.decoder.take_out(generation.sequence)
            ticket.offloads += 1
            found.away.append(ticket)
        elif generation.renewable and not self._deterministic:
            generation.sequence = None
            ticket.recomputations += 1
            self._away[ticket.id] = _Away(None, 0, held)
            found.away.append(ticket)
        else:
            return False
        self.evictions += 1
        return True

    def _on_host(self, generation: Any, held: int) -> _Away | None:
        """A copy of its cache; None where it cannot be taken out, or there is no memory for the copy."""

        def copy() -> _Away | None:
            layers = generation.decoder.layers(generation.sequence)
            if layers is None or not self._host.room_for(_bytes_of(layers)):
                return None
            flat = [t for kv in layers.values() for t in (kv.keys, kv.values)]
            moved = iter(self._parking().to_host(flat))
            tensors = {i: (next(moved), next(moved), kv.start) for i, kv in layers.items()}
            return _Away(tensors, _bytes_of(layers), held)

        return unless_out_of_memory(copy) if self._host.room_for(held) else None

    def back(self, away: Iterable[Ticket], members: Iterable[Ticket]) -> Reserve:
        """Who of those that are away has its cache again, or may compute it.

        Asked at every cut: nobody is looked at again before a step, an end, or less that is paused.
        """
        found, paused = Reserve(), self._paused()
        if paused >= self._looked:
            return found
        active = [self._growing(ticket) for ticket in members if not self._pooled(ticket)]
        active += self._coming.values()
        for ticket in sorted((t for t in away if t.id in self._away), key=_due):
            growing = self._growing(ticket)
            if active and peak_of([*active, growing]) > FILLED * max(self.budget - paused, 0):
                break
            active.append(growing)
            kept, generation = self._away[ticket.id], ticket.generation
            assert generation is not None
            if kept.tensors is None:
                del self._away[ticket.id]
                self._coming[ticket.id] = growing
                found.dropped.append(ticket)
                continue
            try:
                self._restore(generation, kept.tensors)
            except Exception as error:
                generation.decoder.take_out(generation.sequence)
                if not out_of_memory(error):
                    raise
                found.failed = ticket, error
                return found
            del self._away[ticket.id]
            found.ready.append(ticket)
        self._looked = paused
        return found

    def _restore(self, generation: Any, tensors: dict[int, tuple[Tensor, Tensor, int]]) -> None:
        flat = [t for keys, values, _ in tensors.values() for t in (keys, values)]
        moved = iter(self._parking().to_device(flat))
        starts = {layer: start for layer, (_, _, start) in tensors.items()}
        layers = {i: LayerKV(next(moved), next(moved), start) for i, start in starts.items()}
        generation.decoder.put_back(generation.sequence, layers)

    def _growing(self, ticket: Ticket) -> tuple[int, int, float]:
        """Bytes, tokens to come, and bytes of each of these."""
        generation: Any = ticket.generation
        away = self._away.get(ticket.id)
        held = _cache_bytes(ticket) if away is None else away.held
        made = len(generation.tokens)
        most = generation.sampler.max_new_tokens
        total = most if self._deterministic else self._lengths.expected(made, most)
        return held, max(total - made, 0), held / (int(generation.prompt.shape[1]) + made)

    def ended(self, ticket: Ticket) -> None:
        """A request is over."""
        self._looked = inf
        self._away.pop(ticket.id, None)
        self._coming.pop(ticket.id, None)
        generation = ticket.generation
        if generation is not None and generation.tokens and ticket.state in ("completed", "cancelled"):
            self._lengths.ended(len(generation.tokens), cut=generation.finish_reason == "length")


def _due(ticket: Ticket) -> float:
    assert ticket.generation is not None
    return ticket.generation.due


def _cache_bytes(ticket: Ticket) -> int:
    generation: Any = ticket.generation
    held: int = generation.decoder.cache_bytes(generation.sequence)
    return held


def _bytes_of(layers: dict[int, LayerKV]) -> int:
    return sum(t.nbytes for kv in layers.values() for t in (kv.keys, kv.values))

"""Decoding: sequences whose prompt is done, continued by one token at a time, several in one run.

Words
    *sequence*  what stays of a request between two of its tokens: keys and values, or a state.
    *step*      one run over the next token of each of some sequences; gives a row of logits for each.
    *decoder*   what one program knows about continuing: it begins prompts, opens sequences, makes steps.

Typical use
    ``begun = decoder.begin(ids)``; ``begun.run`` is executed like any other
    ``sequence, logits = decoder.open(begun, begun.run.result())``
    ``step = decoder.step([sequence, ...], [token, ...])``; ``step.run`` is executed; ``step.logits()``

Invariants
    A step is built without checks: its tokens come out of the vocabulary, its sequences from ``open``.
    Sequences join and leave between steps. A step that failed, or was dropped half-way, has spoilt its
    sequences, for some layers hold the new token and others do not, until it is undone.
    Alone, a sequence is continued by the kernels, shapes and masks of the unmodified model: its bits. Beside
    others, projections run at another number of rows: to rounding.
    What a step launches depends on its shape, with contexts rounded up, and on the budget.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Protocol, final, runtime_checkable

import torch
from torch import Tensor
from transformers import GenerationMixin

from fpcompile.errors import InternalError, InvalidInputError
from fpcompile.executor.cost_model import CostModel
from fpcompile.executor.inputs import Group, Layout
from fpcompile.executor.kv import KV, GrowingKV, LayerKV, kv_bytes
from fpcompile.executor.packed import PackedCall, PackedProgram
from fpcompile.executor.pool import layout_of
from fpcompile.executor.pool_growing import PooledGrowingKV, growing, kept_in_pool
from fpcompile.executor.racks import Flight, Place, Racks
from fpcompile.executor.run import Run
from fpcompile.executor.sampling import Sampler, Wishes
from fpcompile.executor.schedule import Launch, Shape, launch_seconds

__all__ = ["Begun", "Decoder", "Generates", "PackedDecoder", "PackedSequence", "Step", "packed_decoder"]

_PLANS_KEPT: Final = 512

Budgets = Collection[float | None]
"""``max_blocking_ms`` of sequences; None for the program's own."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """A prompt that is to be continued: its ``run``, of which nothing is executed, and ``ids [1, n]``.

    ``context``: tokens that the cache will hold behind the prompt. ``inputs``: what the model was given.
    """

    run: Any
    ids: Tensor
    context: int
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A step: its ``run``, and ``logits()``, ``[sequences, vocabulary]``, once that is done.

    ``cost()`` is what the next launch is predicted to take in seconds, ``seconds`` the whole step. ``undo()``
    takes the sequences back to before the step, wherever it failed; they can be stepped again.
    """

    run: Any
    logits: Callable[[], Tensor]
    cost: Callable[[], float]
    seconds: float
    undo: Callable[[], None]


class Decoder(abc.ABC):
    """How one program continues sequences."""

    together: bool
    """Whether a step may hold several sequences."""
    follows_length = False
    """Whether rotary frequencies depend on the length of the prompt."""

    @abc.abstractmethod
    def begin(self, input_ids: Any, **inputs: Any) -> Begun:
        """Start the prompt of a generation, one sequence; raises :class:`InvalidInputError`."""

    @abc.abstractmethod
    def sampler(self, begun: Begun, wishes: Wishes) -> Sampler:
        """How the tokens of a request are chosen; raises :class:`InvalidInputError` for what is not there."""

    @abc.abstractmethod
    def open(self, begun: Begun, output: Any) -> tuple[Any, Tensor]:
        """The sequence behind a prompt that is done, and the logits ``[vocabulary]`` of its first token.

        ``output`` is the run's result.
        """

    @abc.abstractmethod
    def seconds(self, sequences: Sequence[Any], budgets: Budgets = ()) -> float:
        """What a step is predicted to take; cheap."""

    @abc.abstractmethod
    def step(self, sequences: Sequence[Any], tokens: Sequence[int], budgets: Budgets = ()) -> Step:
        """The next token of each sequence, as a run of which nothing is executed.

        ``budgets`` are the sequences' own ones: the smallest counts.
        """

    @abc.abstractmethod
    def nbytes(self, sequence: Any) -> int:
        """Bytes that a sequence holds."""

    def cache_bytes(self, sequence: Any) -> int:
        """Bytes of what it needs to see for the next token, that included."""
        return self.nbytes(sequence)

    def layers(self, sequence: Any) -> dict[int, LayerKV] | None:
        """A copy of a sequence's cache; None where it cannot be taken out and put back."""
        return None

    def take_out(self, sequence: Any) -> None:
        """The sequence holds nothing, until its cache is put back."""
        raise InternalError("a cache that cannot be taken out", got=type(sequence).__name__)

    def put_back(self, sequence: Any, layers: Mapping[int, LayerKV]) -> None:
        """What ``layers`` gave is its cache again."""
        raise InternalError("a cache that cannot be put back", got=type(sequence).__name__)


@runtime_checkable
class Generates(Protocol):
    """A program that can generate."""

    def decoder(self) -> Decoder:
        """The program's decoder, one for all requests; raises :class:`InvalidInputError` without one."""


@final
class PackedSequence:
    """``past`` tokens; they lie at ``place``, or in ``kv`` by cache layer, to be attended by themselves."""

    __slots__ = ("__weakref__", "kv", "past", "place")

    def __init__(self, kv: dict[int, GrowingKV | PooledGrowingKV], past: int) -> None:
        self.kv, self.past = kv, past
        self.place: Place | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """The launches of a step and their predicted seconds."""

    launches: tuple[Launch, ...]
    seconds: tuple[float, ...]
    total: float


@final
class PackedDecoder(Decoder):
    """Steps of a packed program: the new tokens of all sequences in one row, each over its own cache.

    ``abreast``: sequences of similar length are attended in one call, where attention takes a mask for each.
    """

    together = True

    def __init__(self, program: PackedProgram, *, abreast: bool = True) -> None:
        self.program = program
        self.follows_length = program.follows_length
        self._spans: dict[int, int] = {}
        for call in program.attention:
            spans = (self._spans.get(call.layer, call.mask.span), call.mask.span)
            self._spans[call.layer] = max(spans) if all(spans) else 0
        abreast = abreast and all(  # others may not take an additive mask for each sequence
            call.torch_kernel or call.implementation == "eager" for call in program.attention
        )
        self._racks = Racks(self._spans) if abreast else None
        layout = layout_of(program.attention, program.dtype)
        self._bytes = {layer: layout.layer_bytes(layer) for layer, *_ in layout.entries}
        self._turn = _turning_point(program)
        self._plans: dict[tuple[tuple[tuple[int, int, int], ...], float], _Plan] = {}
        self._costs: CostModel | None = None

    def begin(self, input_ids: Any, **inputs: Any) -> Begun:
        """Raises :class:`InvalidInputError` for anything but one sequence of visible tokens."""
        for name in ("position_ids", "logits_to_keep", "use_cache"):
            if inputs.get(name) is not None:
                raise InvalidInputError(
                    f"{name} cannot be chosen for a generation", expected="None", got=repr(inputs[name])
                )
        run = self.program.start(input_ids, **{**inputs, "logits_to_keep": 1, "use_cache": True})
        call = run.call
        assert isinstance(call, PackedCall)
        if call.layout.batch != 1 or call.padding is not None:
            raise InvalidInputError(
                "a generation continues one sequence",
                expected="input_ids [1, length] without padding",
                got=f"{call.layout.batch} sequences" if call.padding is None else "hidden tokens",
                remedy="submit each sequence by itself: they share their decode steps anyway",
            )
        run.call = dataclasses.replace(call, returns_cache=False)  # it goes on here, and nowhere else
        return Begun(run, run.values["input_ids"].clone(), call.context)

    def sampler(self, begun: Begun, wishes: Wishes) -> Sampler:
        """As transformers would choose for this model."""
        past, limit = begun.context - int(begun.ids.shape[1]), self.program.max_tokens
        sampler = Sampler(self.program.bindings.model, wishes, begun.ids, past=past, limit=limit)
        last = begun.context + sampler.max_new_tokens - 1
        if (turn := self._turn) is not None and begun.context <= turn < last:
            raise InvalidInputError(
                "the generation crosses the length at which the model's rotary frequencies change",
                expected=f"a prompt of more than {turn} tokens, or at most {turn} with what is generated",
                got=f"{begun.context} tokens and max_new_tokens={sampler.max_new_tokens}",
                remedy="submit in two parts: what was generated becomes a part of the next prompt",
            )
        return sampler

    def open(self, begun: Begun, output: Any) -> tuple[PackedSequence, Tensor]:
        """Take over the cache of the run."""
        (layers,) = begun.run.kv
        sequence = PackedSequence({}, begun.context)
        if self._racks is None or kept_in_pool(layers):
            sequence.kv.update((i, growing(layer, self._spans[i])) for i, layer in layers.items())
        else:
            self._racks.put(sequence, layers)
        return sequence, output.logits[0, -1]

    def seconds(self, sequences: Sequence[PackedSequence], budgets: Budgets = ()) -> float:
        """The sum over the launches, as if all were attended in one call."""
        count = len(sequences)
        context = math.ceil(sum(s.past + 1 for s in sequences) / count)
        return self._plan(((count, context),), budgets).total

    def nbytes(self, sequence: PackedSequence) -> int:
        """Of keys and values, with the room behind them."""
        if self._racks is not None and sequence.place is not None:
            return self._racks.nbytes(sequence)
        return kv_bytes([sequence.kv])

    def cache_bytes(self, sequence: PackedSequence) -> int:
        """Without the room behind it."""
        after = sequence.past + 1
        return sum(each * min(after, self._spans[layer] or after) for layer, each in self._bytes.items())

    def layers(self, sequence: PackedSequence) -> dict[int, LayerKV]:
        """All that it still sees."""
        if self._racks is not None and sequence.place is not None:
            return self._racks.layers(sequence)
        return {layer: kv.kept() for layer, kv in sequence.kv.items()}

    def take_out(self, sequence: PackedSequence) -> None:
        """Its slot is free, or its memory."""
        sequence.kv = {}  # another one: any thread may be reading the old one (statistics)
        sequence.place = None

    def put_back(self, sequence: PackedSequence, layers: Mapping[int, LayerKV]) -> None:
        """To a slot, or memory of its own."""
        if self._racks is not None:
            self._racks.put(sequence, layers)
        else:
            sequence.kv = {i: GrowingKV(kv, self._spans[i]) for i, kv in layers.items()}

    def step(self, sequences: Sequence[PackedSequence], tokens: Sequence[int], budgets: Budgets = ()) -> Step:
        """A packed run of one token of each: who lies on one rack is one group of the run."""
        program, count, flight = self.program, len(sequences), Flight()
        parts = self._parts(sequences, flight)
        order = [index for members, _ in parts for index in members]
        rows = [0] * count
        for row, index in enumerate(order):
            rows[index] = row
        groups, shape, start = list[Group](), list[tuple[int, int]](), 0
        for members, _ in parts:
            past = max(sequences[index].past for index in members)
            groups.append(Group(start, len(members), 1, past))
            shape.append((len(members), past + 1))
            start += len(members)
        plan = self._plan(tuple(shape), budgets)
        call = PackedCall(program, Layout(tuple(groups), count), rows=count, kept=count, use_cache=True)
        given = {
            "input_ids": torch.tensor([[tokens[index] for index in order]], device=program.device),
            "position_ids": torch.tensor([[sequences[index].past for index in order]], device=program.device),
            "logits_to_keep": torch.tensor(rows, device=program.device),
        }
        values = {name: given[name] for name in program.live[0]}
        caches: list[Any] = [kv for _, kv in parts]  # appending returns the same object
        run = Run(program, call, values, caches, plan.launches)
        lengths = [sequence.past for sequence in sequences]

        def logits() -> Tensor:
            for sequence in sequences:
                sequence.past += 1
            self._land(sequences, flight)
            found = run.values[program.plan.output][0]
            return found if "logits_to_keep" in program.live[0] else found[given["logits_to_keep"]]

        def undo() -> None:
            self._land(sequences, flight)
            for sequence, length in zip(sequences, lengths, strict=True):
                sequence.past = length
                for kv in sequence.kv.values():
                    kv.crop(length)

        return Step(run, logits, lambda: plan.seconds[run.at], plan.total, undo)

    def _parts(
        self, sequences: Sequence[PackedSequence], flight: Flight
    ) -> list[tuple[list[int], dict[int, KV]]]:
        """Who is attended in one call: (members by index, their caches)."""
        alone = [index for index, sequence in enumerate(sequences) if sequence.place is None]
        parts: list[tuple[list[int], dict[int, KV]]] = [([i], dict(sequences[i].kv)) for i in alone]
        if self._racks is not None and len(alone) < len(sequences):
            placed = [index for index, sequence in enumerate(sequences) if sequence.place is not None]
            found = self._racks.groups([sequences[i] for i in placed], flight, ragged=len(sequences) > 1)
            parts += [([placed[i] for i in members], caches) for members, caches in found]
        return parts

    def _land(self, sequences: Sequence[PackedSequence], flight: Flight) -> None:
        if self._racks is not None:
            self._racks.landed([s for s in sequences if s.place is not None], flight)

    def _plan(self, parts: tuple[tuple[int, int], ...], budgets: Budgets) -> _Plan:
        """The launches of a step over (sequences, longest context) of each call, contexts rounded up, so that
        few are made.
        """
        program = self.program
        own = math.inf if program.max_blocking_ms is None else program.max_blocking_ms
        budget = min((own if one is None else one for one in budgets), default=own)
        if self._costs is not program.costs:
            self._costs, self._plans = program.costs, {}
        groups = tuple((count, 1, rounded_up(context)) for count, context in parts)
        plan = self._plans.get((groups, budget))
        if plan is None:
            count = sum(batch for batch, _, _ in groups)
            shape = Shape(count, count, groups)
            launches = program.tile_plan(shape, budget, warn=False)
            heads = program.heads()
            seconds = tuple(launch_seconds(n, program.stages, shape, program.costs, heads) for n in launches)
            plan = _Plan(launches, seconds, sum(seconds))
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.clear()
            self._plans[groups, budget] = plan
        return plan


def _turning_point(program: PackedProgram) -> int | None:
    """The length behind which ``generate`` drops the cache and begins anew: phi3 with longrope; else None."""
    model: Any = program.bindings.model
    usual = type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
    limit = getattr(model.config, "original_max_position_embeddings", None)
    return None if usual or not program.follows_length else limit


def rounded_up(length: int) -> int:
    """The next of the numbers with four significant binary digits: at most an eighth more."""
    grain = 1 << max(length.bit_length() - 4, 0)
    return -(-length // grain) * grain


def packed_decoder(program: PackedProgram) -> PackedDecoder:
    """The decoder of a program; raises :class:`InvalidInputError` when its model does not generate."""
    check_generates(program.bindings.model)
    return PackedDecoder(program)


def check_generates(model: Any) -> None:
    """Raise :class:`InvalidInputError` unless transformers' ``generate`` takes ``model``."""
    if not getattr(model, "can_generate", lambda: False)():
        raise InvalidInputError(
            f"{type(model).__name__} does not generate",
            expected="a model with a language modelling head, for which model.can_generate() is True",
            got="another one",
            remedy="leave out max_new_tokens and generation_config: that is one forward pass",
        )

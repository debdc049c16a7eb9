"""Programs of the generic route: one graph for each class of inputs, compiled when first met.

:class:`GenericProgram` takes whatever the model takes. A call is matched to a :class:`Variant`, a program of
its own whose graph holds under recorded conditions; when none fits, one is compiled from the call. Every
state (cache, recurrent state) goes in and comes out as tensors of the graph, and the result is the model's
own output class with the model's own cache class. Nothing that the caller passes is changed.

Invariant: with ``verify`` no call is served by a variant whose numbers were not compared with the model's
(:mod:`fpcompile.executor.generic_check`); kinds of calls for which they differ are refused from then on.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import sympy
import torch
from torch import Tensor, nn

from fpcompile.errors import CheckpointError, InvalidInputError, UnsupportedModelError, UsageError
from fpcompile.executor.call import Call
from fpcompile.executor.checkpoint import check_type
from fpcompile.executor.faults import forget_frames, out_of_memory
from fpcompile.executor.generic_check import Example, compare
from fpcompile.executor.inputs import check_range
from fpcompile.executor.packed import graph_step
from fpcompile.executor.program import Program
from fpcompile.executor.run import Run
from fpcompile.executor.schedule import Heads, Launch, Shape
from fpcompile.executor.stages import Executable, build_stages
from fpcompile.executor.weights import WeightWatch
from fpcompile.ir import Granularity, Part, PartKind
from fpcompile.models.ambient import plain, tracing
from fpcompile.models.generic import GenericBindings, GenericCapture, Guards, pack
from fpcompile.models.generic_shapes import argument_names, promises
from fpcompile.models.generic_tree import Flat, unflatten
from fpcompile.models.kept import assigned, attributes, holds_cache, left
from fpcompile.passes.design import Design
from fpcompile.passes.generic_capture import capture_generic
from fpcompile.passes.generic_partition import Compiled, compile_generic
from fpcompile.passes.lower import lower

if TYPE_CHECKING:
    from fpcompile.executor.checkpoint import Checkpoint
    from fpcompile.executor.decode import Decoder

logger = logging.getLogger(__name__)
_NAMED = 8  # tensors of a call that a message names
_MOST_WAITING = 8  # variants that no call could be checked with yet


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class GenericCall(Call):
    """``symbols`` are the values of the variant's length symbols; ``tokens`` the main length.

    ``context`` is the longest context in tokens.
    """

    program: Variant
    symbols: Mapping[str, int]
    tokens: int
    context: int
    lengths: Mapping[str, int] = dataclasses.field(init=False)
    """The main length and the variant's symbols."""

    def __post_init__(self) -> None:
        lengths = {"tokens": self.tokens, "rows": self.tokens, **self.symbols}
        object.__setattr__(self, "lengths", lengths)

    @property
    def shape(self) -> Shape:
        """What the tile plan depends on."""
        return Shape(self.tokens, self.tokens, ((1, self.tokens, self.context),))

    def attend(
        self, run: Run, part: Part, tile: Launch, arguments: Sequence[Tensor], out: Tensor | None
    ) -> Tensor:
        """Never called: attention is graph code here."""
        raise UsageError("a generic program has no attention parts")

    def result(self, run: Run) -> Any:
        """The model's own output."""
        return self.program.output(run, self)

    def tensors(self) -> dict[str, Tensor]:
        """None: every tensor of the run is a live value."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Lengths, and which variant."""
        return {
            "symbols": dict(self.symbols),
            "tokens": self.tokens,
            "context": self.context,
            "variant": self.program.fingerprint,
        }


@final
class Variant(Program):
    """One compiled graph of a generic program and the conditions under which it holds."""

    def __init__(
        self,
        owner: GenericProgram,
        captured: GenericBindings,
        compiled: Compiled,
    ) -> None:
        self.owner, self.captured, self.compiled = owner, captured, compiled
        self.outputs, self.length_names = compiled.outputs, compiled.lengths
        weights = dict(captured.weights.values())
        by_name = {name: weights[path] for name, (path, _) in captured.weights.items()}
        self.constants = {n: by_name[n] for n in self.outputs if n in by_name}
        super().__init__(
            compiled.plan,
            build_stages(compiled.plan, functools.partial(_bind, compiled, captured, weights)),
            weights,
            owner.watch,
            config=owner.config,
            device=owner.device,
            dtype=owner.dtype,
            max_blocking_ms=owner.max_blocking_ms,
            strict_budget=owner.strict_budget,
        )

    @property
    def vocabulary(self) -> int:
        """Of the owner."""
        return self.owner.vocabulary

    @property
    def max_tokens(self) -> int | None:
        """Of the owner."""
        return self.owner.max_tokens

    def heads(self) -> Sequence[Heads]:
        """No stage is an attention call of the executor."""
        return [Heads()] * len(self.stages)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Of the owner."""
        self.owner.save(path)

    def start(self, *args: Any, **kwargs: Any) -> Run:
        """See :meth:`GenericProgram.start`; the call may go to another variant."""
        return self.owner.start(*args, **kwargs)

    def begin(
        self,
        tensors: Sequence[Tensor],
        values: Mapping[sympy.Symbol, int],
        max_blocking_ms: float | None,
        strict_budget: bool | None,
    ) -> Run:
        """A run over flat inputs for which the variant holds."""
        kept = self.captured.growing
        with plain(self.device_type):  # a clone made in inference mode would have no version to read
            owned = [t if i in kept else t.clone() for i, t in enumerate(tensors)]  # callers may change them
        given = dict(zip(self.captured.inputs, owned, strict=True))
        symbols = {name: values[s] for name, s in self.length_names.items()}
        symbols |= {f"count_{s}": int(v) for s, v in values.items()}
        tokens = values.get(self.captured.length, 0) if self.captured.length is not None else 0
        tokens = tokens or max((int(t.shape[1]) for t in tensors[:1] if t.dim() > 1), default=1)
        call = GenericCall(self, symbols, tokens, tokens)
        return Run(
            self,
            call,
            {n: given[n] for n in self.live[0]},
            [],
            self.tile_plan(
                call.shape,
                max_blocking_ms,
                strict=self.strict_budget if strict_budget is None else strict_budget,
            ),
        )

    def check_ids(self, tensors: Sequence[Tensor]) -> None:
        """Raise :class:`InvalidInputError` for ids among a call's tensors, as the caller passed them, that a
        table of the model has no row for. It waits for those that are on a device: there such an id would end
        every run of the process.
        """
        for index, name, rows in self.captured.tables:
            check_range(name, tensors[index], rows)

    def output(self, run: Run, call: GenericCall) -> Any:
        """The model's output object, out of the values of a finished run."""
        tensors = [self.constants[n] if n in self.constants else run.values[n] for n in self.outputs]
        known = {str(s): s for s in _symbols_of(self.captured.counts)}
        values = {s: call.symbols[f"count_{n}"] for n, s in known.items()}
        counts = [int(c.subs(values)) for c in self.captured.counts]
        return unflatten(self.captured.result, tensors, counts)

    def restore_call(self, description: dict[str, Any], tensors: dict[str, Tensor]) -> GenericCall:
        """Read back a call of a checkpoint."""
        return GenericCall(self, description["symbols"], description["tokens"], description["context"])


@final
class GenericProgram(Program):
    """A model compiled by the generic route. Takes the model's own arguments.

    ``variants`` grows as calls of new kinds are met; each is a :class:`Variant`. The plan that the program
    itself shows is that of its first variant.
    ``dynamic_shapes`` by argument name are promises for that one; calls beyond them are variants too.
    ``saved`` makes variants that were compiled before, in place of one for ``example``.
    ``verify`` compares each later variant with the model; the first one is for who makes the program.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Example | None,
        *,
        granularity: Granularity = Granularity.OPERATOR,
        max_blocking_ms: float | None = None,
        notes: tuple[str, ...] = (),
        dynamic_shapes: Mapping[str, Any] | None = None,
        backend: str = "eager",
        strict_budget: bool = False,
        design: Design | None = None,
        saved: Callable[[GenericProgram], list[Variant]] | None = None,
        verify: bool = True,
    ) -> None:
        self.model = model
        self.design = design
        self.backend = backend
        self.watch = WeightWatch(model)
        self._found = attributes(model)
        self._left = left(model)
        self.dynamic_shapes = dynamic_shapes or {}
        self.granularity = granularity
        self.notes = notes
        self.variants: list[Variant] = []
        self.verify = verify
        self._refused: list[tuple[Guards, UnsupportedModelError]] = []
        self._waiting: list[tuple[Variant, Variant]] = []
        self._lock = threading.Lock()
        self._decoder: Decoder | None = None
        self.config = getattr(model, "config", None)
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.dtype = torch.float32 if parameter is None else parameter.dtype
        self.max_blocking_ms = max_blocking_ms
        self.strict_budget = strict_budget
        if saved is not None:
            self.variants = saved(self)
            first = self.variants[-1]
        else:
            assert example is not None
            first = self._variant(example)[0]
        super().__init__(
            first.plan,
            first.stages,
            first.weights,
            self.watch,
            config=self.config,
            device=self.device,
            dtype=self.dtype,
            max_blocking_ms=max_blocking_ms,
            strict_budget=strict_budget,
        )

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table; 0 for a model without one."""
        table = getattr(getattr(self.model, "get_input_embeddings", lambda: None)(), "weight", None)
        return int(table.shape[0]) if isinstance(table, Tensor) else 0

    @property
    def max_tokens(self) -> int | None:
        """How many positions tokens can have, None when the configuration has no ``max_position_embeddings``.

        Where the table of positions has a row for padding (RoBERTa's family), tokens begin behind it.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        if not limit or limit <= 0:
            return None
        tables = [m for name, m in self.model.named_modules() if name.endswith("position_embeddings")]
        usable = [
            t.num_embeddings - t.padding_idx - 1
            for t in tables
            if getattr(t, "padding_idx", None) is not None
        ]
        return int(min([limit, *usable]))

    def heads(self) -> Sequence[Heads]:
        """No stage is an attention call of the executor."""
        return [Heads()] * len(self.stages)

    def save(self, path: str | os.PathLike[str]) -> None:
        """See :meth:`Program.save`: all variants are saved. What is read compiles others as it meets them."""
        from fpcompile.executor.saving_generic import save

        save(self, path)

    def decoder(self) -> Decoder:
        """How it continues sequences; raises :class:`InvalidInputError` when the model does not generate."""
        from fpcompile.executor.decode_generic import generic_decoder

        if self._decoder is None:
            self._decoder = generic_decoder(self)
        return self._decoder

    def _variant(
        self, tree: Example, *, begun: torch.dtype | None = None
    ) -> tuple[Variant, tuple[Tensor, ...], dict[sympy.Symbol, int]]:
        """The variant that serves a call, compiled if there is none, with its inputs and symbols.
        ``begun``: the cache is of a run of this program and the ids are its choice, so that neither these nor
        the model need be looked at again; it is the default dtype that the run's graph was made for.
        """
        flat, tensors = pack((tree[0], self._plain(tree[1])), self.device)
        if not flat.tensors:
            raise InvalidInputError("the call has no tensor", expected="the model's inputs", got="none")
        if begun is None and holds_cache(flat.spec):
            self._look()
        seen = tuple(self.variants)  # without the lock: nobody waits for what others compile
        found = self._serving(seen, flat, tensors, begun)
        if found is not None:
            return found[0], tensors, found[1]
        with self._lock:
            fresh = [variant for variant in self.variants if variant not in seen]
            found = self._serving(fresh, flat, tensors, begun)
            if found is not None:
                return found[0], tensors, found[1]
            for guards, refusal in self._refused:
                if guards.bind(flat, tensors, torch.get_default_dtype()) is not None:
                    raise copy.copy(refusal)
            if begun is not None:
                self._look()
            variant, checked, values = self._traced(flat, tensors)
            variant.check_ids(flat.tensors)
            if self.verify and self.variants:
                self._check(checked, tree, flat, tensors, values)
            self._waiting = [pair for pair in self._waiting if pair[0] is not variant]
            self.variants.insert(0, variant)
            return variant, tensors, values

    def _serving(
        self, variants: Sequence[Variant], flat: Flat, tensors: Sequence[Tensor], begun: torch.dtype | None
    ) -> tuple[Variant, dict[sympy.Symbol, int]] | None:
        """Which of some variants serves a call, with its symbols; see :meth:`_variant`."""
        now = torch.get_default_dtype()
        for default_dtype in dict.fromkeys((now if begun is None else begun, now)):
            for variant in variants:
                values = self._bound(variant, flat, tensors, default_dtype)
                if values is not None:
                    if begun is None:
                        variant.check_ids(flat.tensors)
                    return variant, values
        return None

    def _traced(
        self, flat: Flat, tensors: tuple[Tensor, ...]
    ) -> tuple[Variant, Variant, dict[sympy.Symbol, int]]:
        """A variant for a call, the one to check in its place (generated code), and the call's symbols. It
        waits for a call that can be checked, so that calls that the model fails on are traced once.
        """
        for variant, checked in self._waiting:
            values = self._bound(variant, flat, tensors, torch.get_default_dtype())
            if values is not None:
                return variant, checked, values
        promised = promises(self.model, flat, self.dynamic_shapes)
        if self.variants:
            promised = {i: p.softened(tensors[i]) for i, p in promised.items()}
        known = self.variants[0].captured.opaque if self.variants else ()
        with tracing(self.device.type):
            captured = capture_generic(self.model, flat, tensors, promised, known, self.kept)
            values = captured.guards.bind(flat, tensors, captured.guards.default_dtype)
            if values is None:
                raise UsageError("a variant does not hold for the call that it was compiled from")
            generated, lowered = self._compile(captured)
            variant = Variant(self, captured.bindings, lowered)
        checked = variant if self.backend == "eager" else Variant(self, captured.bindings, generated)
        self._waiting = [*self._waiting[1 - _MOST_WAITING :], (variant, checked)]
        return variant, checked, values

    def _check(
        self,
        variant: Variant,
        tree: Example,
        flat: Flat,
        tensors: Sequence[Tensor],
        values: Mapping[sympy.Symbol, int],
    ) -> None:
        """Raise :class:`UnsupportedModelError` unless a variant gives the model's numbers for the call that
        it was compiled from, now and for every later call that it would serve.

        It is generated code that is checked: compiled functions were compared with it one by one, and in the
        middle of serving, rounding that turns a choice of experts shall not look like a wrong program.
        Where memory runs out in the check, the variant is used unchecked, and the log says so.
        """

        def result() -> Any:
            run = variant.begin(tensors, values, math.inf, strict_budget=False)
            while not run.done:
                run.step()
            return run.result()

        guards = variant.captured.guards
        try:
            compare(self.model, self.device, tree, result, which="a variant for calls of this kind")
        except UnsupportedModelError as error:
            if torch.get_default_dtype() is guards.default_dtype:  # the model's own numbers follow it
                self._refused.append((guards, copy.copy(error)))
                self._waiting = [pair for pair in self._waiting if pair[1] is not variant]
            raise
        except Exception as error:
            if not out_of_memory(error):
                raise
            forget_frames(error)
            names = argument_names(self.model, flat)
            logger.warning(
                "memory ran out while a variant of %s was compared with the model: it is used unchecked; "
                "it was compiled for a call of %s",
                type(self.model).__name__,
                ", ".join(f"{names.get(i, i)} {list(t.shape)}" for i, t in enumerate(flat.tensors[:_NAMED])),
            )

    def serves(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a variant for such a call is compiled."""
        flat, tensors = pack((args, self._plain(kwargs)), self.device)
        now = torch.get_default_dtype()
        return any(self._bound(variant, flat, tensors, now) is not None for variant in self.variants)

    @property
    def kept(self) -> frozenset[str]:
        """Attributes of the model that calls assign tensors to, as far as is known: in traces, and in the
        model's own calls.
        """
        captured = [variant.captured for variant in self.variants]
        own = self._left.difference(*(c.memoised for c in captured))
        return own.union(*(c.kept for c in captured))

    def _look(self) -> None:
        """Find what the model's own calls have left in it."""
        self._left |= assigned(self._found, attributes(self.model))

    def _bound(
        self, variant: Variant, flat: Flat, tensors: Sequence[Tensor], default_dtype: torch.dtype
    ) -> dict[sympy.Symbol, int] | None:
        """The symbols of a call that a variant serves. A variant may have been traced before it was known
        what calls leave in the model: one for calls with a cache is then not trusted, as they may go on from
        it.
        """
        if not self.kept <= variant.captured.distrusted and holds_cache(flat.spec):
            return None
        return variant.captured.guards.bind(flat, tensors, default_dtype)

    def _compile(self, captured: GenericCapture) -> tuple[Compiled, Compiled]:
        """A traced variant as segments and their functions: as generated, and lowered for the backend."""
        name = type(self.model).__name__
        compiled = compile_generic(captured, self.granularity, name, self.notes, self.design)
        plan, functions = lower(compiled.plan, compiled.functions, self.backend)
        return compiled, dataclasses.replace(compiled, plan=plan, functions=functions)

    def _plain(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments without those that say what leaving them out says."""
        own = inspect.signature(self.model.forward).parameters
        usual = {k: p.default for k, p in own.items() if p.default is not inspect.Parameter.empty}
        kept = {k: v for k, v in kwargs.items() if v is not None or usual.get(k, self) is not None}
        own_default = usual.get("use_cache")
        default = getattr(self.config, "use_cache", None) if own_default is None else own_default
        if kept.get("use_cache") is not None and kept["use_cache"] == default:
            del kept["use_cache"]
        return kept

    def start(
        self,
        *args: Any,
        max_blocking_ms: float | None = None,
        strict_budget: bool | None = None,
        **kwargs: Any,
    ) -> Run:
        """A run over the model's own arguments; compiles a variant when none serves them.

        Raises :class:`InvalidInputError`, for ids that a table of the model has no row for too;
        :class:`UnsupportedModelError` when the model cannot be traced for arguments of this kind, or the
        variant does not give its numbers (:class:`SegmentError` when it fails where the model does not).
        """
        self.watch.check()
        variant, tensors, values = self._variant((args, kwargs))
        return variant.begin(tensors, values, max_blocking_ms, strict_budget)

    def start_next(
        self, kwargs: dict[str, Any], max_blocking_ms: float | None, default_dtype: torch.dtype
    ) -> Run:
        """A run for the next token of a sequence whose first run checked the model: parameters only.
        ``default_dtype`` is torch's that the first run's graph was made for.
        """
        self.watch.check_parameters()
        variant, tensors, values = self._variant(((), kwargs), begun=default_dtype)
        return variant.begin(tensors, values, max_blocking_ms, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run to the end without a pause; arguments and result as the model's own forward."""
        run = self.start(*args, **kwargs)
        while not run.done:
            run.step()
        return run.result()

    def resume(self, checkpoint: Checkpoint) -> Run:
        """A run that goes on where ``checkpoint`` was taken, by the variant that it was taken from.

        Raises :class:`CheckpointError` when that variant is not compiled in this process.
        """
        check_type(checkpoint)
        return self._named(checkpoint.program).resume(checkpoint)

    def _named(self, fingerprint: str) -> Variant:
        for variant in self.variants:
            if variant.fingerprint == fingerprint:
                return variant
        raise CheckpointError(
            "the checkpoint belongs to another program, or to a variant that is not compiled here",
            expected=f"one of {[v.fingerprint[:12] for v in self.variants]}",
            got=fingerprint[:12],
            remedy="start a run with arguments of the same kind and shape first: that compiles the variant",
        )

    def restore_call(self, description: dict[str, Any], tensors: dict[str, Tensor]) -> GenericCall:
        """Read back a call of a checkpoint, of the variant that it names."""
        return self._named(description["variant"]).restore_call(description, tensors)


def _bind(
    compiled: Compiled, captured: GenericBindings, weights: dict[str, Tensor], part: Part
) -> tuple[Executable, tuple[str, ...]]:
    if part.kind is PartKind.LEAF:
        leaf, picks = captured.leaves[part.call], compiled.picks[part.call]

        def run_leaf(run: Run, arguments: list[Tensor], lengths: Mapping[str, int]) -> Sequence[Tensor]:
            results = leaf.run(arguments, (lengths["tokens"],))
            return [results[i] for i in picks]

        return run_leaf, ()
    function = compiled.functions[part.function]
    return graph_step(part, function, weights), function.names


def _symbols_of(counts: Sequence[Any]) -> set[sympy.Symbol]:
    return {s for c in counts for s in c.free_symbols}

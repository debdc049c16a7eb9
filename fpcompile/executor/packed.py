"""Programs of the packed route: sequences in one row of tokens, attention called by the executor."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from fpcompile.errors import InvalidInputError, UsageError
from fpcompile.executor import inputs as checks
from fpcompile.executor.attend import attend, attend_tile, heads_in_front, write
from fpcompile.executor.call import Call
from fpcompile.executor.columns import Columns, columns_of
from fpcompile.executor.cudagraphs import Graphs
from fpcompile.executor.experts import Divisions
from fpcompile.executor.inputs import Group, Layout
from fpcompile.executor.kv import pad_layers, read_cache, write_cache
from fpcompile.executor.program import Program
from fpcompile.executor.run import Run
from fpcompile.executor.schedule import Heads, Launch, Shape
from fpcompile.executor.stages import Executable, build_stages
from fpcompile.executor.strips import in_strips
from fpcompile.executor.weights import WeightWatch
from fpcompile.ir import Part, PartKind
from fpcompile.models.attention import AttentionCall
from fpcompile.models.capture import Bindings
from fpcompile.passes.codegen import Function
from fpcompile.passes.partition import Partitioned
from fpcompile.passes.prepack import PACKED, pack

if TYPE_CHECKING:
    from fpcompile.executor.decode import Decoder

_ARGUMENTS = "input_ids, attention_mask, position_ids, past_key_values, logits_to_keep, use_cache"


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PackedCall(Call):
    """``kept`` columns of logits; ``scatter [rows]`` maps kept rows to their places (None: identity).

    ``padding [batch, columns]`` is the caller's mask, None when nothing is hidden. ``returns_cache``: whether
    the result has the cache that ``use_cache`` keeps, or only the run.
    """

    program: PackedProgram
    layout: Layout
    rows: int
    kept: int
    use_cache: bool
    scatter: Tensor | None = None
    padding: Tensor | None = None
    returns_cache: bool = True
    strict: bool = False
    """Whether its budget was promised: it is executed by its own tile plan only."""
    lengths: Mapping[str, int] = dataclasses.field(init=False)
    """Tokens in the packed row, rows of logits."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", {"tokens": self.layout.tokens, "rows": self.rows})

    @property
    def context(self) -> int:
        """Longest context of any sequence."""
        return self.layout.context

    @property
    def shape(self) -> Shape:
        """What the tile plan depends on."""
        groups = tuple((g.batch, g.length, g.context) for g in self.layout.groups)
        return Shape(self.layout.tokens, self.rows, groups)

    def attend(
        self, run: Run, part: Part, tile: Launch, arguments: Sequence[Tensor], out: Tensor | None
    ) -> Tensor:
        """One tile of an attention part; ``out`` is None for the first, which also writes the cache."""
        call = self.program.attention[part.call]
        q, k, v = arguments
        if out is None:
            write(run, self.layout, call, k, v)
            out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
        attend_tile(run, self.layout, call, q, tile, out)
        if tile.final:
            self.forget(run, part.call)
        return out

    def forget(self, run: Run, call: int) -> None:
        """Drop a layer's keys and values behind the last attention call that reads them, unless asked for."""
        layer = self.program.attention[call].layer
        if not self.use_cache and self.program.last_reader[layer] == call:
            for layers in run.kv:
                layers.pop(layer, None)

    def result(self, run: Run) -> Any:
        """``.logits [batch, kept, vocabulary]`` (zero where hidden) and ``.past_key_values``."""
        packed = run.values[self.program.plan.output]
        if self.scatter is None:
            logits = packed.view(self.layout.batch, self.kept, packed.shape[-1])
        else:
            flat = packed.new_zeros(self.layout.batch * self.kept, packed.shape[-1])
            flat[self.scatter] = packed[0]
            logits = flat.view(self.layout.batch, self.kept, packed.shape[-1])
        cache = None
        if self.use_cache and self.returns_cache:
            layers = run.kv[0] if self.padding is None else pad_layers(run.kv, self.padding)
            cache = write_cache(self.program.config, layers)
        return self.program.output_type(logits=logits, past_key_values=cache)

    def tensors(self) -> dict[str, Tensor]:
        """The index tensors of a padded batch."""
        found = {"scatter": self.scatter, "padding": self.padding}
        return {name: t for name, t in found.items() if t is not None}

    def describe(self) -> dict[str, Any]:
        """Layout and flags."""
        return {
            "groups": [dataclasses.astuple(g) for g in self.layout.groups],
            "columns": self.layout.columns,
            "rows": self.rows,
            "kept": self.kept,
            "use_cache": self.use_cache,
            "returns_cache": self.returns_cache,
        }


@final
class PackedProgram(Program):
    """A decoder LM in which everything outside attention is token-wise."""

    def __init__(
        self,
        partitioned: Partitioned,
        captured: Bindings,
        model: nn.Module,
        *,
        max_blocking_ms: float | None = None,
        strict_budget: bool = False,
    ) -> None:
        weights = dict(captured.weights.values())
        parts = [part for s in partitioned.plan.segments for part in s.parts]
        columns = columns_of(parts, partitioned.functions, weights)
        for path in {p for part in parts if part.outputs not in columns for p in part.params}:
            if path.endswith(PACKED):
                weights[path] = pack(weights[path.removesuffix(PACKED)])
        packed = any(path.endswith(PACKED) for part in parts for path in part.params)
        self._packed_at = WeightWatch(model).version if packed else None
        self.functions, self.bindings = partitioned.functions, captured
        self.output_type = captured.output_type
        self.attention = captured.attention
        self.last_reader = {c.layer: i for i, c in enumerate(captured.attention)}
        self._vocabulary = captured.vocabulary
        own: Any = getattr(model, "generation_config", None)
        captured.model.generation_config = own  # not the copy: as it is when somebody asks
        self._decoder: Decoder | None = None
        self._forward = inspect.signature(type(captured.model).forward).parameters
        graphs = Graphs(next(captured.model.parameters()).device)
        divisions = Divisions(captured)
        stages = build_stages(
            partitioned.plan,
            functools.partial(_bind, partitioned, captured, weights, graphs, columns),
            divisions.of,
            lambda part: columns.get(part.outputs),
        )
        notes = (*partitioned.plan.notes, *graphs.notes, *divisions.notes)
        super().__init__(
            dataclasses.replace(partitioned.plan, notes=tuple(dict.fromkeys(notes))),
            stages,
            weights,
            WeightWatch(model),
            config=captured.model.config,
            device=next(captured.model.parameters()).device,
            dtype=captured.model.dtype,
            max_blocking_ms=max_blocking_ms,
            strict_budget=strict_budget,
        )

    @property
    def vocabulary(self) -> int:
        """Number of rows of the embedding table."""
        return self._vocabulary

    @property
    def max_tokens(self) -> int | None:
        """``max_position_embeddings``, or None when the rotary embedding grows with the sequence."""
        return position_limit(self.config)

    @property
    def follows_length(self) -> bool:
        """Whether rotary frequencies depend on a sequence's whole length, so that parts of it differ."""
        return any(leaf.kind == "rotary" for leaf in self.bindings.leaves)

    def start(
        self,
        input_ids: Any = None,
        *,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        logits_to_keep: Any = 0,
        use_cache: bool | None = None,
        max_blocking_ms: float | None = None,
        strict_budget: bool | None = None,
        **unsupported: Any,
    ) -> Run:
        """A run over ``input_ids [batch, length]``; everything is checked, nothing is executed.

        ``attention_mask [batch, length]`` may hide padding on the left or right; padded batches are packed,
        so hidden positions cost nothing, their logits are zero, and each row gives what the model gives for
        it alone: positions are counted from its first visible token, as ``generate`` counts them, and rotary
        frequencies that depend on the length follow its own. ``position_ids [batch, length]`` gives other
        positions; those of a row's visible tokens must rise by one. ``past_key_values`` is a transformers
        ``DynamicCache`` to continue from; it is not changed. ``logits_to_keep`` is transformers' own: 0 for
        all positions, n for the last n, or a vector of indices. ``max_blocking_ms`` and
        ``strict_budget`` override the program's.

        Raises :class:`InvalidInputError`; :class:`BudgetError` for a strict budget that cannot be kept.
        """
        self._check_weights()
        if position_ids is not None and "position_ids" not in self._forward:
            unsupported["position_ids"] = position_ids
        for name, value in unsupported.items():
            if value is not None or name not in self._forward:
                raise InvalidInputError(
                    f"{name} is not an argument of a packed program",
                    expected=_ARGUMENTS,
                    got=f"{name}={type(value).__name__}",
                )
        if use_cache not in (None, True, False):
            raise InvalidInputError("use_cache has a wrong value", expected="a bool", got=repr(use_cache))
        ids = checks.check_ids(input_ids, self.vocabulary, self.device)
        past, layers = read_cache(past_key_values, int(ids.shape[0]), self.attention, self.dtype)
        mask = checks.check_mask(attention_mask, ids, past)
        checks.check_length(past + int(ids.shape[1]), self.max_tokens)
        rows = checks.check_rows(logits_to_keep, int(ids.shape[1]))
        positions = checks.check_positions(position_ids, ids, mask, self.max_tokens)
        packed = checks.pack(ids, mask, past=past, rows=rows, positions=positions)
        strict = self.strict_budget if strict_budget is None else strict_budget
        call = PackedCall(
            self,
            packed.layout,
            rows=int(packed.keep.shape[0]),
            kept=packed.kept,
            use_cache=bool(getattr(self.config, "use_cache", True)) if use_cache is None else use_cache,
            scatter=packed.scatter,
            padding=packed.padding,
            strict=strict,
        )
        values = {
            "input_ids": packed.token_ids,
            "position_ids": packed.position_ids,
            "logits_to_keep": packed.keep,
        }
        return Run(
            self,
            call,
            {name: values[name] for name in self.live[0]},
            [dict(layers) for _ in packed.layout.groups],
            self.tile_plan(call.shape, max_blocking_ms, strict=strict),
        )

    def _check_weights(self) -> None:
        self.watch.check()
        if self._packed_at is not None and self._packed_at != self.watch.version:
            raise UsageError(
                "the model's weights were changed after they were packed",
                expected="the weights that the model had when it was compiled",
                got="a change in place",
                remedy="call fpcompile.segment(model, weights='packed') again, or use weights='shared'",
            )

    def sample(self, length: int, *, rows: int) -> Run:
        """A run over ``length`` random tokens with ``rows`` rows of logits, one launch for each segment."""
        ids = self.random_ids(length)
        return self.start(ids, logits_to_keep=rows, use_cache=False, max_blocking_ms=math.inf)

    def save(self, path: str | os.PathLike[str]) -> None:
        """See :meth:`Program.save`."""
        from fpcompile.executor.saving import save

        save(self, path)

    def decoder(self) -> Decoder:
        """How it continues sequences; raises :class:`InvalidInputError` when the model does not generate."""
        from fpcompile.executor.decode import packed_decoder

        if self._decoder is None:
            self._decoder = packed_decoder(self)
        return self._decoder

    def heads(self) -> Sequence[Heads]:
        """See :meth:`Program.heads`."""
        kind = self.device_type
        return [
            _heads(self.attention[s.steps[0].part.call], kind) if s.over == "attention" else Heads()
            for s in self.stages
        ]

    def restore_call(self, description: dict[str, Any], tensors: dict[str, Tensor]) -> PackedCall:
        """Read back a call of a checkpoint."""
        groups = tuple(Group(*g) for g in description["groups"])
        return PackedCall(
            self,
            Layout(groups, description["columns"]),
            rows=description["rows"],
            kept=description["kept"],
            use_cache=description["use_cache"],
            returns_cache=description["returns_cache"],
            scatter=tensors.get("scatter"),
            padding=tensors.get("padding"),
        )


def _heads(call: AttentionCall, device: str) -> Heads:
    if not call.head_unit:
        return Heads()
    return Heads(call.heads, call.head_unit, heads_in_front(call, device, torch.get_num_threads()))


def position_limit(config: Any) -> int | None:
    """How many positions the model has, or None when its rotary embedding grows with the sequence."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *rope.values()] if isinstance(rope, dict) else []
    if any(isinstance(k, dict) and "dynamic" in str(k.get("rope_type")) for k in kinds):
        return None
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def _bind(
    partitioned: Partitioned,
    captured: Bindings,
    weights: dict[str, Tensor],
    graphs: Graphs,
    columns: Mapping[tuple[str, ...], Columns],
    part: Part,
) -> tuple[Executable, tuple[str, ...]]:
    """What executes a part, and the local names of its nodes."""
    if part.kind is PartKind.GRAPH:
        function = partitioned.functions[part.function]
        if part.outputs in columns and columns[part.outputs].packed:
            return _units_step(columns[part.outputs]), function.names
        step = graph_step(part, function, weights)
        if function.buckets:
            step = graphs.step(part, function, [weights[p] for p in part.params], step)
        elif captured.model.device.type == "cpu":
            step = in_strips(step, part, function)
        return step, function.names
    return (_attention_step if part.kind is PartKind.ATTENTION else _leaf_step)(captured, part), ()


def graph_step(part: Part, function: Function, weights: dict[str, Tensor]) -> Executable:
    """Execute generated code with the part's weights and the run's lengths."""
    bound = tuple(weights[p] for p in part.params)
    names, call = part.lengths, function.call

    def execute(run: Run, arguments: list[Any], lengths: Mapping[str, int]) -> Sequence[Tensor]:
        arguments += bound  # the list is the function's to empty
        for name in names:
            arguments.append(lengths[name])
        return call(arguments)

    return execute


def _units_step(columns: Columns) -> Executable:
    """All columns of a head whose weight is packed unit by unit."""

    def execute(run: Run, arguments: list[Tensor], lengths: Mapping[str, int]) -> Sequence[Tensor]:
        (x,) = arguments
        arguments.clear()
        out = columns.room(x)
        columns.write(out, x, 0, columns.units)
        return (out,)

    return execute


def _attention_step(captured: Bindings, part: Part) -> Executable:
    call = captured.attention[part.call]

    def execute(run: Run, arguments: list[Tensor], lengths: Mapping[str, int]) -> Sequence[Tensor]:
        assert isinstance(run.call, PackedCall)
        q, k, v = arguments
        arguments.clear()
        write(run, run.call.layout, call, k, v)
        del k, v
        out = attend(run, run.call.layout, call, q)
        run.call.forget(run, part.call)
        return (out,)

    return execute


def _leaf_step(captured: Bindings, part: Part) -> Executable:
    leaf = captured.leaves[part.call]

    def execute(run: Run, arguments: list[Tensor], lengths: Mapping[str, int]) -> Sequence[Tensor]:
        assert isinstance(run.call, PackedCall)
        return leaf.run(arguments, run.call.layout.lengths)

    return execute

"""A program: a compiled model. Immutable but for its cost model; any number of runs execute it.

:class:`Program` is a drop-in callable for the model it was made from (same arguments, same output type) and
starts :class:`Run` objects that can stop between any two segments.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpcompile.errors import InvalidInputError
from fpcompile.executor import inputs as checks
from fpcompile.executor.calibrate import CostModel, calibrate
from fpcompile.executor.explain import explain
from fpcompile.executor.kv import read_cache
from fpcompile.executor.run import Run
from fpcompile.ir import Part, PartKind, Plan, Segment
from fpcompile.models.attention import AttentionCall
from fpcompile.models.capture import Capture
from fpcompile.models.leaves import Leaf
from fpcompile.passes.partition import Function, Partitioned

if TYPE_CHECKING:
    from fpcompile.executor.checkpoint import Checkpoint

_NOT_SUPPORTED = (
    "labels",
    "inputs_embeds",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A part bound to its callable and weights; ``frees`` are the values that nothing reads after it."""

    part: Part
    function: Callable[..., tuple[Tensor, ...]]
    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    frees: tuple[str, ...]


class Program:
    """A model compiled into preemptible segments. Made by :func:`fpcompile.segment`."""

    def __init__(self, partitioned: Partitioned, captured: Capture) -> None:
        self.plan: Plan = partitioned.plan
        self.functions: Mapping[str, Function] = partitioned.functions
        self.attention: tuple[AttentionCall, ...] = captured.attention
        self.leaves: tuple[Leaf, ...] = captured.leaves
        self.weights: dict[str, Tensor] = dict(captured.weights.values())
        self.config = captured.model.config
        self.output_type = captured.output_type
        self.device = next(captured.model.parameters()).device
        self.dtype = captured.model.dtype
        self.vocabulary = captured.vocabulary
        self.steps = tuple(_bind(s, partitioned, self.weights) for s in self.plan.segments)
        self.first_live = _read_first(self.plan)
        self._costs: CostModel | None = None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments, in order."""
        return self.plan.segments

    @property
    def route(self) -> str:
        """How the graph was obtained: ``packed`` or ``generic``."""
        return str(self.plan.route)

    def live_names(self, cursor: int) -> tuple[str, ...]:
        """Names of the values that a run holds when ``cursor`` is its next segment."""
        return self.segments[cursor - 1].live.names if cursor else self.first_live

    def explain(self, tokens: int = 2048) -> str:
        """The plan as a table: each segment's work and live bytes, as formulas and at ``tokens`` tokens."""
        return explain(self.plan, tokens)

    def start(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        past_key_values: Any = None,
        logits_to_keep: Any = 0,
        use_cache: bool | None = None,
        **unsupported: Any,
    ) -> Run:
        """A run over ``input_ids [batch, length]``; everything is checked, nothing is executed.

        ``attention_mask [batch, length]`` may hide padding on the left or right; padded batches are packed,
        so hidden positions cost nothing and their logits are zero. ``past_key_values`` is a transformers
        ``DynamicCache`` to continue from; it is not changed. ``logits_to_keep`` is transformers' own: 0 for
        all positions, n for the last n, or a vector of indices.

        Raises :class:`InvalidInputError`.
        """
        for name, value in unsupported.items():
            if value is not None and value is not False:
                known = f"{name} is not supported" if name in _NOT_SUPPORTED else f"{name} is not an argument"
                raise InvalidInputError(
                    known,
                    expected="input_ids, attention_mask, past_key_values, logits_to_keep, use_cache",
                    got=f"{name}={type(value).__name__}",
                )
        ids = checks.check_ids(input_ids, self.vocabulary, self.device)
        past, layers = read_cache(past_key_values, int(ids.shape[0]))
        mask = checks.check_mask(attention_mask, ids, past)
        checks.check_length(past + int(ids.shape[1]), position_limit(self.config))
        packed = checks.pack(ids, mask, past=past, rows=checks.check_rows(logits_to_keep, int(ids.shape[1])))
        kv = [dict(layers) for _ in packed.layout.groups]
        return Run.begin(self, packed, kv, use_cache=self._uses_cache(use_cache))

    def _uses_cache(self, asked: bool | None) -> bool:
        return bool(getattr(self.config, "use_cache", True)) if asked is None else asked

    def __call__(self, input_ids: Any, **kwargs: Any) -> Any:
        """Run to the end without a pause; arguments and result as the model's own forward."""
        run = self.start(input_ids, **kwargs)
        while not run.done:
            run.step()
        return run.result()

    def resume(self, checkpoint: Checkpoint) -> Run:
        """A run that goes on where ``checkpoint`` was taken.

        Raises :class:`CheckpointError` when it belongs to another program or other weights.
        """
        from fpcompile.executor.checkpoint import restore

        return restore(self, checkpoint)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the segments: the same for programs that execute the same code in the same order."""
        digest = hashlib.sha256()
        for segment in self.segments:
            for p in segment.parts:
                digest.update(
                    repr((segment.index, p.function, p.inputs, p.params, p.lengths, p.outputs)).encode()
                )
        return digest.hexdigest()

    @functools.cached_property
    def weights_fingerprint(self) -> str:
        """Digest of up to 64 evenly spaced elements of every weight, with names, shapes and dtypes."""
        return digest_weights(self.weights.items())

    def calibrate(self, **options: Any) -> CostModel:
        """Measure the segments on the device and keep the fitted cost model; see :func:`calibrate`."""
        self._costs = calibrate(self, **options)
        return self._costs

    @property
    def costs(self) -> CostModel:
        """Seconds of each segment; measured at the first use (a few seconds), or by :meth:`calibrate`."""
        return self._costs or self.calibrate()

    def segment_seconds(self, index: int, *, tokens: int, rows: int = 1, context: int | None = None) -> float:
        """Predicted seconds of one segment."""
        return self.costs.segment(index, tokens=tokens, rows=rows, context=context)

    def predict(self, *, tokens: int, context: int | None = None, start: int = 0, rows: int = 1) -> float:
        """Predicted seconds from segment ``start`` to the end."""
        return self.costs.remaining(tokens=tokens, rows=rows, context=context, start=start)


def position_limit(config: Any) -> int | None:
    """How many positions the model has, or None when its rotary embedding grows with the sequence."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *rope.values()] if isinstance(rope, dict) else []
    if any(isinstance(k, dict) and "dynamic" in str(k.get("rope_type")) for k in kinds):
        return None
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def digest_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Sampled digest of named tensors."""
    digest = hashlib.sha256()
    for path, weight in sorted(weights, key=lambda item: item[0]):
        digest.update(f"{path}{tuple(weight.shape)}{weight.dtype}".encode())
        if weight.numel():
            flat = weight.reshape(-1)
            at = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), device=flat.device).long()
            digest.update(flat[at].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _bind(segment: Segment, partitioned: Partitioned, weights: Mapping[str, Tensor]) -> tuple[Step, ...]:
    needed = set(segment.live.names)
    steps: list[Step] = []
    for part in reversed(segment.parts):
        held = dict.fromkeys(part.inputs)
        frees = tuple(name for name in held if name not in needed)
        needed = (needed - set(part.outputs)) | set(part.inputs)
        function = partitioned.functions.get(part.function)
        call = function.call if function and part.kind is PartKind.GRAPH else _never
        names = function.names if function else ()
        steps.append(Step(part, call, names, tuple(weights[p] for p in part.params), frees))
    return tuple(reversed(steps))


def _never(*_: Tensor) -> tuple[Tensor, ...]:
    raise NotImplementedError("attention calls and leaves have no generated function")


def _read_first(plan: Plan) -> tuple[str, ...]:
    """The graph inputs that some segment reads."""
    needed: set[str] = {plan.output}
    for segment in reversed(plan.segments):
        for part in reversed(segment.parts):
            needed = (needed - set(part.outputs)) | set(part.inputs)
    return tuple(name for name in plan.inputs if name in needed)

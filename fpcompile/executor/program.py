"""A program: a compiled model. Immutable but for its cost model and masks; any number of runs execute it.

:class:`Program` is a drop-in callable for the model it was made from (same arguments, same output type) and
starts :class:`Run` objects that can stop between any two segments. What arguments mean and how a result is
made is the route's: see :mod:`fpcompile.executor.packed`.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import json
import math
import os
import threading
import warnings
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpcompile.errors import BudgetError, BudgetWarning, InvalidInputError
from fpcompile.executor import cost_cache
from fpcompile.executor.calibrate import LENGTHS, cost_model, measure
from fpcompile.executor.cost_model import CostModel, Samples
from fpcompile.executor.experts import state_notes
from fpcompile.executor.explain import explain
from fpcompile.executor.measure_tiles import TileBits, measure_tiles
from fpcompile.executor.run import Run
from fpcompile.executor.schedule import Heads, Launch, Shape, by_budget, by_segment, launch_seconds
from fpcompile.executor.stages import Stage, live_before
from fpcompile.executor.weights import WeightWatch, digest_weights
from fpcompile.ir import Plan, Segment

if TYPE_CHECKING:
    from fpcompile.executor.call import Call
    from fpcompile.executor.checkpoint import Checkpoint


_TOLERANCE = 1.001  # of a predicted time against the budget: rounding
_SECONDS = 5.0  # of a calibration, where nobody says
_TILES = 0.4  # times as long for tiles


class Program(abc.ABC):
    """A model compiled into preemptible segments. Made by :func:`fpcompile.segment`."""

    def __init__(
        self,
        plan: Plan,
        stages: tuple[Stage, ...],
        weights: dict[str, Tensor],
        watch: WeightWatch,
        *,
        config: Any,
        device: torch.device,
        dtype: torch.dtype,
        max_blocking_ms: float | None = None,
        strict_budget: bool = False,
    ) -> None:
        self.plan = plan
        self.stages = stages
        self.live = live_before(plan, stages)
        self.whole = by_segment(stages)
        self.weights = weights
        self.watch = watch
        self.config = config
        self.device = device
        self.device_type = str(device.type)
        self.dtype = dtype
        self.max_blocking_ms = check_budget(max_blocking_ms)
        self.strict_budget = strict_budget
        self._costs: CostModel | None = None
        self._bits: TileBits | None = None
        self.bands: dict[Hashable, Tensor | None] = {}  # see fpcompile.executor.masks
        self._calibrating = threading.RLock()
        self._digest: tuple[int, str] | None = None
        self._warned = False

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments, in order."""
        return self.plan.segments

    @property
    def route(self) -> str:
        """How the graph was obtained: ``packed`` or ``generic``."""
        return str(self.plan.route)

    def explain(self, tokens: int = 2048) -> str:
        """The plan as a table: each segment's work and live bytes, as formulas and at ``tokens`` tokens.

        Below it what the compiler has to say, and what is known of tiles: where their bits were seen to be
        others than the whole's (once the program was calibrated), and what ranges of experts hold.
        Raises :class:`InvalidInputError` for ``tokens`` that are no whole number >= 1.
        """
        given: Any = tokens
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise InvalidInputError("tokens is wrong", expected="a whole number >= 1", got=repr(given))
        return explain(
            self.plan, tokens, (*self._tile_notes(), *state_notes(self.stages, self.dtype, tokens))
        )

    def _tile_notes(self) -> tuple[str, ...]:
        if self._costs is None:
            return ()
        bits = self.bits
        if bits is None:
            tiled = any(stage.over for stage in self.stages)
            return ("tiles were not compared with the whole yet: calibrate() does",) if tiled else ()
        return bits.notes(self.stages, self.segments)

    @abc.abstractmethod
    def start(self, input_ids: Any = None, **kwargs: Any) -> Run:
        """A run over the model's own arguments; everything is checked, nothing is executed.

        Raises :class:`InvalidInputError`.
        """

    @abc.abstractmethod
    def restore_call(self, description: dict[str, Any], tensors: dict[str, Tensor]) -> Call:
        """Read back what :meth:`Call.describe` and :meth:`Call.tensors` gave."""

    @property
    @abc.abstractmethod
    def vocabulary(self) -> int:
        """Number of token ids that the model knows."""

    @property
    @abc.abstractmethod
    def max_tokens(self) -> int | None:
        """Longest sequence that the model has positions for, None when unlimited."""

    @abc.abstractmethod
    def heads(self) -> Sequence[Heads]:
        """For each stage, the query heads that can be attended apart; none where it is no attention."""

    def tile_plan(
        self, shape: Shape, max_blocking_ms: float | None, *, strict: bool = False, warn: bool = True
    ) -> tuple[Launch, ...]:
        """The launches of a run: one for each segment, or as a budget in milliseconds asks.

        The argument overrides the program's own budget; None for both, or infinity, means no budget. The
        first budget of a program that is not calibrated yet measures it. Warns with :class:`BudgetWarning`,
        once per program (never without ``warn``), when no cut or tile can keep the budget; ``strict`` raises
        :class:`BudgetError`.
        """
        asked = check_budget(max_blocking_ms)
        budget = self.max_blocking_ms if asked is None else asked
        if budget is None or math.isinf(budget):
            return self.whole
        launches = by_budget(self.stages, shape, self.costs, budget / 1e3, self.heads())
        if strict or (warn and not self._warned):
            self._check_bound(launches, shape, budget / 1e3, strict)
        return launches

    def _check_bound(self, launches: Sequence[Launch], shape: Shape, budget: float, strict: bool) -> None:
        """Raise, or warn once, when no cut or tile makes a launch as short as ``budget`` seconds."""
        costs, heads = self.costs, self.heads()

        def seconds(launch: Launch) -> float:
            return launch_seconds(launch, self.stages, shape, costs, heads)

        worst = max(launches, key=seconds)
        if seconds(worst) > budget * _TOLERANCE:
            finest = by_budget(self.stages, shape, costs, 1e-9, heads)
            segment = self.segments[self.stages[worst.first].segment]
            smallest = max(map(seconds, finest)) * 1e3
            what = (
                f"max_blocking_ms={budget * 1e3:g} cannot be kept for {shape.tokens} tokens: a part of "
                f"segment {segment.index} ({segment.name}) is predicted to take {seconds(worst) * 1e3:.3g} "
                f"ms; the smallest bound that can be kept is {smallest:.3g} ms"
            )
            if strict:
                raise BudgetError(
                    what, segment=segment.name, seconds=seconds(worst), budget=budget, smallest_ms=smallest
                )
            self._warned = True
            warnings.warn(what, BudgetWarning, stacklevel=4)

    def __call__(self, input_ids: Any = None, **kwargs: Any) -> Any:
        """Run to the end without a pause; arguments and result as the model's own forward."""
        run = self.start(input_ids, **kwargs)
        if run.schedule is run.program.whole:  # nobody can stop it: one launch
            run.schedule = (Launch(0, len(run.program.stages)),)
        while not run.done:
            run.step()
        return run.result()

    def resume(self, checkpoint: Checkpoint) -> Run:
        """A run that goes on where ``checkpoint`` was taken.

        Raises :class:`CheckpointError` when it belongs to another program or other weights.
        """
        from fpcompile.executor.checkpoint import restore

        return restore(self, checkpoint)

    @abc.abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program to the folder ``path``, for :func:`fpcompile.load`; weights are not in it.

        The folder appears whole or not at all; an older program there is replaced. It holds data, no code and
        no pickle: operators are named, and only known ones are read back. With ``backend="inductor"`` it
        holds the compiled code too, which is loaded only for a caller who trusts it.
        Raises :class:`ProgramFileError` for a program of the generic route with ``dynamic_shapes``, for one
        of ``backend="cudagraphs"``, for one whose call cannot be written as data, and for a place that is
        taken by something else.
        """

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the segments, their stages and the model's configuration: equal where the same code is
        executed in the same order. Some numbers (a rotary factor, an expert's activation) are in the
        configuration only; whether experts are a stage of their own depends on the machine's kernels.
        Tiles of columns are counted in units, so how many there are is a part of it.
        """
        digest = hashlib.sha256(settings(self.config).encode())
        for segment in self.segments:
            for p in segment.parts:
                digest.update(
                    repr((segment.index, p.function, p.inputs, p.params, p.lengths, p.outputs)).encode()
                )
        for stage in self.stages:
            counts = len(stage.steps), stage.experts, stage.columns
            digest.update(repr((stage.segment, stage.over, *counts)).encode())
        return digest.hexdigest()

    @property
    def weights_fingerprint(self) -> str:
        """Sampled digest of the weights as they are now; see :func:`digest_weights`."""
        version = self.watch.version
        if self._digest is None or self._digest[0] != version:
            digest = digest_weights((path, w) for path, w in self.weights.items() if not w.is_mkldnn)
            self._digest = (version, digest)
        return self._digest[1]

    def sample(self, length: int, *, rows: int) -> Run:
        """A run over ``length`` random tokens, with ``rows`` rows of logits where that can be chosen."""
        return self.start(self.random_ids(length), max_blocking_ms=math.inf)

    def random_ids(self, length: int) -> Tensor:
        """Reproducible token ids ``[1, length]``."""
        generator = torch.Generator().manual_seed(length)
        return torch.randint(self.vocabulary, (1, length), generator=generator)

    def calibrate(self, *, lengths: Sequence[int] | None = None, seconds: float | None = None) -> CostModel:
        """Measure the segments on the device, now, and use that from here on.

        ``lengths``: tokens of the prefills that are timed (:data:`fpcompile.executor.calibrate.LENGTHS`), up
        to the model's longest; ``seconds``: about how long that may take (5), and 0.4 times as long for
        tiles.
        Without either, what was measured is kept on disk too (:mod:`fpcompile.executor.cost_cache`).
        Raises :class:`InvalidInputError`.
        """
        chosen = LENGTHS if lengths is None else _lengths(lengths)
        given: Any = _SECONDS if seconds is None else seconds
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < math.inf:
            raise InvalidInputError("seconds is wrong", expected="finite seconds > 0", got=repr(given))
        with self._calibrating:
            samples = measure(self, lengths=chosen, seconds=given)
            tiles, self._bits = measure_tiles(self, cost_model(self, samples), seconds=_TILES * given)
            samples = {**samples, **tiles}
            if lengths is None and seconds is None:
                cost_cache.write(self, samples, self._bits)
            return self.use_costs(samples)

    def use_costs(self, samples: Samples, bits: TileBits | None = None) -> CostModel:
        """Predict from ``samples`` from here on; ``bits`` are what was found of tiles beside them."""
        self._costs, self._bits = cost_model(self, samples), bits or self._bits
        return self._costs

    @property
    def costs(self) -> CostModel:
        """Seconds of each segment: as measured before on this machine, else measured at the first use (a few
        seconds); :meth:`calibrate` measures anew.
        """
        with self._calibrating:
            if self._costs is None:
                samples = cost_cache.read(self)
                return self.calibrate() if samples is None else self.use_costs(samples)
            return self._costs

    @property
    def measured(self) -> Samples | None:
        """What the costs are made from, None before they were needed."""
        return None if self._costs is None else self._costs.samples

    @property
    def bits(self) -> TileBits | None:
        """What is known of the bits of tiles, None before the costs were needed."""
        if self._bits is None and self._costs is not None:
            self._bits = cost_cache.read_bits(self)
        return self._bits

    def segment_seconds(
        self, index: int, *, tokens: int, rows: int = 1, context: float | None = None
    ) -> float:
        """Predicted seconds of one segment."""
        return self.costs.segment(index, tokens=tokens, rows=rows, context=context or tokens)

    def predict(self, *, tokens: int, context: float | None = None, start: int = 0, rows: int = 1) -> float:
        """Predicted seconds from segment ``start`` to the end."""
        return self.costs.remaining(tokens=tokens, rows=rows, context=context or tokens, start=start)


def check_budget(max_blocking_ms: float | None) -> float | None:
    """A budget in milliseconds, or None; raises :class:`InvalidInputError` unless it is a positive number."""
    if max_blocking_ms is None:
        return None
    given: Any = max_blocking_ms
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not given > 0:
        raise InvalidInputError(
            "max_blocking_ms has a wrong value",
            expected="a positive number of milliseconds, or None",
            got=repr(given),
        )
    return float(given)


def _lengths(given: Any) -> tuple[int, ...]:
    lengths = tuple(given) if isinstance(given, Sequence) else ()
    if not lengths or any(type(n) is not int or n < 1 for n in lengths):
        raise InvalidInputError("lengths is wrong", expected="whole numbers >= 1", got=repr(given))
    return lengths


_ORIGIN = ("_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype")


def settings(config: Any) -> str:
    """A transformers configuration as text, without what says where the model came from."""
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {name: value for name, value in values.items() if name not in _ORIGIN}
    return json.dumps(kept, sort_keys=True, default=str)

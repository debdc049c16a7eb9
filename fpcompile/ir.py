"""Frozen values that every other layer speaks: values, live sets, parts, segments, plans.

Words: a *segment* is the unit of the plan; it consists of *parts* (graph code, one attention call, one
opaque leaf) that are launched together. A *live set* holds the values that cross a *cut*. A *plan* is the
printable description of a program and reads back from its own text (see
:mod:`fpcompile.passes.plan_text`).

Invariants: nothing here is mutable, nothing here holds a tensor, and sizes are sympy expressions in the
three symbolic dimensions ``tokens`` (new tokens in the run), ``rows`` (positions whose logits are asked
for) and ``context`` (tokens that attention may look back to, cached ones included).
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum

import sympy

from fpcompile.errors import InternalError

TOKENS = sympy.Symbol("tokens", integer=True, positive=True)
ROWS = sympy.Symbol("rows", integer=True, positive=True)
CONTEXT = sympy.Symbol("context", integer=True, positive=True)
SYMBOLS: dict[str, sympy.Symbol] = {"tokens": TOKENS, "rows": ROWS, "context": CONTEXT}
ZERO: sympy.Expr = sympy.Integer(0)


def evaluate(expr: sympy.Expr, *, tokens: int, rows: int = 1, context: int | None = None) -> int:
    """Value of ``expr`` for ``tokens`` new tokens, ``rows`` logit rows and ``context`` visible tokens."""
    return int(expr.subs({TOKENS: tokens, ROWS: rows, CONTEXT: tokens if context is None else context}))


class Route(StrEnum):
    """How a model's graph was obtained."""

    PACKED = "packed"
    GENERIC = "generic"


class Granularity(StrEnum):
    """How cuts are placed: three presets, or by a budget (:mod:`fpcompile.passes.placement`)."""

    OPERATOR = "operator"
    LAYER = "layer"
    MODEL = "model"
    AUTO = "auto"


class PartKind(StrEnum):
    """What executes a part: generated graph code, an attention call, or an opaque leaf."""

    GRAPH = "graph"
    ATTENTION = "attention"
    LEAF = "leaf"


class CutReason(StrEnum):
    """Why a segment ends where it does."""

    BEFORE_ATTENTION = "before attention"
    AFTER_ATTENTION = "after attention"
    PROJECTION = "after projection"
    EXPERTS = "after experts"
    CONVOLUTION = "after convolution"
    AFTER_LEAF = "after opaque leaf"
    LAYER = "layer boundary"
    BUDGET = "the launch would exceed the budget"
    BEYOND_BUDGET = "an operator beside it exceeds the budget"
    END = "end of model"


class Refusal(StrEnum):
    """Why a segment does not end behind one of its nodes."""

    WRITTEN_LATER = "an alias is written in place later"
    INSIDE_OPERATOR = "between the results of one operator"
    NO_SMALLER = "no fewer live bytes than the cut taken"
    BESIDE_ATTENTION = "the cut beside attention is taken"
    NO_WORK = "no heavy operator since the last cut"
    NO_WORK_LEFT = "no heavy operator up to the end"
    COARSER = "not at this granularity"
    MORE_LAUNCHES = "one launch more than the budget needs"


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a node comes from: module path in the model and the source line that produced it."""

    module: str
    line: str = ""

    def __str__(self) -> str:
        return f"{self.module or '<model>'} ({self.line})" if self.line else self.module or "<model>"


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Work of a part or segment: floating-point operations and bytes moved, as formulas."""

    flops: sympy.Expr = ZERO
    bytes: sympy.Expr = ZERO

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """One tensor that crosses a cut. Values with the same ``storage`` share memory."""

    name: str
    shape: tuple[sympy.Expr, ...]
    dtype: str
    storage: str
    storage_bytes: sympy.Expr


@dataclasses.dataclass(frozen=True, slots=True)
class LiveSet:
    """The values that later segments read: what must be kept at a cut."""

    values: tuple[Value, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.values):
            raise InternalError("a live set names a value twice", got=str(self.names))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the live values, in the order of their definition."""
        return tuple(v.name for v in self.values)

    @property
    def nbytes(self) -> sympy.Expr:
        """Bytes held, each storage counted once."""
        return sum({v.storage: v.storage_bytes for v in self.values}.values(), ZERO)


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One call inside a segment.

    ``function`` is the key of the callable in the program's table (identical layers have the same key);
    it is called with the values ``inputs``, the weights ``params`` (paths in the model) and the run's
    ``lengths`` (``tokens``, ``rows``) and defines ``outputs``. ``call`` numbers attention calls and leaves,
    each by itself, and is -1 for graph code. ``nodes`` are the graph nodes it covers, with their sources,
    for error messages.

    ``over`` is the length (``tokens`` or ``rows``) whose ranges can be executed one by one, or empty; then
    ``axes`` gives for each input and each output the dimension that runs over it, -1 for none. ``bound``
    says that a later part of the segment writes in place into what is alive here: no launch may end behind
    this part.
    """

    name: str
    kind: PartKind
    function: str
    inputs: tuple[str, ...]
    params: tuple[str, ...]
    lengths: tuple[str, ...]
    outputs: tuple[str, ...]
    call: int
    cost: Cost
    nodes: tuple[tuple[str, Source], ...]
    over: str = ""
    axes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    bound: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A run of graph nodes launched together.

    ``live`` is the live set of the cut behind it; ``reason`` says why the cut is there, ``refused`` for each
    other node why none is behind that one.
    """

    index: int
    name: str
    kind: str
    parts: tuple[Part, ...]
    live: LiveSet
    reason: CutReason
    refused: tuple[tuple[str, Refusal], ...] = ()

    @property
    def cost(self) -> Cost:
        """Sum of the parts' costs."""
        return sum((p.cost for p in self.parts), Cost())


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The printable description of a program: segments, costs, live sets, reasons of the cuts.

    ``output`` is the value that is the program's result; ``more_outputs`` are further ones (states).
    """

    architecture: str
    route: Route
    granularity: Granularity
    inputs: tuple[str, ...]
    output: str
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = ()
    more_outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the recorded live sets equal those that definitions and uses imply."""
        needed: set[str] = set(self.results)
        for segment in reversed(self.segments):
            recorded = set(segment.live.names)
            if recorded != needed:
                raise InternalError(
                    f"live set behind segment {segment.index} ({segment.name}) is not what is read later",
                    expected=str(sorted(needed)),
                    got=str(sorted(recorded)),
                )
            for part in reversed(segment.parts):
                needed = (needed - set(part.outputs)) | set(part.inputs)
        if not needed <= set(self.inputs):
            raise InternalError("the plan reads undefined values", got=str(sorted(needed - set(self.inputs))))

    @property
    def results(self) -> tuple[str, ...]:
        """Names of all values that are results."""
        return (self.output, *self.more_outputs)

    @property
    def cost(self) -> Cost:
        """Work of a whole prefill."""
        return sum((s.cost for s in self.segments), Cost())

"""The pipeline: an explicit tuple of passes, verified after each one.

A pass is ``(graph, ctx) -> graph`` with its options already bound. After every pass the graph must lint.
The live sets are checked where they are recorded, in :class:`fpcompile.ir.Plan`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import fx

from fpcompile.errors import InternalError
from fpcompile.ir import Granularity
from fpcompile.models.capture import Capture
from fpcompile.passes.context import Context
from fpcompile.passes.costs import annotate_costs
from fpcompile.passes.cuts import place_cuts
from fpcompile.passes.design import Design
from fpcompile.passes.normalise import normalise
from fpcompile.passes.partition import Partitioned, partition
from fpcompile.passes.prepack import prepack
from fpcompile.passes.tokenwise import prove_tokenwise

Pass = Callable[[fx.Graph, Context], fx.Graph]


def packed_pipeline(
    granularity: Granularity, *, packed_weights: bool, design: Design | None = None
) -> tuple[tuple[str, Pass], ...]:
    """The named passes of the packed route, in order."""
    lowering: tuple[tuple[str, Pass], ...] = (("prepack weights", prepack),) if packed_weights else ()
    return (
        ("normalise", normalise),
        ("prove token-wise", prove_tokenwise),
        ("annotate costs", annotate_costs),
        (
            f"place cuts ({granularity})",
            functools.partial(place_cuts, granularity=granularity, design=design),
        ),
        *lowering,
    )


def compile_packed(
    captured: Capture,
    granularity: Granularity,
    *,
    packed_weights: bool = False,
    design: Design | None = None,
) -> Partitioned:
    """Run the packed pipeline over a capture and partition the result; ``design`` is for granularity auto."""
    graph, ctx = captured.graph.graph, Context(captured)
    for name, run in packed_pipeline(granularity, packed_weights=packed_weights, design=design):
        graph = run(graph, ctx)
        try:
            graph.lint()
        except RuntimeError as error:
            raise InternalError(f"the graph does not lint after pass {name!r}", got=str(error)) from error
    return partition(graph, ctx, granularity=granularity)

"""``granularity="auto"``: cuts by a budget, with their reasons, for both routes.

Without a budget there is nothing to place cuts for, and the routes place those of ``operator``: every bound
that a run asks for later can then be kept as well as without ``auto``.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from torch import fx

from fpcompile.ir import Cost, CutReason, Refusal
from fpcompile.passes.design import Design
from fpcompile.passes.placement import place

NO_BUDGET = "granularity auto without max_blocking_ms: the cuts are those of granularity operator"


def budget_cuts(
    nodes: Sequence[fx.Node],
    costs: Mapping[str, Cost],
    held: Sequence[float],
    forbidden: Mapping[str, str],
    design: Design,
) -> tuple[dict[str, CutReason], dict[str, Refusal], str]:
    """Cuts with their reasons, why there is none behind each other node, and a note on what was assumed.

    ``held`` are the bytes alive behind each node at the design length.
    """
    seconds = [design.units(costs[n.name]) for n in nodes]
    legal = [n.name not in forbidden for n in nodes]
    budget = sum(seconds) if design.budget is None else design.budget
    found = place(seconds, [round(h) for h in held], legal, budget)
    cuts = {
        nodes[i].name: CutReason.BEYOND_BUDGET if i in found.beyond else CutReason.BUDGET for i in found.cuts
    }
    targets = {n.name: n.target for n in nodes}
    refused: dict[str, Refusal] = {}
    for i, node in enumerate(nodes):
        if node.name in forbidden:
            picks = targets.get(forbidden[node.name]) is operator.getitem
            refused[node.name] = Refusal.INSIDE_OPERATOR if picks else Refusal.WRITTEN_LATER
        elif node.name not in cuts:
            refused[node.name] = Refusal.NO_SMALLER if i in found.free else Refusal.MORE_LAUNCHES
    return cuts, refused, str(design)

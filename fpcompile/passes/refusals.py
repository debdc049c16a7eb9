"""Why there is no cut behind a node: the rules of :mod:`fpcompile.passes.cuts`, told for what is left.

Word: a *heavy* node is one that a cut is wanted behind: attention, a projection, experts, an opaque leaf.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from torch import fx

from fpcompile.ir import CutReason, Refusal


def refusals(
    nodes: Sequence[fx.Node],
    cuts: Mapping[str, CutReason],
    forbidden: Mapping[str, str],
    heavy: Sequence[bool],
    sizes: Sequence[float],
) -> dict[str, Refusal]:
    """Node -> why no cut is behind it. ``heavy`` and ``sizes`` (live bytes behind) are by position; there are
    no sizes where cuts were placed at layers or not at all.
    """
    targets = {n.name: n.target for n in nodes}
    found: dict[str, Refusal] = {}
    end, follows = len(nodes) - 1, False  # the next cut, and whether a heavy node lies in front of it
    begins = _starts(nodes, cuts, heavy)
    for at in range(len(nodes) - 1, -1, -1):
        name = nodes[at].name
        if name in cuts:
            end, follows = at, heavy[at]
            continue
        if name in forbidden:
            picks = targets.get(forbidden[name]) is operator.getitem
            found[name] = Refusal.INSIDE_OPERATOR if picks else Refusal.WRITTEN_LATER
        elif not sizes:
            found[name] = Refusal.COARSER
        elif not begins[at]:
            found[name] = Refusal.NO_WORK
        elif cuts[nodes[end].name] is CutReason.END and not follows:
            found[name] = Refusal.NO_WORK_LEFT
        elif cuts[nodes[end].name] is CutReason.BEFORE_ATTENTION or sizes[at] < sizes[end]:
            found[name] = Refusal.BESIDE_ATTENTION
        else:
            found[name] = Refusal.NO_SMALLER
        follows = follows or heavy[at]
    return found


def _starts(nodes: Sequence[fx.Node], cuts: Mapping[str, CutReason], heavy: Sequence[bool]) -> list[bool]:
    """For each position, whether a heavy node lies between the last cut and it, itself included."""
    found: list[bool] = []
    seen = False
    for node, weighs in zip(nodes, heavy, strict=True):
        seen = seen or weighs
        found.append(seen)
        if node.name in cuts:
            seen = False
    return found

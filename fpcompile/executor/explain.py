"""The plan as a table for people."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

import sympy
from rich.console import Console
from rich.table import Table

from fpcompile.ir import Plan, evaluate


def _count(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def _formula(expr: sympy.Expr) -> str:
    return str(expr).replace("**2", "²").replace("tokens", "n").replace("rows", "r").replace("context", "c")


def explain(plan: Plan, tokens: int, more: Sequence[str] = ()) -> str:
    """Table of ``plan``, its notes and ``more``: n = tokens, r = rows of logits, c = context (visible)."""
    table = Table(
        title=f"{plan.architecture}: {len(plan.segments)} segments, route {plan.route}, "
        f"granularity {plan.granularity}",
        caption=f"n = tokens, r = rows of logits, c = context; figures at n = c = {tokens}, r = 1",
    )
    for name in ("#", "segment", "kind", "FLOPs", "at n", "bytes", "at n", "live bytes", "at n", "cut"):
        table.add_column(name, justify="right" if name in ("#", "at n") else "left", overflow="fold")
    for s in plan.segments:
        row = [str(s.index), s.name, s.kind]
        for expr in (s.cost.flops, s.cost.bytes, s.live.nbytes):
            row += [_formula(expr), _count(evaluate(expr, tokens=tokens))]
        table.add_row(*row, str(s.reason))
    buffer = io.StringIO()
    console = Console(file=buffer, width=200)
    console.print(table)
    if refused := Counter(reason for s in plan.segments for _, reason in s.refused):
        told = ", ".join(f"{count} {reason}" for reason, count in refused.most_common())
        console.print(f"- {refused.total()} operators without a cut behind them: {told}")
    for note in (*plan.notes, *more):
        console.print(f"- {note}")
    return buffer.getvalue()

"""The text form of a plan: one JSON object per line, formulas as sympy prints them; it reads back.

The first line describes the program, each further one a segment. ``parse(render(plan)) == plan``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import sympy
from torch.utils._sympy import functions

from fpcompile.errors import InvalidInputError
from fpcompile.ir import (
    SYMBOLS,
    Cost,
    CutReason,
    Granularity,
    LiveSet,
    Part,
    PartKind,
    Plan,
    Refusal,
    Route,
    Segment,
    Source,
    Value,
)

FORMAT = "fpcompile-plan-2"
_OWN = ("CeilDiv", "CleanDiv", "FloorDiv", "ModularIndexing", "PythonMod")
_NAMES: dict[str, Any] = {
    **SYMBOLS,
    **{name: getattr(sympy, name) for name in ("Min", "Max", "Mod", "floor", "ceiling")},
    **{name: getattr(functions, name) for name in _OWN},
}


def render(plan: Plan) -> str:
    """``plan`` as text, a line for its head and one for each segment."""
    head = {
        "format": FORMAT,
        "architecture": plan.architecture,
        "route": plan.route,
        "granularity": plan.granularity,
        "inputs": plan.inputs,
        "output": plan.output,
        "more_outputs": plan.more_outputs,
        "notes": plan.notes,
    }
    return "\n".join(json.dumps(line) for line in (head, *map(_segment, plan.segments))) + "\n"


def parse(text: str) -> Plan:
    """Read back what :func:`render` wrote. Raises :class:`InvalidInputError` that names the line."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InvalidInputError(
                "the text is no plan",
                expected="one JSON object per line",
                got=str(error),
                where=f"line {number}",
            ) from error
    if not rows or rows[0].get("format") != FORMAT:
        raise InvalidInputError(
            "the text is no plan of this version",
            expected=FORMAT,
            got=repr(rows[0].get("format") if rows else ""),
        )
    head = rows[0]
    try:
        return Plan(
            architecture=head["architecture"],
            route=Route(head["route"]),
            granularity=Granularity(head["granularity"]),
            inputs=tuple(head["inputs"]),
            output=head["output"],
            segments=tuple(_read_segment(row) for row in rows[1:]),
            notes=tuple(head["notes"]),
            more_outputs=tuple(head["more_outputs"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            "the text is no complete plan", got=f"{type(error).__name__}: {error}"
        ) from error


def _segment(s: Segment) -> dict[str, Any]:
    return {
        "index": s.index,
        "name": s.name,
        "kind": s.kind,
        "reason": s.reason,
        "refused": s.refused,
        "live": [
            {
                "name": v.name,
                "shape": [_text(n) for n in v.shape],
                "dtype": v.dtype,
                "storage": v.storage,
                "bytes": _text(v.storage_bytes),
            }
            for v in s.live.values
        ],
        "parts": [_part(p) for p in s.parts],
    }


def _part(p: Part) -> dict[str, Any]:
    return {
        "name": p.name,
        "kind": p.kind,
        "function": p.function,
        "inputs": p.inputs,
        "params": p.params,
        "lengths": p.lengths,
        "outputs": p.outputs,
        "call": p.call,
        "flops": _text(p.cost.flops),
        "bytes": _text(p.cost.bytes),
        "nodes": [(name, s.module, s.line) for name, s in p.nodes],
        "over": p.over,
        "axes": p.axes,
        "bound": p.bound,
    }


def _read_segment(row: dict[str, Any]) -> Segment:
    live = LiveSet(
        tuple(
            Value(v["name"], tuple(map(_formula, v["shape"])), v["dtype"], v["storage"], _formula(v["bytes"]))
            for v in row["live"]
        )
    )
    parts = tuple(_read_part(p) for p in row["parts"])
    refused = tuple((str(name), Refusal(reason)) for name, reason in row["refused"])
    return Segment(row["index"], row["name"], row["kind"], parts, live, CutReason(row["reason"]), refused)


def _read_part(row: dict[str, Any]) -> Part:
    names: Callable[[str], tuple[str, ...]] = lambda key: tuple(row[key])  # noqa: E731
    return Part(
        name=row["name"],
        kind=PartKind(row["kind"]),
        function=row["function"],
        inputs=names("inputs"),
        params=names("params"),
        lengths=names("lengths"),
        outputs=names("outputs"),
        call=row["call"],
        cost=Cost(_formula(row["flops"]), _formula(row["bytes"])),
        nodes=tuple((name, Source(module, line)) for name, module, line in row["nodes"]),
        over=row["over"],
        axes=(tuple(row["axes"][0]), tuple(row["axes"][1])),
        bound=row["bound"],
    )


def _text(expr: sympy.Expr) -> str:
    """A formula as text; torch's divisions print as operators that would be read as others."""
    if not expr.has(*(getattr(functions, name) for name in _OWN)):
        return str(expr)
    for name in _OWN:
        expr = expr.replace(getattr(functions, name), sympy.Function(name))
    return str(expr)


@functools.lru_cache(maxsize=4096)
def _formula(text: str) -> sympy.Expr:
    """A size expression. sympy evaluates text as Python, so anything but the known names is refused first."""
    words = set(re.findall(r"[^\W\d]\w*", text))
    if not words <= _NAMES.keys() or not re.fullmatch(r"[\w\s+\-*/(),]*", text):
        raise ValueError(f"{text!r} is no formula in {', '.join(_NAMES)}")
    return sympy.sympify(text, locals=_NAMES)

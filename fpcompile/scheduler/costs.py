"""What a prefill costs, as plain numbers: one row of coefficients per segment.

A segment that executes n new tokens after p cached ones takes::

    seconds = a + b*n + c*n*(n + 2*p)

``a`` is the fixed cost, ``b`` the cost per token, ``c`` half the cost per (query, key) pair. For a whole
prefill (p = 0) this is ``a + b*n + c*n*n``; the quadratic part of consecutive chunks adds up to
that of the whole, so that cutting a prompt costs exactly the repeated ``a``.

File format (``--costs FILE``), JSON::

    {"name": "my-gpu", "source": "how it was measured", "check": 5e-6, "sync": 2e-5,
     "segments": [{"name": "embed", "a": 1e-5, "b": 1e-8, "c": 0},
                  {"repeat": 32, "segments": [{"name": "qkv", "a": 2e-5, "b": 2e-7, "c": 0}, ...]},
                  {"name": "lm_head", "a": 1e-4, "b": 0, "c": 0}]}

``repeat`` numbers its rows ``name.0``, ``name.1``...; a layer is one repetition (what layer grains cut).
``kv_bytes_per_token`` and ``live_bytes_per_token`` (default 0) are what a paused run keeps on the device.
``check`` is the seconds lost at a stop point where nobody stops, ``sync`` the further seconds when the device
is synchronised there; both default to 0. There is no limit of length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import inf, isfinite
from pathlib import Path
from typing import Any

from fpcompile.scheduler.errors import CostFileError

__all__ = ["CostTable", "SegmentCost", "load_costs"]

_NUMBERS = ("check", "sync", "kv_bytes_per_token", "live_bytes_per_token")


@dataclass(frozen=True, slots=True)
class SegmentCost:
    """One segment: ``a`` seconds, ``b`` seconds per token, ``c`` seconds per token squared.

    ``layer`` is the index of the layer that it belongs to, -1 outside any.
    """

    name: str
    a: float
    b: float
    c: float
    layer: int = -1

    def __post_init__(self) -> None:
        for field in ("a", "b", "c"):
            value = getattr(self, field)
            if not isinstance(value, int | float) or not isfinite(value) or value < 0:
                raise CostFileError(
                    f"cost {field!r} of segment {self.name!r}",
                    expected="finite seconds >= 0",
                    got=repr(value),
                )

    def seconds(self, tokens: int, context: int = 0) -> float:
        """Device seconds for ``tokens`` new tokens after ``context`` cached ones."""
        return self.a + tokens * (self.b + self.c * (tokens + 2 * context))


@dataclass(frozen=True)
class CostTable:
    """The segments of a program in order, with their costs."""

    segments: tuple[SegmentCost, ...]
    name: str = "unnamed"
    source: str = ""
    check: float = 0.0
    sync: float = 0.0
    kv_bytes_per_token: float = 0.0
    live_bytes_per_token: float = 0.0

    def __post_init__(self) -> None:
        if not self.segments:
            raise CostFileError("a cost table is empty", expected="at least one segment", got="none")
        for name in _NUMBERS:
            _seconds_or_bytes(vars(self), name)
        if not self.seconds(1) > 0:
            raise CostFileError("all costs are zero", expected="a prompt that takes time", got="0 s")

    @classmethod
    def from_segments(
        cls,
        rows: Iterable[tuple[str, tuple[float, float, float]]],
        *,
        name: str = "unnamed",
        source: str = "",
    ) -> CostTable:
        """From calibrated rows ``(name, (a, b, c))``; ``layers.N`` in a name gives the layer."""
        segments = [SegmentCost(label, a, b, c, _layer_of(label)) for label, (a, b, c) in rows]
        return cls(tuple(segments), name=name, source=source)

    @cached_property
    def total(self) -> SegmentCost:
        """All segments as one row."""
        rows = self.segments
        return SegmentCost(self.name, sum(r.a for r in rows), sum(r.b for r in rows), sum(r.c for r in rows))

    def seconds(self, tokens: int, context: int = 0) -> float:
        """Device seconds of the whole program, for ``tokens`` new tokens after ``context`` cached ones."""
        return self.total.seconds(tokens, context)

    def pack_seconds(self, slices: Iterable[tuple[int, int]]) -> float:
        """Device seconds of one launch over several (new tokens, context) slices: one fixed cost."""
        total = self.total
        return total.a + sum(n * (total.b + total.c * (n + 2 * p)) for n, p in slices)

    def to_json(self) -> dict[str, Any]:
        """The file format, without ``repeat``."""
        rows = [{"name": r.name, "a": r.a, "b": r.b, "c": r.c, "layer": r.layer} for r in self.segments]
        head = {"name": self.name, "source": self.source}
        return {**head, **{key: getattr(self, key) for key in _NUMBERS}, "segments": rows}

    def save(self, path: str | Path) -> None:
        """Write the file format; :func:`load_costs` reads it back."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")


def load_costs(path: str | Path) -> CostTable:
    """Read a costs file; raises :class:`CostFileError` naming file and field."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise CostFileError("cannot read the costs file", got=str(error), where=str(path)) from error
    try:
        return table_from_json(data)
    except CostFileError as error:
        raise CostFileError(error.what, expected=error.expected, got=error.got, where=str(path)) from error


def table_from_json(data: Any) -> CostTable:
    """A table from the parsed file format."""
    if not isinstance(data, Mapping) or not isinstance(data.get("segments"), list):
        raise CostFileError(
            "costs must be an object", expected='{"segments": [...]}', got=type(data).__name__
        )
    known = {"name", "source", *_NUMBERS, "segments"}
    if extra := sorted(set(data) - known):
        raise CostFileError(f"unknown field {extra[0]!r}", expected=f"one of {sorted(known)}", got=extra[0])
    segments: list[SegmentCost] = []
    layers = 0
    for row in data["segments"]:
        if not isinstance(row, Mapping):
            raise CostFileError("a segment must be an object", got=repr(row))
        if "repeat" not in row:
            segments.append(_row(row))
            continue
        if (
            not isinstance(row["repeat"], int)
            or row["repeat"] < 1
            or not isinstance(row.get("segments"), list)
        ):
            raise CostFileError("a repeated group", expected="repeat >= 1 and segments: [...]", got=repr(row))
        for _ in range(row["repeat"]):
            segments += [_row(inner, layers) for inner in row["segments"]]
            layers += 1
    numbers = {key: _seconds_or_bytes(data, key) for key in _NUMBERS}
    return CostTable(
        tuple(segments), name=str(data.get("name", "unnamed")), source=str(data.get("source", "")), **numbers
    )


def _seconds_or_bytes(data: Mapping[str, Any], key: str) -> float:
    value = data.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < inf:
        raise CostFileError(f"field {key!r}", expected="a finite number >= 0", got=repr(value))
    return float(value)


def _row(row: Mapping[str, Any], layer: int | None = None) -> SegmentCost:
    try:
        name = str(row["name"])
        a, b, c = row["a"], row["b"], row["c"]
    except KeyError as error:
        raise CostFileError(
            "a segment lacks a field", expected="name, a, b, c", got=f"no {error} in {dict(row)!r}"
        ) from error
    if layer is None:
        own = row.get("layer", _layer_of(name))
        if not isinstance(own, int) or own < -1:
            raise CostFileError(f"layer of segment {name!r}", expected="an index, or -1", got=repr(own))
        return SegmentCost(name, a, b, c, own)
    return SegmentCost(f"{name}.{layer}", a, b, c, layer)


def _layer_of(name: str) -> int:
    """``model.layers.7.mlp`` -> 7; -1 when there is no such part."""
    parts = name.split(".")
    for before, part in pairwise(parts):
        if before in ("layers", "layer", "h", "blocks") and part.isdigit():
            return int(part)
    return -1

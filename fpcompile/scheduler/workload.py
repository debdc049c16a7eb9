"""Requests in time: a trace, its tiling, its scaling to a rate, and its service levels.

Words
    *row*     one request of a trace: arrival, lengths, class. Times start at 0.
    *tile*    a trace is made as long as wanted from blocks of consecutive rows, drawn with a seed: rows
              inside a block keep their order and gaps. Seed 0 repeats the trace as it is.
    *rate*    requests per second offered on average; gaps are divided by the same number everywhere.

Classes of a trace without types are given by length: up to 1,024 tokens ``text``, else ``search``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, isfinite

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.costs import CostTable
from fpcompile.scheduler.events import Request

__all__ = ["TraceRow", "requests_at", "tile"]

KV_BLOCK = 16
"""Tokens per cache block."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace; ``arrival`` in seconds from the start of the trace."""

    arrival: float
    tokens: int
    output_tokens: int = 0
    klass: str = ""
    tenant: str = ""

    def __post_init__(self) -> None:
        if not isfinite(self.arrival) or self.arrival < 0:
            raise InvalidInputError("arrival of a trace row", expected="seconds >= 0", got=repr(self.arrival))
        if self.tokens < 1:
            raise InvalidInputError("input tokens of a trace row", expected=">= 1", got=repr(self.tokens))
        if self.output_tokens < 0:
            raise InvalidInputError(
                "output tokens of a trace row", expected=">= 0", got=repr(self.output_tokens)
            )


def tile(rows: Sequence[TraceRow], count: int, seed: int = 0, block: int | None = None) -> list[TraceRow]:
    """``count`` rows made from ``rows``, with the same mean gap in expectation.

    Seed 0 repeats the rows in order. Other seeds draw blocks of ``block`` consecutive rows (a quarter of the
    trace, 32 to 1,024) from random places, the end joined to the beginning: a circular block bootstrap.
    """
    if len(rows) < 2:
        raise InvalidInputError("a trace is too short", expected="at least 2 rows", got=str(len(rows)))
    size = len(rows)
    span = rows[-1].arrival - rows[0].arrival
    gaps = [span / (size - 1)] + [b.arrival - a.arrival for a, b in pairwise(rows)]
    length = size if seed == 0 else block or min(max(size // 4, 32), 1024)
    draw = random.Random(seed)
    result: list[TraceRow] = []
    now = 0.0
    while len(result) < count:
        start = 0 if seed == 0 else draw.randrange(size)
        for offset in range(min(length, count - len(result))):
            index = (start + offset) % size
            row = rows[index]
            now += gaps[index] if result else 0.0
            result.append(TraceRow(now, row.tokens, row.output_tokens, row.klass, row.tenant))
    return result


def requests_at(
    rows: Sequence[TraceRow],
    rate: float,
    table: CostTable,
    slos: Mapping[str, float],
    *,
    slo_scale: float = 1.0,
    length: Callable[[TraceRow], float] | None = None,
) -> list[Request]:
    """Requests at ``rate`` per second on average; deadline = arrival + SLO of the class x ``slo_scale``.

    ``length`` replaces the table's prediction of a whole prefill (seconds). A row without a tenant has its
    class for one, and the classes have priorities, the shortest SLO the highest: so that `wfq` and `priority`
    mean something on traces that name neither. Raises when a class has no SLO.
    """
    if not rate > 0 or not isfinite(rate):
        raise InvalidInputError("rate", expected="requests per second > 0", got=repr(rate))
    if not slo_scale > 0:
        raise InvalidInputError("slo_scale", expected="> 0", got=repr(slo_scale))
    missing = sorted({row.klass for row in rows} - set(slos))
    if missing:
        raise InvalidInputError(
            f"class {missing[0]!r} has no SLO",
            expected=f"one of {', '.join(sorted(slos))}",
            got=missing[0],
            remedy="pass --slo CLASS=SECONDS",
        )
    span = rows[-1].arrival - rows[0].arrival
    if not span > 0:
        raise InvalidInputError(
            "all requests of the trace arrive at once, which has no rate",
            expected="arrivals that differ",
            got=f"{len(rows)} at {rows[0].arrival:g} s",
        )
    stretch = (len(rows) - 1) / span / rate
    by_slo = sorted({slos[row.klass] for row in rows}, reverse=True)
    requests = []
    for number, row in enumerate(rows):
        arrival = row.arrival * stretch
        slo = slos[row.klass] * slo_scale
        cost = table.seconds(row.tokens) if length is None else length(row)
        requests.append(
            Request(
                f"r{number}",
                arrival,
                arrival + slo,
                row.tokens,
                cost,
                slo=slo,
                priority=by_slo.index(slos[row.klass]),
                tenant=row.tenant or row.klass,
                klass=row.klass,
                kv_blocks=ceil((row.tokens + row.output_tokens) / KV_BLOCK),
                decode_tokens=row.output_tokens,
            )
        )
    return requests

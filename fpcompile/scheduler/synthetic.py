"""Synthetic traffic with documented distributions, fitted to a slice of QwenTrace A.

| class  | share | prompt tokens                                                    |
|--------|-------|------------------------------------------------------------------|
| text   | 68 %  | histogram, see ``TEXT_BINS``; uniform inside a bin               |
| image  | 8 %   | 350 to 400 (90 %), else up to 1,000, uniform                     |
| search | 20 %  | lognormal(8.339, 0.696), at most 16,700                          |
| file   | 4 %   | lognormal(7.511, 1.338), at most 11,000                          |

Gaps between arrivals are gamma distributed with shape ``burstiness`` (1: a Poisson process; smaller:
burstier), as in `vllm bench serve --burstiness`. Everything is drawn from one seeded generator.
"""

from __future__ import annotations

import random
from math import isfinite

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.workload import TraceRow

__all__ = ["SHARES", "TEXT_BINS", "synthetic_trace"]

SHARES = {"text": 0.68, "image": 0.08, "search": 0.20, "file": 0.04}

TEXT_BINS = (
    (10, 110, 0.220),
    (110, 300, 0.127),
    (300, 700, 0.127),
    (700, 850, 0.246),
    (850, 1000, 0.140),
    (1000, 1500, 0.089),
    (1500, 2500, 0.025),
    (2500, 5000, 0.025),
)
"""(least tokens, most tokens, share of the text requests)."""


def synthetic_trace(
    count: int, *, seed: int = 0, rate: float = 1.0, burstiness: float = 1.0
) -> list[TraceRow]:
    """``count`` requests at ``rate`` per second on average."""
    for name, value in (("rate", rate), ("burstiness", burstiness)):
        if not value > 0 or not isfinite(value):
            raise InvalidInputError(name, expected="a finite number > 0", got=repr(value))
    if count < 2:
        raise InvalidInputError("count", expected="at least 2 requests", got=repr(count))
    draw = random.Random(seed)
    rows, now = [], 0.0
    for _ in range(count):
        klass = draw.choices(list(SHARES), list(SHARES.values()))[0]
        output = max(1, round(draw.lognormvariate(5.0, 1.0)))
        rows.append(TraceRow(now, _tokens(klass, draw), output, klass))
        now += draw.gammavariate(burstiness, 1.0 / (rate * burstiness))
    return rows


def _tokens(klass: str, draw: random.Random) -> int:
    if klass == "text":
        low, high, _ = draw.choices(TEXT_BINS, [share for _, _, share in TEXT_BINS])[0]
        return draw.randrange(low, high)
    if klass == "image":
        return draw.randint(350, 400) if draw.random() < 0.9 else draw.randint(400, 1000)
    mu, sigma, most = (8.339, 0.696, 16_700) if klass == "search" else (7.511, 1.338, 11_000)
    while True:
        tokens = round(draw.lognormvariate(mu, sigma))
        if 1 <= tokens <= most:
            return tokens

"""What cuts by budget are placed for: a length, a budget, and how fast the device is taken to be.

Words: the *design length* is the number of new tokens, without a cached prefix, at which launches are meant
to keep the budget; *rates* are the operations and the bytes that the device does in a second. An operator
takes as long as its operations or its bytes need, whichever is more.

The default rates are constants of the kind of device and the dtype and not of the machine: a plan is then
the same in every process, and checkpoints move between them. They are of the right order and no more; the
budget of a run is kept by its tile plan, which is made from measured seconds
(:mod:`fpcompile.executor.schedule`).
"""

from __future__ import annotations

import dataclasses
import functools

import sympy
import torch

from fpcompile.ir import CONTEXT, ROWS, TOKENS, Cost
from fpcompile.passes.placement import UNITS

DESIGN_TOKENS = 2048

_FLOPS: dict[tuple[str, int], float] = {
    ("cpu", 4): 1e11,
    ("cpu", 2): 2e11,
    ("gpu", 4): 4e13,
    ("gpu", 2): 4e14,
}
_BYTES = {"cpu": 1e10, "gpu": 2e12}


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """``flops`` operations and ``bytes`` bytes in a second."""

    flops: float
    bytes: float


def default_rates(device_type: str, dtype: torch.dtype) -> Rates:
    """Rates of a kind of device: two cores of a server's CPU, or one GPU of a data centre."""
    kind = "cpu" if device_type == "cpu" else "gpu"
    return Rates(_FLOPS[kind, 2 if dtype.itemsize <= 2 else 4], _BYTES[kind])


@dataclasses.dataclass(frozen=True, slots=True)
class Design:
    """Launches of at most ``seconds`` at ``tokens`` new tokens on a device of ``rates``."""

    seconds: float
    rates: Rates
    tokens: int = DESIGN_TOKENS

    def __str__(self) -> str:
        return (
            f"cuts for launches of at most {self.seconds * 1e3:g} ms at {self.tokens} tokens, predicted from "
            f"{self.rates.flops:.2g} operations and {self.rates.bytes:.2g} bytes per second"
        )

    @property
    def budget(self) -> int | None:
        """The budget in units of :mod:`fpcompile.passes.placement`; None when there is no limit."""
        return None if self.seconds == float("inf") else round(self.seconds * UNITS)

    def units(self, cost: Cost) -> int:
        """What a node takes, in the same units."""
        flops, moved = (value_at(e, self.tokens) for e in (cost.flops, cost.bytes))
        return round(max(flops / self.rates.flops, moved / self.rates.bytes) * UNITS)


@functools.lru_cache(maxsize=4096)
def value_at(expr: sympy.Expr, tokens: int) -> float:
    """A formula at ``tokens`` tokens that are the whole context, for one row of logits."""
    return float(expr.subs({TOKENS: tokens, CONTEXT: tokens, ROWS: 1}))

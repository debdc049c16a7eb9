"""Bundled cost profiles, for simulations without a device of one's own.

`llama3-8b-a800`
    Llama-3-8B prefill on one A800, from FlowPrefill's published runs: T(n) = 4 ms + 68 us n + 2 ns n^2
    (about 70 us per token up to 4k tokens, about 104 at 16.7k). The published figures are whole prefills;
    the split over the operators of the 32 layers is ours: the linear part by FLOPs of the projections, the
    quadratic part all in attention, the fixed part evenly over the operators.
    ``check`` and ``sync`` are not published and were not measured on that device; they stay 0, which favours
    the policies that check most often with a synchronisation, the published ones.
"""

from __future__ import annotations

from collections.abc import Callable

from fpcompile.errors import UnknownNameError
from fpcompile.scheduler.costs import CostTable, SegmentCost

__all__ = ["DEFAULT_PROFILE", "SLO_TABLE", "profile", "profile_names"]

DEFAULT_PROFILE = "llama3-8b-a800"

SLO_TABLE: dict[str, tuple[float, float]] = {
    "text": (0.25, 0.1),
    "image": (0.5, 0.1),
    "search": (4.0, 0.2),
    "file": (6.0, 0.2),
}
"""Class -> (TTFT SLO, TBT SLO) in seconds, of FlowPrefill's benchmark with Llama3-8B."""


def _llama3_8b_a800() -> CostTable:
    layers, fixed, linear, square = 32, 4e-3, 68e-6, 2e-9
    # multiply-accumulates per token of each projection: rows x columns of its weight
    macs = {
        "qkv": 4096 * 6144,
        "attention": 0,
        "o": 4096 * 4096,
        "gate_up": 4096 * 28672,
        "down": 14336 * 4096,
    }
    every = sum(macs.values())
    rows = []
    for layer in range(layers):
        for name, share in macs.items():
            quadratic = square / layers if name == "attention" else 0.0
            a, b = fixed / layers / len(macs), linear / layers * share / every
            rows.append(SegmentCost(f"layers.{layer}.{name}", a, b, quadratic, layer))
    source = "FlowPrefill's published runs (arXiv 2602.16603): T(n) = 4 ms + 68 us n + 2 ns n^2"
    return CostTable(
        tuple(rows),
        name=DEFAULT_PROFILE,
        source=source,
        kv_bytes_per_token=layers * 2 * 8 * 128 * 2,  # keys and values of 8 heads of 128, bf16
        live_bytes_per_token=(4096 + 28672) * 2,  # at the widest cut: the residual and gate_up's output
    )


_PROFILES: dict[str, Callable[[], CostTable]] = {DEFAULT_PROFILE: _llama3_8b_a800}


def profile_names() -> tuple[str, ...]:
    """The bundled profiles."""
    return tuple(sorted(_PROFILES))


def profile(name: str = DEFAULT_PROFILE) -> CostTable:
    """A bundled profile; an unknown name lists the known ones."""
    if name not in _PROFILES:
        raise UnknownNameError("cost profile", name, known=_PROFILES)
    return _PROFILES[name]()

"""How fast a device is at large matrix products and at copies: measured once, kept on disk.

Used to place cuts before a program exists whose segments could be measured (``granularity="auto"``). The
numbers are rounded to two digits and kept beside the measured costs, so that later processes place the same
cuts.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable

import torch

from fpcompile.executor import cost_cache
from fpcompile.passes.design import Rates

_SIZE = 1024  # rows and columns of the matrices
_BYTES = 1 << 26  # of one copy: more than a cache holds
_ROUNDS = 5
_log = logging.getLogger(__name__)


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of ``device`` for ``dtype``, measured (a tenth of a second) unless they are kept on disk."""
    identity = {
        "device": cost_cache.device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
        "torch": torch.__version__,
    }
    where = cost_cache.rates_file(identity)
    if where is not None and where.is_file():
        try:
            content = json.loads(where.read_text(encoding="utf-8"))
            rates = Rates(float(content["flops"]), float(content["bytes"]))
            if content["identity"] == identity and all(0 < r < math.inf for r in (rates.flops, rates.bytes)):
                return rates
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("measured rates in %s cannot be read (%s): they are measured again", where, error)
    rates = _measure(device, dtype)
    if where is not None:
        content = {"identity": identity, "flops": rates.flops, "bytes": rates.bytes}
        cost_cache.write_file(where, json.dumps(content))
    return rates


def _measure(device: torch.device, dtype: torch.dtype) -> Rates:
    matrix = torch.ones(_SIZE, _SIZE, device=device, dtype=dtype)
    block = torch.ones(_BYTES // 2, device=device, dtype=torch.uint8)
    into = torch.empty_like(block)
    product = _fastest(device, lambda: matrix @ matrix)
    copy = _fastest(device, lambda: into.copy_(block))
    return Rates(_rounded(2 * _SIZE**3 / product), _rounded(_BYTES / copy))


def _fastest(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few rounds: others on the machine only ever add."""
    found: list[float] = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begun)
    return max(min(found), 1e-9)


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")

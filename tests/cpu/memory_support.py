"""Helpers of the memory tests: an engine that the test turns, on a virtual clock that stands still.

So nothing depends on wall time; where a choice depends on predicted seconds, the test sets what copies cost.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fpcompile.engine.engine import Engine
from tests.cpu.test_engine_fakes import Clock

COPY, AGAIN = math.inf, 1.0
"""Bytes per second of copies: nothing is quicker, or nothing is slower than computing again."""


def ids(length: int, first: int = 0) -> torch.Tensor:
    """A prompt of its own for each length; ``first`` tokens are the same in all."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(100, (1, length), generator=generator)
    prompt[:, :first] = torch.arange(first)
    return prompt


def inline(program: Any, *, rate: float = COPY, policy: Any = "s-edf", **options: Any) -> Engine:
    """An engine that the test turns; the later a request comes, the sooner its deadline should be."""
    options.setdefault("clock", Clock())
    engine = Engine(program, policy=policy, device_thread=False, **options)
    engine._memory.moves.rate = rate
    return engine


def turn(engine: Engine, count: int = 1) -> bool:
    """Turns of one launch each, all invariants checked."""
    busy = True
    for _ in range(count):
        busy = engine.turn(1)
        engine._driver.validate()
    return busy


def drain(engine: Engine) -> None:
    while turn(engine):
        pass


def empty(engine: Engine) -> None:
    """Nothing is held by anybody."""
    memory = engine.statistics().memory
    assert (memory.paused_bytes, memory.host_bytes, memory.blocks_used) == (0, 0, 0)
    assert memory.blocks_free + memory.blocks_cached == memory.blocks
    assert engine.statistics().paused_bytes == 0
    assert not engine._memory._seats
    assert not engine._memory._held


def nested(engine: Engine, lengths: list[int], launches: int = 3) -> list[Any]:
    """Requests that come one after the other, each more urgent than those before."""
    handles = []
    for number, length in enumerate(lengths):
        handles.append(engine.submit(ids(length), ttft_slo=1000.0 - number, request_id=f"r{number}"))
        turn(engine, launches)
    return handles

"""Any history of requests, pauses, evictions, checkpoints, cancels and failures: the bits of who survives.

A state machine turns an engine over a tiny real model, with a pool and a budget that are too small for what
comes. The policy serves whoever the machine names, so that every order of pausing and going on is met. Some
requests generate, more at a time than there is room for where the engine takes outputs to be short. After
every rule: blocks are free, used or cached and sum up; nobody is forgotten. At the end: no block, no byte.
"""

from __future__ import annotations

import functools
import math
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import fpcompile
from fpcompile.engine.engine import Engine
from fpcompile.errors import BudgetWarning, RequestCancelledError, SegmentError
from fpcompile.executor.offload import Parking
from fpcompile.scheduler.job import RequestView
from fpcompile.scheduler.policy import RankingPolicy
from tests.cpu.memory_support import empty, ids
from tests.cpu.support import Outcome, differences, finish, outcome, program_of
from tests.cpu.test_engine_fakes import Clock
from tests.cpu.test_generate import own

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning")]

PROMPTS = ((5, None), (17, None), (40, None), (40, 0.02), (33, 0.05), (16, None))
"""(tokens, budget in milliseconds); the pool has room for about two of the long ones."""
GENERATIONS = ((5, 12), (17, 20), (16, 17), (30, 3), (8, 1))
"""(tokens of the prompt, tokens to come)."""
_EXPECTED: dict[tuple[int, float | None], Outcome] = {}


@functools.cache
def generated(length: int, count: int) -> list[int]:
    """What the unmodified model generates."""
    return own("qwen3", ids(length), count)


def expected(prompt: tuple[int, float | None]) -> Outcome:
    """What the run gives that nobody interrupts."""
    if prompt not in _EXPECTED:
        run = program_of("qwen3").start(ids(prompt[0]), max_blocking_ms=prompt[1])
        _EXPECTED[prompt] = finish(run)
    return _EXPECTED[prompt]


class Named(RankingPolicy):
    """The order that the test gives; asks to be asked again a second later."""

    def __init__(self) -> None:
        self.first: list[str] = []

    def rank(self, views: Sequence[RequestView], now: float) -> Iterable[str]:
        known = [view.request.id for view in views]
        front = [name for name in dict.fromkeys(self.first) if name in known]
        return [*front, *(name for name in known if name not in front)]

    def wake(self, now: float) -> float:
        return now + 1.0


class Memory(RuleBasedStateMachine):
    """Requests by name; ``lost`` are those that were cancelled or made to fail."""

    names = Bundle("names")

    def __init__(self) -> None:
        super().__init__()
        warnings.simplefilter("ignore", BudgetWarning)
        self.handles: dict[str, Any] = {}
        self.prompts: dict[str, tuple[int, float | None]] = {}
        self.streams: dict[str, tuple[int, int]] = {}
        self.lost: set[str] = set()
        self.short = 0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(Parking, "to_host", self.copy_unless_short(Parking.to_host))

    def copy_unless_short(self, copy: Any) -> Any:
        """As ``copy``, but the next ``short`` copies find no memory."""

        def to_host(parking: Parking, tensors: Sequence[torch.Tensor], **options: bool) -> Any:
            if self.short and tensors:
                self.short -= 1
                raise MemoryError("injected")
            return copy(parking, tensors, **options)

        return to_host

    @initialize(
        budget=st.sampled_from([0, 50_000, None]),
        host=st.sampled_from([0, 40_000, 1 << 30]),
        blocks=st.sampled_from([3, 5, None]),
        prefix=st.booleans(),
        hopeful=st.booleans(),
    )
    def begin(self, budget: int | None, host: int, blocks: int | None, prefix: bool, hopeful: bool) -> None:
        """Prefix reuse would change bits: here it is asked for and turned off. ``hopeful``: not
        deterministic, and outputs are predicted to be short.
        """
        self.clock, self.policy = Clock(), Named()
        options: dict[str, Any] = {}
        if blocks is not None:
            options = {"kv_blocks": blocks, "prefix_cache": prefix and not hopeful}
        self.engine = Engine(
            program_of("qwen3"), policy=self.policy, device_thread=False, clock=self.clock,
            memory_budget=budget, host_memory=host, deterministic=not hopeful, max_decode_batch=1, **options,
        )  # fmt: skip
        self.copying(True)
        decoding = self.engine._memory.decoding
        for lengths in () if decoding is None else decoding._lengths.values():
            for _ in range(50):
                lengths.ended(2, cut=False)

    # ---- what may happen

    @rule(target=names, prompt=st.sampled_from(PROMPTS), urgent=st.booleans())
    def submit(self, prompt: tuple[int, float | None], urgent: bool) -> str:
        name = f"r{len(self.handles)}"
        if urgent:
            self.policy.first.insert(0, name)
        self.handles[name] = self.engine.submit(ids(prompt[0]), max_blocking_ms=prompt[1], request_id=name)
        self.prompts[name] = prompt
        return name

    @rule(target=names, wish=st.sampled_from(GENERATIONS), tbt=st.sampled_from([0.5, 2.0]))
    def generate(self, wish: tuple[int, int], tbt: float) -> str:
        name = f"r{len(self.handles)}"
        length, count = wish
        self.handles[name] = self.engine.submit(
            ids(length), max_new_tokens=count, tbt_slo=tbt, request_id=name
        )
        self.streams[name] = wish
        return name

    @rule(count=st.integers(1, 9))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.turn(1)

    @rule(name=names)
    def prefer(self, name: str) -> None:
        """Whoever has the device is paused; if this one was paused or evicted, it comes back."""
        self.policy.first.insert(0, name)
        self.clock.advance(1.0)
        self.engine.turn(1)
        self.engine.turn(1)

    @rule(fast=st.booleans())
    def copying(self, fast: bool) -> None:
        """Moving is quicker than computing again, or slower."""
        self.engine._memory.moves.rate = math.inf if fast else 1.0

    @rule(copies=st.integers(1, 2))
    def run_short(self, copies: int) -> None:
        """The host has no memory for the next copies: whoever was to go begins again, and nobody fails."""
        self.short = copies

    @rule(name=names)
    def evict(self, name: str) -> None:
        """Whatever the reason: a paused run has to go."""
        memory = self.engine._memory
        held = memory._held.get(name)
        if held is not None and held.paused:
            memory.evict(name)

    @rule(name=names)
    def relieve(self, name: str) -> None:
        memory = self.engine._memory
        held = memory._held.get(name)
        if held is not None and held.paused and not held.parked and not held.dropped:
            memory._move(held)

    @rule(name=names)
    def checkpoint(self, name: str) -> None:
        """Through a file, and to the end in another run."""
        held = self.engine._memory._held.get(name)
        if held is None or held.parked or held.evicted or held.dropped or name in self.lost:
            return
        if name in self.streams:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            held.seats[0].run.checkpoint().save(path)
            resumed = program_of("qwen3").resume(fpcompile.Checkpoint.load(path))
        assert differences(finish(resumed), expected(self.prompts[name])) == []

    @rule(name=consumes(names))
    def cancel(self, name: str) -> None:
        if self.handles[name].cancel():
            self.lost.add(name)

    @precondition(lambda self: self.engine._driver._flight is not None)
    @rule()
    def fail(self) -> None:
        """The run on the device finds a value of another shape, and raises."""
        flight = self.engine._driver._flight
        assert flight is not None
        run: Any = flight.load.run
        if run.partial or run.done:
            return
        run.values = {name: torch.zeros(3, 3, 3) for name in run.values}
        self.lost.add(flight.load.name)

    @precondition(lambda self: self.engine._driver.lane.stepping)
    @rule()
    def fail_a_step(self) -> None:
        """The decode step under way finds a value of another shape."""
        step = self.engine._driver.lane._step
        assert step is not None
        run: Any = step._step.run
        if run.partial or run.done:
            return
        run.values = {name: torch.zeros(3, 3, 3) for name in run.values}
        self.lost.update(ticket.id for ticket in step.tickets)

    # ---- what must hold

    @invariant()
    def sums(self) -> None:
        if hasattr(self, "engine"):
            self.engine._driver.validate()

    def teardown(self) -> None:
        try:
            if hasattr(self, "engine"):
                self.end()
        finally:
            self.patch.undo()

    def end(self) -> None:
        while self.engine.turn(1):
            self.engine._driver.validate()
        empty(self.engine)
        for name, handle in self.handles.items():
            assert handle.done(), name
            if name in self.lost and handle.metrics.state != "completed":  # a spoilt run may begin again
                with pytest.raises((RequestCancelledError, SegmentError)):
                    handle.result(0)
            elif name in self.streams:
                assert list(handle.tokens(0)) == generated(*self.streams[name]), name
                again = handle.metrics.recomputations > 0
                assert handle.metrics.numerics == "bits" or again
            else:
                assert differences(outcome(handle.result(0)), expected(self.prompts[name])) == [], name
                assert handle.metrics.numerics == "bits"
        self.engine.close()


def test_any_history_gives_the_bits_of_an_undisturbed_run() -> None:
    limits = settings(
        max_examples=40, stateful_step_count=25, deadline=None,
        suppress_health_check=list(HealthCheck), print_blob=True,
    )  # fmt: skip
    run_state_machine_as_test(Memory, settings=limits)

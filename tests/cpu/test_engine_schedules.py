"""Random schedules: whatever is submitted, cancelled and broken, every request ends exactly once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpcompile.errors import RequestCancelledError, RequestRejectedError, SegmentError
from fpcompile.executor.runahead import DEFAULT_WINDOW
from fpcompile.testing import FakeAsyncDevice
from tests.cpu.test_engine_fakes import Clock, FakeProgram, drive, inline, raises

POLICIES = ["fcfs", "edf", "s-edf", "srpt", "priority"]

ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.integers(1, 6),  # tokens
            st.one_of(st.none(), st.floats(0.5, 60.0)),  # SLO
            st.integers(-2, 2),  # priority
            st.one_of(st.none(), st.integers(0, 3)),  # the segment that fails
        ),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("turn"), st.one_of(st.none(), st.integers(1, 5))),
        st.tuples(st.just("pass"), st.floats(0.0, 5.0)),
    ),
    max_size=40,
)


class _World:
    """An engine, what was asked of it, and how each request ended, counted by callbacks."""

    def __init__(self, policy: str, asynchronous: bool, **options: Any) -> None:
        self.clock = Clock()
        self.program = FakeProgram(4, clock=self.clock, seconds=0.25)
        if asynchronous:
            device = FakeAsyncDevice()
            self.program = FakeProgram(4, seconds=DEFAULT_WINDOW / 3)
            self.engine = inline(self.program, device.clock, device=device, policy=policy, **options)  # type: ignore[arg-type]
            self.wait = device.advance
        else:
            self.engine = inline(self.program, policy=policy, **options)
            self.wait = self.clock.advance
        self.handles: list[Any] = []
        self.expected: list[Any] = []
        self.ends: Counter[str] = Counter()
        self.promised: set[str] = set()

    def do(self, action: tuple[Any, ...]) -> None:
        match action:
            case ("submit", tokens, slo, priority, fails):
                at = {} if fails is None else {fails: raises}
                handle = self.engine.submit([2] * tokens, ttft_slo=slo, priority=priority, at=at)
                handle.add_done_callback(lambda h: self.ends.update([h.request_id]))
                self.handles.append(handle)
                self.expected.append(None if fails is not None else 2 * tokens)
            case ("cancel", which) if self.handles:
                handle = self.handles[which % len(self.handles)]
                if handle.cancel():
                    self.promised.add(handle.request_id)
            case ("turn", size):
                self.engine.turn(size)
            case ("pass", seconds):
                self.wait(seconds)
        self.engine._driver.validate()

    def check_ends(self) -> None:
        assert all(self.ends[handle.request_id] == 1 for handle in self.handles)
        for handle, expected in zip(self.handles, self.expected, strict=True):
            state = handle.metrics.state
            assert (state == "cancelled") == (handle.request_id in self.promised)
            if state == "completed":
                assert handle.result(0) == expected
            else:
                kinds = {"cancelled": RequestCancelledError, "rejected": RequestRejectedError}
                with pytest.raises(kinds.get(state, SegmentError)):
                    handle.result(0)
        assert all(run.done or run.released for run in self.program.runs)
        statistics = self.engine.statistics()
        assert statistics.ended == len(self.handles)
        assert (statistics.running, statistics.waiting, statistics.paused_bytes) == (0, 0, 0)
        assert sum(handle.metrics.preemptions for handle in self.handles) == statistics.preemptions


@pytest.mark.slow
@given(
    policy=st.sampled_from(POLICIES),
    asynchronous=st.booleans(),
    quota=st.sampled_from([None, 1, 2]),
    patience=st.sampled_from([float("inf"), 3.0]),
    actions=ACTIONS,
)
def test_every_request_ends_exactly_once(
    policy: str, asynchronous: bool, quota: int | None, patience: float, actions: list[tuple[Any, ...]]
) -> None:
    world = _World(policy, asynchronous, max_segments=quota, max_queue_s=patience)
    for action in actions:
        world.do(action)
    drive(world.engine)
    world.check_ends()


@pytest.mark.slow
@given(policy=st.sampled_from(POLICIES), drain=st.booleans(), actions=ACTIONS)
def test_closing_at_any_moment_ends_every_request(
    policy: str, drain: bool, actions: list[tuple[Any, ...]]
) -> None:
    world = _World(policy, asynchronous=False)
    for action in actions:
        world.do(action)
    live = [handle.request_id for handle in world.handles if not handle.done()]
    world.engine.close(drain=drain)
    if not drain:
        world.promised.update(live)
    world.check_ends()

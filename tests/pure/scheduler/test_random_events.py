"""Any sequence of events a driver may send keeps every invariant, and every request ends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompile.scheduler import (
    ENDED,
    Arrival,
    Cancelled,
    Completed,
    CostPredictor,
    Decoding,
    Event,
    Evict,
    Failed,
    Launch,
    Memory,
    Pause,
    Reject,
    Request,
    Restore,
    Scheduler,
    State,
    Timer,
    Yielded,
    profile,
)

SPECS = (
    "fcfs", "edf", "s-edf", "srpt", "priority", "wfq", "chunked:512,s-edf", "vllm:600,200", "layered:4,edf",
    "flowprefill-published", "flowprefill", "fpcompile", "fpcompile:pack=1024", "fpcompile:patience=0.2",
)  # fmt: skip


class Driver:
    """Sends legal events chosen by hypothesis, and follows the commands."""

    def __init__(self, spec: str, draw: st.DataObject, **options: object) -> None:
        self.core = Scheduler(spec, predictor=CostPredictor(profile()), **options)  # type: ignore[arg-type]
        self.draw, self.now, self.count, self.flying = draw, 0.0, 0, ""
        self.names: list[str] = []
        self.asked = False

    def send(self, event: Event) -> None:
        for command in self.core.handle(event):
            if isinstance(command, Launch):
                assert not self.flying, "one launch at a time"
                self.flying, self.asked = command.run, False
                assert command.tokens is None or len(command.tokens) == len(command.requests)
            elif isinstance(command, Pause):
                assert command.run == self.flying
                assert not self.asked, "asked twice"
                self.asked = True
            elif isinstance(command, Reject):
                assert self.core.state(command.request) is State.REJECTED
            elif isinstance(command, Evict | Restore):
                assert command.run != self.flying
        self.core.validate()

    def arrive(self) -> None:
        tokens = self.draw.draw(st.sampled_from([20, 200, 700, 3000]))
        cost = profile().seconds(tokens)
        slack = self.draw.draw(st.sampled_from([-0.1, 0.0, 0.1, 1.0]))
        name = f"q{self.count}"
        self.count += 1
        self.names.append(name)
        klass = self.draw.draw(st.sampled_from("xy"))
        due = self.now + cost + slack
        blocks = self.draw.draw(st.integers(0, 6))
        request = Request(
            name, self.now, due, tokens, cost, slo=1.0, klass=klass, tenant=klass, kv_blocks=blocks
        )
        self.send(Arrival(self.now, request))

    def land(self, kind: str) -> None:
        run, self.flying = self.flying, ""
        if kind == "completed":
            self.send(Completed(self.now, run))
        elif kind == "failed":
            self.send(Failed(self.now, run, "boom"))
        else:
            self.send(Yielded(self.now, run))

    def step(self) -> None:
        self.now += self.draw.draw(st.sampled_from([0.0, 0.001, 0.05, 0.3]))
        kinds = ["arrive", "arrive", "cancel", "timer", "decoding"]
        if self.flying:
            kinds += ["completed", "yielded", "failed", "completed"]
        kind = self.draw.draw(st.sampled_from(kinds))
        if kind == "arrive":
            self.arrive()
        elif kind == "cancel" and self.names:
            self.send(Cancelled(self.now, self.draw.draw(st.sampled_from(self.names))))
        elif kind == "timer":
            self.send(Timer(self.now))
        elif kind == "decoding":
            self.send(Decoding(self.now, self.draw.draw(st.sampled_from([0.0, 0.2, 0.9]))))
        elif kind in ("completed", "yielded", "failed"):
            self.land(kind)

    def drain(self) -> None:
        for _ in range(10 * self.count + 10):
            if not self.flying:
                break
            self.now += 0.1
            self.land("completed")
        else:
            raise AssertionError("the queue does not drain")
        if self.core.memory.limited:
            self.send(Memory(self.now, int(self.core.memory.capacity)))


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=20, deadline=None)
@given(draw=st.data())
def test_invariants_hold_and_every_request_ends(spec: str, draw: st.DataObject) -> None:
    options: dict[str, object] = draw.draw(
        st.sampled_from(
            [
                {},
                {"max_queue_s": 0.4},
                {"kv_blocks": 8},
                {"suspension_cap_s": 0.1},
                {"trail_cap": 0.5, "hysteresis_s": 0.02},
            ]
        )
    )
    driver = Driver(spec, draw, **options)
    for _ in range(draw.draw(st.integers(1, 40))):
        driver.step()
    driver.drain()
    for name in driver.names:
        assert driver.core.state(name) in ENDED
    assert not driver.core.jobs
    assert not driver.core.queue.jobs

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
from fpcompile.scheduler.events import Dropped

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

    def send(self, *events: Event) -> None:
        for command in self.core.handle_all(events):
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

    def arrival(self) -> Arrival:
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
            name, self.now, due, tokens, cost, slo=1.0, klass=klass, tenant=klass, kv_blocks=blocks,
            decode_tokens=self.draw.draw(st.sampled_from([0, 0, 5])),
        )  # fmt: skip
        return Arrival(self.now, request)

    def land(self, kind: str) -> None:
        run, self.flying = self.flying, ""
        event: Event = Yielded(self.now, run)
        if kind == "completed":
            event = Completed(self.now, run)
        elif kind == "failed":
            event = Failed(self.now, run, "boom")
        self.send(event, *(self.arrival() for _ in range(self.draw.draw(st.sampled_from([0, 0, 1, 2])))))

    def resting(self) -> list[str]:
        """Runs that were stopped, wherever their memory is."""
        return [name for name, job in self.core.jobs.items() if job.state in (State.PAUSED, State.EVICTED)]

    def most_free(self) -> int:
        """What a device reports when nothing is decoded any more."""
        return int(self.core.memory.capacity) - sum(job.held for job in self.core.jobs.values())

    def meddle(self, kind: str) -> None:
        """What happens to runs that are not on the device, and to its memory."""
        if kind == "memory" and self.core.memory.limited:
            free = self.draw.draw(st.integers(int(self.core.memory.free), self.most_free()))
            self.send(Memory(self.now, free))
        elif kind != "memory" and (names := self.resting()):
            name = self.draw.draw(st.sampled_from(names))
            self.send(Failed(self.now, name, "gone") if kind == "lost" else Dropped(self.now, name, 0.7))

    def step(self) -> None:
        self.now += self.draw.draw(st.sampled_from([0.0, 0.001, 0.05, 0.3]))
        kinds = ["arrive", "arrive", "cancel", "timer", "decoding"]
        if self.flying:
            kinds += ["completed", "yielded", "failed", "completed"]
        kinds += ["lost", "dropped", "memory"]
        kind = self.draw.draw(st.sampled_from(kinds))
        if kind == "arrive":
            self.send(self.arrival())
        elif kind == "cancel" and self.names:
            self.send(Cancelled(self.now, self.draw.draw(st.sampled_from(self.names))))
        elif kind == "timer":
            self.send(Timer(self.now))
        elif kind == "decoding":
            self.send(Decoding(self.now, self.draw.draw(st.sampled_from([0.0, 0.2, 0.9]))))
        elif kind in ("completed", "yielded", "failed"):
            self.land(kind)
        elif kind in ("lost", "dropped", "memory"):
            self.meddle(kind)

    def drain(self) -> None:
        for _ in range(10 * self.count + 10):
            if not self.core.jobs:
                return
            self.now += 0.1
            if self.flying:
                run, self.flying = self.flying, ""
                self.send(Completed(self.now, run))
            else:
                self.send(Memory(self.now, self.most_free()))
        raise AssertionError("the queue does not drain")


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
                {"max_segments": 2, "suspension_cap_s": 0.1},
                {"kv_blocks": 8, "suspension_cap_s": 0.05, "move_s": 0.01},
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

"""A fake program for the engine's tests: segments that advance a virtual clock, wait at a gate, or raise.

Every run records which of its segments were executed, so that a test can tell that each one was executed once
and in order, whatever happened in between. The fakes check their own contract: no released run is stepped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fpcompile.engine.engine import Engine
from fpcompile.engine.programs import ProgramLike
from fpcompile.errors import InvalidInputError, SegmentError


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Gate:
    """Lets a test stop a run inside a segment: ``reached`` says that it is there, ``open`` lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, run: FakeRun) -> None:
        self.reached.set()
        assert self.open.wait(20), "nobody opened the gate"

    def wait(self) -> None:
        assert self.reached.wait(20), "the run never came to the gate"


@dataclass(frozen=True)
class FakeSegment:
    index: int
    name: str


class FakeRun:
    """``at[i]`` is called while segment ``i`` is executed; ``seconds`` pass on the program's clock before."""

    def __init__(
        self, program: FakeProgram, ids: list[int], at: dict[int, Callable[[FakeRun], object]]
    ) -> None:
        self.program = program
        self.ids = ids
        self.at = at
        self.cursor = 0
        self.executed: list[int] = []
        self.suspended = 0
        self.released = False

    @property
    def done(self) -> bool:
        return self.cursor == len(self.program.segments)

    @property
    def next_segment(self) -> FakeSegment:
        return self.program.segments[self.cursor]

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def rows(self) -> int:
        return 1

    @property
    def live_bytes(self) -> int:
        return 0 if self.released else 10 * len(self.ids)

    @property
    def kv_bytes(self) -> int:
        return 0 if self.released else self.cursor

    def step(self) -> None:
        assert not self.released, "a released run was stepped"
        assert not self.done, "a run that is done was stepped"
        self.program.log.append((self.ids[0], self.cursor))
        if self.program.clock is not None:
            self.program.clock.advance(self.program.seconds * len(self.ids))
        if self.cursor in self.at:
            try:
                self.at[self.cursor](self)
            except ValueError as error:
                raise SegmentError(
                    self.next_segment.name, cause=error, node="mm_3", source_line="modeling_fake.py:7: x @ w"
                ) from error
        self.executed.append(self.cursor)
        self.cursor += 1

    def result(self) -> Any:
        assert self.done
        assert not self.released
        if self.program.spoiled:
            raise RuntimeError("no result")
        assert self.executed == list(range(len(self.program.segments))), "a segment was lost or repeated"
        return sum(self.ids)

    def suspend(self) -> None:
        self.suspended += 1

    def release(self) -> None:
        self.released = True


class FakeProgram:
    """``segments`` segments of ``seconds`` per token each; ``start(ids, at={index: callable})``."""

    def __init__(
        self,
        segments: int = 4,
        *,
        seconds: float = 1.0,
        clock: Clock | None = None,
        device: str = "cpu",
    ) -> None:
        self.segments: Sequence[FakeSegment] = tuple(FakeSegment(i, f"layer.{i}") for i in range(segments))
        self.seconds = seconds
        self.clock = clock
        self.device = torch.device(device)
        self.runs: list[FakeRun] = []
        self.log: list[tuple[int, int]] = []
        self.spoiled = False

    def start(
        self, input_ids: Any, *, at: dict[int, Callable[[FakeRun], object]] | None = None, **kwargs: Any
    ) -> FakeRun:
        if kwargs or not input_ids:
            raise InvalidInputError("input_ids is empty", expected="at least one", got="none")
        run = FakeRun(self, list(input_ids), at or {})
        self.runs.append(run)
        return run

    def predict(self, *, tokens: int, context: float | None = None, start: int = 0, rows: int = 1) -> float:
        return self.seconds * tokens * (len(self.segments) - start)

    def segment_seconds(
        self, index: int, *, tokens: int, rows: int = 1, context: float | None = None
    ) -> float:
        return self.seconds * tokens


def raises(run: FakeRun) -> None:
    """For ``at``: the segment fails."""
    raise ValueError("inf or nan")


def inline(
    program: FakeProgram | dict[str, FakeProgram], clock: Clock | None = None, **options: Any
) -> Engine:
    """An engine that the test drives by ``turn``, on the program's virtual clock."""
    programs = program if isinstance(program, dict) else {"default": program}
    if clock is None:
        clock = next(iter(programs.values())).clock
    assert clock is not None
    return Engine(programs, clock=clock, device_thread=False, **options)


def drive(engine: Engine, turns: int = 10_000) -> None:
    """Turn until the device is idle; check the invariants after every turn."""
    for _ in range(turns):
        busy = engine.turn()
        engine._driver.validate()
        if not busy:
            return
    raise AssertionError("the engine did not come to rest")


def test_the_fake_is_a_program() -> None:
    assert isinstance(FakeProgram(), ProgramLike)


def test_the_fake_notices_misuse() -> None:
    run = FakeProgram(1).start([1])
    run.release()
    with pytest.raises(AssertionError, match="released"):
        run.step()
    failing = FakeProgram(1).start([1], at={0: raises})
    with pytest.raises(SegmentError, match=r"layer\.0"):
        failing.step()

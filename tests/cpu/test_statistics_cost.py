"""What statistics cost: a paused run is looked at once for each pause, however often somebody asks."""

from __future__ import annotations

from typing import Any

import pytest

from fpcompile.engine import memory_seats
from fpcompile.engine.engine import Engine
from fpcompile.executor import kv, slices
from tests.cpu.memory_support import drain, empty, ids, inline, nested
from tests.cpu.support import program_of


def counted(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Counts the calls of a function."""
    real, calls = getattr(owner, name), [0]

    def function(*arguments: Any) -> Any:
        calls[0] += 1
        return real(*arguments)

    patch.setattr(owner, name, function)
    return calls


def looks(engine: Engine, calls: list[int], asked: int = 5) -> int:
    """How many runs are looked at when somebody asks so often; always with the same answer."""
    calls[0] = 0
    told = [engine.statistics() for _ in range(asked)]
    assert len({(one.paused_bytes, one.memory.paused_bytes) for one in told}) == 1
    return calls[0]


@pytest.mark.parametrize("budget", [None, 1 << 40], ids=["none", "budget"])
def test_paused_runs_are_looked_at_once(budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, memory_seats, "own_bytes")
    engine = inline(program_of("qwen3"), memory_budget=budget)
    nested(engine, [40, 41, 42, 43, 44, 45])
    assert engine.statistics().paused == 5
    before = engine.statistics().paused_bytes
    assert before > 0
    assert looks(engine, calls) == 0
    urgent = engine.submit(ids(30), ttft_slo=1.0)
    for _ in range(3):
        engine.turn(1)
    assert looks(engine, calls) == (1 if budget is None else 0), "the one that was paused now"
    assert engine.statistics().paused_bytes > before
    while not urgent.done():
        engine.turn(1)
    assert looks(engine, calls) == 0, "who goes on is not paused"
    engine._driver.validate()
    drain(engine)
    empty(engine)


def test_what_is_moved_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inline(program_of("qwen3"))
    nested(engine, [40, 41, 42])
    before = engine.statistics().paused_bytes
    calls = counted(monkeypatch, memory_seats, "own_bytes")
    engine._driver._relief.make_room()
    assert engine.statistics().paused_bytes < before
    assert looks(engine, calls) == 0
    engine._driver.validate()
    drain(engine)
    empty(engine)


def test_what_waits_for_its_next_slice_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, slices, "kv_bytes")
    sliced = slices.Sliced(program_of("qwen3").start(ids(40)))
    ticket: Any = None
    seat, held = memory_seats.Seat(ticket, sliced), list[int]()
    for _ in range(3):
        part = sliced.take(13)
        while not part.done:
            part.step()
        sliced.put(part)
        held += [seat.between(sliced) for _ in range(4)]
    assert calls[0] == 3
    assert held == [size for size in held[::4] for _ in range(4)]
    assert held[0] < held[4] < held[8] == sliced.live_bytes + sliced.kv_bytes


def test_bytes_are_counted_while_a_run_goes_on() -> None:
    """Any thread may ask: what is written meanwhile is counted or not, and harms nobody."""

    class Written:
        """Counting it lets the run write one more."""

        def __init__(self, shelf: dict[int, Any]) -> None:
            self.shelf, self.storages = shelf, dict[int, int]()

        @property
        def pooled_bytes(self) -> int:
            self.shelf[len(self.shelf)] = self
            return 8

        nbytes = pooled_bytes

    layers: dict[int, Any] = {}
    layers[0] = Written(layers)
    assert kv.kv_bytes([layers]) == 8
    sliced: Any = slices.Sliced(program_of("qwen3").start(ids(20)))
    sliced.pieces[0] = Written(sliced.pieces)
    assert sliced.live_bytes == 8

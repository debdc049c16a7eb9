"""What decodes in a pool is counted as it changes: the sums are those of a look at everybody, without it.

Members are bare sequences in a real pool of a few tokens a block, some of which begin behind shared blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from fpcompile.engine.decode_memory import DecodeMemory, Reserve
from fpcompile.engine.holdings import Holdings
from fpcompile.engine.memory_facts import NOTHING
from fpcompile.executor.device import CpuDevice
from fpcompile.executor.offload import Parking
from fpcompile.executor.pool import KVPool, Layout, PooledKV
from fpcompile.executor.pool_growing import growing
from tests.cpu.memory_support import drain, ids, inline
from tests.cpu.support import program_of
from tests.cpu.test_decode_memory import decoding_of, until

SIZE = 4
LAYOUT = Layout(((0, 1, 2, 2), (1, 1, 2, 2)), torch.float32)


class Host:
    """``free`` bytes."""

    free = 1 << 30

    def room_for(self, nbytes: int) -> bool:
        return nbytes <= self.free


class Bench:
    """Members that come, make tokens and go, of two programs; ``span`` is the window of every layer."""

    def __init__(self, blocks: int, *, deterministic: bool = False, span: int = 0) -> None:
        self.pool = KVPool(LAYOUT, blocks, SIZE, torch.device("cpu"))
        self.host, self.span = Host(), span
        device = CpuDevice()
        self.memory = DecodeMemory(
            self.pool, self.host, lambda: Parking(device), lambda: (),
            deterministic=deterministic, spans={"a": span, "b": span},
        )  # fmt: skip
        self.tickets: dict[str, Any] = {}
        self.away: dict[str, Any] = {}
        self._names = itertools.count()

    def join(self, length: int, most: int, program: str = "a", shared: int = 0) -> None:
        """A prompt is done; up to ``shared`` blocks are those of others that began alike."""
        keys = [bytes([block]) for block in range(min(shared, (length - 1) // SIZE))]
        if self.pool.needed(length) > self.pool.blocks.available:
            return
        room = self.pool.room(1, length, self.pool.blocks.share(keys))
        for block, key in zip(room.blocks, keys, strict=False):
            self.pool.blocks.file(block, key)
        prompt = torch.zeros(1, length, dtype=torch.int64)
        generation = SimpleNamespace(
            tokens=[1], sampler=SimpleNamespace(max_new_tokens=most), renewable=True, due=float(length),
            prompt=prompt, finish_reason=None,
        )  # fmt: skip
        ticket: Any = SimpleNamespace(
            id=f"m{next(self._names)}", program=program, generation=generation, prompt=NOTHING, ended=None,
            state="decoding", offloads=0, recomputations=0, layers=[],
        )  # fmt: skip
        self.memory.keep(ticket, room)
        ticket.layers = [growing(PooledKV(room, layer, length), self.span) for layer in range(2)]
        self.tickets[ticket.id] = ticket
        self.memory.took(ticket)

    def step(self, names: list[str]) -> None:
        """Room for a token of each, who has it makes one; who gave way is away, or gone."""
        self.heed(self.memory.reserve([self.tickets[name] for name in names if name in self.tickets]))

    def heed(self, found: Reserve) -> None:
        for ticket in (*found.away, *found.dropped):
            del self.tickets[ticket.id]
        self.away |= {ticket.id: ticket for ticket in found.away}
        ready: list[Any] = list(found.ready)
        for ticket in ready:
            for kv in ticket.layers:
                kv.append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
            ticket.generation.tokens.append(1)
            self.memory.took(ticket)

    def back(self) -> None:
        for ticket in self.memory.back(self.away.values()).ready:
            self.tickets[ticket.id] = self.away.pop(ticket.id)

    def end(self, name: str, how: str) -> None:
        ticket = self.tickets.pop(name, None) or self.away.pop(name, None)
        if ticket is not None:
            ticket.state = how
            if how == "completed":
                self.memory.learn(ticket, whole=True)
            self.memory.ended(ticket)

    def looked(self) -> tuple[int, tuple[tuple[int, int], ...]]:
        """The sums by a look at everybody."""
        members = list(self.memory._members.values())
        held = set[int]().union(*(member.room.blocks for member in members))
        wanted = sum(member.wanted for member in members if member.away)
        return len(held) + wanted, tuple(self.memory.growing(member) for member in members)


class Traffic(RuleBasedStateMachine):
    """Whatever happens, what is told is what a look at everybody gives."""

    @initialize(
        blocks=st.integers(3, 24), deterministic=st.booleans(), span=st.sampled_from([0, 6]),
        host=st.sampled_from([0, 1 << 30]), short=st.booleans(),
    )  # fmt: skip
    def begin(self, blocks: int, deterministic: bool, span: int, host: int, short: bool) -> None:
        self.bench = Bench(blocks, deterministic=deterministic, span=span)
        self.last: tuple[int, tuple[tuple[int, int], ...]] = (0, ())
        self.bench.host.free = host
        for lengths in self.bench.memory._lengths.values() if short else ():
            for _ in range(30):
                lengths.ended(2, cut=False)

    @rule(
        length=st.integers(1, 14), most=st.integers(1, 30), program=st.sampled_from("ab"),
        shared=st.integers(0, 2),
    )  # fmt: skip
    def join(self, length: int, most: int, program: str, shared: int) -> None:
        self.bench.join(length, most, program, shared)

    @rule(draw=st.data())
    def step(self, draw: Any) -> None:
        if names := sorted(self.bench.tickets):
            chosen = draw.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            self.bench.step(chosen)

    @rule()
    def step_all(self) -> None:
        self.bench.step(list(self.bench.tickets))

    @rule()
    def back(self) -> None:
        self.bench.back()

    @rule(draw=st.data(), how=st.sampled_from(["completed", "cancelled", "failed"]))
    def end(self, draw: Any, how: str) -> None:
        if names := sorted([*self.bench.tickets, *self.bench.away]):
            self.bench.end(draw.draw(st.sampled_from(names)), how)

    @rule(changed=st.booleans())
    def tell(self, changed: bool) -> None:
        """Not behind everything that happens: what has changed since then is all looked at."""
        memory = self.bench.memory
        blocks, members = self.bench.looked()
        told = memory.reserved(0.0, changed=changed)
        if told is None:
            assert changed
            assert self.last == (blocks, members), "nobody was told of a change"
        else:
            assert (told.blocks, told.growing) == (blocks, members)
        self.last = blocks, members
        memory.validate()

    @invariant()
    def counted(self) -> None:
        if hasattr(self, "bench"):
            held = [member.room.blocks for member in self.bench.memory._members.values()]
            assert self.bench.memory.blocks == len(set[int]().union(*held))
            self.bench.pool.blocks.validate()

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            for name in [*self.bench.tickets, *self.bench.away]:
                self.bench.end(name, "completed")
            assert (self.bench.memory.blocks, self.bench.pool.blocks.used) == (0, 0)
            assert self.bench.memory.reserved(0.0) is not None


def test_whatever_happens_the_sums_are_those_of_a_look_at_everybody() -> None:
    limits = settings(
        max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Traffic, settings=limits)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whom the memory looked at."""
    seen: list[str] = []
    look: Callable[..., Any] = DecodeMemory.growing

    def noted(self: DecodeMemory, member: Any) -> Any:
        seen.append(member.ticket.id)
        return look(self, member)

    monkeypatch.setattr(DecodeMemory, "growing", noted)
    return seen


def test_with_hundreds_of_members_an_event_looks_at_those_that_changed(looks: list[str]) -> None:
    bench = Bench(600)
    for _ in range(300):
        bench.join(3, 20)
    assert bench.memory.reserved(0.0) is not None
    assert len(looks) == 300
    del looks[:]
    for _ in range(100):
        assert bench.memory.reserved(0.0, changed=True) is None
    assert looks == []
    bench.step(["m7", "m8"])
    told = bench.memory.reserved(0.0, changed=True)
    assert told is not None
    assert sorted(looks) == ["m7", "m8"]
    assert told.growing[7] == told.growing[8] == (1, 18)
    del looks[:]
    bench.end("m9", "failed")  # nothing is learnt of how long it would have become
    told = bench.memory.reserved(0.0, changed=True)
    assert told is not None
    assert len(told.growing) == told.blocks == 299
    assert looks == []


def test_what_is_learnt_of_one_program_is_expected_of_its_members(looks: list[str]) -> None:
    bench = Bench(100)
    for program in "ab":
        for _ in range(25):
            bench.join(3, 20, program)
    bench.memory.reserved(0.0)
    del looks[:]
    for number in range(22):
        bench.step([f"m{number}"])
        bench.end(f"m{number}", "completed")
    told = bench.memory.reserved(0.0)
    assert told is not None
    assert set(looks) <= {f"m{number}" for number in range(25)}
    assert told.growing[:3] == ((1, 1),) * 3, "two tokens, as the others made"
    assert told.growing[3:] == ((1, 19),) * 25


def test_an_engine_looks_at_nobody_who_got_no_token(looks: list[str]) -> None:
    engine = inline(program_of("qwen3"), kv_blocks=64)
    handles = [engine.submit(ids(5 + n), max_new_tokens=40) for n in range(6)]
    until(engine, lambda: all(handle.metrics.tokens_out > 2 for handle in handles))
    until(engine, lambda: engine._driver.lane.stepping)
    engine._driver._hear()
    decoding_of(engine).reserved(0.0)
    del looks[:]
    for number in range(10):
        engine.submit(ids(9), ttft_slo=100.0 + number)
        engine._driver._hear()
    assert looks == []
    drain(engine)
    assert all(handle.metrics.tokens_out == 40 for handle in handles)


def test_a_list_of_blocks_is_counted_once() -> None:
    held = Holdings(lambda name: (1, 1))
    held.count("a", [1, 2])
    held.count("b", [2, 3])
    assert (held.blocks, held.told()) == (3, (3, ((1, 1), (1, 1))))
    held.count("a", [1, 2, 4])
    assert held.blocks == 4
    held.count("a", [2, 4])  # what lies behind a window
    assert held.blocks == 3
    held.forget("b")
    held.forget("b")
    assert (held.blocks, held.told()) == (2, (2, ((1, 1),)))
    held.count("a", [])
    assert held.told() == (1, ((1, 1),)), "it wants one"

"""Past-Future's rule: the predicted peak of what decodes, what it is predicted from, who is let in by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpcompile.scheduler import (
    Arrival,
    Completed,
    Evict,
    Launch,
    Reserved,
    Scheduler,
    State,
    Yielded,
)
from fpcompile.scheduler.decide import LOOKED_AT
from fpcompile.scheduler.future import LEAST, OutputLengths, everything, peak
from tests.pure.scheduler.driver import job

PAIRS = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 200)), max_size=8)


def lived(growing: list[tuple[int, int]], size: int) -> int:
    """The most blocks at any time, step by step: blocks that were held are full."""
    most = 0
    for step in range(max((tokens for _, tokens in growing), default=0) + 1):
        most = max(most, sum(held + -(-step // size) for held, tokens in growing if tokens >= step))
    return most


@given(PAIRS, st.sampled_from([1, 4, 16]))
def test_the_peak_is_the_most_that_is_ever_held(growing: list[tuple[int, int]], size: int) -> None:
    assert peak(growing, size) == lived(growing, size)
    assert peak(growing, size) <= everything(growing, size)


def test_who_ends_soon_makes_room_for_who_goes_on() -> None:
    assert peak([(10, 16), (10, 160)], 16) == 22
    assert everything([(10, 16), (10, 160)], 16) == 31
    assert peak([], 16) == 0


def test_a_length_is_predicted_by_those_that_became_longer() -> None:
    lengths = OutputLengths()
    assert lengths.expected(0, 500) == 500, "nothing is known yet"
    for tokens in range(1, 101):
        lengths.ended(tokens, cut=False)
    assert lengths.expected(0, 500) == 90
    assert lengths.expected(50, 500) == 95
    assert lengths.expected(0, 40) == 40, "never more than was asked for"
    assert lengths.expected(100 - LEAST, 500) == 98
    assert lengths.expected(101 - LEAST, 500) == 500, "too few went so far"


def test_who_was_cut_off_says_only_that_it_would_have_gone_on() -> None:
    lengths = OutputLengths()
    for _ in range(80):
        lengths.ended(10, cut=False)
    for _ in range(5):
        lengths.ended(20, cut=True)
    assert lengths.expected(0, 500) == 10, "fewer than one in ten"
    for _ in range(5):
        lengths.ended(20, cut=True)
    assert lengths.expected(0, 500) == 500
    assert lengths.expected(0, 64) == 64


def test_old_lengths_are_forgotten() -> None:
    lengths = OutputLengths()
    for tokens in (10, 1000):
        for _ in range(1000):
            lengths.ended(tokens, cut=False)
    assert lengths.expected(0, 5000) == 1000
    assert lengths.expected(1000, 5000) == 5000


# ---- the core


def arrives(name: str, at: float, blocks: int, to_come: int, *, deadline: float = 99.0) -> Arrival:
    return Arrival(at, job(name, at, deadline, 1.0, kv_blocks=blocks, decode_tokens=to_come))


def core_of(**options: Any) -> Scheduler:
    return Scheduler("edf", kv_blocks=20, block_tokens=16, **options)


def launched(*names: str) -> tuple[Launch, ...]:
    return tuple(Launch(name, (name,)) for name in names)


def test_a_generation_waits_until_the_peak_allows_it() -> None:
    """19 of 20 blocks may be filled: beside 8 that grow by 6, a prompt of 2 may grow by 1."""
    core = core_of()
    assert core.handle(Reserved(0.0, 8, ((8, 96),))) == ()
    assert core.handle(arrives("big", 0.0, 4, 96)) == (), "8 + 4 + 2 * 6 blocks"
    assert core.handle(arrives("small", 0.0, 4, 8)) == (), "no other generation overtakes it"
    assert core.handle(arrives("plain", 0.0, 4, 0)) == launched("plain"), "for a short time only"
    core.validate()
    assert core.handle(Completed(1.0, "plain")) == ()
    assert core.handle(Reserved(2.0, 9, ((9, 16),))) == launched("big"), "9 + 4 + 2 at first, then 4 + 6"
    core.validate()


def test_alone_a_generation_is_always_let_in() -> None:
    core = core_of()
    assert core.handle(arrives("a", 0.0, 10, 10_000)) == launched("a")


def test_blocks_go_from_the_prompt_to_what_decodes() -> None:
    core = core_of()
    core.handle(arrives("a", 0.0, 10, 32))
    assert core.memory.free == 10
    core.handle_all((Completed(1.0, "a"), Reserved(1.0, 10, ((10, 32),))))
    assert core.memory.free == 10
    core.handle(Reserved(2.0, 0))
    assert core.memory.free == 20
    core.validate()


def test_a_prompt_that_was_begun_counts() -> None:
    core = core_of()
    core.handle(arrives("a", 0.0, 8, 80, deadline=50.0))
    assert core.handle(arrives("b", 0.5, 8, 80, deadline=60.0)) == ()
    assert core.handle_all((Completed(1.0, "a"), Reserved(1.0, 8, ((8, 80),)))) == ()
    assert core.handle(Reserved(2.0, 0)) == launched("b")


def test_a_paused_generation_that_is_less_urgent_gives_its_place_up() -> None:
    """There are free blocks, but not for both of them to the end."""
    core = core_of()
    core.handle(arrives("later", 0.0, 8, 80))
    assert [type(c).__name__ for c in core.handle(arrives("urgent", 0.5, 8, 80, deadline=5.0))] == ["Pause"]
    assert core.handle(Yielded(0.6, "later")) == (Evict("later"), *launched("urgent"))
    assert core.handle_all((Completed(1.0, "urgent"), Reserved(1.0, 8, ((8, 80),)))) == ()
    assert core.state("later") is State.EVICTED
    commands = core.handle(Reserved(2.0, 0))
    assert [type(c).__name__ for c in commands] == ["Restore", "Launch"]
    core.validate()


def test_paused_runs_give_way_to_what_decodes() -> None:
    core = core_of()
    core.handle(arrives("a", 0.0, 6, 0, deadline=60.0))
    core.handle(arrives("b", 0.1, 6, 0, deadline=50.0))
    core.handle(Yielded(0.2, "a"))
    core.handle(arrives("c", 0.3, 6, 0, deadline=40.0))
    core.handle(Yielded(0.4, "b"))
    assert core.memory.free == 2
    assert core.handle(Reserved(0.5, 3, ((3, 16),))) == (Evict("a"),), "the last in line, and no more"
    core.validate()
    assert core.memory.free == 5


def test_who_takes_no_block_is_launched_while_too_many_are_wanted() -> None:
    """Somebody is away: what it needs to come back is counted, and is more than there is."""
    core = core_of()
    core.handle(Reserved(0.0, 21, ((21, 16),)))
    assert core.memory.free == -1
    assert core.handle(arrives("embeds", 0.0, 0, 0)) == launched("embeds")
    assert core.handle(arrives("generates", 0.1, 4, 16, deadline=50.0)) == ()
    assert core.handle(Completed(1.0, "embeds")) == ()
    assert core.handle(arrives("also", 1.0, 0, 0)) == launched("also"), "it passes"
    assert core.handle(arrives("plain", 1.1, 1, 0)) == ()
    assert core.handle(Completed(2.0, "also")) == (), "plain needs a block"


def test_a_prompt_that_was_begun_goes_on_where_nobody_is_evicted() -> None:
    core = Scheduler("vllm:40", kv_blocks=20, block_tokens=16)
    assert core.handle(arrives("a", 0.0, 8, 0)) == (Launch("a", ("a",), None, (40,)),)
    commands = core.handle_all((Reserved(1.0, 13, ((13, 16),)), Yielded(1.0, "a")))
    assert core.memory.free == -1
    assert commands == (Launch("a", ("a",), None, (40,)),)


@pytest.mark.parametrize(("ahead", "passes"), [(LOOKED_AT - 1, True), (LOOKED_AT, False)])
def test_who_may_pass_is_looked_for_among_the_first_in_line(ahead: int, passes: bool) -> None:
    core = core_of()
    core.handle(Reserved(0.0, 20, ((20, 16),)))
    core.handle_all([arrives(f"r{i}", 0.0, 4, 16, deadline=50.0) for i in range(ahead)])
    assert core.handle(arrives("plain", 1.0, 0, 0)) == (launched("plain") if passes else ())


def test_kept_free_for_everything_where_steps_are_taken_alone() -> None:
    for lockstep, let_in in ((True, True), (False, False)):
        core = core_of(lockstep=lockstep)
        core.handle(Reserved(0.0, 10, ((10, 16),)))
        assert bool(core.handle(arrives("a", 0.0, 4, 96))) is let_in


def test_a_request_comes_again() -> None:
    core = core_of(max_queue_s=1.0)
    core.handle(arrives("a", 0.0, 4, 32))
    core.handle_all((Completed(1.0, "a"), Reserved(1.0, 4, ((4, 32),))))
    request = job("a", 0.0, 2.0, 1.0, kv_blocks=6, decode_tokens=10)
    core.handle(arrives("b", 1.0, 20, 0, deadline=1.5))
    core.handle_all((Reserved(1.2, 0), Arrival(1.2, request, again=True)))
    core.validate()
    assert core.handle(Completed(5.0, "b")) == launched("a"), "it is not given up for having waited"
    core.handle(Completed(6.0, "a"))
    assert core.state("a") is State.COMPLETED


@pytest.mark.parametrize(
    ("to_come", "packed"), [(48, ("a", "b", "c")), (64, ("a", "b"))], ids=["3 * (3 + 3)", "3 * (3 + 4)"]
)
def test_packs_hold_no_more_than_there_will_be_room_for(to_come: int, packed: tuple[str, ...]) -> None:
    class Costs:
        def predict(self, tokens: int, context: int = 0) -> float:
            return 0.1

        def predict_pack(self, lengths: Iterable[int]) -> float:
            return 0.1

        def correct(self, tokens: int, measured: float) -> None: ...

    core = core_of(pack=1000, predictor=Costs())
    core.handle(arrives("first", 0.0, 4, 0))
    for name in "abc":
        core.handle(arrives(name, 0.1, 3, to_come))
    (launch,) = core.handle(Completed(1.0, "first"))
    assert isinstance(launch, Launch)
    assert launch.requests == packed


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="block_tokens"):
        Scheduler("edf", block_tokens=-1)

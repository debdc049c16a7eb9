"""Cuts by a budget are the best ones: compared with all sets of cuts of small programs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from fpcompile.passes.placement import place

Best = tuple[int, int, tuple[int, ...]]


def keeps(seconds: Sequence[int], legal: Sequence[bool], budget: int, begin: int, end: int) -> bool:
    """Whether the launch of positions ``begin`` to ``end`` (included) is no longer than it must be."""
    pieces, piece = [], 0
    for i in range(begin, end + 1):
        piece += seconds[i]
        if legal[i] or i == end:
            pieces.append(piece)
            piece = 0
    return sum(pieces) <= max(budget, *pieces)


def every(seconds: Sequence[int], held: Sequence[int], legal: Sequence[bool], budget: int) -> list[Best]:
    """(launches, live bytes, cuts) of each set of legal cuts whose launches keep the budget."""
    last = len(seconds) - 1
    places = [i for i in range(last) if legal[i]]
    found: list[Best] = []
    for count in range(len(places) + 1):
        for cuts in itertools.combinations(places, count):
            bounds = [-1, *cuts, last]
            if all(keeps(seconds, legal, budget, a + 1, b) for a, b in itertools.pairwise(bounds)):
                found.append((count + 1, sum(held[i] for i in cuts), cuts))
    return found


positions = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.booleans()), min_size=1, max_size=9)


@given(positions=positions, budget=st.integers(0, 14))
def test_no_other_cuts_are_better(positions: list[tuple[int, int, bool]], budget: int) -> None:
    seconds, held, legal = ([row[i] for row in positions] for i in range(3))
    got = place(seconds, held, legal, budget)  # type: ignore[arg-type]
    candidates = every(seconds, held, legal, budget)  # type: ignore[arg-type]
    fewest, lightest, _ = min(candidates)
    assert (len(got.cuts) + 1, sum(held[i] for i in got.cuts)) == (fewest, lightest)
    assert got.cuts in [cuts for _, _, cuts in candidates]
    as_few = {i for count, _, cuts in candidates if count == fewest for i in cuts}
    assert got.free == as_few - set(got.cuts)


@given(positions=positions, budget=st.integers(0, 14))
def test_what_exceeds_the_budget_is_told(positions: list[tuple[int, int, bool]], budget: int) -> None:
    seconds, held, legal = ([row[i] for row in positions] for i in range(3))
    got = place(seconds, held, legal, budget)  # type: ignore[arg-type]
    bounds = [-1, *got.cuts, len(seconds) - 1]
    long = [(a, b) for a, b in itertools.pairwise(bounds) if sum(seconds[a + 1 : b + 1]) > budget]
    assert got.beyond == {i for pair in long for i in pair if i in got.cuts}


def test_fewest_launches_come_before_fewest_bytes() -> None:
    assert place([2, 2, 2, 2], [9, 9, 9, 0], [True] * 4, 4).cuts == (1,)
    assert place([2, 1, 1, 2], [5, 9, 3, 0], [True] * 4, 4).cuts == (2,)
    assert place([2, 1, 1, 2], [3, 9, 3, 0], [True] * 4, 4).cuts == (0,), "the earliest of equals"


def test_an_operator_beyond_the_budget_is_launched_with_nothing_that_takes_time() -> None:
    got = place([1, 0, 9, 0, 1], [0] * 5, [True] * 5, 4)
    assert got.cuts == (0, 2)
    assert got.beyond == {0, 2}


def test_a_large_program_is_placed_without_trying_every_launch() -> None:
    count = 20_000
    got = place([1] * count, [1] * count, [True] * count, count // 2)
    assert got.cuts == (count // 2 - 1,)

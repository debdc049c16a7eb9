"""Which cuts to take: the fewest launches that keep a budget, then the fewest live bytes.

Words: an *atom* is a run of positions between two neighbouring places where a cut may stand: it cannot be
divided. A *launch* is a run of atoms between two cuts taken. It keeps the budget when its seconds do not
exceed the budget, or those of its longest atom: an atom beyond the budget is launched with nothing that takes
time.

Among all sets of legal cuts whose launches keep the budget, :func:`place` takes one with the fewest launches,
among these one with the fewest live bytes summed over its cuts, among these the earliest. A part of a launch
that keeps the budget keeps it too, so the launches that may end at a place begin in one window, which only
moves forward: two passes over the atoms find the optimum.

Everything is counted in integers, so that the result is a function of its arguments on every machine.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Sequence

UNITS = 1e15
"""Units of time in a second."""


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """``cuts`` are positions behind which a cut is taken, the end left out.

    ``beyond`` are those beside a launch that is longer than the budget. ``free`` are places without a cut
    where another set of as few launches has one: it holds more live bytes, or is a later one of as many.
    """

    cuts: tuple[int, ...]
    beyond: frozenset[int]
    free: frozenset[int]


def place(seconds: Sequence[int], held: Sequence[int], legal: Sequence[bool], budget: int) -> Placement:
    """The best cuts of a program.

    For each position ``seconds`` is what it takes, in units, ``held`` the bytes alive behind it, ``legal``
    whether a cut may stand behind it; the last position is the end, whatever ``legal`` says.
    """
    last = len(seconds) - 1
    ends = [i for i in range(last) if legal[i]] + [last]
    atoms = [sum(seconds[a + 1 : b + 1]) for a, b in zip([-1, *ends[:-1]], ends, strict=True)]
    begins = _windows(atoms, budget)
    best, came = _forward(begins, [held[i] for i in ends[:-1]])
    after = _backward(begins)
    chain: list[int] = []
    at = len(atoms)
    while at:
        chain.append(at)
        at = came[at]
    bounds = [0, *reversed(chain)]
    cuts = [ends[j - 1] for j in bounds[1:-1]]
    beyond: set[int] = set()
    for a, b in itertools.pairwise(bounds):
        if sum(atoms[a:b]) > budget:
            beyond.update(ends[j - 1] for j in (a, b) if 0 < j < len(atoms))
    taken = set(cuts)
    free = frozenset(
        ends[j - 1]
        for j in range(1, len(atoms))
        if ends[j - 1] not in taken and best[j] + after[j] == best[-1]
    )
    return Placement(tuple(cuts), frozenset(beyond), free)


def _windows(atoms: Sequence[int], budget: int) -> list[int]:
    """For each end b (0 to the number of atoms) the first atom with which a launch up to b may begin."""
    found = [0]
    longest: deque[int] = deque()
    begin, total = 0, 0
    for b, cost in enumerate(atoms, 1):
        total += cost
        while longest and atoms[longest[-1]] <= cost:
            longest.pop()
        longest.append(b - 1)
        while total > max(budget, atoms[longest[0]]):
            total -= atoms[begin]
            if longest[0] == begin:
                longest.popleft()
            begin += 1
        found.append(begin)
    return found


def _forward(begins: Sequence[int], held: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each end: the fewest launches up to it, and where the last of them begins with the fewest bytes."""
    count = len(begins) - 1
    best: list[tuple[int, int]] = [(0, 0)]
    came = [0]
    queue: deque[int] = deque()
    for b in range(1, count + 1):
        while queue and best[queue[-1]] > best[b - 1]:
            queue.pop()
        queue.append(b - 1)
        while queue[0] < begins[b]:
            queue.popleft()
        launches, bytes_ = best[queue[0]]
        best.append((launches + 1, bytes_ + (held[b - 1] if b < count else 0)))
        came.append(queue[0])
    return [launches for launches, _ in best], came


def _backward(begins: Sequence[int]) -> list[int]:
    """For each begin the fewest launches from it to the end: each goes as far as it may."""
    count = len(begins) - 1
    reach: list[int] = []
    b = 0
    for a in range(count):
        b = max(b, a + 1)
        while b < count and begins[b + 1] <= a:
            b += 1
        reach.append(b)
    after = [0] * (count + 1)
    for a in range(count - 1, -1, -1):
        after[a] = 1 + after[reach[a]]
    return after

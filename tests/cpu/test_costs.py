"""The cost model adds up: a whole prefill is the sum of its segments, from any segment on."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fpcompile
from fpcompile.executor.cost_model import Coefficients, CostModel, Curve, rising
from fpcompile.executor.weights import digest_weights
from fpcompile.models.zoo import tiny_model

numbers = st.floats(0, 1e-3)


@given(
    stages=st.lists(
        st.tuples(numbers, numbers, numbers, st.booleans(), st.booleans()), min_size=1, max_size=8
    ),
    tokens=st.integers(1, 4096),
    past=st.integers(0, 4096),
    rows=st.integers(1, 64),
)
def test_the_rest_is_the_sum_of_its_segments(
    stages: list[tuple[float, float, float, bool, bool]], tokens: int, past: int, rows: int
) -> None:
    segments: list[int] = []
    for *_, new in stages:
        segments.append((segments[-1] if segments else -1) + (1 if new or not segments else 0))
    model = CostModel(
        "cpu",
        tuple(Curve(Coefficients(a, b, d)) for a, b, d, _, _ in stages),
        tuple(segments),
        tuple(by_rows for *_, by_rows, _ in stages),
        {},
    )
    size = {"tokens": tokens, "rows": rows, "context": past + tokens}
    for start in range(segments[-1] + 2):
        total = sum(model.segment(i, **size) for i in range(start, segments[-1] + 1))
        assert abs(model.remaining(**size, start=start) - total) <= 1e-9 + 1e-9 * total


@given(
    seconds=st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=9),
    pairs=st.booleans(),
    past=st.integers(0, 20_000),
)
def test_curves_meet_their_knots_and_never_fall(seconds: list[float], pairs: bool, past: int) -> None:
    curve = Curve.through([(2**i, s) for i, s in enumerate(seconds)], pairs=pairs)
    for i, _ in enumerate(seconds):
        found = curve.seconds(2**i, 2**i)
        assert min(seconds[i:]) * (1 - 1e-9) <= found <= max(seconds[: i + 1]) * (1 + 1e-9)
        if max(seconds[: i + 1]) == seconds[i] == min(seconds[i:]):
            assert found == pytest.approx(seconds[i], rel=1e-9)
    sizes = (1, 2, 3, 5, 16, 17, 40, 100, 300, 5000, 40_000)
    for context in (0, past):
        predicted = [curve.seconds(n, context + n) for n in sizes]
        assert all(s > 0 for s in predicted)
        assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(predicted))


def test_noise_is_taken_in_the_middle() -> None:
    """Up to 64 tokens cost the same here: half of what was measured lies above, half below."""
    noise = (1.1, 0.9, 1.05, 0.95, 1.1, 0.9)
    curve = Curve.through([(2**i, s * 1e-3) for i, s in enumerate(noise)] + [(1024, 9e-3)], pairs=False)
    assert curve.seconds(1, 1) == pytest.approx(1e-3, rel=0.01)
    assert curve.seconds(24, 24) == pytest.approx(1e-3, rel=0.01)
    assert curve.seconds(1024, 1024) == pytest.approx(9e-3)
    assert rising([3.0]) == pytest.approx([3.0])
    assert rising([8.0, 2.0, 4.0, 1.0, 9.0]) == pytest.approx([64**0.25] * 4 + [9.0])


def test_lengths_between_and_behind_the_knots_follow_the_work() -> None:
    def work(n: int) -> float:
        return 1e-3 + 1e-5 * n + 1e-8 * n * n

    knots = [(n, work(n)) for n in (16, 64, 256, 1024, 4096)]
    attention = Curve.through(knots, pairs=True)
    for n in (20, 100, 1000, 3000, 16_384):
        assert attention.seconds(n, n) == pytest.approx(work(n), rel=0.12)
    assert attention.seconds(16_384, 16_384) == pytest.approx(work(16_384), rel=0.01)
    batch = attention.seconds(4 * 256, (4 * 256 + 256) / 2)  # four sequences of 256: as many pairs
    assert batch == pytest.approx(4 * (attention.seconds(256, 256) - 1e-3) + 1e-3, rel=1e-3)
    rows = Curve.through([(n, 1e-3 + 1e-5 * n) for n in (16, 64, 256)], pairs=False)
    assert rows.seconds(4096, 9999) == pytest.approx(1e-3 + 1e-5 * 4096, rel=1e-6)


def test_fingerprints_of_weights_reach_the_last_element_of_large_ones() -> None:
    weight = torch.zeros(1 << 24, 3)
    before = digest_weights([("w", weight)])
    weight[-1, -1] = 1.0
    assert digest_weights([("w", weight)]) != before


@pytest.mark.parametrize("arch", ["bloom", "mamba"])
def test_programs_of_the_generic_route_are_calibrated_too(arch: str) -> None:
    program = fpcompile.segment(tiny_model(arch))
    assert str(program.route) == "generic"
    costs = program.calibrate(lengths=(16, 32), seconds=0.5)
    assert len(costs.coefficients) == len(program.stages)
    assert program.predict(tokens=32) > 0

"""The cost model adds up: a whole prefill is the sum of its segments, from any segment on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fpcompile
from fpcompile.executor.calibrate import Coefficients, CostModel
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
        tuple(Coefficients(a, b, d) for a, b, d, _, _ in stages),
        tuple(segments),
        tuple(by_rows for *_, by_rows, _ in stages),
        {},
    )
    size = {"tokens": tokens, "rows": rows, "context": past + tokens}
    for start in range(segments[-1] + 2):
        total = sum(model.segment(i, **size) for i in range(start, segments[-1] + 1))
        assert abs(model.remaining(**size, start=start) - total) <= 1e-9 + 1e-9 * total


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

"""What the benchmarks of the server count, and what they send. Servers are not started here."""

from __future__ import annotations

import json

import pytest

from benchmarks.serve_disconnects import blocking, bodies, percentile
from benchmarks.serve_stalls import answers
from benchmarks.serve_stalls import bodies as worst_bodies
from fpcompile.serving.server.parsing import BODIES, parsed

BUCKET = 'blocking_time_seconds_bucket{{le="{}"}}'


def test_blocking_times_are_those_between_two_readings() -> None:
    before = {
        BUCKET.format("0.001"): 2.0,
        BUCKET.format("0.01"): 5.0,
        BUCKET.format("+Inf"): 5.0,
        "other": 1.0,
    }
    after = {BUCKET.format("0.001"): 3.0, BUCKET.format("0.01"): 9.0, BUCKET.format("+Inf"): 10.0}
    assert blocking(before, after) == {0.001: 1, 0.01: 3, float("inf"): 1}
    assert blocking({}, after) == {0.001: 3, 0.01: 6, float("inf"): 1}


@pytest.mark.parametrize(("percent", "edge"), [(1, 0.001), (50, 0.001), (51, 0.01), (99, 0.01), (100, 0.1)])
def test_percentiles_are_nearest_ranks(percent: float, edge: float) -> None:
    assert percentile({0.1: 1, 0.001: 100, 0.01: 99}, percent) == edge


def test_percentiles_of_nothing() -> None:
    assert percentile({0.1: 0}, 99) is None
    assert percentile({}, 99) is None


def test_no_two_streams_ask_the_same() -> None:
    made = bodies(300, 1)
    assert len({tuple(body["prompt"]) for body in made}) == 300
    assert made == bodies(300, 1) != bodies(300, 2)
    assert {"ttft_slo" in body for body in made} == {True, False}


@pytest.mark.parametrize("size", [4 << 20, 16 << 10])
def test_the_worst_bodies_are_permitted_and_json(size: int) -> None:
    for name, (path, body) in worst_bodies(size).items():
        assert len(body) <= size, name
        assert path in BODIES
        json.loads(body)


def test_long_answers_are_asked_for_rightly() -> None:
    for path, body in answers().values():
        assert isinstance(parsed(path, body), BODIES[path])

"""Cost tables, their file format, the bundled profile, and the predictor's online correction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fpcompile.errors import InvalidInputError, UnknownNameError
from fpcompile.scheduler import CostFileError, CostPredictor, CostTable, SegmentCost, load_costs, profile

ROWS = [
    ("embed", (1e-4, 1e-7, 0.0)),
    ("model.layers.0.mlp", (2e-4, 3e-6, 1e-9)),
    ("model.layers.1.mlp", (0, 0, 0)),
]


def test_a_table_from_calibrated_rows() -> None:
    table = CostTable.from_segments(ROWS)
    assert table.seconds(1000) == pytest.approx(3e-4 + 1000 * 3.1e-6 + 1e-9 * 1e6)
    assert [row.layer for row in table.segments] == [-1, 0, 1]


def test_chunks_cost_the_whole_plus_the_repeated_fixed_part() -> None:
    table = profile()
    whole = table.seconds(5000)
    chunks = sum(table.seconds(1000, context=1000 * i) for i in range(5))
    assert chunks == pytest.approx(whole + 4 * table.total.a)


def test_the_bundled_profile_agrees_with_the_published_runs() -> None:
    table = profile("llama3-8b-a800")
    for tokens in (1, 100, 2048, 16744):
        assert table.seconds(tokens) == pytest.approx(4e-3 + 68e-6 * tokens + 2e-9 * tokens**2)
    assert table.seconds(4096) / 4096 == pytest.approx(77e-6, rel=0.1)
    assert table.seconds(16744) / 16744 == pytest.approx(104e-6, rel=0.03)
    assert max(row.layer for row in table.segments) == 31
    with pytest.raises(UnknownNameError, match="llama3-8b-a800"):
        profile("a800")


def test_costs_files_round_trip_and_repeat_layers(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    profile().save(path)
    assert load_costs(path) == profile()
    inner = [{"name": "mlp", "a": 1, "b": 2, "c": 3}]
    path.write_text(
        json.dumps({"segments": [{"repeat": 2, "segments": inner}, {**inner[0], "name": "head"}]})
    )
    assert load_costs(path).segments == (
        SegmentCost("mlp.0", 1, 2, 3, 0), SegmentCost("mlp.1", 1, 2, 3, 1), SegmentCost("head", 1, 2, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "cannot read"),
        ("[]", "must be an object"),
        ('{"segments": []}', "empty"),
        ('{"segments": [1]}', "must be an object"),
        ('{"segments": [{"name": "x", "a": 1, "b": 2}]}', "lacks a field"),
        ('{"segments": [{"name": "x", "a": -1, "b": 2, "c": 0}]}', "'a'"),
        ('{"segments": [{"name": "x", "a": NaN, "b": 2, "c": 0}]}', "'a'"),
        ('{"segments": [{"name": "x", "a": "1", "b": 2, "c": 0}]}', "'a'"),
        ('{"segments": [{"repeat": 0, "segments": []}]}', "repeated"),
        ('{"segments": [{"name": "x", "a": 0, "b": 0, "c": 0}]}', "all costs are zero"),
        ('{"segments": [{"name": "x", "a": 1, "b": 2, "c": 0, "layer": "y"}]}', "layer"),
        ('{"segments": [{"name": "x", "a": 1, "b": 2, "c": 0, "layer": -2}]}', "layer"),
        ('{"speed": 1, "segments": [{"name": "x", "a": 1, "b": 2, "c": 0}]}', "unknown field 'speed'"),
    ],
)
def test_bad_costs_files_are_typed_errors_that_name_the_file(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(CostFileError, match=complaint) as told:
        load_costs(path)
    assert str(path) in str(told.value)


def test_the_predictor_starts_at_the_table_and_follows_the_measurements() -> None:
    table = profile()
    predictor = CostPredictor(table)
    assert predictor.predict(500_000) == table.seconds(500_000), "no limit of length"
    for _ in range(200):
        predictor.correct(1000, 1.5 * table.seconds(1000))
    assert predictor.predict(1000) == pytest.approx(1.5 * table.seconds(1000), rel=0.01)
    assert predictor.predict(500_000) == pytest.approx(1.5 * table.seconds(500_000), rel=0.01)
    first = abs(1 - 1.5) / 1.5
    assert predictor.error.count == 200
    assert predictor.error.worst == pytest.approx(first)
    assert predictor.error.mean_absolute < first / 20
    assert predictor.predict_pack([500, 500]) < predictor.predict(1000)


def test_octaves_are_corrected_apart() -> None:
    table = profile()
    predictor = CostPredictor(table)
    for _ in range(100):
        predictor.correct(64, 2.0 * table.seconds(64))
        predictor.correct(8000, 1.0 * table.seconds(8000))
    assert predictor.predict(64) / table.seconds(64) == pytest.approx(2.0, rel=0.03)
    assert predictor.predict(8000) / table.seconds(8000) == pytest.approx(1.0, rel=0.03)


def test_one_stall_does_not_spoil_the_predictions_of_many() -> None:
    table = profile()
    predictor = CostPredictor(table)
    for _ in range(10):
        predictor.correct(64, table.seconds(64))
    predictor.correct(64, 1000 * table.seconds(64))
    assert predictor.predict(64) < 1.3 * table.seconds(64)
    for _ in range(40):  # a machine that has become slower for good is followed all the same
        predictor.correct(64, 20 * table.seconds(64))
    assert predictor.predict(64) > 15 * table.seconds(64)


@pytest.mark.parametrize(
    ("tokens", "measured"), [(0, 1.0), (10, 0.0), (10, float("nan")), (10, float("inf"))]
)
def test_bad_corrections_are_refused(tokens: int, measured: float) -> None:
    with pytest.raises(InvalidInputError):
        CostPredictor(profile()).correct(tokens, measured)

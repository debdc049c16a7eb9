"""The benchmark of the cost model runs, and its errors are what its rows say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_it_reports_errors_of_held_out_lengths(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "cost_model.py"
    options = [
        "--model",
        "tiny:llama",
        "--tokens",
        "24",
        "100",
        "--repeats",
        "3",
        "--calibration-seconds",
        "0.5",
    ]
    done = subprocess.run(
        [sys.executable, str(script), *options, "--output", str(tmp_path), "--device", "cpu"],
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = json.loads((tmp_path / "cost_model.json").read_text())
    assert (tmp_path / "cost_model.png").stat().st_size > 1000
    assert [row["tokens"] for row in found["rows"]] == [24, 100]
    assert not {24, 100} & set(found["calibrated"])
    for row in found["rows"]:
        assert row["predicted_seconds"] == pytest.approx(sum(s["predicted"] for s in row["segments"]))
        assert row["whole_error"] == pytest.approx(row["predicted_seconds"] / row["measured_seconds"] - 1)
        assert len(row["prefills"]) == 3
    assert "median error over the lengths" in done.stdout

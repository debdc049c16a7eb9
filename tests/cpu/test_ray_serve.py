"""Routing by predicted work, and (where Ray is installed) the example with two replicas."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ray_serve" / "two_replicas.py"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs fpcompile[ray]")


@pytest.fixture
def example() -> Any:
    spec = importlib.util.spec_from_file_location("two_replicas", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        spec.loader.exec_module(module)
    return module


def test_work_is_predicted_between_lengths_and_goes_where_least_is_left(example: Any) -> None:
    work = example.Work(2, (1, 16, 64), [0.1, 0.2, 0.5])
    assert work.of(16) == pytest.approx(0.2)
    assert work.of(40) == pytest.approx(0.35)
    assert work.of(112) == pytest.approx(0.8), "beyond the last length, on the last line"
    assert work.of(1) == pytest.approx(0.1)
    assert work.least() == 0
    work.left[0] += work.of(64)
    assert work.least() == 1
    work.left[1] += work.of(16)
    assert work.least() == 1, "one short request is less than one long one"


@pytest.mark.slow
def test_two_replicas_share_what_comes() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(long|urgent) (\d): replica (\d), token \d+, TTFT", done.stdout, re.MULTILINE)
    assert len(lines) == 6, done.stdout
    assert {where for kind, _, where in lines if kind == "long"} == {"0", "1"}, "one long prompt for each"
    assert {where for kind, _, where in lines if kind == "urgent"} == {"0", "1"}

"""The benchmark of decode steps on a tiny model: its figures, its files, and that it can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cpu.test_benchmarks import PNG, benchmark, tampered, written

pytestmark = pytest.mark.slow
ARGUMENTS = ("--model", "tiny:qwen3", "--contexts", "10", "30", "--repeats", "3", "--device", "cpu")


def test_steps_are_compared_with_their_products(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = [*ARGUMENTS, "--sequences", "1", "3", "--output", str(tmp_path)]
    benchmark("decode", monkeypatch, *arguments).main()
    rows = written(tmp_path / "decode.json")["rows"]
    assert [row["lengths"] for row in rows] == [[10], [10, 20, 30]]
    for row in rows:
        assert {name: len(values) for name, values in row["seconds"].items()} == dict.fromkeys(
            ("abreast", "control", "apart", "model", "products"), 3
        )
        ratios = [a / b for a, b in zip(row["seconds"]["abreast"], row["seconds"]["products"], strict=True)]
        assert row["to_products"]["abreast"]["median"] == pytest.approx(sorted(ratios)[1])
    assert (tmp_path / "decode.png").read_bytes().startswith(PNG)


def test_other_numbers_are_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = [*ARGUMENTS, "--sequences", "2", "--dtype", "float32", "--output", str(tmp_path)]
    module = benchmark("decode", monkeypatch, *arguments)

    def other(model: Any, **options: Any) -> Any:
        return tampered(model, route="packed")

    monkeypatch.setattr(module, "segment", other)
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 1

"""Measured costs on disk: used again where they hold, ignored with a note where they do not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.executor import cost_cache
from fpcompile.executor import program as programs
from fpcompile.executor.cost_model import Samples
from fpcompile.models.zoo import tiny_model
from tests.cpu.support import model_of


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cost_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many measurements were made; each takes no time and gives other figures."""
    made: list[int] = []

    def measure(program: fpcompile.Program, *, lengths: tuple[int, ...], seconds: float) -> Samples:
        made.append(len(made) + 1)
        return {s.key: ((16, 1e-3 * made[-1]), (64, 2e-3 * made[-1])) for s in program.stages}

    monkeypatch.setattr(programs, "measure", measure)
    return made


def fresh(arch: str = "llama", **overrides: Any) -> fpcompile.Program:
    return fpcompile.segment(tiny_model(arch, overrides=overrides), route="packed", verify=False)


@pytest.mark.slow
def test_another_program_of_the_same_model_is_not_measured(cache: Path, measured: list[int]) -> None:
    first = fresh()
    assert first.costs.samples == fresh().costs.samples
    assert measured == [1]
    assert [f.suffix for f in (cache / "costs").iterdir()] == [".json"]
    first.calibrate()
    assert measured == [1, 2]
    assert fresh().costs.samples == first.costs.samples


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_a_budget_asks_the_cache(measured: list[int]) -> None:
    for _ in range(2):
        fpcompile.segment(model_of("llama"), route="packed", verify=False, max_blocking_ms=100.0)
    assert measured == [1]


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_what_times_depend_on_is_told_apart(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    _ = fresh().costs
    _ = fresh(num_hidden_layers=1).costs
    _ = fpcompile.segment(tiny_model("llama", dtype=torch.bfloat16), route="packed", verify=False).costs
    _ = fpcompile.segment(tiny_model("llama"), route="packed", verify=False, granularity="layer").costs
    assert len(measured) == 4
    for name, value in (("device_name", lambda device: "cuda: H1"), ("torch", _Torch)):
        with monkeypatch.context() as patch:
            patch.setattr(cost_cache, name, value)
            _ = fresh().costs
    assert len(measured) == 6
    _ = fresh().costs
    assert len(measured) == 6


class _Torch:
    __version__ = torch.__version__

    @staticmethod
    def get_num_threads() -> int:
        return 77


def _foreign(content: dict[str, Any]) -> None:
    content["identity"]["device"] = "cuda: another"


def _negative(content: dict[str, Any]) -> None:
    content["samples"][0][1][0][1] = -1.0


def _falling(content: dict[str, Any]) -> None:
    content["samples"][0][1].reverse()


def _empty(content: dict[str, Any]) -> None:
    content["samples"] = []


def _older(content: dict[str, Any]) -> None:
    content["format"] = "fpcompile-costs-0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "note"),
    [
        (_foreign, "device 'cuda: another' instead of 'cpu: "),
        (_negative, "broken"),
        (_falling, "broken"),
        (_empty, "broken"),
        (_older, "fpcompile-costs-0"),
        (None, "broken"),
    ],
)
def test_what_does_not_hold_is_ignored_with_a_note(
    change: Callable[[dict[str, Any]], None] | None,
    note: str,
    cache: Path,
    measured: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _ = fresh().costs
    (file,) = (cache / "costs").iterdir()
    content = json.loads(file.read_text())
    if change is not None:
        change(content)
    file.write_text(json.dumps(content) if change is not None else file.read_text()[:-20])
    with caplog.at_level(logging.WARNING, logger="fpcompile"):
        again = fresh()
        assert again.costs.samples != {}
    assert measured == [1, 2]
    assert note in caplog.text
    assert "ignored" in caplog.text
    assert fresh().costs.samples == again.costs.samples
    assert measured == [1, 2]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_noted(
    cache: Path, measured: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("no folder")
    with caplog.at_level(logging.WARNING, logger="fpcompile"):
        assert fresh().predict(tokens=16) > 0
    assert "cannot be kept" in caplog.text
    assert measured == [1]


@pytest.mark.slow
def test_measuring_by_other_rules_is_not_kept(cache: Path) -> None:
    fresh().calibrate(lengths=(4,), seconds=0.1)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({cost_cache.VARIABLE: "off"}, None),
        ({cost_cache.VARIABLE: "/x"}, Path("/x/costs")),
        ({cost_cache.VARIABLE: "", "XDG_CACHE_HOME": "/y"}, Path("/y/fpcompile/costs")),
        ({cost_cache.VARIABLE: "", "XDG_CACHE_HOME": "", "HOME": "/z"}, Path("/z/.cache/fpcompile/costs")),
        ({cost_cache.VARIABLE: "", "XDG_CACHE_HOME": "rel", "HOME": "/z"}, Path("/z/.cache/fpcompile/costs")),
    ],
)
def test_where_it_lies(
    variables: dict[str, str], expected: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cost_cache.folder() == expected


@pytest.mark.slow
def test_a_saved_program_brings_its_measurements(tmp_path: Path, measured: list[int]) -> None:
    program = fresh()
    program.save(tmp_path / "before")
    assert fpcompile.load(tmp_path / "before", tiny_model("llama")).measured is None
    _ = program.costs
    program.save(tmp_path / "after")
    loaded = fpcompile.load(tmp_path / "after", tiny_model("llama"), verify=False)
    assert loaded.measured == program.measured
    assert loaded.predict(tokens=100) == program.predict(tokens=100)
    assert measured == [1]


@pytest.mark.slow
def test_measurements_of_another_device_are_left_behind(
    tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = fresh()
    _ = program.costs
    program.save(tmp_path / "program")
    monkeypatch.setattr(cost_cache, "device_name", lambda device: "cpu: another")
    with caplog.at_level(logging.WARNING, logger="fpcompile"):
        loaded = fpcompile.load(tmp_path / "program", tiny_model("llama"), verify=False)
    assert loaded.measured is None
    assert "something else" in caplog.text

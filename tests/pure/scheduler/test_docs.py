"""docs/scheduling.md shows the table of the core, and names every policy and option; its code works."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from fpcompile.scheduler import SchedulerOptions, policy, policy_names
from fpcompile.scheduler.policies.hodgson import MooreHodgson
from fpcompile.scheduler.states import diagram

PAGE = (Path(__file__).parents[3] / "docs" / "scheduling.md").read_text(encoding="utf-8")


def test_the_diagram_is_generated_from_the_table() -> None:
    assert f"```mermaid\n{diagram()}\n```" in PAGE


def test_every_policy_and_option_has_a_row() -> None:
    shipped = {"fcfs", "edf", "s-edf", "srpt", "priority", "wfq", "chunked", "vllm", "layered", "flowprefill"}
    assert shipped <= set(policy_names())
    for name in (*shipped, "flowprefill-published", "fpcompile"):
        assert f"| `{name}" in PAGE, name
    for field in fields(SchedulerOptions):
        assert f"| `{field.name}`" in PAGE, field.name
    for name, option in inspect.signature(MooreHodgson).parameters.items():
        assert f"| `{name}={option.default}`" in PAGE, name


def test_the_code_on_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "_REGISTRY", dict(policy._REGISTRY))  # what it registers is for itself
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/scheduling.md", "exec"), {"__name__": "page"})

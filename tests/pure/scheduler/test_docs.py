"""docs/scheduling.md shows the table that the core executes, and names every policy and option."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from fpcompile.scheduler import SchedulerOptions, policy_names
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

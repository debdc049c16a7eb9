"""The text form of a plan reads back, and a damaged one is refused by line."""

from __future__ import annotations

import json

import pytest

from fpcompile.errors import InvalidInputError
from fpcompile.passes.plan_text import parse, render
from tests.cpu.support import program_of


@pytest.mark.parametrize("arch", ["llama", "mistral", "mixtral"])
@pytest.mark.parametrize("granularity", ["operator", "layer", "model"])
def test_a_plan_reads_back(arch: str, granularity: str) -> None:
    plan = program_of(arch, granularity=granularity).plan
    assert parse(render(plan)) == plan


def test_a_damaged_text_is_refused() -> None:
    lines = render(program_of("llama").plan).splitlines()
    with pytest.raises(InvalidInputError, match="line 3"):
        parse("\n".join([*lines[:2], lines[2][:-5], *lines[3:]]))
    with pytest.raises(InvalidInputError, match="version"):
        parse("{}")
    segment = json.loads(lines[1])
    del segment["live"]
    with pytest.raises(InvalidInputError, match="complete"):
        parse("\n".join([lines[0], json.dumps(segment), *lines[2:]]))


@pytest.mark.parametrize(
    "formula", ["__import__('os').getpid()", "tokens.__class__", "other + 1", "tokens[0]"]
)
def test_a_formula_is_never_executed(formula: str) -> None:
    lines = render(program_of("llama").plan).splitlines()
    segment = json.loads(lines[1])
    segment["parts"][0]["flops"] = formula
    with pytest.raises(InvalidInputError, match="no formula"):
        parse("\n".join([lines[0], json.dumps(segment), *lines[2:]]))


def test_a_text_without_a_segment_is_inconsistent() -> None:
    lines = render(program_of("llama").plan).splitlines()
    with pytest.raises(Exception, match="live set"):
        parse("\n".join([*lines[:2], *lines[3:]]))

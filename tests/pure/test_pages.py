"""What the pages show exists: links, files, modules, names, commands with their flags, targets of make."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from fpcompile.cli import app
from fpcompile.scheduler import SchedulerOptions, make_policy

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("coverage.md",)
NOT_OURS = {"serve.toml", "fpcompile.engine.requests", "benchmarks/results"}
"""An example of a file, a logger, a folder that is made."""
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in GENERATED),
]
BASES = (ROOT, ROOT / "fpcompile", ROOT / "benchmarks", ROOT / "examples", ROOT / "tests" / "cpu")
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fenced(page: Path, language: str) -> list[str]:
    """The blocks of code in this language."""
    return [code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def inline(page: Path) -> list[str]:
    """What stands between backticks in the text."""
    return INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of every command, without comments."""
    for block in fenced(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)
    for text in inline(page):
        if text.startswith(("fpcompile ", "python ", "make ")):
            yield shlex.split(text)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = [
        target
        for target in targets
        if not target.startswith(("http", "#")) and not (page.parent / target.split("#")[0]).exists()
    ]
    assert broken == []


@pages
def test_files_and_modules_that_are_named_are_there(page: Path) -> None:
    missing = []
    for text in inline(page):
        if re.fullmatch(r"[\w./*-]+\.(py|sh|toml|txt)|(fpcompile|tests|benchmarks|examples)/[\w./*-]+", text):
            missing += [] if any(list(base.glob(text)) for base in BASES) else [text]
        elif re.fullmatch(r"fpcompile(\.\w+)+", text.split("(")[0]):
            missing += [] if found(text.split("(")[0]) else [text]
    assert [name for name in missing if name not in NOT_OURS] == []


def source_of(module: str) -> Path | None:
    """The file of a module or package."""
    place = ROOT.joinpath(*module.split("."))
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)


def names_in(path: Path) -> set[str]:
    """What a module defines or imports at its top level; torch need not be there."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


def found(dotted: str) -> bool:
    """Whether ``fpcompile.a.b`` is a module, or a name in one (or in a class of it)."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        if (path := source_of(".".join(parts[:length]))) is not None:
            return not parts[length:] or parts[length] in names_in(path)
    return False


def imported(tree: ast.Module) -> Iterator[str]:
    """``fpcompile.x.Name`` for everything of this package that code imports or reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fpcompile":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "fpcompile":
            yield f"fpcompile.{node.attr}"


def keywords_of(module: str, *path: str) -> set[str]:
    """The arguments that a function, or a method of a class, may be given by name."""
    source = source_of(module)
    assert source is not None
    node: Any = ast.parse(source.read_text(encoding="utf-8"))
    for name in path:
        node = next(inner for inner in node.body if getattr(inner, "name", None) == name)
    return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}


@pages
def test_code_imports_and_calls_what_there_is(page: Path) -> None:
    known = {
        "segment": keywords_of("fpcompile.api", "segment"),
        "load": keywords_of("fpcompile.api", "load"),
        "Engine": keywords_of("fpcompile.engine.engine", "Engine", "__init__")
        | {field.name for field in fields(SchedulerOptions)},
    }
    for block in fenced(page, "python"):
        tree = ast.parse(block)
        assert [name for name in imported(tree) if not found(name)] == []
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            given = {keyword.arg for keyword in call.keywords if keyword.arg}
            if name in known and ast.unparse(call.func) in (name, f"fpcompile.{name}"):
                assert given <= known[name], ast.unparse(call)


def flags_of(words: list[str]) -> set[str]:
    """The flags among the words of a command, without their values."""
    return {word.split("=")[0] for word in words if word.startswith("--") and len(word) > 2}


def known_flags(words: list[str]) -> set[str]:
    """The flags of the command that ``fpcompile WORDS`` is; fails for one that is not there."""
    command: Any = typer.main.get_command(app)
    for word in words:
        if not hasattr(command, "commands"):
            break
        assert word in command.commands, f"no command {word!r} of fpcompile"
        command = command.commands[word]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return options | {"--help"}


@pages
def test_commands_and_their_flags_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in command_lines(page):
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words[:1] == ["fpcompile"] and len(words) > 1:
            if words[1].startswith("--"):
                assert flags_of(words) <= {"--help", "--version"}, words
            else:
                assert flags_of(words) <= known_flags(words[1:]), words
        elif words[:1] == ["make"] and len(words) > 1 and words[1].islower():
            assert words[1] in targets, words
        elif words[:1] == ["python"] and len(words) > 1 and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words
            if words[1].startswith("benchmarks/"):
                assert flags_of(words) <= flags_in_benchmarks(), words


def flags_in_benchmarks() -> set[str]:
    """All flags that a benchmark has; many share theirs."""
    return {
        flag
        for path in (ROOT / "benchmarks").glob("*.py")
        for flag in re.findall(r'"(--[a-z-]+)"', path.read_text(encoding="utf-8"))
    }


@pages
def test_flags_that_are_named_exist(page: Path) -> None:
    if page.name == "comparison.md":  # names flags of other servers
        return
    every = flags_in_benchmarks() | {"--help", "--version"}
    for command in ("demo", "explain", "replay", "coverage", "serve", "bench goodput", "bench serve"):
        every |= known_flags(command.split())
    named = {flag for text in inline(page) if text.startswith("--") for flag in text.split()[0].split("/")}
    assert {flag for flag in named if flag.split("=")[0] not in every} == set()


@pages
def test_policies_that_are_named_can_be_made(page: Path) -> None:
    for words in command_lines(page):
        for flag, value in pairwise(words):
            if words[:1] == ["fpcompile"] and flag == "--policy" and value.islower():
                make_policy(value)
            elif words[:1] == ["fpcompile"] and flag == "--policies":
                for spec in value.split(";"):
                    make_policy(spec)

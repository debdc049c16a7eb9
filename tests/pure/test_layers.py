"""The layers: imports point down, the scheduler is free of torch, public names are exported exactly once."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Prints the names of fpcompile.__all__, modules apart, each with the identity and the module of what it is.
RESOLVE_PUBLIC_NAMES = """
import json
import fpcompile
found = [(name, getattr(fpcompile, name)) for name in fpcompile.__all__]
objects = [(name, value) for name, value in found if hasattr(value, "__module__")]
print(json.dumps([(name, id(value), value.__module__) for name, value in objects]))
"""

# Imports the module named in argv, with all that a layer contains; prints which heavy packages that loaded.
LOADED_BY = """
import importlib, json, pkgutil, sys
name = sys.argv[1]
module = importlib.import_module(name)
if name != "fpcompile":
    for inner in pkgutil.walk_packages(getattr(module, "__path__", ()), name + "."):
        importlib.import_module(inner.name)
heavy = {"torch", "transformers", "matplotlib", "fastapi", "scipy"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""


def _python(code: str, *argv: str) -> object:
    """The JSON that ``code`` prints, run by a new interpreter in the repository's root."""
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_import_points_down() -> None:
    """In a process of its own: the command line switches off the loggers of whoever calls it."""
    command = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module", ["fpcompile", "fpcompile.errors", "fpcompile.scheduler", "fpcompile.engine.timeline"]
)
def test_it_is_imported_without_torch(module: str) -> None:
    assert _python(LOADED_BY, module) == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="resolving the names imports torch")
def test_each_public_name_is_exported_exactly_once() -> None:
    exported = _python(RESOLVE_PUBLIC_NAMES)
    assert isinstance(exported, list)
    names = [name for name, _, _ in exported]
    assert "segment" in names
    assert len(names) == len(set(names)), "a name stands twice in __all__"
    assert len({identity for _, identity, _ in exported}) == len(names), "one object has two public names"
    assert {name: module for name, _, module in exported} == _exports_for_type_checkers()


def _exports_for_type_checkers() -> dict[str, str]:
    """Name -> module of what ``fpcompile/__init__.py`` imports under ``if TYPE_CHECKING``."""
    tree = ast.parse((ROOT / "fpcompile" / "__init__.py").read_text())
    return {
        alias.name: node.module or ""
        for guard in tree.body
        if isinstance(guard, ast.If)
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_pure_tests_import_no_torch() -> None:
    found = [
        f"{path.name} imports {name}"
        for path in sorted((ROOT / "tests" / "pure").glob("**/*.py"))
        for name in _imported(ast.parse(path.read_text()))
        if name.split(".")[0] in {"torch", "transformers", "accelerate"}
    ]
    assert found == []


def _imported(tree: ast.Module) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return names

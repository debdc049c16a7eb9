"""fpcompile: compile any Hugging Face model into preemptible operator segments.

The names below are the public API; each is imported when it is first used, so that ``import fpcompile``
stays cheap and parts that need no torch do not load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fpcompile import errors

if TYPE_CHECKING:
    from fpcompile.api import load, segment
    from fpcompile.engine.engine import Engine
    from fpcompile.executor.checkpoint import Checkpoint
    from fpcompile.executor.program import Program
    from fpcompile.executor.run import Run

__version__ = "0.1.0"
__all__ = ["Checkpoint", "Engine", "Program", "Run", "errors", "load", "segment"]
_HOMES = {
    "Checkpoint": "fpcompile.executor.checkpoint",
    "Engine": "fpcompile.engine.engine",
    "Program": "fpcompile.executor.program",
    "Run": "fpcompile.executor.run",
    "load": "fpcompile.api",
    "segment": "fpcompile.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fpcompile' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

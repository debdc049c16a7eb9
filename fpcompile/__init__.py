"""fpcompile: compile any Hugging Face model into preemptible operator segments.

The names below are the public API; each is imported when it is first used, so that ``import fpcompile``
stays cheap and parts that need no torch do not load it.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from fpcompile import errors

if TYPE_CHECKING:
    from fpcompile.api import load, segment
    from fpcompile.engine.engine import Engine
    from fpcompile.engine.handle import Handle
    from fpcompile.executor.checkpoint import Checkpoint
    from fpcompile.executor.program import Program
    from fpcompile.executor.run import Run

__version__ = "0.1.0"
__all__ = ["Checkpoint", "Engine", "Handle", "Program", "Run", "errors", "load", "segment"]
_HOMES = {
    "Checkpoint": "fpcompile.executor.checkpoint",
    "Engine": "fpcompile.engine.engine",
    "Handle": "fpcompile.engine.handle",
    "Program": "fpcompile.executor.program",
    "Run": "fpcompile.executor.run",
    "load": "fpcompile.api",
    "segment": "fpcompile.api",
}


if not TYPE_CHECKING:  # a type checker would take any name for one that is here

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            here = sys.modules[__name__]
            raise AttributeError(f"module 'fpcompile' has no attribute {name!r}", name=name, obj=here)
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

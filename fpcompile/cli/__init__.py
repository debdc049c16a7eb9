"""The command line: ``fpcompile demo``, ``fpcompile explain``, ``fpcompile bench``.

Invariant: this package prints and exits; nothing below it does. Modules that need torch are imported by the
command that needs them, so that ``fpcompile --help`` answers at once.
"""

from __future__ import annotations

from fpcompile.cli.app import app, main

__all__ = ["app", "main"]

"""Paths that callers give, for programs and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fpcompile.errors import InvalidInputError

__all__ = ["as_path"]


def as_path(given: Any) -> Path:
    """``given`` as a path; raises :class:`InvalidInputError` for what is none."""
    try:
        return Path(given)
    except TypeError as error:
        raise InvalidInputError("path is wrong", expected="a str or os.PathLike", got=repr(given)) from error

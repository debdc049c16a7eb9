"""What a command does about errors and about chatter of other libraries.

Words
    *remedied error*  one that the user can act on: it becomes one line on stderr and exit code 2.
    *defect*          anything else, :class:`InternalError` included: the traceback is shown, exit code 1.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import NoReturn

import typer

from fpcompile.errors import FpcompileError, InternalError, UsageError

__all__ = ["one_line", "quiet", "remedied"]

_LONGEST = 240
_CHATTY = (
    "transformers",
    "huggingface_hub",
    "torch",
    "torch.utils._pytree",
    "torchvision",
    "torchaudio",
    "torchao",
    "httpx",
    "filelock",
)


def one_line(error: FpcompileError) -> str:
    """``what (expected ...; got ...; where ...). Remedy``: the error's fields, long ones cut."""
    fields = (("expected", error.expected), ("got", error.got), ("at", error.where))
    facts = "; ".join(f"{label} {_cut(value)}" for label, value in fields if value)
    remedy = f". Remedy: {_cut(error.remedy)}" if error.remedy else ""
    return _flat(error.what or type(error).__name__) + (f" ({facts})" if facts else "") + remedy


def _cut(text: str) -> str:
    flat = _flat(text)
    return flat if len(flat) <= _LONGEST else flat[: _LONGEST - 1] + "…"


def _flat(text: str) -> str:
    return " ".join(text.split())


@contextlib.contextmanager
def remedied() -> Iterator[None]:
    """Turn remedied errors into one line and exit code 2; let defects pass."""
    try:
        yield
    except InternalError:
        raise
    except FpcompileError as error:
        _leave(one_line(error))
    except MemoryError as error:
        _leave(one_line(_out_of_memory(error)))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        _leave(one_line(_out_of_memory(error)))


def _out_of_memory(error: Exception) -> UsageError:
    return UsageError(
        "out of memory", got=str(error) or None, remedy="use a smaller --model or fewer --long-tokens"
    )


def _leave(line: str) -> NoReturn:
    typer.echo(f"error: {line}", err=True)
    raise SystemExit(2) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the notices of torch, transformers and the hub's client; errors are still raised.

    Everything is put back on leaving: tests call commands in their own process.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is first imported
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""A saved program of any route, for its model."""

from __future__ import annotations

import os

import safetensors
from torch import nn
from transformers import PreTrainedModel

from fpcompile.errors import ProgramFileError
from fpcompile.executor import saving, saving_generic
from fpcompile.executor.paths import as_path
from fpcompile.executor.program import Program
from fpcompile.executor.program_file import read_folder
from fpcompile.executor.saving_parts import CODE, COMPILED, CONSTANTS, FUNCTIONS

_BROKEN = (AttributeError, AssertionError, IndexError, KeyError, RecursionError, TypeError, ValueError)
_OF_ROUTE = {"packed": (saving.PLAN, saving.CALLS), "generic": (saving_generic.VARIANTS,)}


def load(
    path: str | os.PathLike[str], model: nn.Module, *, trust_code: bool = False, verify: bool = True
) -> tuple[Program, Program]:
    """The program in a folder, for ``model``, and the same with generated code only. ``verify``: variants
    that it compiles itself are checked; checking what is read is for who reads it.

    Raises :class:`ProgramFileError` for a damaged folder and another model.
    """
    optional = (*(name for names in _OF_ROUTE.values() for name in names), saving.COSTS, COMPILED)
    manifest, files = read_folder(as_path(path), (FUNCTIONS, CONSTANTS), optional, CODE)
    where = str(path)
    try:
        if any(name not in files for name in _OF_ROUTE[manifest["route"]]):
            raise KeyError("a file of the program is missing")
        if manifest["route"] == "generic":
            return saving_generic.load(where, manifest, files, model, trust_code, verify)
        if not isinstance(model, PreTrainedModel):
            raise ProgramFileError("the program was saved for another model", got=type(model).__name__)
        return saving.load(where, manifest, files, model, trust_code)
    except (*_BROKEN, safetensors.SafetensorError) as error:
        if isinstance(error, ProgramFileError):
            raise
        raise ProgramFileError(
            "the saved program is not complete",
            expected="what Program.save writes",
            got=f"{type(error).__name__}: {error}",
            where=where,
        ) from error

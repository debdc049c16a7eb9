"""What is known of a compiled function beside its code: where it holds, and how it is called.

Words: a *symbol* is a length that the code was compiled for; ``where`` says which argument tells it. *Guards*
are the compiler's conditions on the symbols; where they do not hold the generated code is called instead.

All of it but the artefact is plain data, so that a saved program can be read without running anything: its
functions are then compiled again from their generated code and from ``arguments``.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor

from fpcompile.errors import ProgramFileError
from fpcompile.passes.expr_text import read_expr, write_expr

Call = Callable[[list[Any]], Sequence[Tensor]]


@dataclasses.dataclass(frozen=True, slots=True)
class Argument:
    """What an argument was compiled as: a tensor, or a length (no dtype, one size)."""

    dtype: torch.dtype | None
    device: str
    sizes: tuple[sympy.Expr, ...]
    strides: tuple[sympy.Expr, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """One compiled function. ``artifact(*arguments)`` runs it.

    ``where`` gives for each symbol the argument, and its dimension (-1: itself), whose size it is;
    ``layouts`` the strides that the code assumes of some arguments.
    """

    artifact: Any
    symbols: tuple[sympy.Symbol, ...]
    where: tuple[tuple[int, int], ...]
    guards: tuple[sympy.Basic, ...]
    layouts: tuple[tuple[int, tuple[sympy.Expr, ...]], ...]
    arguments: tuple[Argument, ...]

    def holds(self) -> Callable[[tuple[int, ...]], bool] | None:
        """Whether the code holds at given lengths; None when it always does."""
        if not self.guards:
            return None

        @functools.lru_cache(maxsize=4096)
        def holds(lengths: tuple[int, ...]) -> bool:
            values = dict(zip(self.symbols, lengths, strict=True))
            return all(guard.subs(values) == sympy.true for guard in self.guards)

        return holds

    def call(self, eager: Call) -> Call:
        """The code as a function of the list of arguments, which it empties; ``eager`` where it does not
        hold.
        """
        compiled, where, holds = self.artifact, self.where, self.holds()
        layouts = tuple((i, sympy.lambdify(list(self.symbols), s, "math")) for i, s in self.layouts)

        def call(box: list[Any]) -> Sequence[Tensor]:
            lengths = tuple(int(box[i]) if d < 0 else box[i].shape[d] for i, d in where)
            if holds is not None and not holds(lengths):
                return eager(box)
            for i, strides in layouts:
                wanted = strides(*lengths)
                if box[i].stride() != wanted:
                    box[i] = _laid_out(box[i], wanted)
            arguments = tuple(box)
            box.clear()
            found: Sequence[Tensor] = compiled(*arguments)
            return found

        return call


def _laid_out(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``value`` with ``strides``, which say nothing where there is one element or none."""
    if value.numel() == 0 or all(
        size == 1 or is_ == wanted
        for size, is_, wanted in zip(value.shape, value.stride(), strides, strict=True)
    ):
        return value
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def write_compiled(compiled: Compiled) -> tuple[dict[str, Any], bytes]:
    """A compiled function as JSON data, and its artefact: code, in torch's own format."""
    names = {s: sympy.Symbol(f"n{i}", integer=True, positive=True) for i, s in enumerate(compiled.symbols)}

    def write(expr: Any) -> Any:
        return write_expr(sympy.sympify(expr).xreplace(names))

    data = {
        "symbols": len(names),
        "where": compiled.where,
        "guards": [write(g) for g in compiled.guards],
        "layouts": [[i, [write(s) for s in strides]] for i, strides in compiled.layouts],
        "arguments": [
            [
                None if a.dtype is None else str(a.dtype).removeprefix("torch."),
                a.device,
                [write(s) for s in a.sizes],
                [write(s) for s in a.strides],
            ]
            for a in compiled.arguments
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "artifact"
        try:
            compiled.artifact.save(path=str(file), format="binary")
            return data, file.read_bytes()
        except (AttributeError, RuntimeError, AssertionError, OSError) as error:
            raise ProgramFileError(
                "torch gives no artefact of a compiled function",
                expected="a function that TorchInductor's caches can hold",
                got=f"{type(error).__name__}: {str(error)[:200]}",
                remedy="switch the caches of TorchInductor on, or save a program with backend='eager'",
            ) from error


def read_compiled(data: Mapping[str, Any]) -> Compiled:
    """Read back the data of :func:`write_compiled`; its artefact is None."""
    symbols = tuple(sympy.Symbol(f"n{i}", integer=True, positive=True) for i in range(int(data["symbols"])))
    named = {s.name: s for s in symbols}

    def read(expr: Any) -> Any:
        return read_expr(expr, named.__getitem__)

    def dtype_of(name: str | None) -> torch.dtype | None:
        found = None if name is None else getattr(torch, name)
        if found is not None and not isinstance(found, torch.dtype):
            raise ValueError(f"torch.{name} is no dtype")
        return found

    return Compiled(
        None,
        symbols,
        tuple((int(i), int(d)) for i, d in data["where"]),
        tuple(read(g) for g in data["guards"]),
        tuple((int(i), tuple(read(s) for s in strides)) for i, strides in data["layouts"]),
        tuple(
            Argument(dtype_of(dtype), str(device), tuple(map(read, sizes)), tuple(map(read, strides)))
            for dtype, device, sizes, strides in data["arguments"]
        ),
    )


def load_artifact(content: bytes) -> Any:
    """The code of an artefact, callable. It runs in this process, on being read too: it must be trusted."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "artifact"
        file.write_bytes(content)
        try:
            from torch._inductor.standalone_compile import CompiledArtifact

            return CompiledArtifact.load(path=str(file), format="binary")
        except Exception as error:
            raise ProgramFileError(
                "the compiled code of the program cannot be loaded",
                expected="an artefact of this version of torch",
                got=f"{type(error).__name__}: {str(error)[:200]}",
                remedy="load the program without trust_code: its functions are compiled again",
            ) from error

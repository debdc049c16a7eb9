"""What the engine needs of a program and its runs, and the programs of one engine by name.

Any object of these shapes can be served: a compiled model, a pipeline of its stages, a fake in a test. A run
is data that one thread at a time steps through; the engine asks nothing else of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

import torch

from fpcompile.errors import InvalidInputError, UnknownNameError
from fpcompile.executor.loop import Named, Steps

__all__ = ["DEFAULT", "ProgramLike", "Programs", "RunLike"]

DEFAULT: Final = "default"
"""Name of the only program of an engine that was given one without a name."""


class RunLike(Steps, Protocol):
    """One execution in flight; see :class:`fpcompile.executor.run.Run`."""

    @property
    def tokens(self) -> int:
        """New tokens."""

    @property
    def rows(self) -> int:
        """Positions whose logits are computed."""

    @property
    def live_bytes(self) -> int:
        """Bytes of the live values."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache."""

    def result(self) -> Any:
        """The output, once done."""

    def suspend(self) -> None:
        """Drop what can be derived again."""

    def release(self) -> None:
        """Drop every tensor."""


@runtime_checkable
class ProgramLike(Protocol):
    """A compiled model; see :class:`fpcompile.executor.program.Program`."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def segments(self) -> Sequence[Named]:
        """What a run steps through."""

    def start(self, input_ids: Any, **kwargs: Any) -> RunLike:
        """A run, checked, of which nothing is executed."""

    def predict(self, *, tokens: int, context: float | None = None, start: int = 0, rows: int = 1) -> float:
        """Predicted seconds from segment ``start`` to the end."""

    def segment_seconds(
        self, index: int, *, tokens: int, rows: int = 1, context: float | None = None
    ) -> float:
        """Predicted seconds of one segment."""


class Programs:
    """The programs of one engine; all on one device, which they share under one bound on blocking time."""

    __slots__ = ("_by_name", "device")

    def __init__(self, programs: object) -> None:
        named = dict(programs) if isinstance(programs, Mapping) else {DEFAULT: programs}
        if not named:
            raise InvalidInputError(
                "an engine without a program", expected="at least one", got="an empty mapping"
            )
        self._by_name: dict[str, ProgramLike] = {}
        for name, program in named.items():
            if not isinstance(name, str) or not name:
                raise InvalidInputError(
                    "a program's name is wrong", expected="a non-empty str", got=repr(name)
                )
            if not isinstance(program, ProgramLike):
                raise InvalidInputError(
                    f"{name!r} is not a program",
                    expected="what fpcompile.segment(model) returns",
                    got=type(program).__name__,
                    remedy="compile the model first: Engine(fpcompile.segment(model))",
                )
            self._by_name[name] = program
        devices = {name: program.device for name, program in self._by_name.items()}
        if len(set(devices.values())) > 1:
            raise InvalidInputError(
                "the programs of one engine are on different devices",
                expected="one device, shared under one bound on blocking time",
                got=", ".join(f"{name}: {device}" for name, device in devices.items()),
                remedy="use one Engine per device",
            )
        self.device = next(iter(devices.values()))

    def resolve(self, name: str | None) -> tuple[str, ProgramLike]:
        """The program of that name; None means the only one. Lists the legal names otherwise."""
        if name is None and len(self._by_name) == 1:
            return next(iter(self._by_name.items()))
        if not isinstance(name, str) or name not in self._by_name:
            raise UnknownNameError("program", name, known=self._by_name)
        return name, self._by_name[name]

    def __getitem__(self, name: str) -> ProgramLike:
        return self._by_name[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order given."""
        return tuple(self._by_name)

    def warm_up(self) -> None:
        """Let every program calibrate its predictions now, not in the first submission.

        Call it in the thread that will execute them: the threads of a CPU's kernels belong to their caller,
        and elsewhere the same kernel may take many times as long.
        """
        here = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with here:
            for program in self._by_name.values():
                program.predict(tokens=1)

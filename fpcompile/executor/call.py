"""What one run was asked for, besides its tensors: lengths, layout, how to make the result.

A :class:`Call` is frozen and can describe itself in plain data, so that a checkpoint can carry it.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fpcompile.executor.schedule import Launch, Shape
from fpcompile.ir import Part

if TYPE_CHECKING:
    from fpcompile.executor.run import Run


class Call(abc.ABC):
    """Base of :class:`fpcompile.executor.packed.PackedCall` and the generic route's call."""

    __slots__ = ()

    @property
    @abc.abstractmethod
    def lengths(self) -> Mapping[str, int]:
        """Values of the plan's symbolic dimensions (``tokens``, ``rows``)."""

    @property
    @abc.abstractmethod
    def context(self) -> int:
        """Longest context in tokens, cached ones included."""

    @property
    @abc.abstractmethod
    def shape(self) -> Shape:
        """What a tile plan depends on."""

    @abc.abstractmethod
    def attend(
        self, run: Run, part: Part, tile: Launch, arguments: Sequence[Tensor], out: Tensor | None
    ) -> Tensor:
        """One tile of an attention part, written into ``out`` (None before the first); returns ``out``."""

    @abc.abstractmethod
    def result(self, run: Run) -> Any:
        """The model's own output, from a run that is done."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the call that a checkpoint must keep."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything else, as JSON data; :meth:`Program.restore_call` reads it back."""

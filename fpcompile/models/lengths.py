"""Follow a trace through a model's submodules and find the one in which a length became a constant."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class LengthWatch:
    """``stack`` holds the paths of the submodules at work, the innermost last.

    ``specialised`` is the path of the first submodule in whose own code a length became a constant (the
    empty path is the model itself), None while there is none. ``shape_env`` is the trace's, once known.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.specialised: str | None = None
        self._open: set[sympy.Symbol] = set()
        self.shape_env: Any = None

    @contextlib.contextmanager
    def watching(self, model: nn.Module, sizes: Iterable[Any]) -> Iterator[None]:
        """While inside, forward hooks follow ``model``; symbolic ones of ``sizes`` are the lengths."""
        lengths = [s.node for s in sizes if isinstance(s, torch.SymInt)]
        self._open = {n.expr for n in lengths}
        if lengths:
            self.shape_env = lengths[0].shape_env
        handles: list[RemovableHandle] = []
        for path, module in model.named_modules():
            handles += [
                module.register_forward_pre_hook(self._enter(path)),
                module.register_forward_hook(self._leave(path)),
            ]
        try:
            yield
        finally:
            self._blame(self.stack[-1] if self.stack else "")
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._blame(self.stack[-1] if self.stack else "")
            self.stack.append(path)

        return hook

    def _leave(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._blame(path)
            while self.stack and self.stack.pop() != path:
                pass

        return hook

    def _blame(self, path: str) -> None:
        gone = [s for s in self._open if self.shape_env.replacements.get(s, s).is_number]
        if gone:
            self._open.difference_update(gone)
            self.specialised = path if self.specialised is None else self.specialised

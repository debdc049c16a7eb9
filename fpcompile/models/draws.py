"""Random numbers: operators that may draw some, and whether a model does.

A trace of a model that draws often fails far from the cause (patches chosen at random are an empty list
under a trace). :func:`first_draw` runs such a model for real once, on a shadow, and compares the state of the
generators around every operator that may draw.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fpcompile.models.generic_tree import Flat, unflatten
from fpcompile.models.shadow import shadow

__all__ = ["Draw", "first_draw", "may_draw"]

Draw = tuple[str, traceback.StackSummary]
"""The operator, and the Python stack that called it."""


def may_draw(node: fx.Node) -> bool:
    """Whether a node's operator draws random numbers as it is called; an idle dropout does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    idle = {"train": False, "training": False, "dropout_p": 0.0}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name in idle:
            given = node.kwargs.get(argument.name, argument.default_value)
            value = node.args[position] if position < len(node.args) else given
            return bool(value != idle[argument.name])
    return True


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the first operator after which a generator's state is another."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.found: Draw | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.found is not None or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = _states(self.device)
        out = func(*args, **(kwargs or {}))
        if not all(map(torch.equal, before, _states(self.device))):
            self.found = str(func), traceback.extract_stack()
        return out


def first_draw(model: nn.Module, flat: Flat, tensors: Sequence[Tensor]) -> Draw | None:
    """The first operator that draws random numbers in a call of ``model``; None when none does, or when the
    call itself fails. The model and the generators are left as found.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = len(flat.tensors)
    given = [t.detach().clone() for t in tensors[:count]]
    devices = [device] if device.type == "cuda" else []
    watch = _Watch(device)
    try:
        args, kwargs = unflatten(flat.spec, given, [t.shape[0] for t in tensors[count:]])
        with torch.random.fork_rng(devices=devices), torch.no_grad(), watch:
            shadow(model)(*args, **kwargs)
    except Exception:  # it is asked why another call failed: that failure is the one to be reported
        return watch.found
    return watch.found


def _states(device: torch.device) -> tuple[Tensor, ...]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(states)

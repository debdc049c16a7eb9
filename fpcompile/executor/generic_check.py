"""Self-check of the generic route: the numbers of a program beside the model's own, for one call.

The first variant is checked on the example that it was compiled from, before anybody has the program; every
later one on the call that it was compiled from, before it is used: three forward passes of that call's size,
one by the variant and two by the model. The model is called on a shadow with copies of the arguments, without
gradients and autocast, and what its calls draw is taken back: nothing that a caller can see is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpcompile.errors import FpcompileError, InvalidInputError, UnsupportedModelError
from fpcompile.executor.faults import out_of_memory
from fpcompile.models.ambient import plain, same_draws
from fpcompile.models.generic_tree import flatten, unflatten
from fpcompile.models.shadow import shadow

__all__ = ["Example", "compare"]

_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
_TURNED = 0.05
"""Of whole numbers (codes, places of the largest): the share that rounding may turn; one of them at least."""

Example = tuple[tuple[Any, ...], dict[str, Any]]


def compare(
    model: nn.Module, device: torch.device, call: Example, result: Callable[[], Any], *, which: str
) -> None:
    """Raise :class:`UnsupportedModelError` when ``result()`` is not what ``model`` gives for ``call``, or
    when the model's own results depend on the calls before: what it keeps, a program does not. ``which``
    names what was checked.

    Raises :class:`InvalidInputError` for a call that the model itself fails on. Nothing is compared on the
    meta device.
    """
    if device.type == "meta":
        return
    with plain(device.type), torch.no_grad(), same_draws(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying an exported module's tree specs
        unmodified = shadow(model)  # a forward may write into buffers and keep tensors
        own = _called(unmodified, call, device)
        varies = _difference(own, _called(unmodified, call, device))
        difference = _difference(own, flatten(result()).tensors)
    if difference is not None:
        raise UnsupportedModelError(
            f"{which} of {type(model).__name__} does not give the model's numbers",
            reason=difference,
            remedy="make such calls of the model itself, and please report it with its configuration",
        )
    if varies is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not give the same numbers twice",
            reason=f"its forward keeps something from call to call, or draws random numbers: {varies}",
            remedy="make what it keeps an argument and a result of its forward",
        )


def _called(model: nn.Module, call: Example, device: torch.device) -> list[Tensor]:
    """The tensors of a result, which the next call cannot change."""
    args, kwargs = _fresh(call, device)
    try:
        found = model(*args, **kwargs)
    except Exception as error:
        if isinstance(error, (FpcompileError, torch.AcceleratorError)) or out_of_memory(error):
            raise
        raise InvalidInputError(
            f"{type(model).__name__} itself fails for these inputs",
            expected="a call that the model can do",
            got=f"{type(error).__name__}: {error}",
        ) from error
    return [t.clone() for t in flatten(found).tensors]


def _fresh(call: Example, device: torch.device) -> Example:
    """The call out of new containers and tensors: a model may write into a cache that it is given."""
    flat = flatten(call)
    tensors = [t.detach().to(device, copy=True) for t in flat.tensors]
    fresh: Example = unflatten(flat.spec, tensors, flat.counts)
    return fresh


def _difference(own: Sequence[Tensor], got: Sequence[Tensor]) -> str | None:
    """What of two results differs by more than rounding, None when nothing does."""
    if len(own) != len(got):
        return f"{len(got)} result tensors instead of {len(own)}"
    for i, (expected, other) in enumerate(zip(own, got, strict=True)):
        if expected.shape != other.shape or expected.dtype != other.dtype:
            return f"result {i} is {other.dtype}{list(other.shape)}"
        a, b = _real(expected), _real(other)
        if not a.is_floating_point():
            turned = int((a != b).sum())
            if turned > max(1, _TURNED * a.numel()):
                return f"result {i} differs in {turned} of {a.numel()} whole numbers"
            continue
        if a.numel() == 0:
            continue
        limit = _ROUNDING.get(a.dtype, 0.1)
        if a.itemsize < 4:
            a, b = a.float(), b.float()
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            return f"result {i} is infinite or not a number in other places"
        some = bool(finite.any())
        scale = float(a[finite].abs().max()) if some else 1.0
        error = float((a - b)[finite].abs().max()) if some else 0.0
        if not error <= limit * max(scale, 1e-6):
            return f"result {i} differs by {error:.2g}, its largest element is {scale:.2g}"
    return None


def _real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor

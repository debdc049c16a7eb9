"""Self-check of the generic route: the numbers of a program beside the model's own, for one call.

The first variant is checked on the example that it was compiled from, before anybody has the program; every
later one on the call that it was compiled from, before it is used: three forward passes of that call's size,
one by the variant and two by the model. The model is called on a shadow with copies of the arguments, without
gradients and autocast, and what its calls draw is taken back: nothing that a caller can see is changed.

Results are compared in pieces: beside them, no more memory is taken than for a few of those.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

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
_PIECE: Final = 2**20
"""Elements that are compared at a time."""

Example = tuple[tuple[Any, ...], dict[str, Any]]


def compare(
    model: nn.Module,
    device: torch.device,
    call: Example,
    result: Callable[[], Any],
    *,
    which: str,
    rounds: bool = False,
) -> None:
    """Raise :class:`UnsupportedModelError` when the model's own results depend on the calls before (what it
    keeps, a program does not), or when ``result()`` is not what ``model`` gives for ``call``. ``which`` names
    what was checked; with ``rounds`` it is compiled code, which may round where no result shows it.

    Raises :class:`InvalidInputError` for a call that the model itself fails on. Nothing is compared on the
    meta device.
    """
    if device.type == "meta":
        return
    with plain(device.type), torch.no_grad():
        own, varies = _own(model, call, device)
        if varies is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not give the same numbers twice",
                reason=f"its forward keeps something from call to call, or draws random numbers: {varies}",
                remedy="make what it keeps an argument and a result of its forward",
            )
        with same_draws(device):
            got = flatten(result()).tensors
        difference = _difference(own, got, rounds)
    if difference is not None:
        raise UnsupportedModelError(
            f"{which} of {type(model).__name__} does not give the model's numbers",
            reason=difference,
            remedy="make such calls of the model itself, and please report it with its configuration",
        )


def _own(model: nn.Module, call: Example, device: torch.device) -> tuple[list[Tensor], str | None]:
    """The tensors that the model gives, and what a second call gives otherwise. A model that draws shows in
    that: both calls draw in turn.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying an exported module's tree specs
        unmodified = shadow(model)  # a forward may write into buffers and keep tensors
    with same_draws(device):
        own = [t.clone() for t in _called(unmodified, call, device)]  # which the next call cannot change
        again = _called(unmodified, call, device)
    return own, _difference(own, again)


def _called(model: nn.Module, call: Example, device: torch.device) -> tuple[Tensor, ...]:
    """The tensors of a result."""
    args, kwargs = _fresh(call, device)
    try:
        return flatten(model(*args, **kwargs)).tensors
    except Exception as error:
        if isinstance(error, (FpcompileError, torch.AcceleratorError)) or out_of_memory(error):
            raise
        raise InvalidInputError(
            f"{type(model).__name__} itself fails for these inputs",
            expected="a call that the model can do",
            got=f"{type(error).__name__}: {error}",
        ) from error


def _fresh(call: Example, device: torch.device) -> Example:
    """The call out of new containers and tensors: a model may write into a cache that it is given."""
    flat = flatten(call)
    tensors = [t.detach().to(device, copy=True) for t in flat.tensors]
    fresh: Example = unflatten(flat.spec, tensors, flat.counts)
    return fresh


def _difference(own: Sequence[Tensor], got: Sequence[Tensor], rounds: bool = False) -> str | None:
    """What of two results differs by more than rounding, None when nothing does.

    Whole numbers may differ only where something was rounded: ``rounds``, or another result shows it.
    """
    if len(own) != len(got):
        return f"{len(got)} result tensors instead of {len(own)}"
    whole: list[tuple[int, Tensor, Tensor]] = []
    for i, (expected, other) in enumerate(zip(own, got, strict=True)):
        if expected.shape != other.shape or expected.dtype != other.dtype:
            return f"result {i} is {other.dtype}{list(other.shape)}"
        a, b = _real(expected), _real(other)
        if not a.is_floating_point():
            whole.append((i, a, b))
            continue
        rounded, reason = _floats(a, b)
        if reason is not None:
            return f"result {i} {reason}"
        rounds = rounds or rounded
    for i, a, b in whole:
        turned = sum(int((x != y).sum()) for x, y in _pieces(a, b))
        if turned > (max(1, _TURNED * a.numel()) if rounds else 0):
            return f"result {i} differs in {turned} of {a.numel()} whole numbers"
    return None


def _floats(a: Tensor, b: Tensor) -> tuple[bool, str | None]:
    """Whether two tensors of floats differ at all, and how, if it is by more than rounding."""
    limit = _ROUNDING.get(a.dtype, 0.1)
    rounded, some, scale, error = False, False, 0.0, 0.0
    for x, y in _pieces(a, b):
        if a.itemsize < 4:
            x, y = x.float(), y.float()
        same = (x == y) | (x.isnan() & y.isnan())
        finite = x.isfinite()
        if not bool((same | (finite & y.isfinite())).all()):
            return True, "is infinite or not a number in other places"
        rounded = rounded or not bool(same.all())
        if bool(finite.any()):
            some = True
            scale = max(scale, float(x[finite].abs().max()))
            error = max(error, float((x - y)[finite].abs().max()))
    if some and not error <= limit * max(scale, 1e-6):
        return True, f"differs by {error:.2g}, its largest element is {scale:.2g}"
    return rounded, None


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of two tensors of one shape, whatever their strides are: nothing is copied."""
    if a.numel() <= _PIECE:
        if a.numel():
            yield a, b
        return
    dim = max(range(a.dim()), key=lambda d: a.shape[d])
    step = max(1, _PIECE * a.shape[dim] // a.numel())
    for x, y in zip(torch.split(a, step, dim), torch.split(b, step, dim), strict=True):
        yield from _pieces(x, y)


def _real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor

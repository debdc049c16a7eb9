"""Compile by the generic route: example inputs of a model, the program, and its self-check."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fpcompile.errors import InvalidInputError, UnsupportedModelError
from fpcompile.executor.generic import GenericProgram
from fpcompile.ir import Granularity
from fpcompile.models.generic_shapes import by_name
from fpcompile.models.generic_tree import flatten, unflatten
from fpcompile.models.shadow import shadow
from fpcompile.passes.design import Design

_LENGTH = 37  # a size that no model dimension is likely to have
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}

Example = tuple[tuple[Any, ...], dict[str, Any]]


def compile_generic_program(
    model: nn.Module,
    *,
    granularity: Granularity,
    max_blocking_ms: float | None,
    strict_budget: bool = False,
    example_inputs: Any,
    blocked: str | None,
    verify: bool,
    dynamic_shapes: Any = None,
    backend: str = "eager",
    design: Design | None = None,
) -> GenericProgram:
    """A program of the generic route. ``blocked`` says why the packed route was not taken.
    ``design`` is what granularity auto places cuts for.

    ``dynamic_shapes`` follows torch.export: by argument name, or a tuple in the arguments' order.

    Raises :class:`InvalidInputError` when the model needs ``example_inputs``, and
    :class:`UnsupportedModelError` when it cannot be traced or its numbers differ.
    """
    example = as_call(example_inputs) if example_inputs is not None else default_example(model)
    notes = (f"the packed route was not taken: {blocked}",) if blocked else ()
    program = GenericProgram(
        model,
        example,
        granularity=granularity,
        max_blocking_ms=max_blocking_ms,
        strict_budget=strict_budget,
        notes=notes,
        dynamic_shapes=None if dynamic_shapes is None else by_name(model, dynamic_shapes),
        backend=backend,
        design=design,
    )
    if verify:
        self_check(program, model, example)
    return program


def exported_module(program: torch.export.ExportedProgram) -> tuple[nn.Module, Example | None]:
    """The module of an exported program, and the example that it was exported with, if it kept one."""
    example = program.example_inputs
    return program.module(), None if example is None else (tuple(example[0]), dict(example[1]))


def is_exported(model: nn.Module) -> bool:
    """Whether a module comes out of torch.export: it has no training mode, whatever its flag says."""
    return isinstance(model, fx.GraphModule) and "eval" in vars(model)


def as_call(example_inputs: Any) -> Example:
    """``example_inputs`` as positional and keyword arguments: a mapping, a tuple, one tensor, or both kinds
    of arguments as ``(tuple, dict)``.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple) and [type(part) for part in example_inputs] == [tuple, dict]:
        return example_inputs[0], example_inputs[1]
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    raise InvalidInputError(
        "example_inputs has a wrong type",
        expected="a mapping of keyword arguments, a tuple of positional ones, or a tensor",
        got=type(example_inputs).__name__,
    )


def default_example(model: nn.Module) -> Example:
    """Inputs that the model's class and configuration suggest: ids, pixels."""
    config = getattr(model, "config", None)
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype
    main = getattr(model, "main_input_name", None)
    if main == "input_ids":
        ids = torch.ones(1, _LENGTH, dtype=torch.long, device=device)
        kwargs: dict[str, Any] = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False):
            kwargs["decoder_input_ids"] = ids[:, :11]
        return (), kwargs
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if main == "pixel_values" and isinstance(size, int) and isinstance(channels, int):
        return (), {"pixel_values": torch.zeros(1, channels, size, size, dtype=dtype, device=device)}
    raise InvalidInputError(
        f"{type(model).__name__} needs example inputs",
        expected="example_inputs={...}: the keyword arguments of one call",
        got=f"a model whose main input is {main!r}",
        remedy="pass what you would pass to model(...)",
    )


def self_check(program: GenericProgram, model: nn.Module, example: Example) -> None:
    """Raise :class:`UnsupportedModelError` when the program's results are not the model's, or when the
    model's own depend on the calls before: what it keeps, a program does not.
    """
    if program.device.type == "meta":
        return
    got = flatten(program(*example[0], **example[1], max_blocking_ms=math.inf))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying an exported module's tree specs
        unmodified = shadow(model)  # a forward may write into buffers and keep tensors
        own, again = _called(unmodified, example), _called(unmodified, example)
    if (difference := _difference(own, got.tensors)) is not None:
        raise _differs(model, difference)
    if (difference := _difference(own, again)) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not give the same numbers twice",
            reason=f"its forward keeps something from call to call, or draws random numbers: {difference}",
            remedy="make what it keeps an argument and a result of its forward",
        )


def _called(model: nn.Module, example: Example) -> list[Tensor]:
    """The tensors of a result, which the next call cannot change."""
    args, kwargs = _fresh(example)
    return [t.clone() for t in flatten(model(*args, **kwargs)).tensors]


def _difference(own: Sequence[Tensor], got: Sequence[Tensor]) -> str | None:
    """What of two results differs by more than rounding, None when nothing does."""
    if len(own) != len(got):
        return f"{len(got)} result tensors instead of {len(own)}"
    for i, (expected, other) in enumerate(zip(own, got, strict=True)):
        if expected.shape != other.shape or expected.dtype != other.dtype:
            return f"result {i} is {other.dtype}{list(other.shape)}"
        if not expected.is_floating_point() or expected.numel() == 0:
            continue
        finite = torch.isfinite(expected)
        if not torch.equal(finite, torch.isfinite(other)):
            return f"result {i} is infinite or not a number in other places"
        scale = float(expected[finite].float().abs().max()) if bool(finite.any()) else 1.0
        error = float((expected.float() - other.float())[finite].abs().max()) if bool(finite.any()) else 0.0
        if not error <= _ROUNDING.get(expected.dtype, 0.1) * max(scale, 1e-6):
            return f"result {i} differs by {error:.2g}, its largest element is {scale:.2g}"
    return None


def check_known(program: GenericProgram, model: nn.Module) -> None:
    """:func:`self_check` on inputs that the model suggests, where a variant that is there serves them."""
    try:
        example = default_example(model)
    except InvalidInputError:
        return
    if program.serves(*example[0], **example[1]):
        self_check(program, model, example)


def _fresh(example: Example) -> Example:
    """The example out of new containers: a model may write into a cache that it is given."""
    flat = flatten(example)
    fresh: Example = unflatten(flat.spec, [t.clone() for t in flat.tensors], flat.counts)
    return fresh


def _differs(model: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the program of {type(model).__name__} does not give the model's numbers",
        reason=reason,
        remedy="please report this model with its configuration",
    )

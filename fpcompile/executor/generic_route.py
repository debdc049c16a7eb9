"""Compile by the generic route: example inputs of a model, the program, and its self-check."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fpcompile.errors import InvalidInputError
from fpcompile.executor.generic import GenericProgram
from fpcompile.executor.generic_check import Example, compare
from fpcompile.ir import Granularity
from fpcompile.models.generic_shapes import by_name
from fpcompile.passes.design import Design

_LENGTH = 37  # a size that no model dimension is likely to have


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
    ``verify`` compares this variant with the model, and every later one before it is used.

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
        verify=verify,
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
    """See :func:`compare`."""
    args, kwargs = example
    run = functools.partial(program, *args, **kwargs, max_blocking_ms=math.inf)
    rounds = program.backend != "eager"
    compare(model, program.device, example, run, which="the program", rounds=rounds)


def check_known(program: GenericProgram, model: nn.Module) -> None:
    """:func:`self_check` on inputs that the model suggests, where a variant that is there serves them."""
    try:
        example = default_example(model)
    except InvalidInputError:
        return
    if program.serves(*example[0], **example[1]):
        self_check(program, model, example)

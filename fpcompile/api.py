"""The compiler's entry point: :func:`segment`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from fpcompile.errors import InvalidInputError, UnknownNameError, UnsupportedModelError
from fpcompile.executor.generic import GenericProgram
from fpcompile.executor.generic_route import (
    check_known,
    compile_generic_program,
    exported_module,
    is_exported,
)
from fpcompile.executor.loading import load as load_program
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.program import Program, check_budget
from fpcompile.executor.rates import measured_rates
from fpcompile.executor.verify import self_check
from fpcompile.ir import Granularity
from fpcompile.models.ambient import tracing
from fpcompile.models.capture import capture
from fpcompile.passes.design import DESIGN_TOKENS, Design, default_rates
from fpcompile.passes.lower import BACKENDS, lower
from fpcompile.passes.lower_graphs import check_device
from fpcompile.passes.partition import Partitioned
from fpcompile.passes.pipeline import compile_packed

WEIGHTS = ("shared", "packed")
ROUTES = ("auto", "packed", "generic")
RATES = ("default", "measured")
KNOWN = {
    "granularity": tuple(str(g) for g in Granularity),
    "weights": WEIGHTS,
    "backend": BACKENDS,
    "route": ROUTES,
}
"""Legal values of the options of :func:`segment` that are names."""


def segment(
    model: nn.Module | ExportedProgram,
    *,
    granularity: str = "operator",
    route: str = "auto",
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    max_blocking_ms: float | None = None,
    strict_budget: bool = False,
    backend: str = "eager",
    weights: str = "shared",
    verify: bool = True,
    design_tokens: int | None = None,
    rates: str | None = None,
) -> Program:
    """Compile ``model`` into preemptible segments.

    The model is left as found and shares its weights with the program: changes in place are seen by later
    runs (not with ``weights="packed"``). A replaced weight, or a later change of its buffers, submodules,
    adapters, hooks or configuration, is an error when a run starts (docs/adapters.md). Forward hooks of the
    model are part of what is traced: they are called now, with fake tensors, and not in runs. A LoRA model of
    PEFT may be passed, and an ``ExportedProgram``.

    ``granularity``
        where the cuts are: ``"operator"`` (around attention, every projection and experts), ``"layer"``,
        ``"model"`` (none), or ``"auto"``: the fewest cuts with which every launch keeps ``max_blocking_ms``
        at ``design_tokens`` tokens (2048), and of these the ones with the fewest live bytes
        (:mod:`fpcompile.passes.auto`). Without a budget its cuts are those of ``"operator"``.
    ``rates``
        for ``"auto"``, what operators are priced by: ``"default"``, constants that give the same plan on
        every machine, or ``"measured"`` on this one.
    ``max_blocking_ms``
        milliseconds that bound the predicted time of every launch, whatever the prompt's length: small
        segments are launched together, long ones tile by tile. :class:`BudgetWarning` says where even the
        smallest tile takes longer; with ``strict_budget`` that is a :class:`BudgetError`. The device is
        measured for it, a few seconds at the first time (:mod:`fpcompile.executor.cost_cache`). None: one
        launch for each segment.
    ``route``
        ``"auto"`` packs sequences where the model is proven to allow it (:mod:`fpcompile.models.capture`),
        and else takes the model as it is (:mod:`fpcompile.models.generic`); ``"packed"`` and ``"generic"``
        ask for one.
    ``example_inputs``
        the arguments of one call (a mapping, a tuple or a tensor). Models whose inputs are not token ids
        need them, and with them the generic route is taken.
    ``dynamic_shapes``
        which of their sizes vary, in torch.export's conventions. Without it batch and lengths stay symbolic
        where the model allows, and other sizes get a graph of their own when first met.
    ``backend``
        ``"eager"`` calls the model's own operators. ``"inductor"`` compiles each distinct function between
        attention calls once, now, whatever the depth (seconds; needs a C++ compiler, on CUDA Triton); what it
        cannot compile stays eager and is named in ``explain()``. Fused code rounds differently: the model's
        numbers, not its bits. ``"cudagraphs"`` replays that code as CUDA graphs for up to 256 tokens at a
        time, padded to the next of a few lengths (packed route; a wide granularity gains more); the rest is
        eager.
    ``weights``
        ``"packed"`` keeps a second copy of linear weights in the layout of the CPU's bf16 kernel: the same
        bits, faster, above all for short prompts and tiles. It has no effect elsewhere.
    ``verify``
        run a self-check on the model's own weights: two short sequences, alone and packed, against the
        unmodified model. On the generic route the example, and for each later kind of call that is compiled
        the call itself: three forward passes each.

    Raises :class:`InvalidInputError` for something that is no evaluating model and for options that do not go
    together, :class:`UnknownNameError` for an unknown granularity, route, rates, weights or backend,
    :class:`UsageError` where the backend's compiler is missing, :class:`UnsupportedModelError` for a model
    that cannot be captured by the route.
    """
    if isinstance(model, ExportedProgram):
        model, own = exported_module(model)
        example_inputs = own if example_inputs is None else example_inputs
    _check_model(model)
    _check_names(granularity=granularity, weights=weights, backend=backend, route=route)
    _check_examples(route, example_inputs, dynamic_shapes)
    if backend == "cudagraphs":
        check_device({p.device for p in model.parameters() if not p.is_meta})
    options = _Options(
        granularity=Granularity(granularity),
        max_blocking_ms=max_blocking_ms,
        strict_budget=strict_budget,
        backend=backend,
        weights=weights,
        verify=verify,
        design=_design(model, granularity, max_blocking_ms, design_tokens, rates),
    )
    blocked: str | None = None
    if route != "generic" and example_inputs is None:
        try:
            return _packed(model, options)
        except UnsupportedModelError as refused:
            if route == "packed":
                raise
            blocked = f"{refused.reason} ({refused.where})" if refused.where else refused.reason
    return _generic(model, options, example_inputs, dynamic_shapes, blocked)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What a program of either route is asked for, checked. ``design``: what ``auto`` places cuts for."""

    granularity: Granularity
    max_blocking_ms: float | None
    strict_budget: bool
    backend: str
    weights: str
    verify: bool
    design: Design | None


def load(
    path: str | os.PathLike[str], model: nn.Module, *, verify: bool = True, trust_code: bool = False
) -> Program:
    """The program that :meth:`Program.save` wrote to the folder ``path``, for ``model``. Nothing is traced.

    The program has the fingerprint of the one that was saved and gives the same bits; checkpoints move
    between both. ``model`` must be as the one that it was compiled from: class, configuration, dtypes, shapes
    and device, and the versions of torch, transformers and fpcompile; weights may have other values.
    ``verify`` runs the self-check of :func:`segment`. ``trust_code`` loads the code that a program
    with ``backend="inductor"`` was saved with, which may do anything: only for a folder that nobody else
    can write. Without it those functions are compiled again.

    Raises :class:`ProgramFileError` where one of these differs, and for a damaged folder;
    :class:`InvalidInputError` for what is no model or no path; ``OSError`` where there is no such folder.
    """
    _check_model(model)
    with tracing(_device_type(model)):
        inner = _without_adapters(model)
        program, generated = load_program(path, inner, trust_code=trust_code, verify=verify)
        if verify and isinstance(generated, GenericProgram):
            check_known(generated, model)
        elif verify:
            self_check(generated, model)
    return program


def _device_type(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


def _design(
    model: nn.Module, granularity: str, max_blocking_ms: float | None, tokens: Any, rates: str | None
) -> Design | None:
    """What cuts are placed for; None for a preset and without a budget."""
    budget = check_budget(max_blocking_ms)
    if granularity != Granularity.AUTO:
        for name, given in (("design_tokens", tokens), ("rates", rates)):
            if given is not None:
                raise InvalidInputError(
                    f"{name} is of no use with granularity={granularity!r}",
                    expected="granularity='auto', or no such option",
                    got=f"{name}={given!r}",
                )
    if rates not in (None, *RATES):
        raise UnknownNameError("rates", rates, known=RATES)
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        raise InvalidInputError(
            "design_tokens has a wrong value", expected="a positive int", got=repr(tokens)
        )
    if granularity == Granularity.AUTO and budget is None and (rates is not None or tokens is not None):
        raise InvalidInputError(
            "design_tokens and rates say how a budget is met",
            expected="max_blocking_ms besides",
            got="granularity='auto' without a budget, whose cuts are those of 'operator'",
        )
    if granularity != Granularity.AUTO or budget is None:
        return None
    parameter = next(model.parameters(), None)
    device, dtype = (
        (torch.device("cpu"), torch.float32) if parameter is None else (parameter.device, parameter.dtype)
    )
    measure = rates == "measured" and device.type != "meta"
    found = measured_rates(device, dtype) if measure else default_rates(device.type, dtype)
    return Design(budget / 1e3, found, tokens or DESIGN_TOKENS)


def _packed(model: nn.Module, options: _Options) -> PackedProgram:
    """By the packed route; raises :class:`UnsupportedModelError` where that is not proven right."""
    with tracing(_device_type(model)):
        program = _compile_packed(model, options)
    if options.max_blocking_ms is not None and program.device.type != "meta":
        _ = program.costs  # measured now, not in the first run
    return program


def _compile_packed(model: nn.Module, options: _Options) -> PackedProgram:
    inner = _without_adapters(model)
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot take the packed route", reason="it is no transformers model"
        )
    captured = capture(inner)
    partitioned = compile_packed(
        captured, options.granularity, packed_weights=options.weights == "packed", design=options.design
    )
    budget: dict[str, Any] = {
        "max_blocking_ms": options.max_blocking_ms,
        "strict_budget": options.strict_budget,
    }
    program = PackedProgram(partitioned, captured.bindings, inner, **budget)
    if options.verify:  # generated code: other rounding may turn a choice of experts, and look like mixing
        self_check(program, model)
    if options.backend == "eager":
        return program
    functions = lower(partitioned.plan, partitioned.functions, options.backend, verify=options.verify)
    return PackedProgram(Partitioned(*functions), captured.bindings, inner, **budget)


def _generic(
    model: nn.Module, options: _Options, example_inputs: Any, dynamic_shapes: Any, blocked: str | None
) -> Program:
    """By the generic route; ``blocked`` is what stands in the way of the packed one."""
    with tracing(_device_type(model)):
        return compile_generic_program(
            model,
            granularity=options.granularity,
            max_blocking_ms=options.max_blocking_ms,
            strict_budget=options.strict_budget,
            example_inputs=example_inputs,
            blocked=blocked,
            verify=options.verify,
            dynamic_shapes=dynamic_shapes,
            backend=options.backend,
            design=options.design,
        )


def _without_adapters(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model whose adapters are layers of it (LoRA); else ``model``."""
    active = getattr(model, "active_peft_config", None)
    if active is None or active.is_prompt_learning:
        return model
    inner = model.get_base_model()  # type: ignore[operator]
    assert isinstance(inner, nn.Module)
    return inner


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            "model is not a model",
            expected="a transformers PreTrainedModel, such as AutoModelForCausalLM.from_pretrained(...), or "
            "another torch.nn.Module with example_inputs",
            got=type(model).__name__,
        )
    training = next((path for path, module in model.named_modules() if module.training), None)
    if training is not None and not is_exported(model):
        raise InvalidInputError(
            f"{f'the submodule {training}' if training else 'the model'} is in training mode",
            expected="a model in evaluation mode",
            remedy="call model.eval() first",
        )
    if any(p.is_inference() for p in model.parameters()):
        raise InvalidInputError(
            "the model's weights were made under torch.inference_mode()",
            expected="ordinary tensors",
            got="inference tensors, which cannot be traced",
            remedy="build or load the model outside torch.inference_mode()",
        )


def _check_names(**given: Any) -> None:
    """Raise :class:`UnknownNameError` for the first option that has no legal value."""
    for kind, name in given.items():
        if name not in KNOWN[kind]:
            raise UnknownNameError(kind, name, known=KNOWN[kind])


def _check_examples(route: str, example_inputs: Any, dynamic_shapes: Any) -> None:
    if dynamic_shapes is not None and example_inputs is None:
        raise InvalidInputError(
            "dynamic_shapes without example_inputs",
            expected="example_inputs, whose sizes dynamic_shapes speaks of",
            got="none",
        )
    if route == "packed" and example_inputs is not None:
        raise InvalidInputError(
            "example_inputs are for the generic route",
            expected="route='auto' or 'generic' with them, or none",
            got="route='packed'",
            remedy="leave out example_inputs: the packed route traces token ids of its own",
        )

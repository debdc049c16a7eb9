"""The compiler's entry point: :func:`segment`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fpcompile.errors import InvalidInputError, UnknownNameError
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.program import Program
from fpcompile.executor.verify import self_check
from fpcompile.ir import Granularity
from fpcompile.models.capture import capture
from fpcompile.passes.pipeline import compile_packed

BACKENDS = ("eager",)
WEIGHTS = ("shared", "packed")


def segment(
    model: PreTrainedModel,
    *,
    granularity: str = "operator",
    max_blocking_ms: float | None = None,
    backend: str = "eager",
    weights: str = "shared",
    verify: bool = True,
) -> Program:
    """Compile ``model`` into preemptible segments.

    ``granularity`` places the cuts: ``"operator"`` (around attention, every projection and experts),
    ``"layer"`` or ``"model"``. ``max_blocking_ms`` bounds the predicted time of every launch at any prompt
    length: small segments are launched together, long ones tile by tile; None means one launch for each
    segment. ``weights="packed"`` keeps a second copy of linear weights in the layout of the CPU's bf16
    kernel: the same bits, faster, above all for short prompts and tiles; it has no effect elsewhere.
    ``verify`` runs a self-check on the model's own weights: two short sequences, alone and packed, against
    the unmodified model. The model is left as found and shares its weights with the program.

    Raises :class:`InvalidInputError` for something that is no evaluating model, :class:`UnknownNameError` for
    an unknown granularity or backend, :class:`UnsupportedModelError` for a model that cannot be captured or
    is not proven token-wise.
    """
    _check_model(model)
    if granularity not in list(Granularity):
        raise UnknownNameError("granularity", granularity, known=[str(g) for g in Granularity])
    if weights not in WEIGHTS:
        raise UnknownNameError("weights", weights, known=WEIGHTS)
    if backend not in BACKENDS:
        raise UnknownNameError("backend", backend, known=BACKENDS)
    captured = capture(model)
    partitioned = compile_packed(captured, Granularity(granularity), packed_weights=weights == "packed")
    program = PackedProgram(partitioned, captured, max_blocking_ms=max_blocking_ms)
    if verify:
        self_check(program, model)
    return program


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        hint = "a torch module of another kind" if isinstance(model, nn.Module) else type(model).__name__
        raise InvalidInputError(
            "model is not a transformers model",
            expected="a transformers PreTrainedModel, such as AutoModelForCausalLM.from_pretrained(...)",
            got=hint,
        )
    if model.training:
        raise InvalidInputError(
            "the model is in training mode",
            expected="a model in evaluation mode",
            remedy="call model.eval() first",
        )

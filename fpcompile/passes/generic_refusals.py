"""Why a model cannot be traced by the generic route: the user's errors, with the model's own line.

Errors of torch.export never reach the user raw: they say which dimension, which line, and what to do.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

from fpcompile.errors import InvalidInputError, UnsupportedModelError
from fpcompile.models.draws import first_draw
from fpcompile.models.generic_shapes import Promises, readable
from fpcompile.models.generic_trace import Trace
from fpcompile.models.generic_tree import Flat


def breaks_promise(error: Exception) -> bool:
    """Whether torch.export refuses: a size that must vary became a constant, or has a wrong example."""
    return isinstance(error, ConstraintViolationError) or "Constraints violated" in str(error)


def broken_promise(
    model: nn.Module, error: Exception, trace: Trace, promised: Promises
) -> UnsupportedModelError | InvalidInputError:
    """The user's error for ``dynamic_shapes`` that the model or the examples do not allow."""
    said = readable(str(error), promised)
    if "not in range" in said:
        return InvalidInputError(
            "example_inputs do not fit dynamic_shapes",
            expected="sizes within the bounds of their torch.export.Dim, and larger than 1",
            got=said,
        )
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be traced with these dynamic_shapes",
        reason=said,
        module_path=trace.specialised or None,
        remedy="leave that dimension out of dynamic_shapes, or mark it with torch.export.Dim.AUTO: then each "
        "size that the model's code makes a constant gets a graph of its own",
    )


def given_up(
    model: nn.Module, flat: Flat, tensors: Sequence[Tensor], error: Exception
) -> UnsupportedModelError:
    """Why nothing worked: random numbers, when the model draws some, or what the last trace said."""
    draw = None if isinstance(error, UnsupportedModelError) else first_draw(model, flat, tensors)
    if draw is None:
        return explain(model, error)
    operator, stack = draw
    return draws_random_numbers(model, node=operator, line=_line_in(model, stack))


def draws_random_numbers(
    model: nn.Module, *, node: str, path: str = "", line: str | None
) -> UnsupportedModelError:
    """The user's error for a model whose results are drawn."""
    return UnsupportedModelError(
        f"{type(model).__name__} draws random numbers while it runs",
        reason="it draws random numbers, which a graph cannot repeat, and no submodule around them can be "
        "opaque",
        node=node,
        module_path=path or None,
        source_line=line or None,
        remedy="draw them outside the model, or move the drawing into a small submodule of its own",
    )


def reads_what_was_left(model: nn.Module, path: str) -> UnsupportedModelError:
    """The user's error for a call that goes on from a tensor that an earlier call left in the model."""
    return UnsupportedModelError(
        f"{type(model).__name__} keeps a state in its modules: a program cannot go on from it",
        reason=f"a call with a cache reads {path}, which the call before assigned; runs of a program leave "
        "nothing in the model",
        module_path=path,
        remedy="pass what is computed from it (position_ids, for multimodal positions), call without a "
        "cache, or generate with the model itself",
    )


def explain(model: nn.Module, error: Exception) -> UnsupportedModelError:
    """The user's error for a failed trace: the model's line, and what was said there."""
    if isinstance(error, UnsupportedModelError):
        return error
    if isinstance(error, AssertionError) and str(error).startswith("Guard failed: "):
        return UnsupportedModelError(
            "the exported program does not take inputs of this shape",
            reason=f"torch.export fixed {readable(str(error).removeprefix('Guard failed: '), {})}",
            remedy="export it with dynamic_shapes that leave this size free, or call it with what it takes",
        )
    reason = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
    reason = f"{type(error).__name__}: {reason[:300]}"
    if isinstance(error, GuardOnDataDependentSymNode):
        reason = f"a decision in the model's code depends on activations ({reason})"
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be traced",
        reason=reason,
        source_line=_line_of(model, error),
        remedy="see docs/adapters.md: move the line into a submodule of its own, or report the model with "
        "its coverage row",
    )


def _line_of(model: nn.Module, error: Exception) -> str | None:
    """The innermost line of the model's own source that an error went through."""
    return _line_in(model, traceback.extract_tb(error.__traceback__))


def _line_in(model: nn.Module, stack: traceback.StackSummary) -> str | None:
    """The innermost line of the model's own source in a stack."""
    homes = {getattr(sys.modules.get(type(m).__module__), "__file__", None) for m in model.modules()}
    torch_home = os.path.dirname(torch.__file__)
    files = {f for f in homes if f and not f.startswith(torch_home)}
    for frame in reversed(stack):
        if frame.filename in files:
            return f"{os.path.basename(frame.filename)}:{frame.lineno}: {frame.line}"
    return None

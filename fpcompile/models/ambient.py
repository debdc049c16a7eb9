"""Torch's ambient state: what a caller has switched on must not change what is traced or computed.

Nor must a trace in one thread change what is computed in another. torch.export raises flags of the whole
process, by which transformers builds masks and chooses kernels, and switches oneDNN, NNPACK and cuDNN off for
the whole process, by which torch chooses them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import torch.export._trace

# The tracer's modes and the registries that it is given are the process's: one trace at a time.
_TRACING = threading.RLock()
_NOTHING = contextlib.nullcontext()
_FLAGS: Final = ("is_compiling", "is_exporting")

_EXPORTER: Final[Any] = torch.export._trace

without_kernel_choice: Final[Callable[[], contextlib.AbstractContextManager[None]]] = (
    _EXPORTER._ignore_backend_decomps
)
"""oneDNN, NNPACK and cuDNN are off, for the whole process: for traces that cannot be made with them."""


def is_plain(device_type: str) -> bool:
    """Whether the caller has switched nothing on that :func:`plain` would switch off."""
    return not (torch.is_grad_enabled() or torch.is_inference_mode_enabled() or _casts(device_type))


def plain(device_type: str) -> contextlib.AbstractContextManager[None]:
    """No gradients, no autocast, no inference mode, whatever the caller has set; cheap where none is on."""
    return _NOTHING if is_plain(device_type) else _made_plain(device_type)


def _casts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


@contextlib.contextmanager
def _made_plain(device_type: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if _casts(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def tracing(device_type: str) -> Iterator[None]:
    """As :func:`plain`, and one thread at a time; no other thread sees that there is a trace."""
    with _TRACING, _unseen(), plain(device_type):
        yield


@contextlib.contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """The random numbers that torch draws behind it, on the CPU and on ``device``, are those that it would
    have drawn without what is inside: a model may set a seed, or draw. What other threads draw meanwhile
    from the same generators is drawn once more.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """``torch.compiler.is_compiling()`` and its like are answered for this thread and denied in all others.

    Kernels stay on: a trace records the operators that choose between them, not what they chose, and the
    arguments of the model's own calls that allow cuDNN.
    """
    patches: list[tuple[Any, str, Any]] = [
        (torch.compiler, name, _only_here(getattr(torch.compiler, name))) for name in _FLAGS
    ]
    patches.append((_EXPORTER, "_ignore_backend_decomps", contextlib.nullcontext))
    found = [(module, name, getattr(module, name)) for module, name, _ in patches]
    for module, name, other in patches:
        setattr(module, name, other)
    try:
        yield
    finally:
        for module, name, own in found:
            setattr(module, name, own)


def _only_here(function: Callable[[], bool]) -> Callable[[], bool]:
    here = threading.get_ident()
    return lambda: threading.get_ident() == here and function()

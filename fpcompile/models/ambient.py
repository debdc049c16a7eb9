"""Torch's ambient state: what a caller has switched on must not change what is traced or computed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

# The tracer's modes and the registries that it is given are the process's: one trace at a time.
_TRACING = threading.RLock()
_NOTHING = contextlib.nullcontext()


def plain(device_type: str) -> contextlib.AbstractContextManager[None]:
    """No gradients, no autocast, no inference mode, whatever the caller has set; cheap where none is on."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or _casts(device_type):
        return _made_plain(device_type)
    return _NOTHING


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
    """As :func:`plain`, and one thread at a time."""
    with _TRACING, plain(device_type):
        yield

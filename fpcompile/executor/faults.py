"""Exceptions inside a segment: made into a :class:`SegmentError` that names node and source line, and whether
memory ran out.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from fpcompile.errors import SegmentError
from fpcompile.ir import Part, Segment

_T = TypeVar("_T")


def segment_error(segment: Segment, part: Part, names: tuple[str, ...], error: Exception) -> SegmentError:
    """``names`` are the generated function's local names of the part's nodes, in order."""
    index = _failed_node(names, error)
    node, source = part.nodes[index] if index is not None else part.nodes[-1]
    return SegmentError(
        f"{segment.index} ({segment.name})",
        cause=error,
        node=node,
        module_path=source.module or None,
        source_line=source.line or None,
    )


def _failed_node(names: tuple[str, ...], error: Exception) -> int | None:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith("<eval_with_key>") and frame.line:
            name = frame.line.split("=", 1)[0].split(":", 1)[0].strip()
            if name in names:
                return names.index(name)
    return None


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation that failed, on the host or on the device, is the error or its cause.

    The host's allocator of torch has no class of its own for it, only a message.
    """
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if type(error) is RuntimeError and "DefaultCPUAllocator" in str(error):
            return True
        error = error.__cause__
    return False


def forget_frames(error: BaseException | None) -> None:
    """Drop the local variables of the frames that ``error`` came through: they hold tensors of its run."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__


def unless_out_of_memory(work: Callable[[], _T]) -> _T | None:
    """What ``work()`` returns; None where memory ran out, and then nothing is held of the attempt."""
    try:
        return work()
    except Exception as error:
        if not out_of_memory(error):
            raise
        forget_frames(error)
        return None

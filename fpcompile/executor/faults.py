"""Turn an exception inside a segment into a :class:`SegmentError` that names node and source line."""

from __future__ import annotations

import traceback

from fpcompile.errors import SegmentError
from fpcompile.ir import Part, Segment


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

"""Parts replayed as CUDA graphs: inputs are copied into the graph's memory, results out of it.

A graph reads and writes the addresses that it was captured with. Runs come and go and are paused in
between, so no value of a run may lie there: a replay copies the inputs in, and the results out before
anybody else replays. Weights stay where they are. All graphs of a program share one pool of memory and are
replayed one at a time.

Words: a *recorder* captures and replays graphs of one device. Everything but :class:`CudaRecorder` runs on
any device, so that buckets, padding and copies are tested without a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, final

import torch
from torch import Tensor

from fpcompile.executor.stages import Executable
from fpcompile.ir import Part
from fpcompile.passes.codegen import Function

if TYPE_CHECKING:
    from fpcompile.executor.run import Run


class Recorder(Protocol):
    """Captures graphs of one device. ``replaying()`` keeps others from replaying."""

    def capture(self, call: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """(replay, results that a replay overwrites). Raises RuntimeError for what cannot be captured."""

    def replaying(self) -> Any:
        """A context in which this thread alone copies and replays, behind what others have replayed."""


@final
class CudaRecorder:
    """CUDA graphs out of one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()

    def capture(self, call: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """See :class:`Recorder`. Kernels are chosen and loaded in two runs before."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                call()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = call()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return graph.replay, results

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """See :class:`Recorder`."""
        with self._lock:
            torch.cuda.current_stream(self._device).wait_event(self._last)
            yield
            self._last.record()


def make_recorder(device: torch.device) -> Recorder:
    """The recorder of a device."""
    return CudaRecorder(device)


@final
class Graphs:
    """The graphs of a program; ``notes`` names the parts that could not be captured."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorder: Recorder | None = None
        self._failed: dict[str, list[str]] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each reason."""
        return tuple(
            f"backend cudagraphs: the code of {names[0]}"
            + (f" and of {len(names) - 1} more parts" if len(names) > 1 else "")
            + f" stays eager: {reason}"
            for reason, names in self._failed.items()
        )

    def step(
        self, part: Part, function: Function, weights: Sequence[Tensor], eager: Executable
    ) -> Executable:
        """``eager``, or replays of graphs where the length has a bucket; captured now."""
        if self._recorder is None:
            self._recorder = make_recorder(self._device)
        recorder = self._recorder
        try:
            graphs = {
                bucket: _capture(recorder, part, function, weights, bucket)
                for bucket in sorted(function.buckets, reverse=True)  # the pool grows to the largest first
            }
        except RuntimeError as error:
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            self._failed.setdefault(f"it cannot be captured ({said[:200]})", []).append(part.name)
            return eager
        inner, outer = part.axes

        def execute(run: Run, arguments: list[Tensor], lengths: Mapping[str, int]) -> Sequence[Tensor]:
            length = lengths[part.over]
            bucket = bucket_of(length, function.buckets)
            if bucket is None:
                return eager(run, arguments, lengths)
            places, replay, results = graphs[bucket]
            with recorder.replaying():
                for place, axis, value in zip(places, inner, arguments, strict=True):
                    (place if axis < 0 else place.narrow(axis, 0, length)).copy_(value)
                arguments.clear()
                replay()
                return tuple(
                    (found if axis < 0 else found.narrow(axis, 0, length)).clone()
                    for found, axis in zip(results, outer, strict=True)
                )

        return execute


def bucket_of(length: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket that holds ``length``, None where there is none."""
    return min((b for b in buckets if b >= length), default=None)


def _capture(
    recorder: Recorder, part: Part, function: Function, weights: Sequence[Tensor], bucket: int
) -> tuple[list[Tensor], Callable[[], None], Sequence[Tensor]]:
    """Memory for the inputs, the replay, and the results, at ``bucket`` tokens or rows."""
    places = [_place(node.meta["val"], bucket) for node in function.inputs[: len(part.inputs)]]
    lengths = [bucket for _ in part.lengths]

    def call() -> Sequence[Tensor]:
        return function.call([*places, *weights, *lengths])

    replay, results = recorder.capture(call)
    return places, replay, results


def _place(like: Tensor, bucket: int) -> Tensor:
    """Zeros of the shape, strides and dtype of a fake tensor whose lengths are all ``bucket``."""

    def at(size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expr = size.node.expr
        return int(expr.subs(dict.fromkeys(expr.free_symbols, bucket)))

    sizes, strides = [at(s) for s in like.shape], [at(s) for s in like.stride()]
    return torch.empty_strided(sizes, strides, dtype=like.dtype, device=like.device).zero_()

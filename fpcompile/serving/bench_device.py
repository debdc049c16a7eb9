"""The load generator of a measurement: sends requests on time to an engine in another process.

:class:`RealDevice` starts the process of :mod:`bench_worker` on one core and stays on another itself. Its
arrivals are the planned ones, whether or not the sending was late, so that the generator's own delay counts
as the system's (open loop). Use it as a context manager: the process ends with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Self

from fpcompile.errors import UsageError
from fpcompile.scheduler.costs import CostTable
from fpcompile.scheduler.events import Request
from fpcompile.serving.bench_worker import Plan, Record, serve

__all__ = ["RealDevice"]

_LEAD_S = 0.05  # from the start of a measurement to its first arrival


class RealDevice:
    """An engine in a process of its own; ``path``: a model's folder, None for the built-in one."""

    def __init__(self, path: str | None) -> None:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._mine: int | None = cores[-1] if len(cores) > 1 else None
        core = cores[0] if len(cores) > 1 else None
        self._before = set(cores)
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, path, core)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.pinned = core is not None

    def __enter__(self) -> Self:
        if self._mine is not None:
            os.sched_setaffinity(0, {self._mine})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
        if self._mine is not None:
            os.sched_setaffinity(0, self._before)

    def _ask(self, *message: Any) -> Any:
        """Send a message and wait for its answer; raises :class:`UsageError` with what the child says."""
        self._send(*message)
        try:
            error, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise _ended(message) from None
        if error is not None:
            raise UsageError("the engine refused", got=error)
        return answer

    def _send(self, *message: Any) -> None:
        try:
            self._pipe.send(message)
        except ConnectionError:
            raise _ended(message) from None

    def describe(self) -> dict[str, Any]:
        """Name, parameters and type of the model."""
        answer: dict[str, Any] = self._ask("describe")
        return answer

    def prepare(self, plan: Plan, longest: int) -> CostTable:
        """Compile the program of a plan, for prompts of at most ``longest`` tokens: its cost table."""
        answer: CostTable = self._ask("prepare", plan, longest)
        return answer

    def alone(self, plan: Plan, lengths: Sequence[int], repeats: int = 7) -> dict[int, float]:
        """Isolated TTFT: median seconds of prompts of these lengths that find the engine idle."""
        answer: dict[int, float] = self._ask("alone", plan, list(lengths), repeats)
        return answer

    def busy(self, plan: Plan, lengths: Sequence[int], repeats: int = 7) -> dict[int, float]:
        """Occupancy: median seconds from one end to the next, in a backlog of all these lengths."""
        answer: dict[int, float] = self._ask("busy", plan, list(lengths), repeats)
        return answer

    def serve(
        self, plan: Plan, policy: str, requests: Sequence[Request], options: dict[str, Any]
    ) -> tuple[list[Record], list[float], float]:
        """Serve ``requests`` (arrivals from 0): records, blocking times, and the most a sending was late.

        Raises :class:`UsageError` when the engine's process has ended.
        """
        self._ask("engine", plan, policy, options)
        start = time.monotonic() + _LEAD_S
        worst = 0.0
        for request in requests:
            at = start + request.arrival
            self._sleep_until(at)
            worst = max(worst, time.monotonic() - at)
            slo = request.deadline - request.arrival
            self._send("submit", request.id, request.klass, request.tokens, at, slo, request.priority)
        records, blocking = self._ask("collect")
        return records, blocking, worst

    @staticmethod
    def _sleep_until(at: float) -> None:
        left = at - time.monotonic()
        if left > 0:
            time.sleep(left)


def _ended(message: tuple[Any, ...]) -> UsageError:
    return UsageError(
        "the engine's process has ended",
        got=f"message {message[0]!r}",
        remedy="see what it wrote to stderr; it may have run out of memory",
    )

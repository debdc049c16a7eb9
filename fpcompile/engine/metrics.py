"""What is known about one request: :class:`RequestMetrics`, a frozen snapshot of its :class:`Ticket`.

Words
    *queued*     from arrival to the first launch.
    *suspended*  from being stopped to being launched again, summed over all preemptions.
    *executed*   on the device, between launches and stops, by the host's clock; of what it shared with
                 others, all of it.
    *TTFT*       from arrival to the first token; of a request that does not generate, to the result.
    *TBT*        time between two tokens.

All times are seconds on the engine's clock. A ticket is written by the engine's driver only; snapshots may be
taken from any thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fpcompile.engine.handle import Handle
from fpcompile.engine.memory_facts import NOTHING, Prompt
from fpcompile.scheduler.events import Request

if TYPE_CHECKING:
    from fpcompile.engine.generation import FinishReason, Generation
    from fpcompile.engine.loads import Load
    from fpcompile.executor.device import Event

__all__ = ["Ended", "RequestMetrics", "RequestState", "Ticket"]

Ended = Literal["completed", "cancelled", "rejected", "failed"]
RequestState = Literal[
    "waiting", "running", "paused", "decoding", "completed", "cancelled", "rejected", "failed"
]


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """A snapshot of one request; what has not happened yet is None.

    ``ttft_slo`` and ``deadline`` are inf without a promise. ``predicted_ttft`` is the time that the prompt
    was predicted to take on an idle device. ``preempted_by`` names the requests that got the device, one per
    preemption, ``packed_with`` those with whom it shared a launch. ``numerics``: ``bits`` when the result is
    that of the request alone to the bit, ``tolerance`` when it shared a launch, was sliced or began behind a
    cached prefix, so that kernels ran at other lengths. ``reused_tokens``: tokens of that prefix.
    ``offloads``: how often it was moved to host memory, ``recomputations``: how often what it had computed
    was dropped and computed again: with the same bits while its prompt was executed, to rounding when it
    decoded. ``slo_met`` is None without a promise, before the
    end, and for cancelled requests.

    Of a request that generates, ``slo_met`` is about its first token. ``tokens_out`` are the tokens so far;
    ``finish_reason`` is ``stop`` behind an end-of-sequence token, ``length`` at ``max_new_tokens``.
    """

    request_id: str
    program: str
    tenant: str
    slo_class: str
    priority: int
    tokens: int
    state: RequestState
    arrival: float
    deadline: float
    ttft_slo: float
    predicted_ttft: float
    started: float | None
    ended: float | None
    queued: float | None
    ttft: float | None
    suspended: float
    executed: float
    preemptions: int
    preempted_by: tuple[str, ...]
    packed_with: tuple[str, ...]
    slo_met: bool | None
    numerics: Literal["bits", "tolerance"]
    tokens_out: int
    finish_reason: FinishReason | None
    tbt_slo: float | None
    tbt_max: float | None
    tbt_mean: float | None
    reused_tokens: int
    offloads: int
    recomputations: int


class Ticket:
    """The engine's record of one request, from submission to its end."""

    __slots__ = (
        "_launched", "_stopped", "budget", "ended", "executed", "generation", "handle", "id", "load",
        "offloads", "packed_with", "predicted", "preempted_by", "preemptions", "program",
        "prompt", "ready", "recomputations", "request", "reused_tokens", "run", "seated", "shared", "started",
        "state", "suspended", "timed_out", "timeout",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        *,
        program: str,
        run: Any,
        handle: Handle,
        predicted: float,
        budget: float | None = None,
        timeout: float = math.inf,
        generation: Generation | None = None,
        prompt: Prompt = NOTHING,
    ) -> None:
        self.request = request
        self.id = request.id
        """The request id."""
        self.program = program
        self.run = run
        """The run, and behind the prompt of a generation that; dropped (None) when the request ends."""
        self.generation = generation
        """Its tokens, if it generates."""
        self.handle = handle
        self.predicted = predicted
        """Device seconds that the program's cost model says, without what the engine has learnt."""
        self.budget = budget
        """``max_blocking_ms`` of this request, if it has one of its own."""
        self.timeout = timeout
        """Seconds after its arrival by which it ends, in whatever way; inf for any time."""
        self.timed_out = False
        """Whether it is being withdrawn for that."""
        self.load: Load | None = None
        """What it was launched in, while that lives."""
        self.state: RequestState = "waiting"
        self.ready: Event | None = None
        """On asynchronous devices: when the caller's stream has the inputs."""
        self.started: float | None = None
        self.ended: float | None = None
        self.suspended = 0.0
        self.shared = False
        """Whether it was executed in slices, or with others."""
        self.executed = 0.0
        self.preemptions = 0
        self.preempted_by: list[str] = []
        self.packed_with: dict[str, None] = {}
        """Names of those with whom it shared a launch, in order."""
        self.prompt = prompt
        """What it asks of the pool of cache blocks."""
        self.reused_tokens = self.offloads = self.recomputations = 0
        self.seated = False
        """Whether its run has what it needs to be launched."""
        self._launched = 0.0
        self._stopped = 0.0

    def launched(self, now: float, together: Sequence[Ticket] = ()) -> None:
        """The device goes on with it, and with whoever else is in ``together``."""
        if len(together) > 1:
            self.packed_with.update((other.id, None) for other in together if other is not self)
        if self.started is None:
            self.started = now
        else:
            self.suspended += now - self._stopped
        self.state, self._launched = "running", now

    def stopped(self, now: float) -> None:
        """The device is free of it again."""
        self.executed += now - self._launched
        self._stopped = now

    def lent(self, start: float, now: float) -> None:
        """Between ``start`` and ``now`` the device was not its own: decode steps had it."""
        self._launched += now - max(start, self._launched)

    def prefilled(self, generation: Generation) -> None:
        """Its prompt is done; from now on it is continued by decode steps."""
        self.state, self.run, self.load = "decoding", generation, None

    def gave_way(self, now: float) -> None:
        """It decoded, and has no cache now: that is on the host, or dropped."""
        self.state, self._stopped = "paused", now

    def came_back(self, now: float) -> None:
        """It decodes again."""
        self.state = "decoding"
        self.suspended += now - self._stopped

    def renewed(self, run: Any, prompt: Prompt, predicted: float) -> None:
        """Its cache is computed again, by another run."""
        self.run, self.load, self.prompt, self.predicted = run, None, prompt, predicted
        self.ready, self.seated, self.shared = None, False, True
        self.reused_tokens = 0  # of the other prompt

    def paused(self, by: str | None) -> None:
        """It gave way to ``by``."""
        self.state = "paused"
        self.preemptions += 1
        if by is not None:
            self.preempted_by.append(by)

    def rested(self) -> None:
        """It waits for its next slice; nobody preempted it."""
        self.state = "paused"

    @property
    def paused_since(self) -> float | None:
        """When it was stopped, while it is paused."""
        return self._stopped if self.state == "paused" else None

    def end(self, outcome: Ended, now: float) -> None:
        """It has ended; its tensors are the caller's to drop."""
        if self.state == "paused":
            self.suspended += now - self._stopped
        self.state, self.ended = outcome, now
        self.run = self.load = None
        if self.generation is not None:
            self.generation.release()

    def snapshot(self) -> RequestMetrics:
        """The metrics so far."""
        request, state, ended, started = self.request, self.state, self.ended, self.started
        generation = self.generation
        first = generation.first if generation is not None else ended if state == "completed" else None
        promised = math.isfinite(request.deadline)
        ttft = None if first is None else first - request.arrival
        met: bool | None = None
        if promised and state in ("completed", "rejected", "failed"):
            met = state == "completed" and first is not None and first <= request.deadline
        return RequestMetrics(
            request_id=request.id,
            program=self.program,
            tenant=request.tenant,
            slo_class=request.klass,
            priority=request.priority,
            tokens=request.tokens,
            state=state,
            arrival=request.arrival,
            deadline=request.deadline,
            ttft_slo=request.slo,
            predicted_ttft=request.cost,
            started=started,
            ended=ended,
            queued=None if started is None else started - request.arrival,
            ttft=ttft,
            suspended=self.suspended,
            executed=self.executed,
            preemptions=self.preemptions,
            preempted_by=tuple(self.preempted_by),
            packed_with=tuple(self.packed_with),
            slo_met=met,
            numerics="tolerance" if self.shared or self.reused_tokens else "bits",
            tokens_out=0 if generation is None else len(generation.tokens),
            finish_reason=None if generation is None else generation.finish_reason,
            tbt_slo=None if generation is None else generation.tbt_slo,
            tbt_max=None if generation is None else generation.tbt_max,
            tbt_mean=None if generation is None else generation.tbt_mean,
            reused_tokens=self.reused_tokens,
            offloads=self.offloads,
            recomputations=self.recomputations,
        )

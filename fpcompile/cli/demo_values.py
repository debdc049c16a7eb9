"""What the demonstration is asked for, and what it found: frozen values; times in seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from fpcompile.cli.bits import Bits
from fpcompile.cli.interleave import Spread
from fpcompile.engine.timeline import Mark, Span

__all__ = ["DemoOptions", "DemoResult", "Outcome", "PolicyRun", "Prompt"]


@dataclasses.dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line asks for. ``urgent_slo`` in seconds; None: as
    :meth:`fpcompile.cli.demo_times.Speed.urgent_slo` finds it.

    With ``max_blocking_ms`` segments run in tiles, by other kernels than the model's: bits may then differ.
    """

    model: str
    long_tokens: int = 4096
    urgent_tokens: int = 64
    policy: str = "s-edf"
    granularity: str = "operator"
    device: str = "auto"
    output: Path = Path()
    urgent_slo: float | None = None
    max_blocking_ms: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One request: ``offset`` is its arrival after the long one's, ``alone`` the unmodified model's time.

    ``ids [1, tokens]``; ``expected`` is the unmodified model's output. All times in seconds.
    """

    name: str
    ids: torch.Tensor
    offset: float
    slo: float
    alone: float
    expected: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request: times in seconds, and its bits against the unmodified model's."""

    name: str
    ttft: float
    met: bool
    waited: float
    suspended: float
    preemptions: int
    bits: Bits


@dataclasses.dataclass(frozen=True, slots=True)
class PolicyRun:
    """One policy: outcomes in order of arrival, blocking times in seconds, and what ran when."""

    policy: str
    outcomes: tuple[Outcome, ...]
    blocking: tuple[float, ...]
    spans: tuple[Span, ...]
    marks: tuple[Mark, ...]

    @property
    def long(self) -> Outcome:
        """The long request."""
        return self.outcomes[0]

    @property
    def urgent(self) -> tuple[Outcome, ...]:
        """The urgent requests."""
        return self.outcomes[1:]


@dataclasses.dataclass(frozen=True, slots=True)
class DemoResult:
    """All that the tables show. ``versus`` is segmented / unmodified, ``control`` unmodified / itself."""

    title: str
    segments: int
    compile_seconds: float
    prompts: tuple[Prompt, ...]
    runs: tuple[PolicyRun, ...]
    versus: Spread
    control: Spread
    versus_tokens: int

    @property
    def bits_equal(self) -> bool:
        """Whether every result of every run has the unmodified model's bits."""
        return all(outcome.bits.equal for run in self.runs for outcome in run.outcomes)

    @property
    def slowdown(self) -> float:
        """Time to first token of the long request: last policy / first policy."""
        return self.runs[-1].long.ttft / self.runs[0].long.ttft

    def slos(self) -> dict[str, float]:
        """TTFT SLO of every request in seconds."""
        return {prompt.name: prompt.slo for prompt in self.prompts}

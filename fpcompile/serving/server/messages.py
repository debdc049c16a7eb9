"""What front and worker say to each other: frozen values of plain data, pickled over a private pipe.

The front sends :class:`Generate`, :class:`Embed`, :class:`Cancel`, :class:`Ask` and :class:`Close`. The
worker sends :class:`Ready` or :class:`Unready` once; then :class:`Fresh` tokens, and for each request exactly
one of :class:`Ended` and :class:`Refused`. An :class:`Embed` that ends well has its vector in ``Ended``.
All times are seconds, points in time on the machine's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "Answer",
    "Ask",
    "Cancel",
    "Close",
    "Embed",
    "Ended",
    "Facts",
    "Fresh",
    "Generate",
    "Kind",
    "Ready",
    "Record",
    "Refused",
    "Sampling",
    "Terms",
    "Unready",
]

Kind = Literal["generate", "embed"]
Subject = Literal["statistics", "health", "pause", "resume"]
RefusedBecause = Literal["invalid", "full", "closed", "rejected", "timeout", "failed"]


@dataclass(frozen=True, slots=True)
class Terms:
    """What is promised, and to whom: ``ttft_slo`` and ``tbt_slo`` None when nothing is.

    ``min_tbt``: who is promised nothing between tokens gets no more than who asks for this; 0 for no floor.
    ``timeout``: seconds from ``arrival`` in which the request must have ended; None for any time.
    """

    arrival: float
    ttft_slo: float | None = None
    tbt_slo: float | None = None
    tenant: str = ""
    slo_class: str | None = None
    timeout: float | None = None
    min_tbt: float = 0.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; None leaves it to the model's generation config. ``temperature`` 0 is greedy."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Generate:
    """Continue ``ids`` (an array, which is pickled as bytes) by at most ``max_new_tokens`` tokens."""

    id: str
    program: str
    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    terms: Terms


@dataclass(frozen=True, slots=True)
class Embed:
    """The vector of ``ids``."""

    id: str
    program: str
    ids: Sequence[int]
    terms: Terms


@dataclass(frozen=True, slots=True)
class Cancel:
    """End this request at the next cut. Void when it has ended."""

    id: str


@dataclass(frozen=True, slots=True)
class Ask:
    """A question about the engine, or an order to it; answered by :class:`Answer` of the same number."""

    number: int
    about: Subject


@dataclass(frozen=True, slots=True)
class Close:
    """End the engine now: what is live is cancelled."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the front must know of a model: its limits in tokens, the width of its vectors."""

    kind: Kind
    vocabulary: int
    max_tokens: int | None
    width: int | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """Models are loaded, compiled and warm."""

    models: Mapping[str, Facts]


@dataclass(frozen=True, slots=True)
class Unready:
    """The worker could not start; it ends."""

    reason: str


@dataclass(frozen=True, slots=True)
class Fresh:
    """Tokens made since the last message, by request."""

    tokens: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """What the engine knows of a request that has ended; None is what has not happened. Seconds."""

    state: str
    arrival: float
    ended: float | None
    queued: float | None
    ttft: float | None
    suspended: float
    executed: float
    predicted: float
    preemptions: int
    slo_met: bool | None
    numerics: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A request has ended well, or was cancelled (``finish_reason`` None).

    ``vector``: little-endian float32, of an :class:`Embed`.
    """

    id: str
    finish_reason: str | None
    record: Record
    vector: bytes | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A request has ended without a result; ``retry_after`` in seconds when coming again helps."""

    id: str
    because: RefusedBecause
    message: str
    retry_after: float | None = None
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """To an :class:`Ask`: plain data, or why there is none."""

    number: int
    value: Any
    error: str | None = None

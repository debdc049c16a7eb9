"""A worker in which things fail.

Prompts of 13 tokens fail in their third launch, the policy for the tenant "brittle"; prompts of 14 tokens
have no first token, those of 15 no fourth one; and files may grow no longer than :data:`ROOM` bytes, as on a
disk that is full then.
"""

from __future__ import annotations

import resource
from typing import Any

import torch
from transformers import LogitsProcessorList

from fpcompile.errors import SegmentError
from fpcompile.executor.run import Run
from fpcompile.scheduler.job import RequestView
from fpcompile.scheduler.policies.orders import Edf
from fpcompile.scheduler.policy import register
from fpcompile.serving.server import build as builder
from fpcompile.serving.server.messages import Sampling
from fpcompile.serving.server.sampling import processors_for
from fpcompile.serving.server.settings import EngineSettings

__all__ = ["FAILING", "HOPELESS", "HOPELESS_LATER", "ROOM", "Brittle", "build"]

FAILING = 13
HOPELESS = 14
HOPELESS_LATER = 15
ROOM = 4096


@register("test-brittle")
class Brittle(Edf):
    """Raises when it is asked about one tenant."""

    def key(self, view: RequestView, now: float) -> float:
        if view.request.tenant == "brittle":
            raise ZeroDivisionError("a policy's defect")
        return super().key(view, now)


def build(settings: EngineSettings) -> builder.EngineBackend:
    """As the server builds it; then runs begin to fail."""
    backend = builder.build(settings)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
    step = Run.step

    def failing(run: Run) -> None:
        if run.tokens == FAILING and run.at == 2:
            raise SegmentError("2 (mlp)", cause=RuntimeError("a model's defect"))
        step(run)

    Run.step = failing  # type: ignore[method-assign, assignment]
    builder.processors_for = hopeless  # type: ignore[attr-defined]
    return backend


def hopeless(asked: Sampling, prompt: int) -> LogitsProcessorList:
    """As the server's own, and then no token is left."""
    processors = processors_for(asked, prompt)
    last = {HOPELESS: prompt, HOPELESS_LATER: prompt + 3}.get(prompt)

    def none(input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        return scores if input_ids.shape[1] < (last or 0) else torch.full_like(scores, -torch.inf)

    if last is not None:
        processors.append(none)
    return processors

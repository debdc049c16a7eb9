"""A worker in which things fail.

Prompts of 13 tokens fail in their third launch, the policy for the tenant "brittle"; and files may grow no
longer than :data:`ROOM` bytes, as on a disk that is full then.
"""

from __future__ import annotations

import resource

from fpcompile.errors import SegmentError
from fpcompile.executor.run import Run
from fpcompile.scheduler.job import RequestView
from fpcompile.scheduler.policies.orders import Edf
from fpcompile.scheduler.policy import register
from fpcompile.serving.server import build as builder
from fpcompile.serving.server.settings import EngineSettings

__all__ = ["FAILING", "ROOM", "Brittle", "build"]

FAILING = 13
ROOM = 4096


@register("brittle")
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
    return backend

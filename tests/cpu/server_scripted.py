"""A worker without models: what becomes of a request is written in its first token.

``options["well"]``: what the engine's health is; ``options["broken"]``: questions that raise.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fpcompile.errors import RequestRejectedError
from fpcompile.serving.server.messages import Embed, Facts, Generate
from fpcompile.serving.server.settings import EngineSettings

__all__ = ["FIRST", "QUICK", "REJECTED", "STUCK", "build", "never"]

QUICK = 1
"""Gives all of its tokens."""
FIRST = 2
"""Gives one token, and then none."""
STUCK = 3
"""Gives nothing, and does not hear that it is cancelled; predicted to take :data:`PREDICTED` seconds."""
REJECTED = 4
"""Is refused, as the scheduler does."""
PREDICTED = 7.0
LETTER = ord("A")


class Handle:
    """Of one request."""

    def __init__(self, ask: Generate) -> None:
        self._what, self._count = ask.ids[0], ask.max_new_tokens  # other tokens are as QUICK
        self._made = 0

    def add_token_callback(self, callback: Callable[[int], object]) -> None:
        most = {STUCK: 0, FIRST: 1}.get(self._what, self._count)
        while self._made < min(most, self._count):
            self._made += 1
            callback(LETTER - 33)  # the byte tokenizer's id of "A"

    def __await__(self) -> Any:
        if self._made < self._count:
            yield from asyncio.Event().wait().__await__()
        yield from asyncio.sleep(0).__await__()

    def cancel(self) -> None:
        """Not heard: the device is held."""

    @property
    def metrics(self) -> Any:
        first = 0.1 if self._made else None
        return SimpleNamespace(
            state="completed", arrival=0.0, ended=None, queued=0.0, ttft=first, suspended=0.0, executed=0.0,
            predicted_ttft=PREDICTED, preemptions=0, slo_met=None, numerics="bits", finish_reason="length",
        )  # fmt: skip


class Backend:
    """See :class:`fpcompile.serving.server.worker.Backend`."""

    def __init__(self, settings: EngineSettings) -> None:
        self.facts = {model.name: Facts("generate", 260, 4096) for model in settings.models}
        self._options = settings.options

    def generate(self, ask: Generate) -> Handle:
        if ask.ids[0] == REJECTED:
            raise RequestRejectedError(ask.id, reason="it would be late")
        return Handle(ask)

    def embed(self, ask: Embed) -> Any:
        raise NotImplementedError

    def vector(self, program: str, output: Any) -> bytes:
        raise NotImplementedError

    def statistics(self) -> dict[str, Any]:
        raise ZeroDivisionError("a defect")

    def health(self) -> tuple[bool, str]:
        return bool(self._options.get("well", True)), "as the test says"

    def pause(self) -> None:
        """As if."""

    def resume(self) -> None:
        """As if."""

    def close(self) -> None:
        """Nothing is held."""


def build(settings: EngineSettings) -> Backend:
    """The factory."""
    return Backend(settings)


def never(settings: EngineSettings) -> Backend:
    """A factory that goes on until it is killed."""
    while True:
        time.sleep(60)

"""What the front needs of whoever runs the models: one worker behind a pipe, or many somewhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from fpcompile.serving.server.messages import Embed, Facts, Generate, Subject
from fpcompile.serving.server.streams import Stream, Watch

__all__ = ["Engines", "State"]

State = Literal["starting", "ready", "gone"]


class Engines(Protocol):
    """See :class:`fpcompile.serving.server.link.Link`. All methods belong to one event loop."""

    @property
    def state(self) -> State:
        """Whether requests can be taken."""

    @property
    def reason(self) -> str:
        """Why not."""

    @property
    def unready(self) -> str | None:
        """Why it could not start."""

    @property
    def facts(self) -> Mapping[str, Facts]:
        """The models by name, once ready."""

    @property
    def live(self) -> int:
        """Requests that have not ended."""

    @property
    def paused(self) -> bool:
        """Whether devices are held."""

    def start(self) -> None:
        """Begin to start."""

    async def settled(self) -> None:
        """Return when the state is not ``starting`` any more."""

    def submit(self, ask: Generate | Embed, watch: Watch | None = None) -> Stream:
        """Send a request; raises :class:`EngineGoneError`."""

    def cancel_all(self, reason: str) -> None:
        """End everything; who waits is told why."""

    async def ask(self, about: Subject, timeout: float = 2.0) -> Any:
        """What :class:`fpcompile.serving.server.worker.Backend` answers; raises :class:`EngineGoneError`."""

    async def pause(self) -> None:
        """Hold devices at the next cut."""

    async def resume(self) -> None:
        """Let them go on."""

    async def close(self, timeout: float = 15.0) -> None:
        """End."""

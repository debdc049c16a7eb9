"""The log of an engine's decisions: what ``fpcompile replay`` reads.

One line for each time that the scheduler was asked: its events and its commands, written out at once (see
:mod:`fpcompile.scheduler.record` for the form). An existing file is replaced.

Invariants
    A log never harms what it describes: when a write fails (a full disk), one error is logged, the log ends
    there, and the engine goes on without it.
    A core that fails (its policy raised) has answered nothing, so what it was asked then is not in the log.
    The fresh core that takes over begins with the line ``restarted``; requests that the first one knew have
    no end in the log, and a replay counts them as not served.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.core import Scheduler
from fpcompile.scheduler.events import Command, Event
from fpcompile.scheduler.policy import Policy
from fpcompile.scheduler.record import Recorder

__all__ = ["DecisionLog", "check_recordable"]

logger = logging.getLogger(__name__)


def check_recordable(policy: Policy | str) -> None:
    """Raise :class:`InvalidInputError` for a policy that a replay could not make again."""
    if isinstance(policy, Policy):
        raise InvalidInputError(
            "an engine that records needs its policy by name",
            expected="a registered name with its arguments, such as 's-edf:late=shortest'",
            got=f"an instance of {type(policy).__name__}",
            remedy="register the policy (fpcompile.scheduler.register) and pass its name",
        )


class DecisionLog:
    """A log that is open, or has ended. Used by the driver's thread, but for ``close``."""

    def __init__(self, path: str | Path, core: Scheduler) -> None:
        try:
            self._recorder: Recorder | None = Recorder(path, core)
        except (OSError, TypeError) as error:
            raise InvalidInputError(
                "the log of decisions cannot be written", expected="a file to write", got=str(error)
            ) from error
        self._path = path
        weakref.finalize(self, self._recorder.close)  # for an engine that nobody closed

    def record(self, events: Iterable[Event], commands: Iterable[Command]) -> None:
        """What the core was told, and what it answered."""
        self._guarded(lambda recorder: recorder.record(events, commands))

    def restarted(self, core: Scheduler) -> None:
        """A fresh core answers from now on."""
        self._guarded(lambda recorder: recorder.restarted(core))

    def close(self) -> None:
        """End the log; again is no mistake."""
        self._guarded(lambda recorder: recorder.close())
        self._recorder = None

    def _guarded(self, write: Callable[[Recorder], None]) -> None:
        recorder = self._recorder
        if recorder is None:
            return
        try:
            write(recorder)
        except Exception:
            self._recorder = None
            logger.exception("the log of decisions %s ends here: it cannot be written", self._path)
            try:
                recorder.close()
            except OSError:
                logger.debug("what was left of the log is lost", exc_info=True)

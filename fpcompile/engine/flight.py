"""The run that has the device, from the scheduler's Launch to its Yielded, Completed or Failed."""

from __future__ import annotations

from dataclasses import dataclass

from fpcompile.engine.loads import Load

__all__ = ["Flight"]


@dataclass(slots=True)
class Flight:
    """The run that has the device.

    ``quota``: segments left of the launch. ``begun``: since when it runs, in this turn.

    ``requested``: when its pause was asked for. ``made``: launches of this turn. ``lends``: whether it
    stopped for a decode step.
    """

    load: Load
    quota: int | None
    begun: float
    pause: bool = False
    requested: float | None = None
    made: int = 0
    lends: bool = False
    error: Exception | None = None
    """Why it cannot be brought back to the device."""

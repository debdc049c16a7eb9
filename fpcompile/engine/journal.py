"""Structured logs: one record for each step in a request's life, with its id among the record's attributes.

Logger ``fpcompile.engine.requests``. How a request ended is INFO, what happens on the way DEBUG; a level that
is off costs one comparison. Every record has the attributes ``request_id``, ``event``, ``program`` and
``tenant``, and those of the event (times in seconds), so that a handler can index or filter by them; the
message says the same for people.

| event | level | further attributes |
|---|---|---|
| ``arrived`` | DEBUG | ``tokens``, ``predicted`` |
| ``launched`` | DEBUG | ``queued`` |
| ``preempted`` | DEBUG | ``by`` |
| ``restarted`` | WARNING | ``error`` |
| ``ended`` | INFO | ``outcome``, ``queued``, ``suspended``, ``executed``, ``ttft``, ``preemptions``, |
| | | ``error`` |
"""

from __future__ import annotations

import logging
from typing import Any

from fpcompile.engine.metrics import Ticket

__all__ = ["arrived", "ended", "launched", "preempted", "restarted"]

logger = logging.getLogger("fpcompile.engine.requests")


def arrived(ticket: Ticket) -> None:
    """The scheduler was told of it."""
    if logger.isEnabledFor(logging.DEBUG):
        request = ticket.request
        _tell(logging.DEBUG, ticket, "arrived", tokens=request.tokens, predicted=request.cost)


def launched(ticket: Ticket) -> None:
    """The device goes on with it; call when the ticket was told."""
    if logger.isEnabledFor(logging.DEBUG):
        queued = None if ticket.started is None else ticket.started - ticket.request.arrival
        _tell(logging.DEBUG, ticket, "launched", queued=queued)


def preempted(ticket: Ticket, by: str | None) -> None:
    """It gave way."""
    if logger.isEnabledFor(logging.DEBUG):
        _tell(logging.DEBUG, ticket, "preempted", by=by)


def restarted(ticket: Ticket, error: BaseException) -> None:
    """It begins again from its inputs."""
    _tell(logging.WARNING, ticket, "restarted", error=_name(error.__cause__ or error))


def ended(ticket: Ticket, error: BaseException | None) -> None:
    """It has ended; call when the ticket was told."""
    if not logger.isEnabledFor(logging.INFO):
        return
    metrics = ticket.snapshot()
    _tell(
        logging.INFO,
        ticket,
        "ended",
        outcome=metrics.state,
        queued=metrics.queued,
        suspended=metrics.suspended,
        executed=metrics.executed,
        ttft=metrics.ttft,
        preemptions=metrics.preemptions,
        error=None if error is None else _name(error),
    )


def _name(error: BaseException) -> str:
    return type(error).__name__


def _tell(level: int, ticket: Ticket, event: str, **more: Any) -> None:
    told = ", ".join(f"{name} {_short(value)}" for name, value in more.items() if value is not None)
    attributes = {"request_id": ticket.id, "event": event, "program": ticket.program} | more
    attributes["tenant"] = ticket.request.tenant
    logger.log(level, "request %s %s: %s", ticket.id, event, told, extra=attributes)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

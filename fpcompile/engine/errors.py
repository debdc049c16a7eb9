"""Errors of the engine itself; the others come from :mod:`fpcompile.errors`."""

from __future__ import annotations

import os

from fpcompile.errors import FpcompileError, UsageError

__all__ = ["Home", "SchedulerFailedError", "WrongProcessError", "twin"]


class SchedulerFailedError(FpcompileError, RuntimeError):
    """The policy raised, or the scheduler refused an event: the requests that it knew have failed.

    The original exception is ``__cause__``. The engine goes on with a fresh scheduler.
    """

    def __init__(self, policy: str, *, cause: BaseException, request_id: str) -> None:
        self.policy = policy
        self.request_id = request_id
        super().__init__(
            f"the scheduler failed under policy {policy!r}; request {request_id!r} was given up",
            got=f"{type(cause).__name__}: {cause}",
            remedy="mend the policy: its methods must not raise",
        )
        self.__cause__ = cause


class WrongProcessError(UsageError, RuntimeError):
    """An engine or handle is used after a fork, in the child: its device thread is not there."""


class Home:
    """The process that an engine belongs to."""

    __slots__ = ("pid",)

    def __init__(self) -> None:
        self.pid = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is that process."""
        return os.getpid() == self.pid

    def check(self) -> None:
        """Raise :class:`WrongProcessError` in any other process. Takes no lock: one may be held forever."""
        if not self.here:
            raise WrongProcessError(
                "this engine belongs to another process",
                expected=f"use in process {self.pid}",
                got=f"use in process {os.getpid()}, after a fork",
                remedy="create the Engine in the process that uses it, after forking",
            )


def twin(error: Exception) -> Exception:
    """The same error once more, for another request that it ends: raising one does not change the other."""
    other = type(error).__new__(type(error), *error.args)
    other.args = error.args
    vars(other).update(vars(error))
    other.__cause__ = error.__cause__
    return other.with_traceback(error.__traceback__)

"""Typed errors: one class per cause, and one message that says what, expected, got, where and the remedy.

Words
    *misuse*       the caller can fix it by calling differently: :class:`UsageError` and its children.
    *unsupported*  the model cannot be compiled (yet): :class:`UnsupportedModelError`.
    *failure*      code of the model raised while it ran: :class:`SegmentError`.
    *outcome*      a request ended without a result, as somebody asked or a policy decided:
                   :class:`RequestCancelledError`, :class:`RequestRejectedError`,
                   :class:`RequestTimeoutError`, :class:`QueueFullError`.
    *breakdown*    the device does not answer any more: :class:`DeviceFailedError`.
    *defect*       an invariant of this package is broken: :class:`InternalError`.

Typical use
    ``raise InvalidInputError("input_ids is empty", expected="at least one token", got="shape [1, 0]")``
    ``raise UnknownNameError("policy", name, known=("fcfs", "s-edf"))``

Invariants
    Every error derives from :class:`FpcompileError`, and from the built-in class that a caller who does not
    know this package would catch (``ValueError``, ``RuntimeError``, ``NotImplementedError``).
    The five fields are public attributes; ``str(error)`` renders the ones that are set, in one order.
    Every error survives ``pickle`` and ``copy`` with all its attributes: requests cross process boundaries.

This module imports the standard library only, so that every layer may raise from it.
"""

from __future__ import annotations

import concurrent.futures
import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "BudgetError",
    "BudgetWarning",
    "CheckpointError",
    "DeviceFailedError",
    "EngineClosedError",
    "FpcompileError",
    "InternalError",
    "InvalidInputError",
    "ProgramFileError",
    "QueueFullError",
    "RequestCancelledError",
    "RequestRejectedError",
    "RequestTimeoutError",
    "SegmentError",
    "UnknownNameError",
    "UnsupportedModelError",
    "UsageError",
]


class FpcompileError(Exception):
    """Base of every error raised by this package.

    ``what`` is the sentence that names the problem; ``expected`` and ``got`` are the two sides of a
    comparison; ``where`` locates it (node, module path, source line, file); ``remedy`` says what to do.
    """

    what: str | None
    expected: str | None
    got: str | None
    where: str | None
    remedy: str | None

    def __init__(
        self,
        what: str | None = None,
        *,
        expected: str | None = None,
        got: str | None = None,
        where: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.expected, self.got, self.where, self.remedy = what, expected, got, where, remedy
        super().__init__(self.render())

    def render(self) -> str:
        """The message: ``what`` on the first line, then one indented line per further field that is set."""
        lines = [self.what or type(self).__name__]
        for label in ("expected", "got", "where", "remedy"):
            value: str | None = getattr(self, label)
            if value is not None:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, dict(self.__dict__))


def _restore(cls: type[FpcompileError], args: tuple[object, ...], state: dict[str, object]) -> FpcompileError:
    """Rebuild a pickled error without calling its ``__init__``, whose arguments differ by class."""
    error = cls.__new__(cls, *args)
    error.args = args  # OSError's own __new__ leaves them to an __init__
    error.__dict__.update(state)
    return error


class UsageError(FpcompileError, ValueError):
    """The caller did something that can be corrected in the caller's code."""


class InvalidInputError(UsageError):
    """An argument has a wrong value, shape, dtype or rank: ids, SLOs, sizes, a model in training mode."""


class UnknownNameError(UsageError):
    """A name is not in a registry (granularity, policy, backend): lists the legal ones.

    ``kind`` is the sort of name, ``name`` the one asked for, ``known`` the legal ones, sorted.
    """

    def __init__(self, kind: str, name: object, *, known: Iterable[str], where: str | None = None) -> None:
        self.kind = kind
        self.name = name
        self.known = tuple(sorted(known))
        near = difflib.get_close_matches(str(name), self.known, n=1)
        super().__init__(
            f"unknown {kind} {name!r}",
            expected=f"one of {', '.join(map(repr, self.known))}"
            if self.known
            else f"no {kind} is registered",
            got=repr(name),
            where=where,
            remedy=f"did you mean {near[0]!r}?" if near else None,
        )


class CheckpointError(UsageError):
    """A checkpoint cannot be used: of another program or other weights, truncated, or changed on disk."""


class ProgramFileError(UsageError):
    """A saved program cannot be used, or a program cannot be saved: made for another model or version,
    truncated, changed on disk, or of a kind that has no file form.
    """


class EngineClosedError(UsageError, RuntimeError):
    """A request was submitted to an engine that is closed or closing."""


class BudgetError(UsageError):
    """With ``strict_budget=True``: no cut or tile keeps ``max_blocking_ms`` for this length.

    ``segment`` is the name of the one that takes longest, ``seconds`` its predicted time, ``smallest_ms`` the
    smallest bound in milliseconds that can be kept.
    """

    def __init__(self, what: str, *, segment: str, seconds: float, budget: float, smallest_ms: float) -> None:
        self.segment, self.seconds, self.smallest_ms = segment, seconds, smallest_ms
        super().__init__(
            what,
            expected=f"launches of at most {budget * 1e3:g} ms",
            got=f"{seconds * 1e3:.3g} ms",
            where=segment,
            remedy=f"allow max_blocking_ms={smallest_ms:.3g} or more, or strict_budget=False",
        )


class QueueFullError(FpcompileError, RuntimeError):
    """The engine's queue is full; ``retry_after`` is the estimated time in seconds until a place is free.

    Not a :class:`UsageError`: the call was right, the moment was not (HTTP 429, not 400).
    """

    def __init__(
        self, what: str, *, retry_after: float, got: str | None = None, where: str | None = None
    ) -> None:
        self.retry_after = retry_after
        super().__init__(what, got=got, where=where, remedy=f"submit again in {retry_after:.3g} s")


class UnsupportedModelError(FpcompileError, NotImplementedError):
    """The model, or one of its nodes, cannot be compiled; ``reason`` is the true one.

    ``node`` is the graph node, ``module_path`` the dotted name of the submodule that it came from, and
    ``source_line`` the line of the model's source (``file.py:123: code``); each None when not known.
    """

    def __init__(
        self,
        what: str,
        *,
        reason: str,
        node: str | None = None,
        module_path: str | None = None,
        source_line: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.reason = reason
        self.node = node
        self.module_path = module_path
        self.source_line = source_line
        where = _locate(node=node, module=module_path, line=source_line)
        super().__init__(what, got=reason, where=where, remedy=remedy)


class SegmentError(FpcompileError, RuntimeError):
    """A segment raised while it ran. Its own run has failed; other runs go on.

    ``segment`` and ``node`` name the place in the program, ``source_line`` the line of the model's source.
    The original exception is ``__cause__`` (lost, as always, by pickling; its text stays in ``got``).
    """

    def __init__(
        self,
        segment: str,
        *,
        cause: BaseException,
        node: str | None = None,
        module_path: str | None = None,
        source_line: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.segment = segment
        self.node = node
        self.module_path = module_path
        self.source_line = source_line
        where = _locate(node=node, module=module_path, line=source_line)
        got = f"{type(cause).__name__}: {cause}"
        super().__init__(f"segment {segment!r} failed", got=got, where=where, remedy=remedy)
        self.__cause__ = cause


class RequestCancelledError(FpcompileError, concurrent.futures.CancelledError):
    """The request was cancelled, by its handle or by closing the engine, before it had a result.

    Not ``asyncio.CancelledError``: that one says that the *awaiting task* is cancelled.
    """

    def __init__(self, request_id: str, *, where: str | None = None) -> None:
        self.request_id = request_id
        super().__init__(f"request {request_id!r} was cancelled", where=where)


class RequestRejectedError(FpcompileError, RuntimeError):
    """The scheduler refused the request, as the policy or a limit says; ``reason`` is that rule."""

    def __init__(self, request_id: str, *, reason: str, remedy: str | None = None) -> None:
        self.request_id = request_id
        self.reason = reason
        super().__init__(f"request {request_id!r} was rejected", got=reason, remedy=remedy)


class RequestTimeoutError(FpcompileError, TimeoutError):
    """The request had not ended ``timeout`` seconds after its arrival, as ``submit(timeout=...)`` asked.

    It has ended now and holds nothing. Not what ``handle.result(timeout)`` raises: that one only stops
    waiting, and the request goes on.
    """

    def __init__(self, request_id: str, *, timeout: float) -> None:
        self.request_id = request_id
        self.timeout = timeout
        super().__init__(
            f"request {request_id!r} has not ended within {timeout:g} s of its arrival",
            remedy="allow more time, or submit it when less is waiting",
        )


class DeviceFailedError(FpcompileError, RuntimeError):
    """The device failed, not a segment on it: what was in flight is lost, and its engine is closed.

    The original exception is ``__cause__``. On CUDA such an error stays until the process ends.
    """

    def __init__(self, device: str, *, cause: BaseException) -> None:
        self.device = device
        super().__init__(
            f"device {device} failed",
            got=f"{type(cause).__name__}: {cause}",
            remedy="create a new Engine; after an error of CUDA, in a new process",
        )
        self.__cause__ = cause


class InternalError(FpcompileError, RuntimeError):
    """An invariant of this package is broken: a defect here, not in the caller's code or model."""

    def __init__(
        self, what: str, *, expected: str | None = None, got: str | None = None, where: str | None = None
    ) -> None:
        remedy = "this is a defect of fpcompile: please report it with this message and the traceback"
        super().__init__(what, expected=expected, got=got, where=where, remedy=remedy)


class BudgetWarning(UserWarning):
    """No cut or tile keeps ``max_blocking_ms`` for this length: one indivisible piece is predicted to take
    longer. The message names its segment, its time, and the smallest bound that can be kept.
    """


def _locate(*, node: str | None, module: str | None, line: str | None) -> str | None:
    """``node mm_3, module model.layers.0.mlp, modeling_llama.py:176``, without the unknown parts."""
    parts = [f"node {node}" if node else None, f"module {module}" if module else None, line]
    return ", ".join(part for part in parts if part) or None

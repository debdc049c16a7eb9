"""Every setting of the server as one frozen value, checked when made.

:class:`EngineSettings` is what the worker needs, :class:`Limits` what the front refuses, and
:class:`ServerSettings` holds both with the address, the accounts and the keys.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any

from fpcompile.errors import InvalidInputError, UsageError
from fpcompile.serving.server.messages import Kind
from fpcompile.serving.server.promises import Accounts

__all__ = ["EngineSettings", "Limits", "ModelSpec", "ServerSettings", "is_loopback"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model to serve under ``name``.

    ``source``: a hub id, a folder, or a name that ``random_weights`` gives a meaning to. ``kind`` None: found
    out from the configuration. ``random_weights``: ``"tiny"`` for the built-in models, else weights drawn for
    the configuration at ``source``.
    """

    name: str
    source: str
    kind: Kind | None = None
    random_weights: bool = False


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the worker builds. ``options`` are passed to :class:`fpcompile.engine.engine.Engine`.

    ``pooling``: how an embedder's vectors come out of its hidden states: mean, cls or last; None: as the
    model's ``1_Pooling/config.json`` says, else mean. ``factory``: ``module:function`` that makes the engine.
    """

    models: tuple[ModelSpec, ...]
    device: str = "auto"
    dtype: str | None = None
    granularity: str = "operator"
    weights: str = "shared"
    backend: str = "eager"
    max_blocking_ms: float | None = 20.0
    policy: str = "fpcompile"
    threads: int | None = None
    pooling: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    factory: str = "fpcompile.serving.server.build:build"

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if not names:
            raise InvalidInputError(
                "no model to serve",
                expected="at least one",
                remedy="fpcompile serve MODEL, or --random-weights tiny",
            )
        if twice := [name for name in names if names.count(name) > 1]:
            raise InvalidInputError(f"two models are called {twice[0]!r}", remedy="name them: NAME=MODEL")
        if self.pooling not in (None, "mean", "cls", "last"):
            raise InvalidInputError("pooling", expected="mean, cls or last", got=repr(self.pooling))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a single request may ask for, and how many there may be.

    ``held_bytes``: of all bodies that are being read or parsed, ``body_bytes`` at least. ``buffered_tokens``:
    tokens that wait for a slow reader before its request is ended. Seconds: ``write_s`` for one write to a
    client, ``head_s`` for the head of a request to come, ``request_s`` for a request, None for ever.
    """

    body_bytes: int = 4 << 20
    held_bytes: int = 1 << 28
    tokens: int | None = None
    choices: int = 16
    stops: int = 4
    stop_chars: int = 256
    inputs: int = 256
    messages: int = 1024
    live: int = 1024
    connections: int = 2048
    buffered_tokens: int = 4096
    write_s: float = 30.0
    head_s: float = 20.0
    request_s: float | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and not (isfinite(value) and value > 0):
                raise InvalidInputError(f"limit {each.name} is wrong", expected="> 0", got=repr(value))


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Everything. ``port`` 0 takes a free one. ``log_prompts``: prompts go into the log.

    Without ``admin_key``, /pause and /resume are off, and /metrics answers on loopback only.
    Raises :class:`UsageError` for an address that others can reach without keys, unless ``open``.
    """

    engine: EngineSettings
    host: str = "127.0.0.1"
    port: int = 8000
    limits: Limits = field(default_factory=Limits)
    accounts: Accounts = field(default_factory=Accounts)
    admin_digest: str | None = None
    open: bool = False
    drain_timeout: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise InvalidInputError("port is wrong", expected="0 to 65535", got=repr(self.port))
        if not (isfinite(self.drain_timeout) and self.drain_timeout >= 0):
            raise InvalidInputError("drain timeout", expected="seconds >= 0", got=repr(self.drain_timeout))
        if not (self.loopback or self.accounts.by_digest or self.open):
            raise UsageError(
                f"{self.host} can be reached by others, and no API key is set",
                remedy="put keys into --config, or say --open",
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine's own address or name."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"

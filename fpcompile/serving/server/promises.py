"""Service levels: classes by name, accounts by API key, and what a request may be promised.

Words
    *class*    a name in the server's configuration with a TTFT SLO and a TBT SLO (time between tokens).
    *account*  what a key stands for: a tenant, the classes that it may name, its floors, its default class.
    *floor*    the shortest SLO that an account may ask for, by whatever field: nobody gets ahead by asking.

Invariants
    The tenant follows from the key only. A promise is never shorter than the account's floor. A key is held
    as its SHA-256; keys are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite

from fpcompile.errors import InvalidInputError, UnknownNameError

__all__ = ["Account", "Accounts", "BelowFloorError", "Promise", "SloClass", "digest_of"]


def _seconds(name: str, value: float | None, *, zero: bool = False) -> None:
    if value is not None and not ((isfinite(value) and value > 0) or (zero and value == 0)):
        raise InvalidInputError(f"{name} is wrong", expected="seconds > 0", got=repr(value))


@dataclass(frozen=True, slots=True)
class SloClass:
    """Seconds until the first token, and between tokens; None promises nothing."""

    name: str
    ttft: float | None = None
    tbt: float | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidInputError("a class needs a name", expected="a non-empty str", got=repr(self.name))
        _seconds(f"ttft of class {self.name!r}", self.ttft)
        _seconds(f"tbt of class {self.name!r}", self.tbt)


@dataclass(frozen=True, slots=True)
class Account:
    """``classes``: the names that may be used, None for all. Floors in seconds, 0 for none."""

    tenant: str = ""
    min_ttft: float = 0.0
    min_tbt: float = 0.0
    classes: tuple[str, ...] | None = None
    default_class: str | None = None

    def __post_init__(self) -> None:
        _seconds("min_ttft", self.min_ttft, zero=True)
        _seconds("min_tbt", self.min_tbt, zero=True)


@dataclass(frozen=True, slots=True)
class Promise:
    """What one request is promised; None: nothing."""

    ttft: float | None
    tbt: float | None
    slo_class: str | None


def digest_of(key: str) -> str:
    """The SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Accounts:
    """The accounts by digest of their key, the classes by name, and who a request without a key is.

    ``anonymous`` None: a key is needed.
    """

    classes: Mapping[str, SloClass] = field(default_factory=dict)
    by_digest: Mapping[str, Account] = field(default_factory=dict)
    anonymous: Account | None = field(default_factory=Account)

    def __post_init__(self) -> None:
        for account in self.all():
            for name in (
                *(account.classes or ()),
                *([account.default_class] if account.default_class else []),
            ):
                if name not in self.classes:
                    raise UnknownNameError("SLO class", name, known=self.classes)
                self._check_floor(account, self.classes[name])
            if account.default_class is not None and not self._may(account, account.default_class):
                raise InvalidInputError(
                    f"the default class of tenant {account.tenant!r} is none of its classes",
                    expected=f"one of {', '.join(account.classes or ())}",
                    got=account.default_class,
                )

    def all(self) -> Iterable[Account]:
        """Every account."""
        return (*self.by_digest.values(), *([self.anonymous] if self.anonymous is not None else []))

    def account(self, key: str | None) -> Account | None:
        """Who brings ``key``; None for nobody known."""
        if key is None:
            return self.anonymous
        mine = digest_of(key)
        found = None
        for digest, account in self.by_digest.items():
            if hmac.compare_digest(digest, mine):
                found = account
        # Clients of the OpenAI API cannot be made without a key: where none is asked for, any will do.
        return found or (self.anonymous if not self.by_digest else None)

    def promise(
        self, account: Account, *, slo_class: str | None, ttft: float | None, tbt: float | None
    ) -> Promise:
        """What a request of ``account`` that asks for these gets: its own SLOs over those of the class.

        Raises :class:`UnknownNameError` for a class that is not there or not the account's, and
        :class:`BelowFloorError` for an SLO shorter than the account may ask for.
        """
        name = slo_class or account.default_class
        if name is not None and not self._may(account, name):
            raise UnknownNameError(
                "SLO class", name, known=[known for known in self.classes if self._may(account, known)]
            )
        given = self.classes[name] if name is not None else SloClass("none")
        wanted = SloClass(given.name, given.ttft if ttft is None else ttft, given.tbt if tbt is None else tbt)
        self._check_floor(account, wanted)
        return Promise(wanted.ttft, wanted.tbt, name)

    def _may(self, account: Account, name: str) -> bool:
        return name in self.classes and (account.classes is None or name in account.classes)

    def _check_floor(self, account: Account, asked: SloClass) -> None:
        for what, value, floor in (
            ("ttft_slo", asked.ttft, account.min_ttft),
            ("tbt_slo", asked.tbt, account.min_tbt),
        ):
            if (inf if value is None else value) < floor:
                raise BelowFloorError(what, asked=value or 0.0, floor=floor)


class BelowFloorError(InvalidInputError):
    """An SLO is shorter than the account may ask for; ``field`` is its name in the request."""

    def __init__(self, field: str, *, asked: float, floor: float) -> None:
        self.field, self.floor = field, floor
        super().__init__(
            f"{field} is shorter than this key may ask for",
            expected=f"at least {floor:g} s",
            got=f"{asked:g} s",
        )

"""The configuration file: SLO classes, keys and floors, in TOML or YAML.

::

    [classes.interactive]         # seconds
    ttft = 0.25
    tbt = 0.1
    [classes.batch]
    ttft = 30

    [[keys]]
    env = "ALICE_KEY"             # or key = "...", or sha256 = "..."
    tenant = "alice"
    min_ttft = 0.2                # the shortest TTFT SLO that this key may ask for
    classes = ["interactive", "batch"]
    default_class = "batch"

    [anonymous]                   # who brings no key, where no keys are set
    min_ttft = 1.0

    [admin]
    env = "ADMIN_KEY"

Unknown names are errors that list the legal ones.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fpcompile.errors import InvalidInputError, UnknownNameError, UsageError
from fpcompile.serving.server.promises import Account, Accounts, SloClass, digest_of

__all__ = ["read_config"]


def read_config(path: Path) -> tuple[Accounts, str | None]:
    """The accounts of a file, and the digest of the admin key, if there is one.

    Raises :class:`UsageError` for a file that cannot be read, typed errors for what is wrong in it.
    """
    content = _table("the file", _parsed(path))
    _known("section", content, ("classes", "keys", "anonymous", "admin"))
    classes = {}
    for name, raw in _table("classes", content.get("classes", {})).items():
        fields = _table(f"class {name}", raw)
        _known(f"field of class {name!r}", fields, ("ttft", "tbt"))
        classes[name] = SloClass(name, _seconds(fields, "ttft"), _seconds(fields, "tbt"))
    by_digest = {}
    keys = content.get("keys", [])
    if not isinstance(keys, list):
        raise UsageError("keys are wrong", expected="a list: [[keys]]", got=type(keys).__name__)
    for raw in keys:
        fields = _table("a key", raw)
        _known("field of a key", fields, (*_SECRET, *_ACCOUNT))
        digest = _digest(fields)
        if digest in by_digest:
            raise UsageError(
                "a key stands twice in the configuration", got=f"tenant {fields.get('tenant')!r}"
            )
        by_digest[digest] = _account(fields)
    anonymous: Account | None = None if by_digest else Account()
    if "anonymous" in content:
        fields = _table("anonymous", content["anonymous"])
        _known("field of [anonymous]", fields, _ACCOUNT)
        anonymous = _account(fields)
    admin = None
    if "admin" in content:
        fields = _table("admin", content["admin"])
        _known("field of [admin]", fields, _SECRET)
        admin = _digest(fields)
    return Accounts(classes, by_digest, anonymous), admin


_SECRET = ("key", "env", "sha256")
_ACCOUNT = ("tenant", "min_ttft", "min_tbt", "classes", "default_class")


def _parsed(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() in (".yaml", ".yml"):
            import yaml

            return yaml.safe_load(text)
        return tomllib.loads(text)
    except Exception as error:  # whatever the two parsers raise
        raise UsageError("the configuration cannot be read", got=str(error), where=str(path)) from error


def _table(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{what} is wrong", expected="names and values", got=type(value).__name__)
    return {str(name): item for name, item in value.items()}


def _known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = tuple(known)
    for name in given:
        if name not in known:
            raise UnknownNameError(what, name, known=known)


def _seconds(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise InvalidInputError(f"{name} is wrong", expected="seconds", got=repr(value))
    return None if value is None else float(value)


def _digest(fields: Mapping[str, Any]) -> str:
    named = [name for name in _SECRET if name in fields]
    if len(named) != 1 or not isinstance(value := fields[named[0]], str) or not value:
        raise UsageError("a key is given wrongly", expected=f"one of {', '.join(_SECRET)}", got=str(named))
    if named[0] == "env":
        if not (value := os.environ.get(value, "")):
            raise UsageError(f"the environment has no {fields['env']!r}", remedy="set it to the key")
    elif named[0] == "sha256":
        value = value.lower()
        if len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise UsageError(
                "sha256 is wrong", expected="64 hexadecimal digits", got=f"{len(value)} characters"
            )
        return value
    return digest_of(value)


def _account(fields: Mapping[str, Any]) -> Account:
    tenant, classes, default = fields.get("tenant", ""), fields.get("classes"), fields.get("default_class")
    if not isinstance(tenant, str):
        raise InvalidInputError("tenant is wrong", expected="a str", got=repr(tenant))
    if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
        raise InvalidInputError("classes of a key are wrong", expected="a list of names", got=repr(classes))
    if default is not None and not isinstance(default, str):
        raise InvalidInputError("default_class is wrong", expected="a name", got=repr(default))
    return Account(
        tenant,
        _seconds(fields, "min_ttft") or 0.0,
        _seconds(fields, "min_tbt") or 0.0,
        None if classes is None else tuple(classes),
        default,
    )

"""The folder of a saved program: a manifest, and files whose digests it holds.

A folder is written beside its place and renamed, so that a reader sees a whole one or none. A file that is
missing or differs from its digest is refused. The digests find damage, not forgery: whoever can write the
folder can write new ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpcompile.errors import ProgramFileError

FORMAT = "fpcompile-program-3"
MANIFEST = "manifest.json"
_AGAIN = "save the program again with Program.save"


def write_folder(path: Path, head: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write ``files`` and a manifest with ``head``; an older program at ``path`` is replaced.

    Raises :class:`ProgramFileError` when ``path`` holds something else than a saved program.
    """
    if path.exists() and not _is_ours(path):
        raise ProgramFileError(
            "the place for the program is taken",
            expected="a new path, an empty folder, or an older saved program",
            got="a file, or a folder with other files",
            where=str(path),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = {"format": FORMAT, "files": digests, **head}
    manifest["sha256"] = _digest(manifest)
    fresh = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    fresh.mkdir()  # not mkdtemp, whose folders are private: who may read the program is for the umask to say
    try:
        for name, content in {**files, MANIFEST: json.dumps(manifest, indent=1).encode()}.items():
            with open(fresh / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _swap(fresh, path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def read_folder(
    path: Path, names: tuple[str, ...], optional: tuple[str, ...], numbered: str = ""
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(manifest, files) of a saved program; files that it was saved without are left out if ``optional``, and
    those that begin with ``numbered`` are all read.

    Raises :class:`ProgramFileError`, and FileNotFoundError where there is no folder.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no saved program at {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        digests = dict(manifest["files"])
        stated = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProgramFileError(
            "the folder holds no complete program",
            expected=f"a {MANIFEST} written by Program.save",
            got=f"{type(error).__name__}: {error}",
            where=str(path),
            remedy=_AGAIN,
        ) from error
    if manifest.get("format") != FORMAT:
        raise ProgramFileError(
            "the folder holds no program of this version",
            expected=FORMAT,
            got=str(manifest.get("format")),
            where=str(path),
            remedy=_AGAIN,
        )
    if _digest(manifest) != stated:
        raise _changed(path / MANIFEST)
    return manifest, {
        name: _read(path / name, digests.get(name))
        for name in (*names, *(n for n in digests if n in optional or _is_numbered(n, numbered)))
    }


def _is_numbered(name: str, prefix: str) -> bool:
    """Whether a file is ``<prefix><number>.bin``: never a path into another folder."""
    return bool(prefix) and re.fullmatch(re.escape(prefix) + r"\d+\.bin", name) is not None


def _read(path: Path, digest: str | None) -> bytes:
    content = path.read_bytes() if path.is_file() else None
    if content is None or hashlib.sha256(content).hexdigest() != digest:
        raise _changed(path)
    return content


def _changed(path: Path) -> ProgramFileError:
    return ProgramFileError(
        "the saved program was changed after it was written, or is not complete",
        expected="the digest in the manifest",
        got="another digest" if path.exists() else "no file",
        where=str(path),
        remedy=_AGAIN,
    )


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_ours(path: Path) -> bool:
    if not path.is_dir():
        return False
    if not any(path.iterdir()):
        return True
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((path / MANIFEST).read_bytes())["format"]).startswith("fpcompile-program-")
    return False


def _swap(fresh: Path, path: Path) -> None:
    """Put ``fresh`` at ``path``; what was there is gone when it returns, and back when that fails."""
    if not path.exists():
        fresh.rename(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    path.rename(old / "program")
    try:
        fresh.rename(path)
    except BaseException:
        (old / "program").rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)

"""One file of flat byte tensors and a text about them: a safetensors file with a digest, whole or not there.

Words
    *piece*   up to :data:`PIECE` bytes of one tensor: what is read or written and digested at a time.
    *digest*  SHA-256 over the text, the sizes, and the SHA-256 of every piece: pieces are digested by other
              threads while the next ones move, so that the file system sets the pace, not the digest.

Invariants
    ``write`` makes a file beside its place and renames it: whoever is killed in the middle leaves the older
    file (and perhaps a hidden one beside it), never half a file. When it returns, the file is on the disk.
    ``read`` gives back what was written or raises :class:`CheckpointError`: a file that is truncated, longer,
    changed in any byte that carries something, or of another kind. Nothing in a file is executed.
    Tensors are named ``s0``, ``s1``, ... of dtype U8, so that any safetensors reader can look into the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fpcompile.errors import CheckpointError

__all__ = ["PIECE", "read", "write"]

PIECE: Final = 8 << 20
_DIGESTERS: Final = 2
_HEAD: Final = struct.Struct("<Q")


class _Digest:
    """Digests pieces in other threads. They must not change until ``close``."""

    def __init__(self, text: str, sizes: Sequence[int]) -> None:
        self._whole = hashlib.sha256(json.dumps([text, list(sizes)]).encode())
        self._pool = ThreadPoolExecutor(_DIGESTERS, thread_name_prefix="fpcompile-digest")
        self._pieces: list[Future[bytes]] = []

    def __enter__(self) -> _Digest:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, piece: memoryview) -> None:
        self._pieces.append(self._pool.submit(lambda: hashlib.sha256(piece).digest()))

    def close(self) -> str:
        """The digest of everything added; once."""
        for piece in self._pieces:
            self._whole.update(piece.result())
        return self._whole.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """A flat byte tensor in host memory, piece by piece."""
    view: memoryview = tensor.numpy().data
    for start in range(0, len(view), PIECE):
        yield view[start : start + PIECE]


def _header(kind: str, text: str, sizes: Sequence[int], digest: str) -> bytes:
    """What stands in front of the bytes; its length does not depend on the digest."""
    at = 0
    fields: dict[str, Any] = {"__metadata__": {"format": kind, "description": text, "sha256": digest}}
    for number, size in enumerate(sizes):
        fields[f"s{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    written = json.dumps(fields).encode()
    written += b" " * (-len(written) % 8)
    return _HEAD.pack(len(written)) + written


def write(path: Path, kind: str, text: str, tensors: Sequence[Tensor]) -> None:
    """Write flat byte tensors, from any device, and replace an older file. Raises ``OSError``."""
    sizes = [int(tensor.numel()) for tensor in tensors]
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with FileIO(handle, "wb") as file:
            _write_all(file, _header(kind, text, sizes, "0" * 64))
            with _Digest(text, sizes) as digest:
                for tensor in tensors:
                    for piece in _pieces(tensor.cpu()):
                        digest.add(piece)
                        _write_all(file, piece)
                whole = digest.close()
            file.seek(0)
            _write_all(file, _header(kind, text, sizes, whole))
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp made it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _write_all(file: FileIO, content: bytes | memoryview) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) or 0 :]


def _sync_folder(folder: Path) -> None:
    """The renaming, too, is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's file mode mask; reading it means setting it for a moment."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def read(path: Path, kind: str) -> tuple[str, tuple[Tensor, ...]]:
    """The text and the tensors (in host memory). Raises :class:`CheckpointError`, ``FileNotFoundError``."""
    with FileIO(path, "rb") as file:
        try:
            fields, left = _read_header(file)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _refused(path, f"{type(error).__name__}: {error}") from error
        text, expected = _metadata(path, fields, kind)
        sizes = _sizes(path, fields)
        if sum(sizes) != left:
            raise _refused(path, f"{left} bytes of tensors, where {sum(sizes)} belong")
        tensors = tuple(torch.empty(size, dtype=torch.uint8) for size in sizes)
        with _Digest(text, sizes) as digest:
            for tensor in tensors:
                for piece in _pieces(tensor):
                    if not _read_all(file, piece):
                        raise _refused(path, "fewer bytes than the file had a moment ago")
                    digest.add(piece)
            got = digest.close()
    if got != expected:
        raise CheckpointError(
            "the checkpoint was changed after it was written",
            expected=f"sha256 {expected}",
            got=f"sha256 {got}",
            where=os.fspath(path),
        )
    return text, tensors


def _read_header(file: FileIO) -> tuple[dict[str, Any], int]:
    """The header's fields and how many bytes are behind it."""
    whole = os.fstat(file.fileno()).st_size
    (length,) = _HEAD.unpack(file.read(_HEAD.size).ljust(_HEAD.size, b"\xff"))
    left = whole - _HEAD.size - length
    if left < 0:
        raise ValueError(f"a header of {length} bytes in a file of {whole}")
    fields = json.loads(_exactly(file, length))
    if not isinstance(fields, dict):
        raise TypeError("the header is no object")
    return fields, left


def _exactly(file: FileIO, length: int) -> bytes:
    content = bytearray(length)
    if not _read_all(file, memoryview(content)):
        raise ValueError("the header ends early")
    return bytes(content)


def _read_all(file: FileIO, into: memoryview) -> bool:
    """Fill ``into``; False at the end of the file."""
    while into:
        if not (count := file.readinto(into)):
            return False
        into = into[count:]
    return True


def _metadata(path: Path, fields: dict[str, Any], kind: str) -> tuple[str, str]:
    """The text and the digest."""
    found = fields.pop("__metadata__", None)
    metadata = found if isinstance(found, dict) else {}
    if metadata.get("format") != kind:
        raise CheckpointError(
            "the file is no checkpoint of this version",
            expected=kind,
            got=str(metadata.get("format")),
            where=os.fspath(path),
        )
    text, digest = metadata.get("description"), metadata.get("sha256")
    if not isinstance(text, str) or not isinstance(digest, str):
        raise _refused(path, "no description, or no digest of it")
    return text, digest


def _sizes(path: Path, fields: dict[str, Any]) -> list[int]:
    """Of the tensors, which must lie behind one another in the order of their numbers."""
    sizes: list[int] = []
    at = 0
    for number in range(len(fields)):
        entry = fields.get(f"s{number}")
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        stop = offsets[-1] if isinstance(offsets, list) and offsets else -1
        size = stop - at if type(stop) is int else -1
        if size < 0 or entry != {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}:
            raise _refused(path, f"tensor s{number} is {entry}")
        sizes.append(size)
        at += size
    return sizes


def _refused(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        "the checkpoint cannot be read",
        expected="a file written by Checkpoint.save",
        got=got,
        where=os.fspath(path),
        remedy="the file is truncated or of another kind: take the checkpoint again",
    )

"""Files of byte tensors: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fpcompile.errors import CheckpointError
from fpcompile.executor import tensor_file
from fpcompile.executor.tensor_file import PIECE, read, write

ROOT = Path(__file__).parents[2]
KIND = "kind-1"


def _tensors(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8) for n in sizes]


def _equal(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (7, 0, 13), (PIECE,), (PIECE + 1, 5, 2 * PIECE - 1)])
def test_what_was_written_is_read(sizes: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "file"
    tensors = _tensors(*sizes)
    threads = threading.active_count()
    write(path, KIND, "some \u2713 text", tensors)
    text, back = read(path, KIND)
    assert text == "some \u2713 text"
    assert _equal(back, tensors)
    assert threading.active_count() == threads
    assert os.listdir(tmp_path) == ["file"]


def test_any_reader_of_safetensors_can_look_into_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tensors = _tensors(100, 3)
    write(path, KIND, "text", tensors)
    found = load_file(path)
    assert _equal([found["s0"], found["s1"]], tensors)


def _with_header(path: Path, change: Any) -> None:
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    fields = json.loads(whole[8 : 8 + length])
    change(fields)
    header = json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["s0"].update(dtype="I8"),
        lambda f: f["s0"].update(shape=[50, 2]),
        lambda f: f["s0"].update(data_offsets=[0, 90]),
        lambda f: f["s0"].update(data_offsets=[]),
        lambda f: f["s0"].update(data_offsets="01"),
        lambda f: f.update(s1={"dtype": "U8", "shape": [-1], "data_offsets": [100, 99]}),
        lambda f: f.update(s1=f["s0"]),
        lambda f: f.update(other=f["s0"]),
        lambda f: f.update(s0=3),
        lambda f: f.pop("s0"),
        lambda f: f["__metadata__"].pop("sha256"),
        lambda f: f["__metadata__"].update(description=1),
        lambda f: f["__metadata__"].update(description="another text"),
        lambda f: f["__metadata__"].update(sha256="0" * 64),
        lambda f: f["__metadata__"].update(format="kind-0"),
        lambda f: f.update(__metadata__=[]),
    ],
)
def test_a_header_that_says_otherwise_is_refused(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, KIND, "text", _tensors(100))
    _with_header(path, lambda fields: None)
    assert read(path, KIND)[0] == "text", "written anew, it is the same"
    _with_header(path, change)
    with pytest.raises(CheckpointError) as caught:
        read(path, KIND)
    assert caught.value.where == str(path)
    assert caught.value.expected
    assert caught.value.got


@pytest.mark.parametrize("length", [2**63, 2**20])
def test_a_header_longer_than_the_file_is_refused_without_memory_for_it(length: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match="header"):
        read(path, KIND)


class _Full(FileIO):
    """A disk with room for ``room`` more bytes: it takes what fits, and then no more."""

    room = 0

    def write(self, content: Any) -> int:
        left = min(type(self).room, len(content))
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        type(self).room -= left
        return super().write(content[:left])


@pytest.mark.parametrize("room", [0, 100, PIECE, 2 * PIECE + 5])
def test_a_full_disk_leaves_the_older_file_and_no_other(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    older = _tensors(50, seed=1)
    write(path, KIND, "older", older)
    threads = threading.active_count()
    monkeypatch.setattr(tensor_file, "FileIO", _Full)
    _Full.room = room
    with pytest.raises(OSError, match="No space left"):
        write(path, KIND, "newer", _tensors(2 * PIECE, PIECE))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["file"]
    text, back = read(path, KIND)
    assert text == "older"
    assert _equal(back, older)
    assert threading.active_count() == threads


def test_a_disk_that_takes_little_at_a_time_gets_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(FileIO):
        def write(self, content: Any) -> int:
            return super().write(content[: max(1, len(content) // 2)])

    monkeypatch.setattr(tensor_file, "FileIO", Small)
    tensors = _tensors(1000, 3)
    write(tmp_path / "file", KIND, "text", tensors)
    assert _equal(read(tmp_path / "file", KIND)[1], tensors)


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write(path, KIND, "text", _tensors(1000))
    real = tensor_file._metadata

    def shrink(*arguments: Any) -> tuple[str, str]:
        os.truncate(path, path.stat().st_size - 10)
        return real(*arguments)

    monkeypatch.setattr(tensor_file, "_metadata", shrink)
    with pytest.raises(CheckpointError, match="a moment ago"):
        read(path, KIND)


SAVE = """
import os, sys, time
import torch
from pathlib import Path
from fpcompile.executor import tensor_file
stage, path = sys.argv[1:]

def here(*_):
    print("here", flush=True)
    time.sleep(100)

written, real, replace = 0, tensor_file._write_all, os.replace

def slowly(file, content):
    global written
    real(file, content)
    written += 1
    if stage == f"piece {written}":
        here()

def renamed(*names):
    if stage == "before the rename":
        here()
    replace(*names)
    here()

tensor_file._write_all, os.replace = slowly, renamed
if stage == "fsync":
    os.fsync = here
tensor_file.write(Path(path), "kind-1", "newer", [torch.full((2 * tensor_file.PIECE,), 7, dtype=torch.uint8)])
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["piece 1", "piece 2", "fsync", "before the rename", "behind the rename"])
def test_kill_9_leaves_the_older_file_or_the_newer_one(stage: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    older = _tensors(50, seed=1)
    write(path, KIND, "older", older)
    with subprocess.Popen(
        [sys.executable, "-c", SAVE, stage, str(path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as saving:
        assert saving.stdout is not None
        assert saving.stdout.readline() == b"here\n"
        os.kill(saving.pid, signal.SIGKILL)
        assert saving.wait() == -signal.SIGKILL
    text, back = read(path, KIND)
    if stage == "behind the rename":
        assert text == "newer"
        assert _equal(back, [torch.full((2 * PIECE,), 7, dtype=torch.uint8)])
    else:
        assert text == "older"
        assert _equal(back, older)
    write(path, KIND, "again", older)
    assert read(path, KIND)[0] == "again", "what the killed one left behind is in nobody's way"

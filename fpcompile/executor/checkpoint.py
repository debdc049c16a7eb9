"""Checkpoints: portable snapshots of a run, on disk as one safetensors file with a JSON description inside.

Live values may be views of shared storages, and their strides matter for bits: each storage is kept once,
and every value as (storage, offset, sizes, strides). A file carries a digest of its description and its
bytes, is written beside its place and renamed, and never holds a pickle: see
:mod:`fpcompile.executor.tensor_file`. On resuming, the fingerprints of the program and of its weights, the
shapes, dtypes and strides are checked, and that the heads of each tile to come can be attended apart here.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpcompile.errors import CheckpointError, UsageError
from fpcompile.executor import tensor_file
from fpcompile.executor.kv import LayerKV
from fpcompile.executor.paths import as_path
from fpcompile.executor.schedule import Launch

if TYPE_CHECKING:
    from fpcompile.executor.program import Program
    from fpcompile.executor.run import Run

FORMAT = "fpcompile-checkpoint-5"


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """A tensor as a view: ``storage`` index, ``offset``, ``sizes`` and ``strides`` in elements."""

    storage: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A snapshot between two segments. ``storages`` are flat byte tensors; everything else is plain data."""

    program: str
    weights: str
    torch_version: str
    at: int
    schedule: tuple[Launch, ...]
    call: dict[str, Any]
    values: dict[str, Placement]
    kv: tuple[dict[int, tuple[Placement, Placement, int]], ...]
    partial: dict[str, Placement]
    extra: dict[str, Placement]
    storages: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(int(s.numel()) for s in self.storages)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the snapshot to one file, replacing an older one atomically.

        Raises :class:`InvalidInputError` for what is no path, ``OSError`` where nothing can be written.
        """
        where = as_path(path)
        description = json.dumps(_describe(self), sort_keys=True)
        tensor_file.write(where, FORMAT, description, self.storages)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read a snapshot. Raises :class:`CheckpointError` for a truncated, changed or foreign file,
        :class:`InvalidInputError` for what is no path, ``FileNotFoundError`` where there is none.
        """
        description, tensors = tensor_file.read(as_path(path), FORMAT)
        try:
            return _rebuild(json.loads(description), tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "the checkpoint's description is not complete",
                expected="what Checkpoint.save writes",
                got=f"{type(error).__name__}: {error}",
                where=os.fspath(path),
            ) from error


class Packer:
    """Collects storages; each is kept once."""

    def __init__(self) -> None:
        self.storages: list[Tensor] = []
        self._index: dict[int, int] = {}

    def place(self, tensor: Tensor) -> Placement:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._index:
            self._index[key] = len(self.storages)
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self.storages.append(flat)
        return Placement(
            self._index[key],
            int(tensor.storage_offset()),
            tuple(int(s) for s in tensor.shape),
            tuple(int(s) for s in tensor.stride()),
            str(tensor.dtype).removeprefix("torch."),
        )


def take(run: Run) -> Checkpoint:
    """Snapshot of a run between two steps."""
    packer = Packer()
    program = run.program
    return Checkpoint(
        program=program.fingerprint,
        weights=program.weights_fingerprint,
        torch_version=torch.__version__,
        at=run.at,
        schedule=run.schedule,
        call=run.call.describe(),
        values={name: packer.place(v) for name, v in run.values.items()},
        kv=tuple(
            {i: (packer.place(kv.keys), packer.place(kv.values), kv.start) for i, kv in group.items()}
            for group in [{i: kv.kept() for i, kv in group.items()} for group in run.kv]
        ),
        partial={name: packer.place(v.clone()) for name, v in run.partial.items()},
        extra={name: packer.place(t) for name, t in run.call.tensors().items()},
        storages=tuple(packer.storages),
    )


def check_type(checkpoint: Any) -> None:
    """Refuse what is no checkpoint, such as the path of one."""
    if not isinstance(checkpoint, Checkpoint):
        raise UsageError(
            "resume() takes a Checkpoint",
            got=type(checkpoint).__name__,
            remedy="read a file with fpcompile.Checkpoint.load(path) first",
        )


def restore(program: Program, checkpoint: Checkpoint) -> Run:
    """A run of ``program`` that goes on at the checkpoint."""
    from fpcompile.executor.run import Run

    check_type(checkpoint)
    program.watch.check()
    for what, expected, got in (
        ("program", program.fingerprint, checkpoint.program),
        ("weights", program.weights_fingerprint, checkpoint.weights),
        ("torch version", torch.__version__, checkpoint.torch_version),
    ):
        if expected != got:
            raise CheckpointError(
                f"the checkpoint belongs to another {what}",
                expected=expected,
                got=got,
                remedy="resume it with the program, weights and torch version that it was taken with",
            )
    done = checkpoint.at == len(checkpoint.schedule)
    live = program.live[-1 if done else checkpoint.schedule[checkpoint.at].first]
    if set(checkpoint.values) != set(live):
        raise CheckpointError(
            "the checkpoint's values are not the live set of its cut",
            expected=str(sorted(live)),
            got=str(sorted(checkpoint.values)),
        )
    _check_heads(program, checkpoint)
    moved = [s.to(program.device) for s in checkpoint.storages]

    def view(p: Placement) -> Tensor:
        dtype: torch.dtype = getattr(torch, p.dtype)
        return torch.empty(0, dtype=dtype, device=program.device).set_(
            moved[p.storage].untyped_storage(), p.offset, p.sizes, p.strides
        )

    return Run(
        program,
        program.restore_call(checkpoint.call, {name: view(p) for name, p in checkpoint.extra.items()}),
        {name: view(checkpoint.values[name]) for name in live},
        [
            {i: LayerKV(view(k), view(v), start) for i, (k, v, start) in group.items()}
            for group in checkpoint.kv
        ],
        checkpoint.schedule,
        at=checkpoint.at,
        partial={
            name: view(p).clone(memory_format=torch.preserve_format) for name, p in checkpoint.partial.items()
        },
    )


def _check_heads(program: Program, checkpoint: Checkpoint) -> None:
    """Refuse tiles of heads that are computed together where the run is to go on."""
    heads = program.heads()
    for tile in checkpoint.schedule[checkpoint.at :]:
        if not tile.head_stop or program.stages[tile.first].over != "attention":
            continue
        total, unit, _ = heads[tile.first]
        if tile.head_start % unit or tile.head_stop % unit or tile.head_stop > total:
            raise CheckpointError(
                "the checkpoint's tiles divide heads that are computed together on this device",
                expected=f"groups of {unit} of {total} query heads" if total else "all heads at once",
                got=f"heads {tile.head_start} to {tile.head_stop}",
                remedy="resume it on the kind of device, and with the attention, that it was taken with",
            )


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    plain = {
        f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint) if f.name != "storages"
    }
    for name in ("values", "partial", "extra"):
        plain[name] = {k: dataclasses.astuple(p) for k, p in plain[name].items()}
    plain["schedule"] = [dataclasses.astuple(launch) for launch in checkpoint.schedule]
    plain["kv"] = [
        {
            str(i): (dataclasses.astuple(k), dataclasses.astuple(v), start)
            for i, (k, v, start) in group.items()
        }
        for group in checkpoint.kv
    ]
    return plain


def _rebuild(plain: dict[str, Any], tensors: tuple[Tensor, ...]) -> Checkpoint:
    def placement(fields: list[Any]) -> Placement:
        storage, offset, sizes, strides, dtype = fields
        return Placement(storage, offset, tuple(sizes), tuple(strides), dtype)

    for name in ("values", "partial", "extra"):
        plain[name] = {k: placement(p) for k, p in plain[name].items()}
    plain["schedule"] = tuple(Launch(*fields) for fields in plain["schedule"])
    plain["kv"] = tuple(
        {int(i): (placement(k), placement(v), start) for i, (k, v, start) in group.items()}
        for group in plain["kv"]
    )
    return Checkpoint(**plain, storages=tensors)

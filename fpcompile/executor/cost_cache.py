"""Measured seconds kept on disk, so that a program is measured once on a machine and not in every process.

They lie in the folder ``costs`` of the user's cache (``$XDG_CACHE_HOME/fpcompile``, ``~/.cache/fpcompile``),
or of the one that the environment variable ``FPCOMPILE_CACHE`` names; its value ``off`` keeps nothing. A file
is JSON and carries what it was measured for, its *identity*: the device's name, dtype, program, weights'
shapes, threads, versions. One of another identity, or a broken one, is ignored with a logged note. A folder
that cannot be written to is noted too, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fpcompile.executor.cost_model import Samples
from fpcompile.executor.measure_tiles import TileBits

if TYPE_CHECKING:
    from fpcompile.executor.program import Program

FORMAT = "fpcompile-costs-3"
VARIABLE = "FPCOMPILE_CACHE"
_log = logging.getLogger(__name__)


def folder() -> Path | None:
    """Where measurements are kept; None when that is switched off."""
    asked = os.environ.get(VARIABLE, "")
    if asked.lower() == "off":
        return None
    if asked:
        return Path(asked).expanduser() / "costs"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fpcompile" / "costs"


def read(program: Program) -> Samples | None:
    """What was measured for ``program`` on this machine, or None."""
    where = _file(program)
    if where is None or not where.is_file():
        return None
    try:
        return read_text(program, where.read_text(encoding="utf-8"), str(where))
    except OSError as error:
        _log.warning("measured costs in %s cannot be read (%s): they are measured again", where, error)
        return None


def read_bits(program: Program) -> TileBits | None:
    """What was found of the bits of tiles beside the measurement that :func:`read` gives, or None."""
    where = _file(program)
    try:
        return None if where is None else bits_of_text(program, where.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no text
        return None


def bits_of_text(program: Program, text: str) -> TileBits | None:
    """What :func:`write_text` was given of the bits of tiles; None for none, or for another identity."""
    try:
        content = json.loads(text)
        if content["format"] == FORMAT and dict(content["identity"]) == identity(program):
            return TileBits.read(content["bits"])
    except (AttributeError, KeyError, TypeError, ValueError):
        pass  # there is none, or what is broken was noted when the measurement was read
    return None


def write(program: Program, samples: Samples, bits: TileBits | None = None) -> None:
    """Keep what was measured; an older measurement is replaced."""
    where = _file(program)
    if where is not None:
        write_file(where, write_text(program, samples, bits))


def write_file(where: Path, text: str) -> None:
    """Write a file of the cache whole or not at all; a folder that cannot be written to is noted."""
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=where.parent, prefix=f".{where.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, where)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.warning("measured costs cannot be kept in %s: %s", where, error)


def write_text(program: Program, samples: Samples, bits: TileBits | None = None) -> str:
    """Samples, their identity, and what was found of the bits of tiles, as JSON."""
    rows = [[list(key), [list(pair) for pair in found]] for key, found in samples.items()]
    content = {"format": FORMAT, "identity": identity(program), "samples": rows}
    return json.dumps(content if bits is None else {**content, "bits": bits.plain()})


def read_text(program: Program, text: str, where: str) -> Samples | None:
    """Read back what :func:`write_text` gave for the same identity; None, with a logged note, for others."""
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        own, other = identity(program), dict(content["identity"])
        differing = [name for name in {**own, **other} if own.get(name) != other.get(name)]
        if differing:
            told = ", ".join(f"{name} {other.get(name)!r} instead of {own.get(name)!r}" for name in differing)
            _log.warning("measured costs in %s are of something else and are ignored: %s", where, told)
            return None
        samples = {
            tuple(str(name) for name in key): tuple((int(n), float(seconds)) for n, seconds in found)
            for key, found in content["samples"]
        }
        if not samples or not all(_sound(found) for found in samples.values()):
            raise ValueError("no rising lengths with positive seconds")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _log.warning(
            "measured costs in %s are broken and are ignored: %s: %s", where, type(error).__name__, error
        )
        return None
    return samples


def identity(program: Program) -> dict[str, Any]:
    """What a measurement holds for."""
    shapes = hashlib.sha256()
    for path, weight in sorted(program.weights.items()):
        shapes.update(f"{path}{tuple(weight.shape)}{weight.dtype}".encode())
    return {
        "device": device_name(program.device),
        "threads": torch.get_num_threads(),
        "dtype": str(program.dtype),
        "program": program.fingerprint,
        "weights": shapes.hexdigest(),
        "torch": torch.__version__,
    }


def device_name(device: torch.device) -> str:
    """The name of a GPU or of the processor, after the kind of device."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{device.type}: {next(names, platform.processor() or platform.machine())}"


def _sound(found: tuple[tuple[int, float], ...]) -> bool:
    sizes = [n for n, _ in found]
    return (
        bool(found)
        and sizes == sorted(set(sizes))
        and sizes[0] > 0
        and all(0 < seconds < math.inf for _, seconds in found)
    )


def _file(program: Program) -> Path | None:
    return _named(identity(program), "")


def rates_file(identity: dict[str, Any]) -> Path | None:
    """Where the rates of a device are kept; None when nothing is."""
    return _named(identity, "rates-")


def _named(identity: dict[str, Any], prefix: str) -> Path | None:
    base = folder()
    if base is None:
        return None
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return base / f"{prefix}{digest[:32]}.json"

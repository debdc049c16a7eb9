"""Saving and loading a prefill that stopped in mid-layer, against what the machine does with a plain file.

    python benchmarks/checkpoint_rate.py                          4096 tokens, half-way; target: 50 %
    python benchmarks/checkpoint_rate.py --tokens 1024 --folder /mnt/disk

In one interleaved run: *save* and *load* of the checkpoint, and the baselines: *write* as many bytes from
memory to a new file, ``fsync`` and rename it; *read* such a file into fresh memory. What was written a moment
ago is read from the page cache, by both. The ratio is baseline over checkpoint, per round: 1 is as fast.

The saved run is resumed and finished: exit code 1 when its logits have not the bits of the uninterrupted one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any directory

from benchmarks import common
from fpcompile import Checkpoint, Run, segment
from fpcompile.cli.bits import compare_outputs
from fpcompile.cli.guard import quiet, remedied
from fpcompile.cli.interleave import interleave, ratio
from fpcompile.cli.load import forward_arguments, random_ids
from fpcompile.executor.tensor_file import PIECE

TARGET = 0.5


def arguments() -> argparse.Namespace:
    """The command line."""
    made = common.parser("Rate of saving and loading a paused prefill, against plain files.")
    made.add_argument("--tokens", type=int, default=4096)
    made.add_argument("--repeats", type=int, default=7, help="rounds")
    made.add_argument("--folder", type=Path, help="where the files lie; default: a temporary folder")
    return made.parse_args()


def half_way(run: Run) -> Run:
    """Stepped to the middle of a layer: behind half of the launches, and then up to attention."""
    while run.at < len(run.schedule) // 2 or run.next_segment.kind != "attention":
        run.step()
    return run


def write(path: Path, content: memoryview) -> None:
    """A new file of these bytes, on the disk when this returns."""
    beside = path.with_suffix(".new")
    handle = os.open(beside, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    try:
        for start in range(0, len(content), PIECE):
            _write_all(handle, content[start : start + PIECE])
        os.fsync(handle)
    finally:
        os.close(handle)
    beside.replace(path)


def _write_all(handle: int, content: memoryview) -> None:
    while content:
        content = content[os.write(handle, content) :]


def read(path: Path, size: int) -> torch.Tensor:
    """The file in fresh memory."""
    tensor = torch.empty(size, dtype=torch.uint8)
    rest: memoryview = tensor.numpy().data
    handle = os.open(path, os.O_RDONLY)
    try:
        while rest:
            rest = rest[os.readv(handle, [rest[:PIECE]]) :]
    finally:
        os.close(handle)
    return tensor


def measure(model: Any, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All four, and whether the bits stay."""
    program = segment(model)
    ids = random_ids(model, options.tokens, seed=options.seed)
    expected = program(input_ids=ids, **forward_arguments(model))
    run = half_way(program.start(input_ids=ids, **forward_arguments(model)))
    stopped = run.next_segment.name
    checkpoint = run.checkpoint()
    size = checkpoint.nbytes
    saved, plain = folder / "run.ckpt", folder / "plain"
    generator = torch.Generator().manual_seed(options.seed)
    noise = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    content: memoryview = noise.numpy().data
    checkpoint.save(saved)
    write(plain, content)
    seconds = interleave(
        {
            "save": lambda: checkpoint.save(saved),
            "load": lambda: Checkpoint.load(saved),
            "write": lambda: write(plain, content),
            "read": lambda: read(plain, size),
        },
        rounds=options.repeats,
        seed=options.seed,
    )
    resumed = program.resume(Checkpoint.load(saved))
    while not resumed.done:
        resumed.step()
    return {
        "tokens": options.tokens,
        "stopped_at": stopped,
        "bytes": size,
        "seconds": seconds,
        "rate": {name: size / statistics.median(times) for name, times in seconds.items()},
        "ratio": {
            "save": common.spread(ratio(seconds, "write", "save")),
            "load": common.spread(ratio(seconds, "read", "load")),
        },
        "bits_equal": compare_outputs(resumed.result(), expected).equal,
    }


def plot(found: dict[str, Any], title: str, options: argparse.Namespace) -> None:
    """Rates as bars."""
    figure, ax = common.canvas(
        f"A checkpoint of {found['bytes'] / 1e6:.0f} MB, {found['tokens']}-token prefill in mid-layer",
        f"{title}; medians of {options.repeats} interleaved rounds",
        x="",
        y="GB/s",
    )
    for place, (name, colour) in enumerate(zip(("write", "save", "read", "load"), (2, 0, 2, 0), strict=True)):
        ax.bar([place], [found["rate"][name] / 1e9], color=common.COLOURS[colour])
    ax.set_xticks(range(4), ["write a file", "save", "read a file", "load"])
    common.save_plot(figure, options.output / "checkpoint_rate.png")


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    with quiet(), remedied(), torch.no_grad():
        common.warn_if_busy()
        model, title = common.load(options)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = measure(model, Path(folder), options)
        print(f"{title}, {found['tokens']} tokens, stopped at {found['stopped_at']}")
        head = ("", "GB/s", "of the file's rate", "quartiles")
        rows = [
            (
                name,
                f"{found['rate'][name] / 1e9:.2f}",
                f"{found['ratio'][name]['median']:.2f}",
                f"{found['ratio'][name]['q1']:.2f}-{found['ratio'][name]['q3']:.2f}",
            )
            for name in ("save", "load")
        ]
        rows += [(f"plain {name}", f"{found['rate'][name] / 1e9:.2f}", "", "") for name in ("write", "read")]
        common.print_table(head, rows)
        for name in ("save", "load"):
            if (reached := found["ratio"][name]["median"]) < TARGET:
                common.report_missed(f"{name} reaches {reached:.2f} of the file's rate, not {TARGET}")
        plot(found, title, options)
        content = {"benchmark": "checkpoint_rate", "model": title, "target": TARGET, **found}
        machine = common.machine(model.device)
        common.write_json(options.output / "checkpoint_rate.json", {**content, "machine": machine})
        common.fail_if_different([] if found["bits_equal"] else ["the resumed run"])


if __name__ == "__main__":
    main()

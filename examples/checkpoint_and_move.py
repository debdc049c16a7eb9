"""A prefill stops half-way, is saved, and another process ends it with the same bits.

python examples/checkpoint_and_move.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fpcompile
from fpcompile.models.demo_models import build_demo_model


def compiled() -> fpcompile.Program:
    """The program. Its weights are drawn from one seed, so both processes have the same ones."""
    return fpcompile.segment(build_demo_model("qwen3-110m", seed=0), verify=False)


def finish(checkpoint: Path, result: Path) -> None:
    """The second process: resume, run to the end, save the logits."""
    run = compiled().resume(fpcompile.Checkpoint.load(checkpoint))
    print(f"second process: goes on at segment {run.cursor} of {len(run.program.segments)}")
    while not run.done:
        run.step()
    torch.save(run.result().logits, result)


def main() -> None:
    """The first process: run half, save, let the other one finish, compare with an uninterrupted run."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--finish", type=Path, nargs=2, metavar=("CHECKPOINT", "RESULT"), help="internal")
    given = options.parse_args()
    if given.finish:
        finish(*given.finish)
        return

    program = compiled()
    ids = torch.randint(1000, 9000, (1, given.tokens), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, result = Path(folder) / "prefill.ckpt", Path(folder) / "logits.pt"
        run = program.start(input_ids=ids, logits_to_keep=1)
        while run.cursor < len(program.segments) // 2:
            run.step()
        run.checkpoint().save(checkpoint)
        size = checkpoint.stat().st_size / 1e6
        print(f"first process: stopped at segment {run.cursor}, saved {size:.1f} MB")
        subprocess.run([sys.executable, __file__, "--finish", str(checkpoint), str(result)], check=True)
        moved = torch.load(result)
    alone = program(input_ids=ids, logits_to_keep=1).logits
    print("bits equal to the uninterrupted run:", "yes" if torch.equal(moved, alone) else "NO")


if __name__ == "__main__":
    main()

"""Bits at every cut: a paused and resumed run equals the uninterrupted one and the unmodified model.

The reference runs in the same process with the attention implementation that the model itself chose (sdpa, or
eager where it has no other). Layer and model granularity are tested in one dtype each, turn by turn, as they
share the segments' code with operator granularity.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fpcompile.models.zoo import MAIN_ARCHS, sample_ids
from tests.cpu.support import (
    DTYPES,
    LENGTHS,
    Outcome,
    cuts,
    differences,
    finish,
    model_of,
    outcome,
    program_of,
    reference,
    relay,
    through_file,
)

CASES = [(arch, dtype, "operator") for arch in MAIN_ARCHS for dtype in DTYPES] + [
    (arch, DTYPES[(i + j) % 2], granularity)
    for i, arch in enumerate(MAIN_ARCHS)
    for j, granularity in enumerate(("layer", "model"))
]


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype", "granularity"), CASES, ids=_name)
def test_preempted_at_every_cut_it_gives_the_bits_of_the_unmodified_model(
    arch: str, dtype: torch.dtype, granularity: str, tmp_path: Path
) -> None:
    program = program_of(arch, dtype, granularity)
    wrong: list[str] = []

    def compare(what: str, got: Outcome, expected: Outcome) -> None:
        wrong.extend(f"{what}: {difference}" for difference in differences(got, expected))

    for length in LENGTHS:
        ids = sample_ids(length, seed=length)
        expected = reference(model_of(arch, dtype), ids)
        compare(f"{length} tokens, uninterrupted", outcome(program(ids)), expected)

        snapshots = []
        run = program.start(ids)
        for _ in cuts(run):
            run.suspend()
            snapshots.append(run.checkpoint())
        compare(f"{length} tokens, snapshotted at every cut", outcome(run.result()), expected)
        assert len(snapshots) == len(program.segments) + 1
        for cut, snapshot in enumerate(snapshots):  # only now: what ran since must not have changed them
            compare(f"{length} tokens, resumed at cut {cut}", finish(program.resume(snapshot)), expected)

        compare(f"{length} tokens, relayed", relay(program, program.start(ids)), expected)
    carry = through_file(tmp_path / "run.ckpt")
    ids = sample_ids(17, seed=3)
    expected = reference(model_of(arch, dtype), ids)
    compare("17 tokens, relayed by file", relay(program, program.start(ids), carry), expected)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gpt_oss"])
def test_one_snapshot_can_be_resumed_many_times_and_its_run_can_go_on(arch: str) -> None:
    program = program_of(arch)
    ids = sample_ids(40, seed=5)
    expected = reference(model_of(arch), ids)
    run = program.start(ids)
    for _ in range(len(program.segments) // 2):
        run.step()
    snapshot = run.checkpoint()
    twins = [program.resume(snapshot), program.resume(snapshot)]
    assert [differences(finish(r), expected) for r in (*twins, run)] == [[], [], []]


@pytest.mark.slow
def test_granularities_cut_differently_and_agree() -> None:
    ids = sample_ids(33, seed=6)
    programs = {g: program_of("llama", granularity=g) for g in ("model", "layer", "operator")}
    counts = [len(p.segments) for p in programs.values()]
    assert counts[0] == 1
    assert counts == sorted(set(counts))
    expected = reference(model_of("llama"), ids)
    assert [differences(outcome(p(ids)), expected) for p in programs.values()] == [[], [], []]

"""CUDA graphs of a tiny model: its numbers, the same bits paused or not, and longer prompts eager."""

from __future__ import annotations

import pytest
import torch

import fpcompile
from fpcompile.models.zoo import sample_ids, tiny_model
from tests.cpu.support import differences, finish, reference, relative_error, relay


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
def test_replays_give_the_models_numbers(arch: str) -> None:
    model = tiny_model(arch)
    model.to("cuda")  # type: ignore[arg-type]
    program = fpcompile.segment(
        model, route="packed", backend="cudagraphs", granularity="layer", verify=False
    )
    assert any(part.function.startswith("cudagraphs") for s in program.segments for part in s.parts)
    assert not [note for note in program.plan.notes if "cannot be captured" in note]
    for length in (1, 2, 17, 128, 300):
        ids = sample_ids(length).to("cuda")
        whole = finish(program.start(ids))
        assert relative_error(whole.logits, reference(model, ids).logits) <= 2e-5
        assert differences(relay(program, program.start(ids)), whole) == []


def test_interleaved_runs_do_not_see_each_other() -> None:
    model = tiny_model("llama")
    model.to("cuda")  # type: ignore[arg-type]
    program = fpcompile.segment(
        model, route="packed", backend="cudagraphs", granularity="layer", verify=False
    )
    ids = [sample_ids(n, seed=n).to("cuda") for n in (11, 30)]
    alone = [finish(program.start(i)) for i in ids]
    runs = [program.start(i) for i in ids]
    streams = [torch.cuda.Stream() for _ in runs]  # type: ignore[no-untyped-call]
    while not all(run.done for run in runs):
        for run, stream in zip(runs, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                if not run.done:
                    run.step()
            torch.cuda.current_stream().wait_stream(stream)
    assert [differences(finish(r), a) for r, a in zip(runs, alone, strict=True)] == [[], []]

"""Parts replayed as graphs, on a recorder that needs no GPU: buckets, padding, copies, who stays eager."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fpcompile
from fpcompile.errors import ProgramFileError, UsageError
from fpcompile.executor import cudagraphs
from fpcompile.executor.cudagraphs import bucket_of
from fpcompile.models.zoo import sample_ids
from tests.cpu.support import differences, finish, model_of, program_of, reference, relative_error, relay


class FakeRecorder:
    """Replays by computing again into the captured results, which are poisoned while nobody replays."""

    def __init__(self, device: torch.device) -> None:
        self.results: list[Tensor] = []
        self.replays = 0
        self._lock = threading.Lock()

    def capture(self, call: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        results = [found.clone() for found in call()]
        self.results += results

        def replay() -> None:
            assert self._lock.locked()
            self.replays += 1
            for place, found in zip(results, call(), strict=True):
                place.copy_(found)

        return replay, results

    @contextmanager
    def replaying(self) -> Iterator[None]:
        with self._lock:
            yield
            for place in self.results:
                place.fill_(float("nan") if place.is_floating_point() else -1)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecorder]:
    """The recorders that are made; CPU counts as a device with graphs."""
    made: list[FakeRecorder] = []

    def make(device: torch.device) -> FakeRecorder:
        made.append(FakeRecorder(device))
        return made[-1]

    monkeypatch.setattr(cudagraphs, "make_recorder", make)
    monkeypatch.setattr("fpcompile.passes.lower_graphs.DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr("fpcompile.passes.lower_graphs.BUCKETS", (1, 4, 16, 64))
    return made


def graphs_of(arch: str, **options: object) -> fpcompile.Program:
    return fpcompile.segment(model_of(arch), backend="cudagraphs", verify=False, **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_replays_give_the_models_numbers_at_any_length(arch: str, recorders: list[FakeRecorder]) -> None:
    program = graphs_of(arch, granularity="layer")
    (recorder,) = recorders
    for length in (1, 2, 4, 17, 64):
        before = recorder.replays
        ids = sample_ids(length)
        got, expected = (
            finish(program.start(ids, logits_to_keep=1)),
            reference(model_of(arch), ids, logits_to_keep=1),
        )
        assert recorder.replays > before
        assert relative_error(got.logits, expected.logits) <= 2e-6
        for (k, v), (own_k, own_v) in zip(got.layers, expected.layers, strict=True):
            assert relative_error(k, own_k) <= 2e-6
            assert relative_error(v, own_v) <= 2e-6
    before, ids = recorder.replays, sample_ids(65)
    assert differences(finish(program.start(ids)), reference(model_of(arch), ids)) == []
    assert recorder.replays == before, "longer than the largest bucket: eager, the model's bits"


@pytest.mark.slow
def test_paused_runs_hold_nothing_of_the_graphs(recorders: list[FakeRecorder]) -> None:
    program = graphs_of("llama")
    first, second = sample_ids(11), sample_ids(30, seed=1)
    alone = [finish(program.start(ids)) for ids in (first, second)]
    assert differences(relay(program, program.start(first)), alone[0]) == []
    runs = [program.start(first), program.start(second)]
    while not all(run.done for run in runs):
        for run in runs:
            if not run.done:
                run.step()
                assert not any(t.isnan().any() for t in run.values.values() if t.is_floating_point())
    assert [differences(finish(r), a) for r, a in zip(runs, alone, strict=True)] == [[], []]
    assert recorders[0].replays > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning")
def test_tiles_are_replayed_too(recorders: list[FakeRecorder]) -> None:
    program = graphs_of("llama")
    program.use_costs({s.key: ((1, 1e-3), (512, 1.0)) for s in program.stages})
    ids = sample_ids(128)
    before = recorders[0].replays
    run = program.start(ids, max_blocking_ms=130.0)
    assert any(launch.tiled for launch in run.schedule)
    assert relative_error(finish(run).logits, reference(model_of("llama"), ids).logits) <= 2e-6
    assert recorders[0].replays > before


@pytest.mark.slow
def test_who_stays_eager_is_told(recorders: list[FakeRecorder], tmp_path: Path) -> None:
    program = graphs_of("llama")
    told = " ".join(program.explain().split())
    assert "backend cudagraphs: " in told
    assert "stays eager: one kernel is launched as fast without a graph" in told
    assert program.fingerprint != program_of("llama").fingerprint
    with pytest.raises(ProgramFileError, match="CUDA graphs cannot be saved"):
        program.save(tmp_path / "program")
    generic = graphs_of("llama", route="generic")
    told = " ".join(generic.explain().split())
    assert "backend cudagraphs: 0 of " in told
    assert "not proven independent" in told
    ids = sample_ids(5)
    assert torch.equal(generic(input_ids=ids).logits, reference(model_of("llama"), ids).logits)


@pytest.mark.slow
def test_what_cannot_be_captured_stays_eager(
    recorders: list[FakeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeRecorder, call: object) -> object:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(FakeRecorder, "capture", refuse)
    program = graphs_of("llama")
    ids = sample_ids(9)
    assert differences(finish(program.start(ids)), reference(model_of("llama"), ids)) == []
    told = " ".join(program.explain().split())
    assert "cannot be captured (operation not permitted when stream is capturing)" in told


def test_without_a_gpu_the_error_says_what_is_missing() -> None:
    with pytest.raises(UsageError, match=r"(?s)needs a model on a CUDA device.*a model on cpu.*'inductor'"):
        fpcompile.segment(model_of("llama"), backend="cudagraphs")


def test_the_smallest_bucket_that_fits() -> None:
    assert [bucket_of(n, (1, 4, 16)) for n in (1, 2, 4, 5, 16, 17)] == [1, 4, 4, 16, 16, None]

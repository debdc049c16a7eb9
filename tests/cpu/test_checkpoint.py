"""Checkpoints: what a file carries, what is refused, and resuming in another process."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fpcompile
from fpcompile.errors import CheckpointError
from fpcompile.executor.schedule import Heads, Launch
from fpcompile.models.attention import AttentionCall
from fpcompile.models.zoo import sample_ids, tiny_model
from tests.cpu.support import (
    Outcome,
    cuts,
    differences,
    finish,
    mlp,
    model_of,
    outcome,
    program_of,
    reference,
    same_bits,
    storage_bytes,
    toy,
)

ROOT = Path(__file__).parents[2]
SHORT = 3
MIDDLE = 5


@pytest.fixture(scope="module")
def program() -> fpcompile.Program:
    return program_of("llama")


@pytest.fixture
def run(program: fpcompile.Program) -> fpcompile.Run:
    """A run of :data:`SHORT` tokens that is paused before segment :data:`MIDDLE`."""
    started = program.start(sample_ids(SHORT, seed=1))
    for _ in range(MIDDLE):
        started.step()
    return started


@pytest.fixture
def file(run: fpcompile.Run, tmp_path: Path) -> Path:
    path = tmp_path / "run.ckpt"
    run.checkpoint().save(path)
    return path


def _refused(error: CheckpointError) -> None:
    assert error.what
    assert error.expected
    assert error.got


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "llama", "phi3"])
def test_a_file_gives_back_every_tensor_with_its_strides_and_its_sharing(name: str, tmp_path: Path) -> None:
    program = fpcompile.segment(toy(mlp), route="packed") if name == "toy" else program_of(name)
    path = tmp_path / "run.ckpt"
    run = program.start(sample_ids(17, batch=2, seed=2), logits_to_keep=torch.tensor([3, 16]))
    shared = 0
    for cut in cuts(run):
        checkpoint = run.checkpoint()
        checkpoint.save(path)
        back = program.resume(fpcompile.Checkpoint.load(path))
        assert (back.cursor, back.tokens, back.rows, back.done) == (cut, 34, 4, run.done)
        assert list(back.values) == list(run.values)
        assert not cut or set(back.values) == set(program.segments[cut - 1].live.names)
        for live, value in run.values.items():
            assert same_bits(back.values[live], value), live
            assert back.values[live].stride() == value.stride(), live
            assert back.values[live].storage_offset() == value.storage_offset(), live
        assert (back.live_bytes, back.kv_bytes) == (run.live_bytes, run.kv_bytes)
        held = [*run.values.values(), *(t for g in run.kv for kv in g.values() for t in (kv.keys, kv.values))]
        assert checkpoint.nbytes == storage_bytes(held)
        shared += run.live_bytes < sum(v.untyped_storage().nbytes() for v in run.values.values())
    assert shared or name != "toy", "the toy's queries, keys and values are views of one storage"


def test_taking_a_checkpoint_copies_nothing(run: fpcompile.Run) -> None:
    held = {v.untyped_storage().data_ptr() for v in run.values.values()}
    assert held <= {s.untyped_storage().data_ptr() for s in run.checkpoint().storages}


def test_saving_replaces_an_older_file_and_leaves_nothing_else(
    program: fpcompile.Program, run: fpcompile.Run, tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"
    path.write_bytes(b"older")
    run.checkpoint().save(str(path))
    assert program.resume(fpcompile.Checkpoint.load(str(path))).cursor == MIDDLE
    assert os.listdir(tmp_path) == ["run.ckpt"]


def test_a_failed_save_keeps_the_older_file(
    run: fpcompile.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.ckpt"
    run.checkpoint().save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run.step()
    with pytest.raises(OSError, match="no space"):
        run.checkpoint().save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.ckpt"]


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fpcompile.Checkpoint.load(tmp_path / "none.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("granularity", lambda: program_of("llama", granularity="layer")),
        ("architecture", lambda: program_of("qwen3")),
        ("dtype", lambda: program_of("llama", torch.bfloat16)),
        ("depth", lambda: _changed("llama", num_hidden_layers=3)),
    ],
)
def test_a_checkpoint_of_another_program_is_refused(run: fpcompile.Run, name: str, other: Any) -> None:
    with pytest.raises(CheckpointError, match="another program") as caught:
        other().resume(run.checkpoint())
    _refused(caught.value)
    assert caught.value.remedy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("granite", {"attention_multiplier": 0.5}),
        ("granite", {"residual_multiplier": 0.25}),
        ("gemma2", {"attn_logit_softcapping": 5.0}),
        ("gemma2", {"query_pre_attn_scalar": 64}),
        ("mistral", {"sliding_window": 24}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama", {"hidden_act": "gelu"}),
        ("mixtral", {"hidden_act": "gelu"}),
        ("mixtral", {"num_experts_per_tok": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_same_weights_under_another_configuration_are_another_program(
    arch: str, changes: dict[str, object]
) -> None:
    """Every one of these changes the numbers; none changes a weight or a shape."""
    ids = sample_ids(40, seed=4)
    run = program_of(arch).start(ids)
    while run.next_segment.reason != "before attention":
        run.step()
    other = _changed(arch, **changes)
    assert differences(outcome(other(ids)), reference(model_of(arch), ids)), "the change changes nothing"
    with pytest.raises(CheckpointError, match="another"):
        other.resume(run.checkpoint())


@pytest.mark.slow
@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_other_rotary_parameters_are_another_program(rope: str) -> None:
    """Modules that compute their frequencies at run time hold them in no weight."""
    ids = sample_ids(40, seed=4)
    model = tiny_model("llama", rope=rope)
    parameters = dict(model.config.rope_parameters)
    if rope == "dynamic":
        parameters["factor"] = 8.0
    else:
        parameters["long_factor"] = [2 * f for f in parameters["long_factor"]]
    run = fpcompile.segment(model, route="packed").start(ids)
    run.step()
    other = fpcompile.segment(
        tiny_model(
            "llama",
            rope=parameters,
            overrides={"max_position_embeddings": model.config.max_position_embeddings},
        )
    )
    assert differences(outcome(other(ids)), reference(tiny_model("llama", rope=rope), ids))
    with pytest.raises(CheckpointError, match="another"):
        other.resume(run.checkpoint())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "weight"),
    [
        ("llama", None),
        ("llama", "model.layers.1.self_attn.q_proj.weight"),
        ("mixtral", "model.layers.1.mlp.experts.down_proj"),
        ("gpt_oss", "model.layers.0.self_attn.sinks"),
    ],
)
def test_a_checkpoint_of_other_weights_is_refused(arch: str, weight: str | None) -> None:
    """All of them another seed's, or one tensor a little different, wherever it is used."""
    model = tiny_model(arch, seed=0 if weight else 1)
    if weight is not None:
        with torch.no_grad():
            model.get_parameter(weight).mul_(1.01)
    other = fpcompile.segment(model, route="packed")
    started = program_of(arch).start(sample_ids(SHORT))
    started.step()
    with pytest.raises(CheckpointError, match="another weights") as caught:
        other.resume(started.checkpoint())
    _refused(caught.value)


def test_a_checkpoint_of_another_torch_is_refused(program: fpcompile.Program, run: fpcompile.Run) -> None:
    older = dataclasses.replace(run.checkpoint(), torch_version="1.0.0")
    with pytest.raises(CheckpointError, match="torch version") as caught:
        program.resume(older)
    assert caught.value.got == "1.0.0"


@pytest.mark.slow
def test_truncated_at_any_length_it_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in [*range(64), *range(64, len(whole), 97), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            fpcompile.Checkpoint.load(file)
        _refused(caught.value)
        assert caught.value.where == str(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError):
        fpcompile.Checkpoint.load(file)


@pytest.mark.slow
def test_with_any_byte_of_the_header_changed_it_is_refused_or_the_same(
    file: Path, program: fpcompile.Program, run: fpcompile.Run
) -> None:
    """Some bytes carry nothing (the padding behind the JSON); no other change may go unnoticed."""
    whole = file.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    expected = finish(run)
    unnoticed: list[int] = []
    for at in range(end):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 7
        file.write_bytes(flipped)
        try:
            checkpoint = fpcompile.Checkpoint.load(file)
        except CheckpointError:
            continue
        unnoticed.append(at)
        assert differences(finish(program.resume(checkpoint)), expected) == []
    assert len(unnoticed) < 16, f"{len(unnoticed)} of {end} bytes can be changed"


@pytest.mark.slow
def test_with_any_byte_of_the_tensors_changed_it_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    begin = 8 + struct.unpack("<Q", whole[:8])[0]
    for at in [*range(begin, len(whole), 61), len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[at] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="changed") as caught:
            fpcompile.Checkpoint.load(file)
        _refused(caught.value)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"x": torch.zeros(2)}, path)
    kinds = [path.read_bytes()]
    save_file({"x": torch.zeros(2)}, path, metadata={"format": "fpcompile-checkpoint-0"})
    kinds += [path.read_bytes(), b"", b"PK\x03\x04 a pickle of torch.save", b"{}", b"\xff" * 64]
    for content in kinds:
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            fpcompile.Checkpoint.load(path)
        _refused(caught.value)


def test_a_file_of_this_format_without_its_description_is_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    checkpoint = fpcompile.Checkpoint.load(file)
    tensors = {f"s{i}": s for i, s in enumerate(checkpoint.storages)}
    for missing in ("description", "sha256"):
        metadata = {"format": "fpcompile-checkpoint-5", "description": "{}", "sha256": "0" * 64}
        del metadata[missing]
        save_file(tensors, other, metadata=metadata)
        with pytest.raises(CheckpointError):
            fpcompile.Checkpoint.load(other)


def test_the_file_is_no_pickle_and_its_description_is_json(file: Path, program: fpcompile.Program) -> None:
    whole = file.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    metadata = json.loads(whole[8 : 8 + size])["__metadata__"]
    assert sorted(metadata) == ["description", "format", "sha256"]
    assert set(json.loads(metadata["description"])["values"]) == set(program.segments[MIDDLE - 1].live.names)


def test_plans_count_query_heads_wherever_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that repeat the keys take whole groups: they go on with a plan of groups, and with no other."""
    program, ids, total = program_of("qwen3"), sample_ids(40), 4

    def paused(together: int) -> fpcompile.Checkpoint:
        run = program.start(ids)
        run.schedule = tuple(
            Launch(i, i + 1, 0, 40, 0, head, head + together, final=head + together == total)
            if stage.over == "attention"
            else Launch(i, i + 1)
            for i, stage in enumerate(program.stages)
            for head in range(0, total if stage.over == "attention" else 1, together)
        )
        while not run.partial:
            run.step()
        return run.checkpoint()

    alone, groups = paused(1), paused(2)
    expected = finish(program.resume(alone))
    monkeypatch.setattr(AttentionCall, "head_unit", property(lambda call: call.heads // call.kv_heads))
    assert {heads for heads in program.heads() if heads.total} == {Heads(total, 2)}
    assert differences(finish(program.resume(groups)), expected) == []
    with pytest.raises(CheckpointError, match="heads") as caught:
        program.resume(alone)
    _refused(caught.value)
    monkeypatch.setattr(AttentionCall, "head_unit", 0)
    with pytest.raises(CheckpointError, match="heads"):
        program.resume(groups)


RESUME = """
import sys
import torch, fpcompile
from safetensors.torch import save_file
from fpcompile.models.zoo import tiny_model
torch.set_num_threads(1)
arch, dtype, checkpoint, result = sys.argv[1:]
program = fpcompile.segment(tiny_model(arch, dtype=getattr(torch, dtype)))
run = program.resume(fpcompile.Checkpoint.load(checkpoint))
while not run.done:
    run.step()
out = run.result()
tensors = {"logits": out.logits}
for i, layer in enumerate(out.past_key_values.layers):
    tensors |= {f"{i}.keys": layer.keys, f"{i}.values": layer.values}
save_file({name: t.contiguous() for name, t in tensors.items()}, result)
"""


def _go_on_elsewhere(arch: str, dtype: str, checkpoint: Path, result: Path) -> dict[str, torch.Tensor]:
    """What another process makes of the checkpoint, with one thread."""
    from safetensors.torch import load_file

    done = subprocess.run(
        [sys.executable, "-c", RESUME, arch, dtype, str(checkpoint), str(result)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(result)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the other process: the number of threads may decide in which order a kernel sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _assert_same(got: dict[str, torch.Tensor], expected: Outcome) -> None:
    assert same_bits(got["logits"], expected.logits)
    for i, layer in enumerate(expected.layers):
        assert same_bits(got[f"{i}.keys"], layer[0])
        assert same_bits(got[f"{i}.values"], layer[1])


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), [("llama", "float32"), ("gpt_oss", "bfloat16")])
def test_another_process_goes_on_to_the_same_bits(
    arch: str, dtype: str, tmp_path: Path, one_thread: None
) -> None:
    program = program_of(arch, getattr(torch, dtype))
    ids = sample_ids(33, seed=8)
    run = program.start(ids)
    for _ in range(len(program.segments) // 2):
        run.step()
    run.checkpoint().save(tmp_path / "run.ckpt")
    expected = reference(model_of(arch, getattr(torch, dtype)), ids)
    _assert_same(_go_on_elsewhere(arch, dtype, tmp_path / "run.ckpt", tmp_path / "result"), expected)
    assert differences(finish(run), expected) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning")
@pytest.mark.parametrize("over", ["tokens", "attention"])
def test_another_process_goes_on_in_the_middle_of_a_segment(
    over: str, tmp_path: Path, one_thread: None
) -> None:
    """Between two tiles: the tile plan and the partial outputs travel with the run."""
    program = program_of("llama")
    ids = sample_ids(300, seed=8)
    run = program.start(ids, max_blocking_ms=1e-3)
    expected = finish(program.start(ids, max_blocking_ms=1e-3))
    tiles = [at for at, launch in enumerate(run.schedule) if launch.tiled and not launch.final]
    at = [at for at in tiles if program.stages[run.schedule[at].first].over == over][1]
    while run.at <= at:
        run.step()
    assert run.partial
    run.checkpoint().save(tmp_path / "run.ckpt")
    _assert_same(_go_on_elsewhere("llama", "float32", tmp_path / "run.ckpt", tmp_path / "result"), expected)


def _changed(arch: str, **changes: object) -> fpcompile.Program:
    """A program of the tiny model's weights under a changed configuration."""
    return fpcompile.segment(tiny_model(arch, overrides=changes), route="packed")

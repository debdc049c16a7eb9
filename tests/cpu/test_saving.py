"""Saved programs: the same bits and fingerprints without a trace, and nothing is taken on trust."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.utils._sympy.functions import FloorDiv, Mod

import fpcompile
from fpcompile.errors import ProgramFileError, UnsupportedModelError
from fpcompile.executor import program_file
from fpcompile.executor.measure_tiles import TileBits
from fpcompile.models.generic_tree import flatten
from fpcompile.models.zoo import MAIN_ARCHS, sample_ids, tiny_model
from fpcompile.passes.codegen import function_of, key_of
from fpcompile.passes.expr_text import read_expr, write_expr
from fpcompile.passes.graph_text import read_function, write_function, write_value
from fpcompile.passes.prepack import can_prepack
from tests.cpu.support import differences, finish, model_of, outcome, program_of, reference

CASES = [*((arch, None) for arch in MAIN_ARCHS), ("llama", "dynamic"), ("phi3", "longrope")]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved tiny llama."""
    program_of("llama").save(tmp_path / "program")
    return tmp_path / "program"


def load_untraced(path: Path, model: nn.Module, **options: Any) -> fpcompile.Program:
    """Load where tracing is an error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("loading traced the model")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", refuse)
        return fpcompile.load(path, model, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "rope"), CASES)
def test_a_loaded_program_is_the_saved_one(arch: str, rope: str | None, tmp_path: Path) -> None:
    model, program = model_of(arch, rope=rope), program_of(arch, rope=rope)
    program.save(tmp_path / "program")
    loaded = load_untraced(tmp_path / "program", model, verify=False)
    assert loaded.plan == program.plan
    assert loaded.fingerprint == program.fingerprint
    assert loaded.weights_fingerprint == program.weights_fingerprint
    ids = sample_ids(40)
    assert differences(outcome(loaded(ids)), reference(model, ids)) == []
    for giver, taker in ((program, loaded), (loaded, program)):
        run = giver.start(ids)
        for _ in range(len(giver.segments) // 2):
            run.step()
        assert differences(finish(taker.resume(run.checkpoint())), reference(model, ids)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"weights": "packed"}, {"granularity": "layer", "max_blocking_ms": 50.0}]
)
def test_options_are_kept(options: dict[str, Any], tmp_path: Path) -> None:
    model = model_of("qwen3", torch.bfloat16)
    program = fpcompile.segment(model, route="packed", **options)
    program.save(tmp_path / "program")
    loaded = load_untraced(tmp_path / "program", model)
    assert loaded.max_blocking_ms == program.max_blocking_ms
    assert loaded.plan == program.plan
    ids = sample_ids(40)
    free = {"max_blocking_ms": float("inf")}
    assert differences(outcome(loaded(ids, **free)), outcome(program(ids, **free))) == []


@pytest.mark.slow
def test_what_was_found_of_tiles_is_kept(tmp_path: Path) -> None:
    model = tiny_model("llama")
    program = fpcompile.segment(model, route="packed", verify=False)
    stage = next(s for s in program.stages if s.over)
    bits = TileBits(128, {stage.key: (("64 rows", False), ("128 rows", True))})
    program.use_costs({s.key: ((16, 1e-3), (64, 2e-3)) for s in program.stages}, bits)
    program.save(tmp_path / "program")
    loaded = load_untraced(tmp_path / "program", model)
    assert loaded.bits == bits
    assert loaded.explain() == program.explain()
    assert "64 rows" in loaded.explain()


@pytest.mark.slow
def test_a_fresh_process_loads_it_and_goes_on_with_a_checkpoint(saved: Path) -> None:
    program, ids = program_of("llama"), sample_ids(40)
    run = program.start(ids)
    for _ in range(5):
        run.step()
    run.checkpoint().save(saved.parent / "run.ckpt")
    save_file(dict(model_of("llama").state_dict()), saved.parent / "model.safetensors")
    script = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
import fpcompile
from fpcompile.models.zoo import tiny_model

def refuse(*args, **kwargs):
    raise AssertionError("loading traced the model")

torch.export.export = refuse
folder = Path(sys.argv[1])
model = tiny_model("llama")
model.load_state_dict(load_file(folder / "model.safetensors"))
program = fpcompile.load(folder / "program", model)
run = program.resume(fpcompile.Checkpoint.load(folder / "run.ckpt"))
while not run.done:
    run.step()
save_file({"logits": run.result().logits.contiguous()}, folder / "logits.safetensors")
"""
    subprocess.run([sys.executable, "-c", script, str(saved.parent)], check=True, timeout=240)
    logits = load_file(saved.parent / "logits.safetensors")["logits"]
    assert torch.equal(logits, reference(model_of("llama"), ids).logits)


@pytest.mark.slow
def test_other_values_of_the_weights_are_fine(saved: Path) -> None:
    other = tiny_model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    loaded, ids = fpcompile.load(saved, other), sample_ids(20)
    assert differences(outcome(loaded(ids)), reference(other, ids)) == []
    assert loaded.weights_fingerprint != program_of("llama").weights_fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_model("qwen2"), "another configuration"),
        (lambda: tiny_model("llama", overrides={"rms_norm_eps": 1e-3}), "rms_norm_eps: 0.001"),
        (lambda: tiny_model("llama", overrides={"attn_implementation": "eager"}), "attention implementation"),
        (lambda: tiny_model("llama", dtype=torch.bfloat16), r"bfloat16\["),
        (lambda: _hooked(tiny_model("llama")), "another modules"),
        (lambda: nn.Module.to(tiny_model("llama"), "meta"), "another device"),
    ],
)
def test_another_model_is_refused(make: Callable[[], Any], message: str, saved: Path) -> None:
    with pytest.raises(ProgramFileError, match=message) as caught:
        fpcompile.load(saved, make())
    assert caught.value.expected
    assert caught.value.got
    assert caught.value.remedy


def _hooked(model: nn.Module) -> nn.Module:
    def doubled(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output * 2

    model.get_submodule("model.layers.0.mlp").register_forward_hook(doubled)
    return model


class Padded(nn.Module):
    """Numbers that tracing makes constants, and that no configuration and no weight shows."""

    def __init__(self, padding: int, factor: float) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=padding)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self.conv(x) * self.factor
        return scaled


@pytest.mark.parametrize(("padding", "factor"), [(2, 1.0), (1, 3.0)])
def test_attributes_that_were_traced_belong_to_the_model(padding: int, factor: float, tmp_path: Path) -> None:
    first, other = Padded(1, 1.0).eval(), Padded(padding, factor).eval()
    other.load_state_dict(first.state_dict())
    x = torch.randn(1, 4, 10)
    fpcompile.segment(first, example_inputs=(x,)).save(tmp_path / "program")
    with pytest.raises(ProgramFileError, match="another modules"):
        fpcompile.load(tmp_path / "program", other)
    torch.testing.assert_close(fpcompile.load(tmp_path / "program", first)(x), first(x), rtol=0, atol=0)


@pytest.mark.slow
def test_what_no_record_shows_is_found_by_the_self_check(saved: Path) -> None:
    model = tiny_model("llama")
    model.get_submodule("model.layers.0.mlp").forward = lambda x: x * 100
    with pytest.raises(UnsupportedModelError, match="does not give the model's numbers"):
        fpcompile.load(saved, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "transformers", "fpcompile"])
def test_another_version_is_refused(name: str, saved: Path) -> None:
    def older(manifest: dict[str, Any]) -> None:
        manifest["versions"][name] = "1.0"

    _edit(saved, older)
    with pytest.raises(ProgramFileError, match=f"another versions\n.*{name}: 1.0"):
        fpcompile.load(saved, model_of("llama"))


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as somebody would who can write new digests."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["files"] = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in manifest["files"]}
    manifest["sha256"] = program_file._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["manifest.json", "plan.jsonl", "functions.json", "calls.json", "constants.safetensors"]
)
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_folder_is_refused(name: str, damage: str, saved: Path) -> None:
    file = saved / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if damage == "truncated" else content.replace(b"e", b"f", 1) + b" ")
    with pytest.raises(ProgramFileError) as caught:
        fpcompile.load(saved, model_of("llama"))
    assert caught.value.remedy
    with pytest.raises(FileNotFoundError):
        fpcompile.load(saved / "elsewhere", model_of("llama"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("functions.json", "aten.rsqrt.default", "aten.sqrt.default", "not the one that its key says"),
        ("functions.json", "aten.rsqrt.default", "aten.from_file.default", "may not call"),
        ("functions.json", "aten.rsqrt.default", "os.system.default", "may not call"),
        ("functions.json", "aten.rsqrt.default", "operator.attrgetter", "may not call"),
        ("functions.json", '"rsqrt"', '"__import__(1)"', "wrong name"),
        ("calls.json", "CausalLMOutputWithPast", "Path", "unknown type"),
        ("calls.json", 'model.layers.0.self_attn\\"', 'model.layers.9.self_attn\\"', "complete"),
        ("plan.jsonl", "aten", "aten", None),
    ],
)
def test_a_forged_file_runs_nothing(file: str, old: str, new: str, message: str | None, saved: Path) -> None:
    """Digests do not stop somebody who writes new ones: keys, tables and types do."""
    text = (saved / file).read_text()
    (saved / file).write_text(text.replace(old.replace("\\", ""), new.replace("\\", "")))
    _edit(saved, lambda manifest: None)
    if message is None:
        fpcompile.load(saved, model_of("llama"))
        return
    assert (saved / file).read_text() != text
    with pytest.raises(ProgramFileError, match=message):
        fpcompile.load(saved, model_of("llama"))


@pytest.mark.slow
def test_a_folder_appears_whole_or_not_at_all(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {f.name: f.read_bytes() for f in saved.iterdir()}

    def fail(handle: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            program_of("llama").save(saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before
    assert [f.name for f in saved.parent.iterdir()] == ["program"]
    program_of("llama").save(saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before
    assert [f.name for f in saved.parent.iterdir()] == ["program"]


@pytest.mark.slow
def test_other_folders_are_never_replaced(saved: Path) -> None:
    (saved / "manifest.json").write_text("{}")
    with pytest.raises(ProgramFileError, match="taken"):
        program_of("llama").save(saved)
    shutil.rmtree(saved)
    saved.mkdir()
    program_of("llama").save(saved)
    assert fpcompile.load(saved, model_of("llama")).route == "packed"


@pytest.mark.slow
def test_what_cannot_be_saved_is_told(tmp_path: Path) -> None:
    example = {"input_ids": torch.ones(1, 9, dtype=torch.long)}
    shapes = {"input_ids": {1: torch.export.Dim("length", max=500)}}
    program = fpcompile.segment(
        tiny_model("bloom"), example_inputs=example, dynamic_shapes=shapes, verify=False
    )
    with pytest.raises(ProgramFileError, match="dynamic_shapes") as caught:
        program.save(tmp_path / "program")
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["bloom", "mamba"])
def test_a_program_of_the_generic_route_is_loaded(arch: str, tmp_path: Path) -> None:
    """Variants of three kinds of calls, one of which continues a state; opaque leaves; runs move over."""
    model = tiny_model(arch)
    program = fpcompile.segment(model, route="generic", verify=False)
    ids, more = sample_ids(21), sample_ids(30, seed=1)
    masked = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    expected = [program(input_ids=ids), program(**masked)]
    cache = "cache_params" if arch == "mamba" else "past_key_values"
    follow = {"input_ids": ids[:, :3], cache: expected[0][cache]}
    expected.append(program(**follow))
    program.save(tmp_path / "program")
    loaded = load_untraced(tmp_path / "program", model)
    assert loaded.fingerprint == program.fingerprint
    assert loaded.plan == program.plan
    assert loaded.weights_fingerprint == program.weights_fingerprint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("a call traced the model"))
        got = [loaded(input_ids=ids), loaded(**masked), loaded(**follow)]
        run = program.start(input_ids=ids)
        run.step()
        assert torch.equal(_finished(loaded, run.checkpoint()), expected[0].logits)
        again = loaded.start(**masked)
        again.step()
        assert torch.equal(_finished(program, again.checkpoint()), expected[1].logits)
    for mine, theirs in zip(got, expected, strict=True):
        assert type(mine) is type(theirs)
        assert list(mine) == list(theirs)
        mine_flat, their_flat = flatten(mine), flatten(theirs)
        assert len(mine_flat.tensors) == len(their_flat.tensors)
        assert all(map(torch.equal, mine_flat.tensors, their_flat.tensors))
    if arch == "bloom":  # a call of a new kind is compiled when it comes
        other = {"input_ids": sample_ids(5), "output_hidden_states": True}
        with torch.no_grad():
            own = model(**other)
        assert torch.equal(loaded(**other).logits, own.logits)


def _finished(program: fpcompile.Program, checkpoint: fpcompile.Checkpoint) -> torch.Tensor:
    run = program.resume(checkpoint)
    while not run.done:
        run.step()
    logits: torch.Tensor = run.result().logits
    return logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("variants.json", "transformers.cache_utils:DynamicCache", "subprocess:Popen", "unknown type"),
        ("variants.json", "transformers.cache_utils:DynamicCache", "torch:Generator", "unknown type"),
        (
            "variants.json",
            "transformers.cache_utils:DynamicCache",
            "transformers.cache_utils:torch",
            "unknown",
        ),
        ("variants.json", '"outputs"', '"inputs_"', "not complete"),
        ("variants.json", "fpcompile-plan", "fpcompile-flan", "no plan"),
        ("functions.json", "aten.tanh.default", "aten.from_file.default", "may not call"),
    ],
)
def test_a_forged_program_of_the_generic_route_runs_nothing(
    file: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "program"
    _bloom().save(folder)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    _edit(folder, lambda manifest: None)
    with pytest.raises(fpcompile.errors.FpcompileError, match=message):
        fpcompile.load(folder, tiny_model("bloom"))


@functools.cache
def _bloom() -> fpcompile.Program:
    return fpcompile.segment(tiny_model("bloom"), route="generic", verify=False)


@pytest.mark.slow
def test_a_model_of_another_kind_is_refused(saved: Path, tmp_path: Path) -> None:
    _bloom().save(tmp_path / "program")
    with pytest.raises(ProgramFileError, match="another"):
        fpcompile.load(tmp_path / "program", tiny_model("bloom", overrides={"n_layer": 1}))
    with pytest.raises(ProgramFileError, match="another"):
        fpcompile.load(saved, nn.Linear(3, 3).train(False))


COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[fpcompile.Program, Path]:
    """A compiled tiny qwen3, one layer deep, and the folder that it is saved in."""
    program = fpcompile.segment(_shallow(), route="packed", backend="inductor", verify=False)
    folder = tmp_path_factory.mktemp("compiled")
    program.save(folder / "program")
    save_file(dict(_shallow().state_dict()), folder / "model.safetensors")
    return program, folder


def _shallow() -> Any:
    return tiny_model("qwen3", overrides={"num_hidden_layers": 1, "layer_types": ["full_attention"]})


@pytest.mark.slow
@needs_compiler
def test_compiled_code_is_loaded_in_a_fresh_process(
    compiled: tuple[fpcompile.Program, Path], tmp_path: Path
) -> None:
    """Nothing is traced, nothing compiled by Inductor; the bits are those of the saved program."""
    program, folder = compiled
    assert any(p.function.startswith("inductor") for s in program.segments for p in s.parts)
    run = program.start(sample_ids(40))
    for _ in range(4):
        run.step()
    run.checkpoint().save(tmp_path / "run.ckpt")
    script = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
import fpcompile
from fpcompile.models.zoo import sample_ids, tiny_model

def refuse(*args, **kwargs):
    raise AssertionError("loading traced or compiled")

torch.export.export = torch._inductor.standalone_compile = refuse
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
model = tiny_model("qwen3", overrides={"num_hidden_layers": 1, "layer_types": ["full_attention"]})
model.load_state_dict(load_file(folder / "model.safetensors"))
program = fpcompile.load(folder / "program", model, trust_code=True)
run = program.resume(fpcompile.Checkpoint.load(out / "run.ckpt"))
while not run.done:
    run.step()
found = {str(n): program(sample_ids(n)).logits.contiguous() for n in (1, 2, 17, 200)}
save_file({"resumed": run.result().logits.contiguous(), **found}, out / "logits.safetensors")
"""
    subprocess.run([sys.executable, "-c", script, str(folder), str(tmp_path)], check=True, timeout=240)
    found = load_file(tmp_path / "logits.safetensors")
    assert torch.equal(found["resumed"], finish(run).logits)
    for n in (1, 2, 17, 200):
        assert torch.equal(found[str(n)], program(sample_ids(n)).logits)


@pytest.mark.slow
@needs_compiler
def test_code_that_is_not_trusted_is_compiled_again(
    compiled: tuple[fpcompile.Program, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, folder = compiled
    shutil.copytree(folder / "program", tmp_path / "program")
    for code in (tmp_path / "program").glob("code-*.bin"):
        code.write_bytes(b"cposix\nsystem\n(S'touch /nonexistent'\ntR.")  # must never be looked at
    _edit(tmp_path / "program", lambda manifest: None)
    monkeypatch.setattr(
        "fpcompile.executor.saving_parts.load_artifact",
        lambda content: pytest.fail("untrusted code was loaded"),
    )
    model = _shallow()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    loaded = load_untraced(tmp_path / "program", model)
    assert loaded.plan == program.plan
    assert loaded.fingerprint == program.fingerprint
    for n in (1, 2, 37):
        ids = sample_ids(n)
        assert differences(outcome(loaded(ids)), outcome(program(ids))) == []
    monkeypatch.undo()
    with pytest.raises(ProgramFileError, match="cannot be loaded"):
        load_untraced(tmp_path / "program", model, trust_code=True)


@pytest.mark.slow
@needs_compiler
def test_code_for_another_processor_is_refused(
    compiled: tuple[fpcompile.Program, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = compiled
    monkeypatch.setattr("fpcompile.executor.saving_parts.target_of", lambda devices: "neon")
    with pytest.raises(ProgramFileError, match="another processor"):
        fpcompile.load(folder / "program", _shallow(), trust_code=True)


def test_formulas_read_back_and_nothing_else_does() -> None:
    n, m = (sympy.Symbol(s, integer=True, positive=True) for s in "nm")
    kept = (
        2 * n + m**2 - 3,
        n // m,
        Mod(n, 4),
        FloorDiv(n + 1, m),
        sympy.Max(n, m),
        sympy.And(n < 5, m >= 2),
    )
    named = {"n": n, "m": m}
    for expr in (*kept, sympy.Eq(Mod(n, 8), 0), sympy.Ne(n, m), sympy.true, sympy.Rational(1, 3), sympy.oo):
        data = json.loads(json.dumps(write_expr(expr)))
        assert read_expr(data, named.__getitem__) == expr
    with pytest.raises(ProgramFileError, match="cannot be saved"):
        write_expr(sympy.sin(n))
    for bad in ("q", ["sin", "n"], ["__import__", 1], {"n": 1}, True, [["Add"], 1]):
        with pytest.raises((KeyError, TypeError, ValueError)):
            read_expr(bad, named.__getitem__)


def _nested(depth: int, kind: str, inner: Any, *more: Any) -> Any:
    for _ in range(depth):
        inner = [kind, inner, *more]
    return inner


@pytest.mark.parametrize(
    "bomb",
    [
        ["Pow", 10, 10**12],
        ["Pow", 10, ["Pow", 10, 12]],
        ["torch.PowByNatural", 10, 10**12],
        ["Pow", "n", 10**12],
        _nested(20, "Pow", 9, 64),
        _nested(20, "Pow", "n", 64),
        ["torch.PowByNatural", "n", 10**12],
        ["Pow", 2, -(10**12)],
        1 << 5000,
        ["Rational", 1, 1 << 5000],
        _nested(5000, "Not", "n"),
    ],
)
def test_a_forged_formula_does_not_work_for_ever(bomb: Any) -> None:
    n = sympy.Symbol("n", integer=True, positive=True)
    with pytest.raises(ValueError, match=r"more than|higher than"):
        read_expr(bomb, {"n": n}.__getitem__)


def test_who_may_read_a_saved_program_is_for_the_umask_to_say(tmp_path: Path) -> None:
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            program_file.write_folder(tmp_path / "program", {}, {"a": b"1"})
        finally:
            os.umask(before)
        folder = tmp_path / "program"
        assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
        assert (folder / "a").stat().st_mode & 0o777 == 0o666 & ~mask
    assert [path.name for path in tmp_path.iterdir()] == ["program"]


@pytest.mark.parametrize("place", ["input", "node", "argument"])
@pytest.mark.parametrize(
    "evil",
    ["x0, = [1]; __import__('os').abort(); x0", "x\n    raise SystemExit", "lambda", "", 7, "aé", "a=f(), b"],
)
def test_names_in_a_record_never_become_code(place: str, evil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are written into the generated code; whoever forges a record can compute its key as well."""
    own = {"input": "x0", "node": "add", "argument": "alpha", place: evil}
    record = {
        "inputs": [own["input"]],
        "nodes": [
            [
                own["node"],
                "aten.add.Tensor",
                {"tuple": [{"node": own["input"]}, 1]},
                {"dict": {own["argument"]: 1}},
            ]
        ],
        "output": {"tuple": [{"node": own["node"]}]},
        "names": [],
        "shapes": "",
    }
    monkeypatch.setattr("fpcompile.passes.graph_text.key_of", lambda graph, shapes: "key")
    with pytest.raises(ProgramFileError, match=r"wrong name|cannot be read"):
        read_function("key", json.loads(json.dumps(record)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", b"[]"),
        ("manifest.json", b"[" * 100_000),
        ("constants.safetensors", b"not tensors"),
        ("functions.json", b"[" * 100_000),
        ("calls.json", b"3"),
        ("plan.jsonl", b"{}"),
    ],
)
def test_rubbish_is_refused_with_a_typed_error(file: str, content: bytes, saved: Path) -> None:
    (saved / file).write_bytes(content)
    if file != "manifest.json":
        _edit(saved, lambda manifest: None)
    with pytest.raises(fpcompile.errors.FpcompileError):
        fpcompile.load(saved, model_of("llama"))


@pytest.mark.slow
def test_packed_weights_need_their_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen3", torch.bfloat16)
    if not can_prepack(next(iter(model.parameters()))):
        pytest.skip("this CPU has no bf16 matrix kernel")
    fpcompile.segment(model, route="packed", weights="packed", verify=False).save(tmp_path / "program")
    monkeypatch.setattr("fpcompile.executor.saving.can_prepack", lambda weight: False)
    with pytest.raises(ProgramFileError, match="packed weights"):
        fpcompile.load(tmp_path / "program", model)


def test_values_of_arguments_read_back() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x0")
    arguments: list[Any] = [
        (1, [2, None], {"a": slice(1, None)}),
        -0.5,
        float("-inf"),
        True,
        "text",
        torch.int64,
    ]
    arguments += [torch.device("cpu"), torch.strided, torch.preserve_format]
    graph.output(tuple(graph.call_function(torch.ops.aten.add.Tensor, (x, a)) for a in arguments))
    key = key_of(graph, "")
    record = json.loads(json.dumps(write_function(function_of(graph, (), ""))))
    again = read_function(key, record).graph
    assert [n.args[1] for n in again.nodes if n.op == "call_function"] == arguments
    with pytest.raises(ProgramFileError, match="cannot be saved"):
        write_value(nn.Linear(1, 1))

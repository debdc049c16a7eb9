"""The command line: what it prints, and that every mistake becomes one line and exit code 2."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import fpcompile
from fpcompile.cli import app
from fpcompile.cli.guard import one_line, quiet, remedied
from fpcompile.cli.load import load_model, load_shape, random_ids
from fpcompile.errors import InternalError, InvalidInputError
from fpcompile.models.demo_models import DEFAULT_DEMO_MODEL, DEMO_MODELS, build_demo_model
from fpcompile.models.zoo import UNBUILDABLE, tiny_model

CPU = torch.device("cpu")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def error_line(*arguments: str) -> str:
    """The one line that a refused command leaves on stderr."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    return lines[0]


def test_version() -> None:
    assert run("--version").output == f"fpcompile {fpcompile.__version__}\n"


@pytest.mark.slow
def test_the_package_is_a_command_too() -> None:
    command = [sys.executable, "-m", "fpcompile", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"fpcompile {fpcompile.__version__}\n"


def test_help_lists_the_commands() -> None:
    for arguments in ([], ["--help"]):
        output = run(*arguments).output
        assert "demo" in output
        assert "explain" in output


@pytest.mark.slow
def test_help_loads_no_torch() -> None:
    code = (
        "import sys, fpcompile.cli; print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_explain_prints_a_line_per_segment() -> None:
    result = run("explain", "tiny:llama", "--tokens", "77")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM" in result.stdout
    assert "model.layers.1.self_attn" in result.stdout
    assert "77" in result.stdout
    assert result.stderr == ""


@pytest.mark.slow
def test_explain_takes_a_granularity() -> None:
    assert "1 segments" in run("explain", "tiny:qwen3", "--granularity", "model").stdout
    assert "'operator'" in error_line("explain", "tiny:qwen3", "--granularity", "operators")


@pytest.mark.slow
def test_explain_of_a_large_model_loads_no_weights() -> None:
    assert all(p.device.type == "meta" for p in load_shape("qwen3-0.6b").parameters())
    result = run("explain", DEFAULT_DEMO_MODEL, "--granularity", "layer")
    assert result.exit_code == 0, result.output
    assert "Qwen3ForCausalLM" in result.stdout


def test_an_unknown_model_is_refused_without_network() -> None:
    line = error_line("explain", "nobody/nothing")
    assert "HF_HUB_OFFLINE" in line
    assert DEFAULT_DEMO_MODEL in line


def test_a_misspelt_model_gets_a_hint() -> None:
    assert "did you mean 'qwen3-110m'?" in error_line("explain", "qwen3-110")


def test_an_unknown_zoo_architecture_gets_a_hint() -> None:
    assert "did you mean 'llama'?" in error_line("explain", "tiny:lama")


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "a/b/c"])
def test_a_missing_folder(name: str) -> None:
    assert "no such folder" in error_line("explain", name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert "cannot be loaded" in error_line("explain", str(tmp_path))


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('executed')\n")
    config = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "never runs such code" in error_line("explain", str(tmp_path))


@pytest.mark.slow
def test_a_local_folder_is_loaded(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device=CPU)
    assert not loaded.training
    ids = random_ids(model, 12, seed=3)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert load_shape(str(tmp_path)).device.type == "meta"


def hub_answers(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_answers(monkeypatch, ConnectionError("[Errno -2] Name or service not known"))
    line = error_line("explain", "org/model")
    assert "the hub cannot be reached (ConnectionError)" in line
    assert "check the network" in line


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("RepositoryNotFoundError", "no such name, folder or hub repository"),
        ("GatedRepoError", "hf auth login"),
    ],
)
def test_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, kind: str, expected: str) -> None:
    from huggingface_hub import errors

    known = getattr(errors, kind)
    hub_answers(monkeypatch, known.__new__(known, "refused"))  # made without the response that it wants
    assert expected in error_line("explain", "org/model")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--policy", "sedf"], "did you mean 's-edf'?"),
        (["--policy", "vllm:512"], "compares bits"),
        (["--policy", "chunked:512,edf"], "compares bits"),
        (["--policy", "flowprefill"], "compares bits"),
        (["--device", "cpux"], "unknown device"),
        (["--device", "meta"], "unknown device"),
        (["--urgent-slo", "0"], "seconds > 0"),
        (["--urgent-slo", "nan"], "seconds > 0"),
        (["--granularity", "operators"], "did you mean 'operator'?"),
        (["--max-blocking-ms", "0"], "positive number of milliseconds"),
    ],
)
def test_demo_refuses_before_it_loads_a_model(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fpcompile.cli import demo

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(demo, "load_model", load)
    assert expected in error_line("demo", *arguments, "--output", str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_demo_without_cuda(tmp_path: Path) -> None:
    line = error_line("demo", "--device", "cuda", "--output", str(tmp_path))
    assert "CUDA" in line
    assert "use device='cpu', or 'auto'" in line


def test_demo_output_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--output" in error_line("demo", "--output", str(tmp_path / "file"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "tiny:llama", "--long-tokens", "513"], "at most 512 tokens"),
        (["--model", "tiny:llama", "--policy", "vllm:0"], "token budget"),
        (["--model", f"tiny:{min(UNBUILDABLE)}"], min(UNBUILDABLE)),
    ],
)
def test_demo_refuses_what_cannot_run(arguments: list[str], expected: str, tmp_path: Path) -> None:
    defaults = ["--long-tokens", "64", "--urgent-tokens", "8", "--output", str(tmp_path)]
    assert expected in error_line("demo", *defaults, *arguments)


@pytest.mark.parametrize("option", ["--long-tokens", "--urgent-tokens"])
def test_demo_lengths_are_positive(option: str) -> None:
    assert run("demo", option, "0").exit_code == 2


def test_an_error_is_one_line_and_long_fields_are_cut() -> None:
    error = InvalidInputError("two\nlines", expected="x " * 500, got="7", where="there", remedy="do that")
    line = one_line(error)
    assert line.startswith("two lines (expected x x")
    assert line.endswith("got 7; at there). Remedy: do that")
    assert len(line) < 400
    assert "\n" not in line


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(InternalError, match="broken"), remedied():
        raise InternalError("broken")
    with pytest.raises(RuntimeError, match="no memory is meant"), remedied():
        raise RuntimeError("no memory is meant")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_out_of_memory_is_a_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, remedied():
        raise error
    assert left.value.code == 2
    assert "out of memory" in capsys.readouterr().err


def test_quiet_silences_libraries_and_puts_everything_back() -> None:
    logger = logging.getLogger("transformers")
    before = logger.level, list(warnings.filters)
    with quiet():
        warnings.warn("not shown, and no error", stacklevel=1)
        assert not logger.isEnabledFor(logging.ERROR)
    assert (logger.level, list(warnings.filters)) == before


@pytest.mark.slow
def test_demo_models_have_their_shapes() -> None:
    parameters = {}
    for name, shape in DEMO_MODELS.items():
        model = build_demo_model(name, device="meta")
        parameters[name] = sum(p.numel() for p in model.parameters())
        assert model.config.num_hidden_layers == shape.fields["num_hidden_layers"]
        assert not model.training
        assert model.dtype == torch.bfloat16
    assert 100e6 < parameters[DEFAULT_DEMO_MODEL] < 200e6
    assert 450e6 < parameters["qwen2-0.5b"] < 550e6
    assert DEMO_MODELS["qwen2-0.5b"].fields["num_hidden_layers"] == 24


def test_random_ids_are_reproducible_and_in_the_vocabulary() -> None:
    model = tiny_model("llama")
    ids = random_ids(model, 300, seed=1)
    assert ids.shape == (1, 300)
    assert torch.equal(ids, random_ids(model, 300, seed=1))
    assert not torch.equal(ids, random_ids(model, 300, seed=2))
    assert int(ids.max()) < model.config.vocab_size

"""The README's code runs as it stands there, but for the model, the lengths of the prompts and the budget."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fpcompile.models.zoo import tiny_model

README = Path(__file__).resolve().parents[2] / "README.md"
SMALLER = {
    r"^from transformers import AutoModelForCausalLM$": "",
    r"^model = .*$": "",
    r", max_blocking_ms=20\)": ")",  # times of a tiny model say nothing
    r"randint\(1000, 9000, \(1, n\)\) for n in \(4096, 64\)": "randint(1, 100, (1, n)) for n in (400, 64)",
}


@pytest.mark.slow
def test_the_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for pattern, small in SMALLER.items():
        first = re.sub(pattern, small, first, flags=re.MULTILINE)
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None  # the prompts are drawn: some end early
    names: dict[str, Any] = {"model": model, "something_urgent": lambda: True}
    exec(compile(first, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert "segments, route packed" in "\n".join(printed)
    assert len([line for line in printed if line.isdigit()]) == 50, "a token each"

    exec(compile(second, "README.md", "exec"), names)
    run = names["run"]
    assert 0 < run.cursor < len(run.program.segments), "it goes on where it was saved"
    while not run.done:
        run.step()
    assert torch.equal(run.result().logits, names["program"](names["long"]).logits)

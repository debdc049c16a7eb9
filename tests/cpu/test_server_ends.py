"""Ends: an engine that is killed, a model that is not there."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import openai
import psutil
import pytest
import torch

from fpcompile.serving.server.models import build_model, load_config, parse_models
from fpcompile.serving.server.tiny import byte_tokenizer
from tests.cpu.server_support import COMMAND, PATIENCE, ROOT, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def _client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=PATIENCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer as `save_pretrained` writes them."""
    path = tmp_path_factory.mktemp("model")
    (spec, _) = parse_models([], ["tiny"])
    build_model(spec, "generate", load_config(spec), torch.device("cpu"), None).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_a_folder_is_served_and_a_killed_engine_gives_errors_and_not_silence(folder: Path) -> None:
    ask = {"model": "chat", "prompt": "x", "max_tokens": 4000}
    with served(f"chat={folder}", "--threads", "1") as server, _client(server.url) as client:
        talk = client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "Hello"}], max_tokens=3, temperature=0
        )
        assert talk.usage is not None
        assert (talk.usage.prompt_tokens, talk.usage.completion_tokens) == (8, 3)
        errors: list[openai.APIError] = []

        def waits() -> None:
            try:
                client.completions.create(**ask, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
            except openai.APIError as error:
                errors.append(error)

        stream = client.completions.create(**ask, stream=True, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
        pieces = iter(stream)
        next(pieces)
        waiting = threading.Thread(target=waits)
        waiting.start()
        server.settles("num_requests_live", 2)
        os.kill(server.worker(), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the engine's process has ended"):
            for _ in pieces:
                pass
        waiting.join(PATIENCE)
        assert [getattr(error, "status_code", None) for error in errors] == [503]
        with server.client() as plain:
            assert plain.get("/health").status_code == 503
            assert plain.get("/ready").status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**ask)  # type: ignore[call-overload]
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"]
        assert server.end() == 0


def test_a_signal_to_the_whole_group_lets_what_is_live_finish() -> None:
    """As a terminal and a supervisor send it: the engine's process has it, too."""
    with served("--random-weights", "tiny", "--threads", "1", group=True) as server:
        children = server.children()
        with _client(server.url) as client:
            stream = client.completions.create(
                model="tiny", prompt="x", max_tokens=600, stream=True, extra_body={"ignore_eos": True}
            )
            pieces = iter(stream)
            next(pieces)
            os.killpg(server.process.pid, signal.SIGTERM)
            assert [piece.choices[0].finish_reason for piece in pieces][-1] == "length"
        assert server.process.wait(PATIENCE) == 0
        _, left = psutil.wait_procs(children, PATIENCE)
        assert left == []


def test_a_model_that_is_not_there_is_one_line_and_no_server() -> None:
    done = subprocess.run(
        [*COMMAND, "/no/such/model", "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2
    assert [
        line for line in done.stderr.splitlines() if line.startswith("error: model '/no/such/model' cannot")
    ]

"""Ends: an engine that is killed, a model that is not there."""

from __future__ import annotations

import os
import signal
import subprocess
import threading

import openai
import pytest

from tests.cpu.server_support import COMMAND, PATIENCE, ROOT, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def _client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=PATIENCE)


def test_a_killed_engine_gives_errors_and_not_silence() -> None:
    ask = {"model": "tiny", "prompt": "x", "max_tokens": 4000}
    with served("--random-weights", "tiny", "--threads", "1") as server, _client(server.url) as client:
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

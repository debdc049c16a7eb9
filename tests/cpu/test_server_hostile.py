"""Malformed and hostile requests: nothing crashes, nothing stays allocated, no 5xx for a client's mistake.

Cases come from the server's own OpenAPI document (schemathesis), and from hypothesis: bytes that are no JSON,
fields with wrong values, clients that go away. The number of cases is small here; the long run is

    FPCOMPILE_HOSTILE=10000 python -m pytest tests/cpu/test_server_hostile.py
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from tests.cpu.server_support import PATIENCE, Served, served

CASES = int(os.environ.get("FPCOMPILE_HOSTILE", "300"))
FORMS = ("schema", "right", "bodies", "bytes", "clients")
EACH = max(CASES // len(FORMS), 5)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280 + CASES // 5)]
rounds = settings(max_examples=EACH, deadline=None, suppress_health_check=list(HealthCheck), database=None)
ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    flags = ("--max-model-len", "64", "--max-body-bytes", "65536", "--kv-memory", "4000000")
    with served("--random-weights", "tiny", *flags) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


def check(status: int, text: str) -> None:
    """What any answer must be."""
    assert status < 500 or status == 503, text  # 503: as before a server is ready
    assert status != 503, text
    if status >= 400:
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}, text
        assert isinstance(error["message"], str)
        assert error["message"]


# ---- from the OpenAPI document


@pytest.fixture(scope="module")
def document(server: Served) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@rounds
@given(data=st.data())
def test_what_the_document_allows_and_what_it_does_not(document: Any, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([*ENDPOINTS, "/v1/models/{name}"]))
    operation = document[path]["GET" if "models" in path else "POST"]
    case = data.draw(operation.as_strategy(generation_mode=data.draw(st.sampled_from(list(GenerationMode)))))
    if isinstance(case.body, dict) and data.draw(st.booleans()):
        case.body["model"] = "tiny-embed" if "embeddings" in path else "tiny"
    response = case.call(timeout=PATIENCE)
    check(response.status_code, response.text)


# ---- from hypothesis

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["tiny", "tiny-embed", "\ud800", "\x00", "<|end|>", "<|user|>", "{{ 7 * 7 }}"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=6), v, max_size=3),
    max_leaves=8,
)
ids = st.lists(st.integers(-1, 261), max_size=70)
prompts = st.one_of(
    st.text(max_size=80), st.lists(st.text(max_size=10), max_size=5), ids, st.lists(ids, max_size=3)
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", ""]), "content": prompts}
    ),
    max_size=4,
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(0, 70), "n": st.integers(0, 4), "stream": st.booleans(),
        "temperature": st.floats(0, 2), "top_p": st.floats(0, 1), "top_k": st.integers(0, 300),
        "min_p": st.floats(0, 1), "seed": st.integers(), "stop": st.lists(st.text(max_size=3), max_size=5),
        "presence_penalty": st.floats(-2, 2), "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0, 10), "ignore_eos": st.booleans(), "slo_class": scalars,
        "logit_bias": st.dictionaries(st.sampled_from(["0", "65", "260", "x", "²"]), st.floats(-9, 9)),
        "ttft_slo": st.floats(), "tbt_slo": st.floats(), "stream_options": values, "logprobs": scalars,
        "echo": scalars, "user": scalars,
    },
)  # fmt: skip
right_prompts = st.text("ab<|end|>é😀", min_size=1, max_size=9) | st.lists(
    st.integers(0, 259), min_size=1, max_size=9
)
right_messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]), "content": st.text("abé", max_size=5)}
    ),
    min_size=1,
    max_size=2,
)
right_fields = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 20)},
    optional={
        "n": st.integers(1, 3), "stream": st.booleans(), "temperature": st.sampled_from([0, 0.001, 1, 2]),
        "top_p": st.floats(0.01, 1), "top_k": st.integers(1, 300), "min_p": st.floats(0, 1),
        "seed": st.integers(-(2**63), 2**63 - 1), "user": st.text(max_size=3),
        "stop": st.lists(st.text("ab", min_size=1, max_size=8), max_size=3),
        "presence_penalty": st.floats(-2, 2), "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.01, 10), "ignore_eos": st.booleans(),
        "logit_bias": st.dictionaries(st.sampled_from(["0", "65", "259"]), st.floats(-100, 100)),
        "ttft_slo": st.floats(30, 60), "tbt_slo": st.floats(30, 60),
    },
)  # fmt: skip


def written(value: Any) -> bytes:
    """JSON as a hostile client writes it: NaN, Infinity and lone surrogates included."""
    return json.dumps(value).encode()


@rounds
@given(path=st.sampled_from(ENDPOINTS), prompt=right_prompts, talk=right_messages, options=right_fields)
def test_right_bodies(
    client: httpx.Client, path: str, prompt: Any, talk: Any, options: dict[str, Any]
) -> None:
    """What is sent here is not refused at the door: the wrong bodies below meet what is behind it."""
    body: dict[str, Any] = {"model": "tiny", "prompt": prompt, **options}
    if "chat" in path:
        body = {"model": "tiny", "messages": talk, **options}
    elif "embeddings" in path:
        body = {"model": "tiny-embed", "input": prompt}
    response = client.post(path, content=written(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 200, response.text
    assert '{"error":' not in response.text, "nor in a stream"


@rounds
@given(
    path=st.sampled_from(ENDPOINTS), wrong=values, case=st.one_of(
        st.tuples(prompts, messages, fields), st.tuples(right_prompts, right_messages, right_fields)
    ),
    spoilt=st.sampled_from(["", "", "", "model", "prompt", "input", "messages", "max_tokens", "stop", "new"]),
)  # fmt: skip
def test_bodies(
    client: httpx.Client, path: str, case: tuple[Any, Any, dict[str, Any]], wrong: Any, spoilt: str
) -> None:
    prompt, talk, options = case
    body = {"model": "tiny", "prompt": prompt, **options}
    if "chat" in path:
        body = {"model": "tiny", "messages": talk, **options}
    elif "embeddings" in path:
        body = {
            "model": "tiny-embed",
            "input": prompt,
            "encoding_format": ("float", "base64")[len(options) % 2],
        }
    if spoilt:
        body[spoilt] = wrong
    response = client.post(path, content=written(body), headers={"Content-Type": "application/json"})
    check(response.status_code, response.text)


header_values = st.text("abcXYZ0189 .,;:=-%", max_size=40).map(str.strip).filter(bool)
names = ["content-type", "authorization", "x-slo-ttft-ms", "traceparent", "x-request-id", "accept"]
methods = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"]
places = [*ENDPOINTS, "/v1/models", "/health", "/metrics", "/pause"]
lumps = [b"[" * 60_000, b"9" * 5000, b"{" * 2000, b"0" * 65_537]


@rounds
@given(
    method=st.sampled_from(methods),
    path=st.one_of(st.sampled_from(places), st.text(max_size=20)),
    body=st.one_of(st.binary(max_size=200), st.sampled_from(lumps)),
    headers=st.dictionaries(st.sampled_from(names), header_values),
    said=st.booleans(),
)
def test_bytes(
    client: httpx.Client, method: str, path: str, body: bytes, headers: dict[str, str], said: bool
) -> None:
    if said:
        headers = {**headers, "content-type": "application/json"}
    try:
        request = client.build_request(method, "/" + path.lstrip("/"), content=body, headers=headers)
    except (httpx.InvalidURL, UnicodeEncodeError):
        return
    response = client.send(request)
    assert response.status_code < 500, response.text
    if response.status_code >= 400 and method != "HEAD":
        check(response.status_code, response.text)


@rounds
@given(
    cut=st.integers(0, 400), tokens=st.integers(1, 60), stream=st.booleans(),
    path=st.sampled_from(ENDPOINTS[:2]), length=st.sampled_from([None, -5, 5, 999]), read=st.integers(0, 600),
)  # fmt: skip
def test_clients_that_go_away(
    server: Served, cut: int, tokens: int, stream: bool, path: str, length: int | None, read: int
) -> None:
    """Half a request, a wrong length, half an answer: then the connection is reset."""
    body: dict[str, Any] = {"model": "tiny", "max_tokens": tokens, "stream": stream, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    text = json.dumps(body).encode()
    said = len(text) if length is None else max(len(text) + length, 0)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {said}\r\n\r\n"
    )
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        whole = head.encode() + text
        connection.sendall(whole[: cut or None] if cut < 200 else whole)
        connection.settimeout(0.01 + read / 2e4)
        with contextlib.suppress(OSError):
            connection.recv(read or 1)


# ---- what is left


def test_nothing_is_left_and_the_server_serves(server: Served, client: httpx.Client) -> None:
    server.idle()
    server.settles("kv_cache_usage_perc", 0)
    assert client.get("/health").json() == {"status": "ok", "reason": ""}
    got = client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 5})
    assert got.json()["usage"]["completion_tokens"] >= 1
    assert not [line for line in server.lines if "Traceback" in line]


def test_a_killed_server_gives_an_error_and_can_be_started_again(
    server: Served, client: httpx.Client
) -> None:
    children = server.children()
    assert server.worker() in [child.pid for child in children]
    body = {"model": "tiny", "prompt": "x", "max_tokens": 60, "stream": True, "n": 16, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.signal(signal.SIGSTOP)
        server.signal(signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            for _ in lines:
                pass
    _, left = psutil.wait_procs(children, PATIENCE)
    assert left == [], "they end with the front"
    port = server.url.rsplit(":", 1)[1]
    with served(
        "--random-weights", "tiny", "--port", port, "--drain-timeout", "0.5",
        environment={"FPCOMPILE_ADMIN_KEY": "a"}, key="a",
    ) as again:  # fmt: skip
        _drain_for_too_long(again)


def _drain_for_too_long(server: Served) -> None:
    """What is live when the drain is over is told so."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "stream": True}
    with server.client("a") as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        with server.client("a") as admin:
            assert admin.post("/pause").status_code == 200  # it would end by itself otherwise
        server.signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is shutting down"
    assert server.end() == 0

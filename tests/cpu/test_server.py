"""A server with the built-in models: OpenAI's own client, errors, disconnects. Tokens are the model's.

One server for the module; the model that it serves is built in this process as well, from the same seed.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch

from fpcompile.errors import UsageError
from fpcompile.serving.bench_client import Endpoint
from fpcompile.serving.bench_serve import Load, Slo, run_bench_serve
from fpcompile.serving.server.build import pooled
from fpcompile.serving.server.messages import Kind
from fpcompile.serving.server.models import build_model, load_config, parse_models
from fpcompile.serving.server.tiny import byte_tokenizer
from tests.cpu.server_support import PATIENCE, ROOT, Served, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

CONFIG = """
[classes.fast]
ttft = 60
tbt = 20
[classes.slow]
ttft = 600
[[keys]]
key = "k-main"
tenant = "main"
[[keys]]
key = "k-poor"
tenant = "poor"
min_ttft = 100
min_tbt = 1
classes = ["slow"]
default_class = "slow"
[admin]
key = "k-admin"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    config = tmp_path_factory.mktemp("server") / "config.toml"
    config.write_text(CONFIG)
    arguments = ("--random-weights", "tiny", "--config", str(config), "--max-body-bytes", "200000")
    with served(*arguments, key="k-admin") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="k-main", max_retries=0, timeout=PATIENCE
    ) as made:
        yield made


@functools.cache
def model_of(name: str, kind: Kind) -> Any:
    spec = next(spec for spec in parse_models([], ["tiny"]) if spec.name == name)
    return build_model(spec, kind, load_config(spec), torch.device("cpu"), None)


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([byte_tokenizer()(text)["input_ids"]])


def continued(ids: torch.Tensor, count: int, *, eos: bool = True) -> str:
    """The greedy continuation by the unmodified model, as text."""
    stop = {} if eos else {"eos_token_id": 260}
    with torch.no_grad():
        made = model_of("tiny", "generate").generate(ids, max_new_tokens=count, do_sample=False, **stop)
    text: str = byte_tokenizer().decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text


# ---- OpenAI's client, unmodified


def test_a_completion_is_the_models(client: openai.OpenAI) -> None:
    got = client.completions.create(model="tiny", prompt="Hello", max_tokens=24, temperature=0)
    assert got.choices[0].text == continued(ids_of("Hello"), 24)
    assert got.choices[0].finish_reason == "length"
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (5, 24)


def test_a_streamed_completion_is_the_same(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="tiny", prompt="Hello", max_tokens=24, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks if c.choices) == continued(ids_of("Hello"), 24)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert [c.usage.total_tokens for c in chunks if c.usage is not None] == [29]
    assert not chunks[-1].choices


def test_a_chat_uses_the_models_template(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ids = byte_tokenizer().apply_chat_template(plain, add_generation_prompt=True, return_tensors="pt")
    expected = continued(getattr(ids, "input_ids", ids), 20)
    got = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=0)
    assert got.choices[0].message.content == expected
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=20, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


def test_a_conversation_goes_on_with_the_clients_own_answers(client: openai.OpenAI) -> None:
    """The usual loop: what came is appended as it is."""
    talk: list[Any] = [{"role": "user", "content": "Hello", "name": "ann"}]
    for _ in range(2):
        got = client.chat.completions.create(model="tiny", messages=talk, max_tokens=4, temperature=0)
        talk += [got.choices[0].message, {"role": "user", "content": "more"}]
    plain = [m if isinstance(m, dict) else {"role": "assistant", "content": m.content} for m in talk]
    ids = byte_tokenizer().apply_chat_template(plain, add_generation_prompt=True, return_tensors="pt")
    got = client.chat.completions.create(model="tiny", messages=talk, max_tokens=4, temperature=0)
    assert got.choices[0].message.content == continued(getattr(ids, "input_ids", ids), 4)


def test_embeddings_are_the_models(client: openai.OpenAI) -> None:
    texts = ["one", "a longer text", "x"]
    got = client.embeddings.create(model="tiny-embed", input=texts)
    plain = client.embeddings.create(model="tiny-embed", input=texts[0], encoding_format="float")
    model = model_of("tiny-embed", "embed")
    for text, found in zip(texts, got.data, strict=True):
        with torch.no_grad():
            expected = pooled(model(input_ids=ids_of(text)).last_hidden_state, "mean")
        assert torch.allclose(torch.tensor(found.embedding), expected, atol=2e-6)
    assert plain.data[0].embedding == pytest.approx(got.data[0].embedding, abs=1e-7)
    assert got.usage.prompt_tokens == sum(map(len, texts))


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-embed"]
    assert client.models.retrieve("tiny").owned_by == "fpcompile"


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    prompts = ["One", "Two"]
    got = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=8, temperature=0)
    assert [c.index for c in got.choices] == [0, 1, 2, 3]
    assert [c.text for c in got.choices] == [continued(ids_of(p), 8) for p in prompts for _ in range(2)]
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (6, 32)
    texts = ["", "", "", ""]
    for chunk in client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=8, temperature=0, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in got.choices]


def test_a_seed_draws_the_same_again(client: openai.OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        got = client.completions.create(
            model="tiny", prompt="Hello", max_tokens=20, temperature=1.5, seed=seed, n=2
        )
        return [choice.text for choice in got.choices]

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 2, "each choice draws for itself"


def test_penalties_and_biases_change_the_tokens(client: openai.OpenAI) -> None:
    letter = byte_tokenizer()("Q")["input_ids"][0]
    got = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=6, temperature=0, logit_bias={str(letter): 100}
    )
    assert got.choices[0].text == "QQQQQQ"
    got = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=6, temperature=0, frequency_penalty=2,
        logit_bias={str(letter): 30},
    )  # fmt: skip
    assert got.choices[0].text[0] == "Q"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, stream: bool) -> None:
    whole = continued(ids_of("Hello"), 40)
    stop = whole[7:9]
    arguments: Any = {
        "model": "tiny",
        "prompt": "Hello",
        "max_tokens": 40,
        "temperature": 0,
        "stop": [stop, "???"],
    }
    if stream:
        chunks = list(client.completions.create(**arguments, stream=True))
        text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        got = client.completions.create(**arguments)
        text, reason = got.choices[0].text, got.choices[0].finish_reason
        assert got.usage is not None
        assert got.usage.completion_tokens < 40
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


# ---- errors


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"logprobs": 1}, "logprobs", "not supported"),
        ({"logprobs": 0}, "logprobs", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "only 1"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5000}, None, "the model takes 4096 tokens"),
        ({"n": 17}, "n", "at most 16"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": [""]}, "stop", "1 to 256"),
        ({"prompt": ""}, None, "no tokens"),
        ({"prompt": []}, "prompt", "no prompt"),
        ({"prompt": [260]}, None, "not in the vocabulary"),
        ({"temprature": 1}, "temprature", "unknown field 'temprature'"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "by their ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"slo_class": "no"}, None, "unknown SLO class"),
        ({"ttft_slo": 0}, "ttft_slo", "greater than 0"),
    ],
)
def test_a_mistake_is_told(client: openai.OpenAI, body: dict[str, Any], param: str | None, part: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"model": "tiny", "prompt": "x", **body}, cast_to=object)
    error: Any = caught.value.body
    assert part in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_other_mistakes(server: Served, client: openai.OpenAI) -> None:
    tool: Any = [{"role": "tool", "content": "x"}]
    with pytest.raises(openai.NotFoundError, match="tiny, tiny-embed"):
        client.completions.create(model="no", prompt="x")
    with pytest.raises(openai.BadRequestError, match="embeddings only"):
        client.completions.create(model="tiny-embed", prompt="x")
    with pytest.raises(openai.BadRequestError, match="gives no embeddings"):
        client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.BadRequestError, match="templates in requests are refused"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], extra_body={"chat_template": "{{ 1 }}"}
        )
    with pytest.raises(openai.BadRequestError, match="chat template refuses"):
        client.chat.completions.create(model="tiny", messages=tool)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt="x" * 200_000)
    assert caught.value.status_code == 413
    with server.client("k-main") as plain:
        for got in (
            plain.get("/nothing"),
            plain.get("/v1/completions"),
            plain.post("/v1/completions", content=b"{"),
            plain.post("/v1/completions", content=b"[" * 100_000),
            plain.post("/v1/completions", content=b'{"model": "\\ud800", "prompt": "\\udfff"}'),
            plain.post("/v1/completions", content=b'{"model": "tiny", "prompt": "\\udfff"}'),
            plain.post("/v1/completions", content=b'{"model": "tiny", "prompt": "x", "temperature": NaN}'),
        ):
            assert 400 <= got.status_code < 500, got.text
            assert set(got.json()["error"]) == {"message", "type", "param", "code"}


# ---- promises


def test_keys_have_floors_and_classes(server: Served, client: openai.OpenAI) -> None:
    poor = client.with_options(api_key="k-poor")
    ask: Any = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    for wrong in (
        {"extra_body": {"ttft_slo": 99}},
        {"extra_headers": {"x-slo-ttft-ms": "99000"}},
        {"extra_body": {"tbt_slo": 0.5}},
    ):
        with pytest.raises(openai.PermissionDeniedError, match="shorter than this key may ask for"):
            poor.completions.create(**ask, **wrong)
    with pytest.raises(openai.BadRequestError, match="unknown SLO class 'fast'"):
        poor.completions.create(**ask, extra_body={"slo_class": "fast"})
    with pytest.raises(openai.BadRequestError, match="differ"):
        client.completions.create(**ask, extra_body={"ttft_slo": 1}, extra_headers={"x-slo-ttft-ms": "2"})
    kept = server.metric("slo_requests_total", slo="ttft", met="true")
    poor.completions.create(**ask)
    client.completions.create(**ask, extra_body={"slo_class": "fast"})
    client.completions.create(**ask, extra_headers={"x-slo-ttft-ms": "60000"})
    assert server.metric("slo_requests_total", slo="ttft", met="true") == kept + 3
    assert server.metric("slo_requests_total", slo="tbt", slo_class="fast", met="true") >= 1


# ---- operations


def test_operations_need_the_admin_key(server: Served) -> None:
    with server.client() as nobody, server.client("k-main") as user:
        assert nobody.get("/health").json() == {"status": "ok", "reason": ""}
        assert nobody.get("/ready").status_code == 200
        for path, method in (("/metrics", "GET"), ("/pause", "POST"), ("/resume", "POST")):
            assert nobody.request(method, path).status_code == 401
            assert user.request(method, path).status_code == 401


def test_a_paused_engine_keeps_its_work(server: Served, client: openai.OpenAI) -> None:
    with server.client("k-admin") as admin:
        stream = client.completions.create(
            model="tiny", prompt="Hello", max_tokens=400, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        pieces = iter(stream)
        text = next(pieces).choices[0].text
        assert admin.post("/pause").json() == {"paused": True}
        assert server.metric("num_requests_live") == 1
        assert admin.get("/health").status_code == 200
        assert admin.post("/resume").json() == {"paused": False}
        text += "".join(chunk.choices[0].text for chunk in pieces)
    assert text == continued(ids_of("Hello"), 400, eos=False)


def test_the_log_has_ids_and_traces_and_no_prompts(server: Served, client: openai.OpenAI) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "x-request-id": "my-request"}
    got = client.completions.with_raw_response.create(
        model="tiny", prompt="a secret", max_tokens=2, extra_headers=headers
    )
    assert got.headers["x-request-id"] == "my-request"
    line = server.wait_for("id=my-request")
    assert f"trace={trace}" in line
    assert "tenant=main" in line
    assert "prompt_tokens=8 completion_tokens=2" in line
    assert not any("secret" in line for line in server.lines)


# ---- disconnects


def test_no_token_is_lost_doubled_or_mixed_when_others_go_away(server: Served) -> None:
    """40 streams (or FPCOMPILE_STREAMS): 30 % go away somewhere, the others get the model's tokens."""
    count, length = int(os.environ.get("FPCOMPILE_STREAMS", "40")), 30
    draw = random.Random(7)
    leaves = {number: draw.randrange(0, length - 5) for number in draw.sample(range(count), count * 3 // 10)}
    texts: dict[int, str] = {}

    async def one(client: openai.AsyncOpenAI, number: int) -> None:
        stream = await client.completions.create(
            model="tiny", prompt=f"stream {number}", max_tokens=length, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        text = ""
        async with stream:
            async for seen, chunk in _numbered(stream):
                if seen >= leaves.get(number, length + 1):
                    return
                text += chunk.choices[0].text
        texts[number] = text

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="k-main", max_retries=0, timeout=PATIENCE
        ) as client:
            await asyncio.gather(*(one(client, number) for number in range(count)))

    asyncio.run(all_of_them())
    assert len(texts) >= count - len(leaves)
    expected = {n: continued(ids_of(f"stream {n}"), length, eos=False) for n in texts}
    assert texts == expected
    server.idle()


async def _numbered(stream: Any) -> Any:
    number = 0
    async for chunk in stream:
        yield number, chunk
        number += 1


def test_going_away_before_the_answer_cancels_too(server: Served) -> None:
    before = server.metric("requests_cancelled_total")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "ignore_eos": True}
    with server.client("k-main") as client, pytest.raises(httpx.TimeoutException):
        client.post("/v1/completions", json=body, timeout=0.5)
    server.idle()
    assert server.metric("requests_cancelled_total") == before + 1


# ---- load


def test_the_load_generator_measures_it(server: Served) -> None:
    endpoint = Endpoint(server.url, "tiny", slo=True, key="k-main", ignore_eos=True)
    load = Load(rates=(20.0, 40.0), num_prompts=12, max_input=40, output_len=5, slos={"": Slo(60.0, 20.0)})
    report = run_bench_serve(endpoint, load)
    entry = report["policies"]["server"]
    assert (entry["max_goodput"], entry["paper_goodput"]) == (40.0, 40.0)
    for point in entry["points"]:
        assert (point["completed"], point["failed"], point["total_output_tokens"]) == (12, 0, 60)
        assert point["total_input_tokens"] == sum(row.tokens for row in load.rows())
        assert point["p99_ttft_ms"] > 0 < point["mean_tpot_ms"]
    with pytest.raises(UsageError, match="404"):
        run_bench_serve(Endpoint(server.url, "no", key="k-main"), load)


def test_the_example_runs(server: Served) -> None:
    command = [sys.executable, "examples/serve_client.py", "--base-url", server.url, "--api-key", "k-main"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True)
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["chat", "urgent", "long", "embeddings"]
    assert lines[0].endswith("16 tokens")
    assert "64 numbers" in lines[3]


# ---- the end of the server; last, as it ends the module's


def test_draining_finishes_what_is_live(server: Served, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny",
        prompt="Hello",
        max_tokens=600,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    pieces = iter(stream)
    text = next(pieces).choices[0].text
    server.signal(signal.SIGTERM)
    server.wait_for("draining: 1 requests are live")
    text += "".join(chunk.choices[0].text for chunk in pieces)
    assert text == continued(ids_of("Hello"), 600, eos=False)
    assert server.end() == 0

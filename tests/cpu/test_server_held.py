"""The front while the engine does nothing: time limits, readers that go, and questions without an answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import GenerationConfig

from fpcompile.serving.server.app import make_app
from fpcompile.serving.server.build import EngineBackend
from fpcompile.serving.server.channel import Channel
from fpcompile.serving.server.failures import ApiError
from fpcompile.serving.server.front import Front
from fpcompile.serving.server.link import Link
from fpcompile.serving.server.messages import Facts, Generate, Sampling, Terms
from fpcompile.serving.server.metrics import Metrics, RequestWatch
from fpcompile.serving.server.models import parse_models
from fpcompile.serving.server.promises import Account, Accounts
from fpcompile.serving.server.settings import EngineSettings, Limits, ServerSettings
from fpcompile.serving.server.streams import EngineGoneError, RefusedError
from tests.cpu.server_scripted import FIRST, PREDICTED, QUICK, REJECTED, STUCK
from tests.cpu.server_support import PATIENCE

pytestmark = pytest.mark.timeout(120)

(TINY, _) = parse_models([], ["tiny"])


def _engine(**options: Any) -> EngineSettings:
    return EngineSettings((TINY,), options=options, factory="tests.cpu.server_scripted:build")


@contextlib.contextmanager
def _serving(settings: ServerSettings) -> Iterator[TestClient]:
    app = make_app(settings)
    with TestClient(app) as client:
        until = time.monotonic() + PATIENCE
        while app.state.front.link.state == "starting":
            assert time.monotonic() < until
            time.sleep(0.01)
        yield client


def _ask(client: TestClient, what: int, **more: Any) -> Any:
    body = {"model": "tiny", "prompt": [what], "max_tokens": 3, **more}
    return client.post("/v1/completions", json=body)


@pytest.mark.slow
def test_a_request_ends_in_its_time_though_the_engine_comes_to_no_cut() -> None:
    with _serving(ServerSettings(_engine(), limits=Limits(request_s=0.2))) as client:
        assert _ask(client, QUICK).status_code == 200
        for stream in (False, True):
            late = _ask(client, STUCK, stream=stream)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        begun = _ask(client, FIRST, stream=True)
        assert begun.status_code == 200
        assert '"timeout"' in begun.text
        assert "[DONE]" not in begun.text
        metrics = client.get("/metrics").text
        assert "fpcompile:num_requests_live 0.0" in metrics
        assert 'fpcompile:requests_failed_total{reason="timeout"} 3.0' in metrics


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_is_null_until_it_comes_where_it_is_asked_for(path: str) -> None:
    body = {"model": "tiny", "max_tokens": 3, "stream": True}
    more = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": [QUICK]}
    with _serving(ServerSettings(_engine())) as client:
        for options in ({}, {"stream_options": {"include_usage": True}}):
            text = client.post(path, json={**body, **more, **options}).text
            chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            assert len(chunks) >= 4
            if options:
                assert all(chunk["usage"] is None for chunk in chunks[:-1])
                assert chunks[-1]["usage"]["completion_tokens"] == 3
            else:
                assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.slow
def test_an_engine_that_is_not_well_is_not_ready_and_its_other_answers_come() -> None:
    with _serving(ServerSettings(_engine(well=False))) as client:
        unready = client.get("/ready")
        assert (unready.status_code, unready.json()["reason"]) == (503, "as the test says")
        assert "fpcompile:stale_statistics_total 1.0" in client.get("/metrics").text
        assert _ask(client, QUICK).json()["choices"][0]["text"] == "AAA", "the worker goes on"


@contextlib.asynccontextmanager
async def _link(**options: Any) -> AsyncIterator[Link]:
    link = Link(_engine(**options), buffered=64)
    link.start()
    try:
        await asyncio.wait_for(link.settled(), PATIENCE)
        yield link
    finally:
        await link.close()


def _generate(name: str, what: int) -> Generate:
    return Generate(name, "tiny", (what,), 3, Sampling(), Terms(time.monotonic(), ttft_slo=1.0))


@pytest.mark.slow
def test_who_goes_is_not_live_and_counts_for_what_it_was() -> None:
    async def scene() -> str:
        metrics = Metrics()
        async with _link() as link:
            with pytest.raises(EngineGoneError, match="ZeroDivisionError"):
                await link.ask("statistics")
            assert await link.ask("health") == (True, "as the test says"), "one broken answer is one"
            streams = []
            for name, what in (("gone", STUCK), ("stopped", FIRST)):
                ask = _generate(name, what)
                streams.append(link.submit(ask, RequestWatch(metrics, "tiny", ask.terms, 1)))
            await streams[1].started()
            assert link.live == 2
            streams[0].cancel()
            streams[1].cancel("stop")
            assert link.live == 0
            rejected = link.submit(_generate("rejected", REJECTED))
            with pytest.raises(RefusedError) as caught:
                await rejected.end()
            assert caught.value.refused.retry_after == PREDICTED, "what waits takes so long"
        return metrics.text().decode()

    text = asyncio.run(scene())
    assert 'request_success_total{finished_reason="stop",model_name="tiny"} 1.0' in text
    assert "fpcompile:requests_cancelled_total 1.0" in text
    assert "requests_failed_total{" not in text


@pytest.mark.parametrize("broken", ["send", "receive"])
def test_a_pipe_with_no_message_in_it_ends(broken: str) -> None:
    async def scene() -> None:
        mine, theirs = multiprocessing.Pipe()
        ended = asyncio.Event()
        channel = Channel(mine, asyncio.get_running_loop(), lambda messages: None, ended.set)
        channel.start()
        if broken == "send":
            channel.send(lambda: None)  # cannot be pickled
        else:
            theirs.send_bytes(b"no pickle")
        await asyncio.wait_for(ended.wait(), PATIENCE)
        theirs.close()
        channel.close()

    asyncio.run(scene())


# ---- the floor of the time between tokens


@pytest.mark.parametrize(
    ("default", "asked", "floor", "told"),
    [
        (0.3, None, 0.0, 0.3), (0.3, None, 1.0, 1.0), (0.3, None, 0.1, 0.3), (0.3, 2.0, 1.0, 2.0),
        (0.3, 0.05, 0.0, 0.05), (None, None, 0.0, None), (None, None, 1.0, 1.0), (None, None, 0.1, 0.2),
        (None, 0.05, 0.0, 0.05),
    ],
)  # fmt: skip
def test_who_asks_for_nothing_gets_no_more_than_the_floor(
    default: float | None, asked: float | None, floor: float, told: float | None
) -> None:
    seen: dict[str, Any] = {}
    engine: Any = SimpleNamespace(submit=lambda ids, **options: seen.update(options))
    gate: Any = None
    config: Any = GenerationConfig
    facts = {"tiny": Facts("generate", 260, 4096)}
    backend = EngineBackend(engine, gate, {}, facts, {"tiny": config()}, {}, default)
    terms = Terms(0.0, ttft_slo=1.0, tbt_slo=asked, min_tbt=floor)
    backend.generate(Generate("r", "tiny", (1,), 3, Sampling(), terms))
    assert seen["tbt_slo"] == told


def test_the_front_passes_the_floor_on() -> None:
    account = Account("t", min_tbt=1.0)
    front = Front(ServerSettings(_engine(), accounts=Accounts(anonymous=account)), {})
    request: Any = SimpleNamespace(headers={}, state=SimpleNamespace(facts={}, arrival=0.0))
    body: Any = SimpleNamespace(model="tiny", ttft_slo=0.5, slo_class=None)
    terms = front.terms(request, account, body, None)
    assert (terms.ttft_slo, terms.tbt_slo, terms.min_tbt) == (0.5, None, 1.0)


def test_draining_says_for_how_long() -> None:
    front = Front(ServerSettings(_engine()), {})
    front.draining, front.drained_by = True, time.monotonic() + 1e6
    with pytest.raises(ApiError) as caught:
        front.check_open()
    assert int(caught.value.headers["Retry-After"]) > 1e5

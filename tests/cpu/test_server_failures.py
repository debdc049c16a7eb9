"""A server whose model, policy and log of decisions fail: each costs what it must, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fpcompile.serving.server.app import make_app
from fpcompile.serving.server.models import parse_models
from fpcompile.serving.server.promises import Account, Accounts, digest_of
from fpcompile.serving.server.settings import EngineSettings, ServerSettings
from tests.cpu.server_brittle import FAILING, HOPELESS, HOPELESS_LATER, ROOM
from tests.cpu.server_support import PATIENCE

WAITING = 4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "decisions.jsonl"


@pytest.fixture(scope="module")
def client(log: Path) -> Iterator[TestClient]:
    engine = EngineSettings(
        parse_models([], ["tiny"]),
        policy="test-brittle",
        threads=1,
        max_blocking_ms=None,  # each segment is a launch
        options={"record": str(log), "max_queue": WAITING},
        factory="tests.cpu.server_brittle:build",
    )
    accounts = Accounts(
        {}, {digest_of("k-good"): Account("good"), digest_of("k-bad"): Account("brittle")}, None
    )
    settings = ServerSettings(engine, accounts=accounts, admin_digest=digest_of("k-admin"))
    with TestClient(make_app(settings), headers={"Authorization": "Bearer k-good"}) as made:
        until = time.monotonic() + PATIENCE
        while made.get("/ready").status_code != 200:
            assert (health := made.get("/health")).status_code == 200, health.text
            assert time.monotonic() < until
            time.sleep(0.1)
        yield made


def _ask(client: TestClient, tokens: int, count: int = 4, key: str = "k-good", **more: Any) -> Any:
    body = {
        "model": "tiny",
        "prompt": [65] * tokens,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
    }
    return client.post("/v1/completions", json={**body, **more}, headers={"Authorization": f"Bearer {key}"})


def test_a_failing_segment_ends_its_own_request_only(client: TestClient) -> None:
    other: list[Any] = []
    beside = threading.Thread(target=lambda: other.append(_ask(client, 20, 200)))
    beside.start()
    failed = _ask(client, FAILING)
    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == "failed"
    assert "defect" not in failed.text, "what the model said is for the log"
    beside.join(PATIENCE)
    assert other[0].json()["usage"]["completion_tokens"] == 200
    assert _ask(client, FAILING, stream=True).status_code == 500


def test_what_leaves_no_token_to_choose_is_the_requests_mistake(client: TestClient) -> None:
    for tokens in (HOPELESS, HOPELESS_LATER):
        refused = _ask(client, tokens, 8, temperature=1)
        assert refused.status_code == 400
        assert "no token to choose from" in refused.json()["error"]["message"]
    assert _ask(client, HOPELESS, 8, temperature=1, stream=True).status_code == 400
    begun = _ask(client, HOPELESS_LATER, 8, temperature=1, stream=True)
    assert begun.status_code == 200
    assert '"type":"invalid_request_error"' in begun.text
    assert _ask(client, HOPELESS - 2, 8, temperature=1).status_code == 200


def test_a_policy_that_raises_costs_what_it_knew(client: TestClient) -> None:
    before = _ask(client, 20).json()["choices"]
    assert _ask(client, 5, key="k-bad").status_code == 500
    assert _ask(client, 20).json()["choices"] == before
    assert client.get("/health").json() == {"status": "ok", "reason": ""}


def test_a_full_queue_says_when_to_come_back(client: TestClient) -> None:
    """The device is held: one request may have it, some wait, the others are turned away at once."""
    admin = {"Authorization": "Bearer k-admin"}
    assert client.post("/pause", headers=admin).json() == {"paused": True}
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(_ask(client, 20))) for _ in range(4 * WAITING)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + PATIENCE
    while len(answers) < 3 * WAITING - 1:
        assert time.monotonic() < until
        time.sleep(0.01)
    refused = list(answers)
    assert {answer.status_code for answer in refused} == {429}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
    assert client.post("/resume", headers=admin).json() == {"paused": False}
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(answer.status_code for answer in answers).count(200) >= WAITING


def test_a_full_disk_ends_the_log_of_decisions_and_nothing_else(client: TestClient, log: Path) -> None:
    for _ in range(40):
        assert _ask(client, 20, 1).status_code == 200
    assert 0 < log.stat().st_size <= ROOM
    assert client.get("/health").json() == {"status": "ok", "reason": ""}


def test_what_cannot_be_in_time_is_turned_away_where_the_policy_says_so() -> None:
    """All are late when they come; the first may wait, the others have too much late work before them."""
    engine = EngineSettings(parse_models([], ["tiny"]), policy="fpcompile:patience=0.001", threads=1)
    with TestClient(make_app(ServerSettings(engine))) as client:
        until = time.monotonic() + PATIENCE
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.1)
        refused = _ask(client, 200, n=16, ttft_slo=1e-6)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["Retry-After"]) >= 1
        assert _ask(client, 200, n=4, ttft_slo=60).status_code == 200
        text = client.get("/metrics").text
        assert 'fpcompile:requests_rejected_total{reason="rejected"}' in text

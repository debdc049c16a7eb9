"""The load generator, against a server that answers as a test says."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest

from fpcompile.errors import UsageError
from fpcompile.scheduler.events import Request
from fpcompile.serving.bench_client import Endpoint, Sent, run_load
from fpcompile.serving.bench_serve import Load, Slo, run_bench_serve
from fpcompile.serving.bench_serve_cli import parse_goodput, parse_slos


class Scripted:
    """Streams tokens. ``hold``: they wait for it; ``breaks``: lengths of prompts that get half an answer."""

    def __init__(self) -> None:
        self.hold = threading.Event()
        self.hold.set()
        self.breaks: set[int] = set()
        self.error: Any = {"message": "cut short"}
        self.chat = False
        self.ends = False  # a chunk without text says why the answer ended
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length: ")[1].split("\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            warm_up = not self.bodies
            self.bodies.append(body)
            self.headers.append(head)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while not (warm_up or self.hold.is_set()):
                await asyncio.sleep(0.001)
            size = len(body["messages"][0]["content"].split() if self.chat else body["prompt"])
            if self.chat:
                self._event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for number in range(body["max_tokens"]):  # the first token has no text yet
                text = "x" if number else ""
                delta = {"content": text} if text else {}
                choice: dict[str, Any] = {"delta": delta} if self.chat else {"text": text}
                self._event(writer, {"choices": [{**choice, "finish_reason": None}]})
            if self.ends:
                choice = {"delta": {}} if self.chat else {"text": ""}
                self._event(writer, {"choices": [{**choice, "finish_reason": "length"}]})
            if size in self.breaks:
                self._event(writer, {"error": self.error})
            else:
                usage = {"prompt_tokens": size, "completion_tokens": body["max_tokens"]}
                self._event(writer, {"choices": [], "usage": usage})
                self._event(writer, "[DONE]")
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    def _event(self, writer: asyncio.StreamWriter, value: Any) -> None:
        data = b"data: " + (value if isinstance(value, str) else json.dumps(value)).encode() + b"\n\n"
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server, ready = Scripted(), threading.Event()
    loop = asyncio.new_event_loop()

    async def listen() -> asyncio.Server:
        listening = await asyncio.start_server(server.answer, "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        return listening

    def run() -> None:
        asyncio.set_event_loop(loop)
        listening = loop.run_until_complete(listen())
        ready.set()
        loop.run_forever()
        listening.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(asyncio.sleep(0.01))

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def _request(name: str, arrival: float, tokens: int, output: int = 3) -> Request:
    return Request(name, arrival, inf, tokens, 0.0, slo=2.0, klass="text", decode_tokens=output)


def test_requests_are_sent_when_due_whatever_became_of_the_others(scripted: Scripted) -> None:
    """The server holds every answer until all have been sent: a closed loop would never get there."""
    requests = [_request(f"r{n}", 0.01 * n, 5 + n) for n in range(8)]
    endpoint = Endpoint(f"http://127.0.0.1:{scripted.port}", "m", slo=True)

    async def scene() -> list[Sent]:
        scripted.hold.clear()
        running = asyncio.create_task(run_load(endpoint, requests, tbt_slos={"text": 0.5}))
        while len(scripted.bodies) < 9:  # the warm-up goes ahead
            await asyncio.sleep(0.001)
        scripted.hold.set()
        return (await running)[0]

    sent = asyncio.run(scene())
    assert all(one.completed for one in sent)
    assert [one.input_tokens for one in sent] == [5 + n for n in range(8)]
    assert [one.output_tokens for one in sent] == [3] * 8
    ttfts = [one.ttft or 0.0 for one in sent]
    assert ttfts[0] > ttfts[-1] >= 0, "times count from when a request was due"
    assert all(body["tbt_slo"] == 0.5 for body in scripted.bodies[1:])
    assert all("x-slo-ttft-ms: 2000.000" in head for head in scripted.headers[1:])


def test_an_answer_that_breaks_off_is_a_miss(scripted: Scripted) -> None:
    scripted.breaks = {5}
    endpoint = Endpoint(f"http://127.0.0.1:{scripted.port}", "m")
    sent, _ = asyncio.run(run_load(endpoint, [_request("a", 0.0, 5), _request("b", 0.0, 15)]))
    assert [one.completed for one in sent] == [False, True]
    assert sent[0].error == "cut short"


@pytest.mark.parametrize(
    "error", ["cut short", {"message": "cut short"}, {"text": "cut short"}, ["cut short"]]
)
def test_an_error_has_any_shape(scripted: Scripted, error: Any) -> None:
    scripted.breaks, scripted.error = {5}, error
    endpoint = Endpoint(f"http://127.0.0.1:{scripted.port}", "m")
    sent, _ = asyncio.run(run_load(endpoint, [_request("a", 0.0, 5)]))
    assert not sent[0].completed
    assert "cut short" in sent[0].error


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
@pytest.mark.parametrize("ends", [False, True], ids=["bare", "finish chunk"])
def test_a_chunk_that_only_ends_the_answer_is_no_token(scripted: Scripted, chat: bool, ends: bool) -> None:
    scripted.chat, scripted.ends = chat, ends
    api: Any = "chat" if chat else "completions"
    endpoint = Endpoint(f"http://127.0.0.1:{scripted.port}", "m", api, "text" if chat else "ids")
    sent, _ = asyncio.run(run_load(endpoint, [_request("a", 0.0, 5, output=4)]))
    assert sent[0].completed
    assert (len(sent[0].gaps), sent[0].output_tokens) == (3, 4)


def test_only_who_asks_for_it_goes_on_behind_the_end(scripted: Scripted) -> None:
    url = f"http://127.0.0.1:{scripted.port}"
    for endpoint in (Endpoint(url, "m"), Endpoint(url, "m", ignore_eos=True)):
        asyncio.run(run_load(endpoint, [_request("a", 0.0, 5)]))
    assert [body.get("ignore_eos") for body in scripted.bodies] == [None, None, True, True]


def test_a_report_has_both_goodputs_and_the_usual_keys(scripted: Scripted) -> None:
    endpoint = Endpoint(f"http://127.0.0.1:{scripted.port}", "m")
    load = Load(rates=(50.0, inf), num_prompts=20, max_input=9, output_len=3, slos={"": Slo(30.0, 10.0)})
    report = run_bench_serve(endpoint, load)
    entry = report["policies"]["server"]
    assert entry["max_goodput"] == entry["paper_goodput"] == inf
    for point in entry["points"]:
        assert point["completed"] == 20
        assert {"mean_ttft_ms", "p99_tpot_ms", "median_itl_ms", "request_goodput", "attainment"} <= set(point)
    hopeless = run_bench_serve(
        endpoint, Load(rates=(50.0,), num_prompts=20, max_input=9, slos={"": Slo(1e-9)})
    )
    point = hopeless["policies"]["server"]["points"][0]
    assert (point["attainment"], point["completed"]) == ({}, 20), "what is late even alone is not counted"


def test_a_server_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="ConnectError"):
        asyncio.run(run_load(Endpoint("http://127.0.0.1:9", "m"), [_request("a", 0.0, 5)]))


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://", "http://h:port"])
def test_an_address_that_is_none_is_a_mistake(url: str) -> None:
    with pytest.raises(UsageError, match="address"):
        Endpoint(url, "m")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"rates": (0.0,)}, "rates"),
        ({"length_scale": float("nan")}, "length_scale"),
        ({"length_scale": -1.0}, "length_scale"),
        ({"slo_scale": 0.0}, "slo_scale"),
        ({"burstiness": 0.0}, "burstiness"),
        ({"slos": {"txt": Slo(1.0)}}, "unknown class 'txt'"),
        ({"trace": "missing.csv"}, "cannot read the trace"),
    ],
)
def test_a_wrong_load_is_refused_before_anything_is_sent(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        run_bench_serve(Endpoint("http://127.0.0.1:9", "m"), Load(**wrong))


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        run_bench_serve(
            Endpoint("http://127.0.0.1:9", "m"), Load(), json_path=tmp_path / "missing" / "x.json"
        )


@pytest.mark.parametrize(
    ("ttft", "gaps", "met"),
    [
        (0.5, (0.1, 0.1, 0.1), True),
        (0.5, (0.29, 0.29), True),  # ahead: the deadlines count from the promise of the first token
        (0.5, (0.31,), False),  # but no gap is longer than three
        (1.0, (0.1, 0.11), False),
        (2.0, (0.1, 0.1), True),  # a late first token does not make those behind it late
        (1.0, (), True),
    ],
)
def test_deadlines_of_tokens(ttft: float, gaps: tuple[float, ...], met: bool) -> None:
    sent = Sent(_request("r", 0.0, 5), ttft=ttft, gaps=gaps)
    assert sent.tbt_met(1.0, 0.1) == met
    assert sent.tbt_met(1.0, None)


def test_options_are_read() -> None:
    assert parse_slos(["a=1", "b=2:0.5"]) == {"a": (1.0, None), "b": (2.0, 0.5)}
    assert parse_goodput(["ttft:200", "tpot:50"]) == {"": (0.2, 0.05)}
    assert parse_goodput([]) == {}
    for wrong in ("a", "a=x", "a=0", "a=1:2:3"):
        with pytest.raises(UsageError):
            parse_slos([wrong])
    for wrong in ("e2el:5", "ttft", "ttft:-5", "tpot:nan"):
        with pytest.raises(UsageError):
            parse_goodput([wrong])

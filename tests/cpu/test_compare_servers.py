"""The comparison of servers: what it sends, counts and writes. The servers are not started here."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare_cells import (
    LOADS,
    OUTPUT,
    Slo,
    backlog_of,
    best_setting,
    cell_of,
    in_time,
    narrow,
    requests_of,
    result_of,
    slos_of,
)
from benchmarks.compare_client import PeerEndpoint, is_ready, offer, text_of, unfinished
from benchmarks.compare_model import prompt_of, vocabulary
from benchmarks.compare_peers import (
    CLASSES,
    PEERS,
    Peer,
    Server,
    ServerError,
    Setting,
    neighbour,
    started,
    versions_of,
    write_classes,
)
from benchmarks.compare_runs import Bench, measure_all, screen
from benchmarks.compare_tables import BEGIN, END, markdown_of, put_into
from fpcompile.scheduler.events import Request
from fpcompile.scheduler.synthetic import synthetic_trace
from fpcompile.scheduler.workload import TraceRow
from fpcompile.serving.bench_client import Sent
from fpcompile.serving.server.config_file import read_config

SLOS = {"text": Slo(0.1, 0.02), "search": Slo(1.0, 0.05)}
NOBODY: Any = None
"""No process."""
BY_NAME = {peer.name: peer for peer in PEERS}


def request(klass: str = "text", output: int = 1, *, at: float = 0.0, name: str = "r") -> Request:
    return Request(name, at, at + 1.0, 4, 0.0, slo=1.0, priority=1, klass=klass, decode_tokens=output)


def answered(klass: str, ttft: float | None, gaps: tuple[float, ...] = (), **fields: Any) -> Sent:
    output = len(gaps) + 1
    latency = None if ttft is None else ttft + sum(gaps)
    seen = Sent(request(klass, output), ttft=ttft, gaps=gaps, latency=latency, output_tokens=output)
    for name, value in fields.items():
        setattr(seen, name, value)
    return seen


# What is sent


def test_every_letter_is_one_token_and_every_id_has_a_visible_text() -> None:
    from benchmarks.compare_model import _tokenizer

    tokenizer = _tokenizer(500, 2048)
    prompt = prompt_of(100, "seed")
    ids = tokenizer(prompt)["input_ids"]
    assert len(ids) == 100
    assert tokenizer.decode(ids) == prompt
    assert len(tokenizer) == len(vocabulary(500)) == 500
    assert all(tokenizer.decode([number]) for number in range(500) if number != tokenizer.unk_token_id)


def test_prompts_share_no_prefix() -> None:
    prompts = {prompt_of(16, f"1 r{number}") for number in range(100)}
    assert len(prompts) == len({prompt[:8] for prompt in prompts}) == 100
    assert prompt_of(16, "1 r0") in prompts


def test_requests_are_the_same_every_time_and_come_at_the_rate() -> None:
    rows = synthetic_trace(200, seed=3)
    slos = slos_of({"text": 0.1, "image": 0.2, "search": 1.0, "file": 2.0})
    first = requests_of(rows, 20.0, 500, "tokens", slos, 1)
    assert first == requests_of(rows, 20.0, 500, "tokens", slos, 1)
    assert first != requests_of(rows, 20.0, 500, "tokens", slos, 2)
    assert (len(first) - 1) / first[-1].arrival == pytest.approx(20.0)
    outputs = {one.decode_tokens for one in first}
    assert min(outputs) >= OUTPUT[0]
    assert max(outputs) <= OUTPUT[1]
    assert len(outputs) > 10
    assert {one.decode_tokens for one in requests_of(rows, 20.0, 50, "first", slos, 1)} == {1}
    by_class = {one.klass: one.priority for one in first}
    assert by_class["text"] > by_class["image"] > by_class["search"] > by_class["file"]


def test_the_slo_between_tokens_keeps_the_proportion_of_the_table() -> None:
    assert slos_of({"text": 0.5, "search": 1.0}) == {"text": Slo(0.5, 0.2), "search": Slo(1.0, 0.05)}


def test_vllm_is_tried_with_every_combination_every_n_first() -> None:
    settings = BY_NAME["vllm"].settings
    assert len({setting.flags for setting in settings}) == 16
    tokens = [setting.flags[setting.flags.index("--max-num-batched-tokens") + 1] for setting in settings]
    assert set(tokens[:4]) == {"256", "512", "1024", "2048"}
    assert sum("--long-prefill-token-threshold" in setting.flags for setting in settings) == 8
    assert sum("fcfs" in setting.flags for setting in settings) == 8


def body_for(peer: Peer, setting: Setting, what: Request, tmp_path: Path) -> dict[str, Any]:
    return Server(peer, setting, 1, tmp_path, NOBODY, (), 0.0).endpoint.body(what, 0, 0.02)


def test_bodies_differ_only_in_what_each_server_knows(tmp_path: Path) -> None:
    bodies = {p.name: body_for(p, p.settings[0], request(output=8), tmp_path) for p in PEERS}
    common = {"prompt", "max_tokens", "temperature", "stream"}
    values = [{name: body[name] for name in common} for body in bodies.values()]
    assert values[0] == values[1] == values[2]
    assert set(bodies["transformers"]) == {*common, "model"}  # it refuses fields that it does not know
    assert bodies["transformers"]["model"] == str(tmp_path)
    assert bodies["fpcompile"]["slo_class"] == "text"
    patient = Server(BY_NAME["fpcompile"], BY_NAME["fpcompile"].settings[0], 1, tmp_path, NOBODY, (), 0.0)
    assert "slo_class" not in patient.endpoint.body(request("patient"), 0, None)


def test_the_server_reads_the_classes(tmp_path: Path) -> None:
    write_classes(tmp_path, {"text": (0.1, 0.04), "search": (1.05, 0.0525)})
    accounts, _ = read_config(tmp_path / CLASSES)
    assert {name: (c.ttft, c.tbt) for name, c in accounts.classes.items()} == {
        "text": (0.1, 0.04), "search": (1.05, 0.0525),
    }  # fmt: skip
    assert CLASSES in " ".join(BY_NAME["fpcompile"].command(Path("bin/python"), tmp_path, 1))


def test_vllm_gets_priorities_where_it_takes_them_the_urgent_lowest(tmp_path: Path) -> None:
    vllm = BY_NAME["vllm"]
    ordered = next(setting for setting in vllm.settings if "priority" in setting.options)
    plain = next(setting for setting in vllm.settings if "fcfs" in setting.options)
    assert body_for(vllm, ordered, request(), tmp_path)["priority"] == -1
    assert "priority" not in body_for(vllm, plain, request(), tmp_path)


def test_the_neighbour_shares_most_options() -> None:
    best = Setting(("N = 512", "priority"), ())
    rest = [Setting(("N = 256", "fcfs"), ()), Setting(("N = 512", "fcfs"), ()), Setting(("N = 512", "x"), ())]
    assert neighbour(best, rest) is rest[1]


# What is counted


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (answered("text", 0.09), True),
        (answered("text", 0.11), False),
        (answered("search", 0.11), True),
        (answered("text", None), False),
        (answered("text", 0.05, (0.01, 0.03)), True),  # the mean is on time
        (answered("text", 0.05, (0.02, 0.03)), False),
        (answered("text", 0.05, error="3 tokens instead of 4"), False),
        (answered("text", 0.05, (0.01,), latency=None), False),
    ],
)
def test_in_time_is_the_first_token_and_the_mean_between_tokens(seen: Sent, expected: bool) -> None:
    assert in_time(seen, SLOS) is expected


def test_a_cell_counts_every_request() -> None:
    seen = [
        answered("text", 0.05, (0.01, 0.01)),
        answered("text", 0.05, (0.001, 0.0389)),  # on time by its mean, not by every token
        answered("search", 0.5),
        answered("search", None, error=unfinished),
        answered("search", None, error=unfinished),
    ]
    cell = cell_of(seen, SLOS, 10.0, 0.5)
    assert cell["attainment"] == {"text": 1.0, "search": pytest.approx(1 / 3)}
    assert cell["worst"] == pytest.approx(1 / 3)
    assert cell["overall"] == pytest.approx(3 / 5)
    assert cell["every_token"] == pytest.approx(3 / 5)
    assert cell["errors"] == {unfinished: 2}
    assert cell["ttft_p99"] == 0.5
    assert cell["gap_p99"] == 0.0389
    slow = cell_of([answered("text", 0.05, (0.001, 0.001, 0.001, 0.0701))], SLOS, 10.0, 0.5)
    assert (slow["overall"], slow["every_token"]) == (1.0, 0.0)  # a gap of more than three times the SLO


def test_a_cell_without_an_answer() -> None:
    cell = cell_of([answered("text", None, error="ConnectError")], SLOS, 1.0, 0.1)
    assert (cell["worst"], cell["ttft_mean"], cell["tbt_mean"]) == (0.0, None, None)


def test_a_backlog_counts_what_was_done() -> None:
    seen = [answered("text", 1.0, (1.0,)), answered("text", 1.0, (3.0,)), answered("text", None, error="x")]
    done = backlog_of(seen)
    assert (done["requests"], done["complete"], done["seconds"]) == (3, 2, 4.0)
    assert (done["output_tokens_per_s"], done["prompt_tokens_per_s"]) == (1.0, 2.0)


@pytest.mark.parametrize("worst", [-1, 0, 3, 11, len(LOADS) - 1])
@pytest.mark.parametrize("further", [0, 1, 5])
def test_narrowing_finds_both_goodputs_with_few_cells(worst: int, further: int) -> None:
    overall = min(worst + further, len(LOADS) - 1)
    rates = [10 * load for load in LOADS]
    asked: list[float] = []

    def measure(rate: float) -> dict[str, Any]:
        asked.append(rate)
        at = rates.index(rate)
        return {"rate": rate, "worst": float(at <= worst), "overall": 0.9 if at <= overall else 0.89}

    cells = narrow(rates, measure)
    found = result_of(rates, cells.values())
    assert found["goodput"] == (rates[worst] if worst >= 0 else 0.0)
    assert found["paper_goodput"] == (rates[overall] if overall >= 0 else 0.0)
    assert found["goodput_narrowed"] is (worst < len(rates) - 1)
    assert len(asked) == len(set(asked)) <= 10


def test_narrowing_ends_with_the_time_and_says_so() -> None:
    rates = [1.0, 2.0, 3.0, 4.0]
    cells = narrow(rates, lambda rate: {"rate": rate, "worst": 1.0, "overall": 1.0} if rate == 2.0 else None)
    assert list(cells) == [2.0]
    assert result_of(rates, cells.values()) == {
        "goodput": 2.0, "goodput_narrowed": False, "paper_goodput": 2.0, "paper_goodput_narrowed": False,
    }  # fmt: skip


def test_the_best_setting_has_the_most_in_time_then_the_shortest_wait() -> None:
    def cell(worst: float, overall: float, mean: float | None) -> dict[str, Any]:
        return {"worst": worst, "overall": overall, "ttft_mean": mean}

    assert best_setting({"a": cell(0.5, 1.0, 0.1), "b": cell(0.9, 1.0, 0.2)}) == "b"
    assert best_setting({"a": cell(1.0, 1.0, 0.3), "b": cell(1.0, 1.0, 0.2)}) == "b"
    assert best_setting({"a": cell(0.0, 0.0, None), "b": cell(0.0, 0.0, 9.0)}) == "b"


# The client


class _Stand(BaseHTTPRequestHandler):
    """Streams as many tokens as are asked for; 13 tokens are never answered to the end, 9 are cut short."""

    protocol_version = "HTTP/1.1"
    done_mark = True
    bodies: list[dict[str, Any]]
    held: threading.Event

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ready" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).bodies.append(body)
        if not body["stream"]:
            content = json.dumps({"choices": [{"text": "whole"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.close_connection = True
        wanted = body["max_tokens"] - (len(body["prompt"]) == 9)
        for number in range(wanted):
            end = "length" if number == wanted - 1 else None
            self._send({"choices": [{"index": 0, "text": "t", "finish_reason": end}]})
            if len(body["prompt"]) == 13:
                type(self).held.wait(30)
                return
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": wanted}
        self._send({"choices": [], "usage": usage})
        if self.done_mark:
            self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def stand(*, done_mark: bool = True) -> Iterator[tuple[str, type[_Stand]]]:
    class Handler(_Stand):
        pass

    Handler.bodies, Handler.held, Handler.done_mark = [], threading.Event(), done_mark
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", Handler
    finally:
        Handler.held.set()
        server.shutdown()
        thread.join()
        server.server_close()


def sized(name: str, tokens: int, output: int, at: float = 0.0) -> Request:
    return Request(name, at, inf, tokens, 0.0, klass="text", decode_tokens=output)


@pytest.mark.slow
@pytest.mark.parametrize("done_mark", [True, False])
def test_the_client_closes_what_does_not_end_and_counts_tokens(done_mark: bool) -> None:
    requests = [sized("a", 5, 3), sized("b", 13, 3), sized("c", 9, 3), sized("d", 5, 1, at=0.05)]
    with stand(done_mark=done_mark) as (url, handler):
        endpoint = PeerEndpoint(url, "m", extra=lambda one, tbt: {"tbt_slo": tbt})
        whole, held, short, late = asyncio.run(offer(endpoint, requests, {"text": 0.5}, 7, 0.4))
        assert (whole.completed, whole.error, len(whole.gaps)) == (True, "", 2)
        assert (held.completed, held.error) == (False, unfinished)
        assert short.error == "2 tokens instead of 3"
        assert late.completed
        prompts = {len(body["prompt"]): body for body in handler.bodies}
        assert prompts[5]["prompt"] in (prompt_of(5, "7 a"), prompt_of(5, "7 d"))
        assert all(body["tbt_slo"] == 0.5 for body in handler.bodies)
        assert text_of(endpoint, requests[0], 7, 5.0) == "whole"
        assert is_ready(f"{url}/ready")
        assert not is_ready(f"{url}/other")
    assert not is_ready(f"{url}/ready")


# Processes

_SCRIPT = """
import http.server, subprocess, sys, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[2]).write_text(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def stand_in(script: str, *words: str) -> Peer:
    def command(python: Path, folder: Path, port: int) -> list[str]:
        return [str(python), "-c", script, str(port), *words]

    setting = Setting(("plain",), ())
    return Peer("stand-in", "a stand-in", (), command, (setting,), lambda s, r, t: {})


def gone(process: int) -> bool:
    """Whether there is no such process, or only its entry."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_server_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    peer = stand_in(_SCRIPT, str(tmp_path / "child"))
    log = tmp_path / "log"
    with started(peer, peer.settings[0], Path(sys.executable), tmp_path, log, 30.0) as server:
        child = int((tmp_path / "child").read_text(encoding="utf-8"))
        assert server.alive
        assert is_ready(f"{server.url}/health")
        assert not gone(child)
        assert os.getpgid(server.process.pid) == server.process.pid != os.getpgid(0)
    assert server.process.poll() is not None
    ended: Callable[[], bool] = lambda: gone(child)  # noqa: E731
    assert any(ended() or threading.Event().wait(0.05) for _ in range(100))


@pytest.mark.slow
def test_a_server_that_does_not_start_is_told_with_its_log(tmp_path: Path) -> None:
    peer = stand_in("raise SystemExit('no such model')")
    with (
        pytest.raises(ServerError, match="no such model"),
        started(peer, peer.settings[0], Path(sys.executable), tmp_path, tmp_path / "log", 30.0),
    ):
        pass


@pytest.mark.slow
def test_versions_come_from_the_environment_of_the_peer() -> None:
    found = versions_of(Path(sys.executable), ("torch",))
    assert set(found) == {"python", "torch"}
    with pytest.raises(ServerError, match="no-such-package"):
        versions_of(Path(sys.executable), ("no-such-package",))


# The measurements


class FakeBench(Bench):
    """Servers that are not there; a setting keeps up to the load that it names; ``broken`` does not start."""

    @contextmanager
    def start(self, peer: Peer, setting: Setting, python: Path) -> Iterator[Server]:
        if "broken" in setting.options:
            raise ServerError("it does not start\nlog")
        yield Server(peer, setting, 1, self.folder, NOBODY, (), 3.0)

    def warm(self, server: Server) -> None:
        pass

    def rest(self, server: Server) -> None:
        pass

    def offer(self, server: Server, requests: Sequence[Request], patience: float) -> list[Sent]:
        return [replace(answered("text", 1.0, (0.5,)), request=one) for one in requests]

    def cell(self, server: Server, mode: str, load: float, count: int) -> dict[str, Any]:
        if "dies" in server.setting.options and load > 1.5:
            raise ServerError("it is gone")
        up_to = float(server.setting.options[0]) - (0.2 if mode == "tokens" else 0.0)
        met = 1.0 if load <= up_to + 1e-9 else 0.5
        rate = load * self.capacity
        return {"rate": rate, "load": load, "worst": met, "overall": met, "ttft_mean": 1 / up_to}


def fake(tmp_path: Path, seconds: float, *options: tuple[str, ...]) -> tuple[FakeBench, Peer, dict[str, Any]]:
    rows = [TraceRow(0.1 * number, 4 + number, 0, "text") for number in range(40)]
    bench = FakeBench(tmp_path, tmp_path, rows, SLOS, 10.0, 1, 1.0, time.monotonic() + seconds)
    peer = replace(stand_in(""), settings=tuple(Setting(one, ()) for one in options))
    return bench, peer, {peer.name: {"screened": {}, "untried": []}}


def test_the_best_setting_is_bisected_in_both_modes(tmp_path: Path) -> None:
    bench, peer, entries = fake(
        tmp_path, 600.0, ("0.5",), ("broken",), ("1.3",), ("0.9",), ("1.1",), ("0.3",)
    )
    python = {peer.name: Path("python")}
    screen(bench, [peer], python, entries, 20, None)
    entry = entries[peer.name]
    assert list(entry["screened"])[:4] == ["0.5", "broken", "1.3", "0.9"]
    assert len(entry["screened"]) == 6
    assert entry["screened"]["broken"] == {"failure": "it does not start\nlog"}
    assert entry["untried"] == []
    measure_all(bench, [peer], python, entries, 20)
    assert entry["first"]["setting"] == entry["tokens"]["setting"] == "1.3"
    assert entry["first"]["goodput"] == pytest.approx(13.0)
    assert entry["first"]["goodput_narrowed"]
    assert entry["tokens"]["goodput"] == pytest.approx(11.0)
    assert (entry["backlog"]["requests"], entry["backlog"]["seconds"]) == (48, 1.5)


def test_a_server_that_dies_keeps_what_was_measured(tmp_path: Path) -> None:
    bench, peer, entries = fake(tmp_path, 600.0, ("2.0", "dies"))
    python = {peer.name: Path("python")}
    screen(bench, [peer], python, entries, 20, None)
    measure_all(bench, [peer], python, entries, 20)
    entry = entries[peer.name]
    assert entry["failure"] == "it is gone"
    assert [cell["load"] for cell in entry["first"]["cells"]] == [1.2]
    assert (entry["first"]["goodput"], entry["first"]["goodput_narrowed"]) == (pytest.approx(12.0), False)
    assert "tokens" not in entry
    assert "backlog" not in entry


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    bench, peer, entries = fake(tmp_path, -1.0, ("0.5",), ("1.3",))
    python = {peer.name: Path("python")}
    screen(bench, [peer], python, entries, 20, None)
    measure_all(bench, [peer], python, entries, 20)
    assert entries[peer.name]["untried"] == ["0.5", "1.3"]
    assert entries[peer.name]["failure"] == "no setting could be measured"


def test_every_peer_has_its_first_settings_before_any_has_more(tmp_path: Path) -> None:
    bench, many, _ = fake(tmp_path, 600.0, *((f"{load}",) for load in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)))
    few = replace(many, name="few", settings=many.settings[:5], first=2)
    many = replace(many, first=6)
    entries: dict[str, Any] = {peer.name: {"screened": {}, "untried": []} for peer in (few, many)}
    order: list[str] = []

    class Late(FakeBench):
        @contextmanager
        def start(self, peer: Peer, setting: Setting, python: Path) -> Iterator[Server]:
            order.append(peer.name)
            with super().start(peer, setting, python) as server:
                yield server

    late = Late(bench.folder, bench.logs, bench.rows, bench.slos, bench.capacity, 1, 1.0, bench.end)
    screen(late, [many, few], {peer.name: Path("python") for peer in (few, many)}, entries, 20, None)
    assert order[:8] == ["few"] * 2 + [many.name] * 6
    assert sorted(order[8:]) == ["few"] * 3 + [many.name]


def test_settings_can_be_limited(tmp_path: Path) -> None:
    bench, peer, entries = fake(tmp_path, 600.0, *((f"{load}",) for load in (0.5, 0.6, 0.7, 0.8, 0.9)))
    screen(bench, [peer], {peer.name: Path("python")}, entries, 20, 2)
    assert list(entries[peer.name]["screened"]) == ["0.5", "0.6"]
    assert entries[peer.name]["untried"] == ["0.7", "0.8", "0.9"]


# The report


def report() -> dict[str, Any]:
    cell = cell_of([answered("text", 0.05, (0.01, 0.01)), answered("search", 2.0)], SLOS, 6.0, 0.6)
    done = {"setting": "plain", "cells": [cell], **result_of([6.0, 12.0], [cell])}
    measured = {
        "title": "one", "versions": {"python": "3", "one": "1"}, "command": "one serve",
        "flags": {"plain": ["--plain", "1"]},
        "environment": {"OMP_NUM_THREADS": "1"}, "untried": ["other"],
        "screened": {"plain": {"first": cell, "tokens": cell, "start_s": 3.0}}, "first": done, "tokens": done,
        "backlog": {"setting": "plain", **backlog_of([answered("text", 1.0, (1.0,))])},
    }  # fmt: skip
    failed = {
        "title": "two", "versions": {"python": "3"}, "command": "two serve", "environment": {},
        "flags": {}, "untried": [], "screened": {"plain": {"failure": "two is not ready:\nlong log"}},
        "failure": "no start",
    }  # fmt: skip
    return {
        "model": {"num_hidden_layers": 4, "hidden_size": 640, "dtype": "bfloat16"},
        "machine": {"time": "2026-01-02T03:04:05Z", "cpu_count": 2, "device_name": "a processor"},
        "load_average": [0.1, 1.0], "minutes": 20.0, "requests": 2, "trace": "t.csv", "length_scale": 0.0625,
        "capacity": 10.0, "slos": {"text": {"ttft": 0.1, "tbt": 0.02}}, "note": "", "rates": [6.0, 12.0],
        "screening_requests": 2, "screening_load": 0.6, "same_text": True,
        "peers": {"one": measured, "two": failed},
    }  # fmt: skip


def test_the_tables_say_what_was_measured_and_what_was_not() -> None:
    text = markdown_of(report())
    assert "| one | plain | < 6.00 | < 6.00 |" in text  # the lowest rate was tried, and failed
    assert "| two | not measured: no start |" in text
    assert "| one | 0.6 | 0 % | 50 % | 50 % |" in text
    assert "| two | plain | two is not ready: |" in text
    assert "long log" not in text
    assert "| one | other | not tried |" in text
    assert "OMP_NUM_THREADS=1 one serve" in text
    assert "One token and 16 to 64 tokens: `--plain 1`" in text
    assert markdown_of({**report(), "note": "Smoke figures."}).count("**Smoke figures.**") == 1


@pytest.mark.parametrize(
    ("overall", "rates", "shown"),
    [
        (1.0, [6.0, 12.0], "≥ 6.00"),  # nothing above it was tried
        (1.0, [6.0], "≥ 6.00"),  # there is nothing above it
        (0.5, [3.0, 6.0], "not found"),  # nothing below it was tried
        (0.5, [6.0, 12.0], "< 6.00"),
    ],
)
def test_a_goodput_that_was_not_narrowed_says_so(overall: float, rates: list[float], shown: str) -> None:
    content = report()
    cell = {**content["peers"]["one"]["first"]["cells"][0], "overall": overall, "worst": overall}
    content["rates"] = rates
    content["peers"]["one"]["first"] = {"setting": "plain", "cells": [cell], **result_of(rates, [cell])}
    assert f"| one | plain | {shown} | {shown} |" in markdown_of(content)


def test_rows_of_a_table_have_the_columns_of_its_head() -> None:
    blocks = [block.splitlines() for block in markdown_of(report()).split("\n\n")]
    tables = [block for block in blocks if block[0].startswith("|")]
    assert len(tables) >= 6
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_the_section_of_a_page_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n", encoding="utf-8")
    put_into(page, "new\n")
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\n\nnew\n\n{END}\nbehind\n"
    put_into(page, "newer\n")
    assert page.read_text(encoding="utf-8").count("new") == 1
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the marks"):
        put_into(page, "new")

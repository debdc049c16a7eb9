"""Trace readers, tiling, rates, SLOs, synthetic traffic; bad lines are named."""

from __future__ import annotations

import gzip
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler import TraceError, profile
from fpcompile.scheduler.synthetic import SHARES, synthetic_trace
from fpcompile.scheduler.traces import read_trace
from fpcompile.scheduler.workload import TraceRow, requests_at, tile

QWEN_CSV = (
    "chat_id,parent_chat_id,arrival_s,input_tokens,single_turn_input_tokens,output_tokens,type,turn\n"
    "0,-1,5.0,900,791,532,text,1\n1,-1,5.5,378,378,76,image,1\n"
)
FILES = {
    "qwen.csv": (QWEN_CSV, [(0.0, 791, 532, "text"), (0.5, 378, 76, "image")]),
    "plain.csv": (
        "arrival_s,input_tokens,output_tokens,type\n0.0,374,44,conv\n4.5,3000,9,code\n",
        [(0.0, 374, 44, "text"), (4.5, 3000, 9, "search")],
    ),
    "azure.csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.2,180,8\n",
        [(0.0, 4808, 10, "search"), (0.22004, 180, 8, "text")],
    ),
    "qwen.jsonl": (
        '{"chat_id": 1, "timestamp": 61.1, "input_length": 20, "output_length": 3, "type": "file"}\n\n'
        '{"chat_id": 2, "timestamp": 61.6, "input_length": 30, "output_length": 4, "type": "text"}\n',
        [(0.0, 20, 3, "file"), (0.5, 30, 4, "text")],
    ),
    "mooncake.jsonl": (
        '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
        '{"timestamp": 3000, "input_length": 10, "output_length": 1, "hash_ids": []}\n',
        [(0.0, 6758, 500, "search"), (3.0, 10, 1, "text")],
    ),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zipped", [False, True])
def test_each_format_is_recognised_and_read(tmp_path: Path, name: str, zipped: bool) -> None:
    text, expected = FILES[name]
    path = tmp_path / (name + ".gz" if zipped else name)
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    rows = read_trace(path)
    assert [(row.tokens, row.output_tokens, row.klass) for row in rows] == [e[1:] for e in expected]
    assert [row.arrival for row in rows] == pytest.approx([e[0] for e in expected], abs=1e-6)


HEAD = "arrival_s,input_tokens,output_tokens,type\n0.0,10,1,conv\n"


@pytest.mark.parametrize(
    ("name", "text", "line", "field"),
    [
        ("a.csv", HEAD + "1.0,-5,1,conv\n", 3, "input_tokens"),
        ("a.csv", HEAD + "1.0,0,1,conv\n", 3, "input_tokens"),
        ("a.csv", HEAD + "1.0,5,-1,conv\n", 3, "output_tokens"),
        ("a.csv", HEAD + "1.0,5.5,1,conv\n", 3, "input_tokens"),
        ("a.csv", HEAD + "1.0,x,1,conv\n", 3, "input_tokens"),
        ("a.csv", HEAD + "nan,5,1,conv\n", 3, "arrival_s"),
        ("a.csv", HEAD + "inf,5,1,conv\n", 3, "arrival_s"),
        ("a.csv", HEAD + "1.0,,1,conv\n", 3, "input_tokens"),
        ("a.csv", HEAD + "2.0,5,1,conv\n1.0,5,1,conv\n", 4, None),
        ("a.csv", HEAD + "2.0,5\n", 3, None),
        ("a.csv", HEAD + "2.0,5,1,conv,9\n", 3, None),
        ("a.csv", "a,b\n1,2\n", 2, None),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", 2, "TIMESTAMP"),
        ("a.jsonl", '{"timestamp": 0, "input_length": 5, "output_length": 1}\n{oops\n', 2, None),
        ("a.jsonl", '{"timestamp": 0, "input_length": 5, "output_length": 1}\n[1]\n', 2, None),
        ("a.jsonl", '{"timestamp": 0, "input_length": 5}\n', 1, "output_length"),
        ("a.jsonl", '{"timestamp": 0, "input_length": null, "output_length": 1}\n', 1, "input_length"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03+xx,1,1\n", 2, "TIMESTAMP"),
    ],
)
def test_a_malformed_line_is_named(
    tmp_path: Path, name: str, text: str, line: int, field: str | None
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(TraceError) as told:
        read_trace(path)
    assert (told.value.line, told.value.field) == (line, field)
    assert str(path) in str(told.value)


def test_unreadable_and_empty_traces(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot read the trace"):
        read_trace(tmp_path / "missing.csv")
    (tmp_path / "bad.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(InvalidInputError, match="cannot read the trace"):
        read_trace(tmp_path / "bad.csv.gz")
    whole = gzip.compress(HEAD.encode() * 50)
    for at in (12, len(whole) - 20):
        (tmp_path / "bad.csv.gz").write_bytes(whole[:at] + b"\xff\x00\xff" + whole[at + 3 :])
        with pytest.raises(InvalidInputError, match="cannot read the trace"):
            read_trace(tmp_path / "bad.csv.gz")
    (tmp_path / "empty.csv").write_text("arrival_s,input_tokens,output_tokens,type\n")
    with pytest.raises(InvalidInputError, match="empty"):
        read_trace(tmp_path / "empty.csv")


ROWS = [TraceRow(float(i * i), 10 + i, 1, "text") for i in range(40)]


def test_tiling_repeats_with_seed_0_and_draws_blocks_otherwise() -> None:
    plain = tile(ROWS, 100)
    assert [row.tokens for row in plain] == [10 + i % 40 for i in range(100)]
    assert plain[39].arrival == ROWS[39].arrival
    assert tile(ROWS, 100, 3) == tile(ROWS, 100, 3)
    assert tile(ROWS, 100, 3) != tile(ROWS, 100, 4)
    drawn = tile(ROWS, 400, 3, block=8)
    assert all(b.arrival >= a.arrival for a, b in pairwise(drawn))
    inside = [b.tokens - a.tokens for a, b in pairwise(drawn)]
    assert Counter(inside)[1] >= 300, "order inside the blocks is kept"
    with pytest.raises(InvalidInputError, match="too short"):
        tile(ROWS[:1], 10)


def test_rates_scale_gaps_and_deadlines_follow_the_class() -> None:
    requests = requests_at(ROWS, 4.0, profile(), {"text": 0.25}, slo_scale=2.0)
    assert (len(requests) - 1) / (requests[-1].arrival - requests[0].arrival) == pytest.approx(4.0)
    gaps = [b.arrival - a.arrival for a, b in pairwise(requests)]
    assert gaps[3] / gaps[1] == pytest.approx(7 / 3)
    assert all(r.deadline == pytest.approx(r.arrival + 0.5) and r.slo == 0.5 for r in requests)
    assert requests[5].cost == profile().seconds(15)
    assert requests[5].kv_blocks == 1


def test_rows_without_tenants_and_priorities_get_those_of_their_class() -> None:
    rows = [
        TraceRow(0.0, 9, klass="slow"),
        TraceRow(1.0, 9, klass="quick"),
        TraceRow(2.0, 9, 0, "quick", "t"),
    ]
    requests = requests_at(rows, 1.0, profile(), {"slow": 4.0, "quick": 0.5})
    assert [request.tenant for request in requests] == ["slow", "quick", "t"]
    assert [request.priority for request in requests] == [0, 1, 1], "the shorter promise is served first"


@pytest.mark.parametrize(
    ("rate", "scale", "slos", "complaint"),
    [
        (0.0, 1.0, {"text": 1.0}, "rate"),
        (float("nan"), 1.0, {"text": 1.0}, "rate"),
        (1.0, -1.0, {"text": 1.0}, "slo_scale"),
        (1.0, 1.0, {"image": 1.0}, "class 'text' has no SLO"),
    ],
)
def test_bad_scaling_is_refused(rate: float, scale: float, slos: dict[str, float], complaint: str) -> None:
    with pytest.raises(InvalidInputError, match=complaint):
        requests_at(ROWS, rate, profile(), slos, slo_scale=scale)


@pytest.mark.parametrize("fields", [{"arrival": -1.0}, {"tokens": 0}, {"tokens": -3}, {"output_tokens": -1}])
def test_trace_rows_check_themselves(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError):
        TraceRow(**{"arrival": 0.0, "tokens": 1, **fields})  # type: ignore[arg-type]


def test_synthetic_traffic_has_the_documented_shape() -> None:
    rows = synthetic_trace(4000, seed=2, rate=3.0)
    assert rows == synthetic_trace(4000, seed=2, rate=3.0)
    shares = Counter(row.klass for row in rows)
    assert {k: shares[k] / 4000 for k in SHARES} == pytest.approx(SHARES, abs=0.02)
    assert 4000 / rows[-1].arrival == pytest.approx(3.0, rel=0.1)
    assert sum(row.tokens for row in rows) / 4000 == pytest.approx(1632, rel=0.15), (
        "the slice it was fitted to"
    )
    assert max(row.tokens for row in rows if row.klass == "image") <= 1000
    bursty = synthetic_trace(4000, seed=2, rate=3.0, burstiness=0.2)
    gaps = [b.arrival - a.arrival for a, b in pairwise(bursty)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation / mean == pytest.approx(5**0.5, rel=0.15)
    with pytest.raises(InvalidInputError):
        synthetic_trace(10, burstiness=0.0)


def test_marks_zones_and_absent_types_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + HEAD.encode())
    assert [row.tokens for row in read_trace(path)] == [10], "a byte order mark"
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    path.write_text(head + "2024-05-10 00:00:00.009930+00:00,5,1\n2024-05-10 02:00:00.5+01:00,6,1\n")
    assert read_trace(path)[1].arrival == pytest.approx(3600.5 - 0.00993)
    path.write_text(
        '{"chat_id": 1, "timestamp": 0, "input_length": 2000, "output_length": 1, "type": null}\n'
    )
    assert read_trace(path)[0].klass == "search", "no type: by length"


def test_requests_that_all_arrive_at_once_have_no_rate() -> None:
    with pytest.raises(InvalidInputError, match="arrive at once"):
        requests_at([TraceRow(3.0, 10, klass="text")] * 4, 1.0, profile(), {"text": 1.0})


def test_a_line_that_is_no_csv_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{HEAD}1.0,{'5' * 140_000},1,conv\n")
    with pytest.raises(TraceError, match="not csv") as told:
        read_trace(path)
    assert told.value.line == 3

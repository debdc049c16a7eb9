"""The timeline: what counts as a lane's TTFT, how intervals merge, the events, the picture's colours."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fpcompile.engine.timeline import (
    Lane,
    Mark,
    Span,
    chrome_events,
    draw_timeline,
    lanes,
    write_chrome_trace,
)
from fpcompile.errors import InvalidInputError, UnknownNameError

BLUE, ORANGE, GREY = (0x2B, 0x6C, 0xB0), (0xD9, 0x62, 0x2B), (0x64, 0x74, 0x8B)


def _fcfs() -> list[Span]:
    """A long request runs for 1 s; an urgent one arrives at 0.2 s and waits for it."""
    return [
        Span("long", "layers.0", 100.0, 100.5, "segment"),
        Span("long", "layers.1", 100.5, 101.0, "segment"),
        Span("urgent", "queue", 100.2, 101.0, "wait"),
        Span("urgent", "layers.0", 101.0, 101.1, "segment"),
    ]


def _preempting() -> list[Span]:
    """The same, but the urgent one stops the long one at 0.5 s."""
    return [
        Span("long", "layers.0", 7.0, 7.5, "segment"),
        Span("urgent", "queue", 7.2, 7.5, "wait"),
        Span("urgent", "layers.0", 7.5, 7.6, "segment"),
        Span("long", "paused", 7.5, 7.6, "preempted"),
        Span("long", "layers.1", 7.6, 8.1, "tile"),
    ]


def _lane(name: str, spans: list[Span], slo: float | None = None) -> Lane:
    return next(lane for lane in lanes(spans, slos={} if slo is None else {name: slo}) if lane.name == name)


@pytest.mark.parametrize(("start", "end"), [(2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_a_span_must_be_an_interval(start: float, end: float) -> None:
    with pytest.raises(InvalidInputError, match="no interval"):
        Span("a", "x", start, end, "segment")


def test_a_mark_must_have_a_time() -> None:
    with pytest.raises(InvalidInputError, match="no time"):
        Mark("a", "x", math.nan, "arrival")


def test_unknown_kinds_list_the_legal_ones() -> None:
    with pytest.raises(UnknownNameError, match="'preempted', 'segment'"):
        Span("a", "x", 0.0, 1.0, "run")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="'first_token', 'preempt'"):
        Mark("a", "x", 0.0, "start")  # type: ignore[arg-type]


def test_lanes_are_ordered_by_arrival_and_shifted_to_zero() -> None:
    long, urgent = lanes(reversed(_fcfs()))
    assert (long.name, long.arrival) == ("long", 0.0)
    assert urgent.name == "urgent"
    assert urgent.arrival == pytest.approx(0.2)
    assert [span.name for span in long.spans] == ["layers.0", "layers.1"]


def test_ttft_is_from_arrival_to_the_end_of_the_last_running_span() -> None:
    assert _lane("urgent", _fcfs()).ttft == pytest.approx(0.9)
    assert _lane("urgent", _preempting()).ttft == pytest.approx(0.4)


def test_marks_of_arrival_and_first_token_take_precedence() -> None:
    marks = [Mark("urgent", "arrives", 100.1, "arrival"), Mark("urgent", "token", 101.05, "first_token")]
    urgent = lanes(_fcfs(), marks)[1]
    assert urgent.ttft == pytest.approx(0.95)


def test_a_lane_that_never_ran_has_no_ttft_and_misses_its_slo() -> None:
    lane = _lane("a", [Span("a", "queue", 0.0, 1.0, "wait")], slo=5.0)
    assert lane.ttft is None
    assert lane.met is False


def test_slo_is_met_late_or_absent() -> None:
    assert _lane("urgent", _preempting(), slo=0.5).met is True
    assert _lane("urgent", _fcfs(), slo=0.5).met is False
    assert _lane("urgent", _fcfs()).met is None


def test_a_lane_of_marks_alone_is_kept() -> None:
    only = lanes([], [Mark("a", "arrives", 3.0, "arrival"), Mark("a", "cancelled", 4.0, "end")])
    assert [(lane.name, lane.arrival, lane.ttft) for lane in only] == [("a", 0.0, None)]


def test_touching_segments_are_one_interval() -> None:
    assert _lane("long", _fcfs()).running(gap=0.0) == [(0.0, 1.0)]


def test_segments_further_apart_than_the_gap_are_two() -> None:
    spans = [Span("a", "x", 0.0, 1.0, "segment"), Span("a", "y", 1.5, 2.0, "segment")]
    assert _lane("a", spans).running(gap=0.4) == [(0.0, 1.0), (1.5, 2.0)]
    assert _lane("a", spans).running(gap=0.5) == [(0.0, 2.0)]


def test_a_preemption_is_never_merged_away() -> None:
    assert len(_lane("long", _preempting()).running(gap=10.0)) == 2


def test_trace_has_one_named_thread_per_lane_and_microseconds() -> None:
    events = chrome_events(_fcfs(), [Mark("urgent", "arrives", 100.2, "arrival")], process="fcfs", pid=4)
    named = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    assert list(named) == ["long", "urgent"]
    assert len(set(named.values())) == 2
    assert {e["pid"] for e in events} == {4}
    second = next(e for e in events if e["name"] == "layers.1")
    assert (second["ph"], second["cat"], second["tid"]) == ("X", "segment", named["long"])
    assert (second["ts"], second["dur"]) == (pytest.approx(5e5), pytest.approx(5e5))
    instant = next(e for e in events if e["ph"] == "i")
    assert (instant["name"], instant["tid"], instant["ts"]) == (
        "arrives",
        named["urgent"],
        pytest.approx(2e5),
    )


def test_trace_file_has_a_process_per_group(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    write_chrome_trace(path, {"fcfs": _fcfs(), "s-edf": _preempting()})
    events = json.loads(path.read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert list(processes.values()) == ["fcfs", "s-edf"]
    complete = [e for e in events if e["ph"] == "X"]
    assert [processes[e["pid"]] for e in complete] == ["fcfs"] * 4 + ["s-edf"] * 5
    assert min(e["ts"] for e in complete if processes[e["pid"]] == "s-edf") == 0.0


def test_trace_file_of_plain_lists_is_one_process(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    write_chrome_trace(path, _fcfs(), [Mark("long", "ends", 101.0, "end")])
    events = json.loads(path.read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {1}
    assert [e["cat"] for e in events if e["ph"] == "i"] == ["end"]


def test_marks_of_an_unknown_group_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no spans"):
        write_chrome_trace(tmp_path / "t.json", {"fcfs": _fcfs()}, {"edf": [Mark("a", "x", 0.0, "end")]})


@pytest.mark.parametrize("spans", [[], [Span("a", "x", 1.0, 1.0, "segment")]])
def test_nothing_to_draw_is_an_error(tmp_path: Path, spans: list[Span]) -> None:
    with pytest.raises(InvalidInputError, match="nothing to draw"):
        draw_timeline(tmp_path / "t.png", {"fcfs": spans})


def _share(path: Path, color: tuple[int, int, int]) -> float:
    """Part of the picture's pixels that have exactly ``color``."""
    from matplotlib.image import imread

    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    return float((pixels == color).all(axis=-1).mean())


@pytest.mark.slow  # imports matplotlib
def test_picture_shows_who_is_late_in_colour(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    slos = {"urgent": 0.5, "long": 3.0}
    draw_timeline(path, {"fcfs": _fcfs()}, slos)
    assert _share(path, BLUE) > 0.05  # the long one, in time
    assert _share(path, ORANGE) > 0.002  # the urgent one, late
    draw_timeline(path, {"s-edf": _preempting()}, slos)
    assert _share(path, BLUE) > 0.05
    assert _share(path, ORANGE) == 0.0
    draw_timeline(path, {"s-edf": _preempting()})
    assert _share(path, BLUE) == 0.0
    assert _share(path, GREY) > 0.05


@pytest.mark.slow
def test_picture_grows_by_a_lane_and_by_a_panel(tmp_path: Path) -> None:
    from matplotlib.image import imread

    def height(groups: dict[str, list[Span]]) -> int:
        draw_timeline(tmp_path / "t.png", groups, dpi=50)
        return int(imread(tmp_path / "t.png").shape[0])

    one = height({"a": _fcfs()[:2]})
    assert one < height({"a": _fcfs()}) < height({"a": _fcfs(), "b": _preempting()})

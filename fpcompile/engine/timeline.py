"""What ran when: the trace of an engine as JSON for Perfetto and as a picture.

Words
    *lane*   one request; every span and mark belongs to one.
    *span*   an interval of a lane: it runs (``segment``, ``tile``), waits for its first launch (``wait``),
             was stopped and waits to go on (``preempted``), or moves to or from the host (``copy``).
    *mark*   a moment of a lane: arrival, first token, preemption, end.
    *group*  one recording, usually one policy; groups are drawn as panels over one time axis.

Typical use
    ``write_chrome_trace("timeline.json", {"fcfs": spans_a, "s-edf": spans_b})``
    ``draw_timeline("timeline.png", {"fcfs": spans_a, "s-edf": spans_b}, slos={"urgent 1": 0.25})``

Invariants
    All times are seconds of one clock per group; each group is shifted so that its first moment is 0.
    A lane's *arrival* is its ``arrival`` mark, else its first span; its *first token* is its ``first_token``
    mark, else the end of its last running span (a prefill alone). The difference is the TTFT that is shown.

The drawing uses a Figure of its own and no ``pyplot``: it needs no display and leaves no global state.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fpcompile.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SpanKind = Literal["segment", "tile", "decode", "wait", "preempted", "copy"]
MarkKind = Literal["arrival", "first_token", "preempt", "end"]

_RUNNING = frozenset[SpanKind]({"segment", "tile"})
_MET, _MISSED, _FREE = "#2b6cb0", "#d9622b", "#64748b"
_DECODE = "#0f766e"
_COPY, _LATE = "#8b5cf6", "#b91c1c"
_INK, _MUTED, _HATCH, _RULE, _PALE = "#1f2937", "#6b7280", "#a3adba", "#e5e7eb", "#eef1f5"
_FIGURES = 0.13
"""Room for a lane's figures behind the last bar, as a part of the time axis."""
_RUNS: dict[bool | None, tuple[str, str]] = {
    True: ("runs, in time", _MET),
    False: ("runs, late", _MISSED),
    None: ("runs, no deadline", _FREE),
}
_LEGEND = (
    "arrives",
    "waits",
    *(label for label, _ in _RUNS.values()),
    "decodes",
    "is preempted",
    "paused",
    "copied",
    "deadline",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """An interval of one lane, in seconds."""

    lane: str
    name: str
    start: float
    end: float
    kind: SpanKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(SpanKind):
            raise UnknownNameError("span kind", self.kind, known=get_args(SpanKind))
        if not (math.isfinite(self.start) and math.isfinite(self.end) and self.start <= self.end):
            raise InvalidInputError(
                f"span {self.name!r} of lane {self.lane!r} is no interval",
                expected="finite start <= end, in seconds",
                got=f"start {self.start}, end {self.end}",
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """A moment of one lane, in seconds."""

    lane: str
    name: str
    time: float
    kind: MarkKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(MarkKind):
            raise UnknownNameError("mark kind", self.kind, known=get_args(MarkKind))
        if not math.isfinite(self.time):
            raise InvalidInputError(
                f"mark {self.name!r} of lane {self.lane!r} has no time",
                expected="a number",
                got=str(self.time),
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Lane:
    """One request of one group, as drawn; times in seconds after the group's first moment."""

    name: str
    spans: tuple[Span, ...]
    arrival: float
    first_token: float | None
    slo: float | None

    @property
    def ttft(self) -> float | None:
        """Time to first token in seconds; None when the request never ran."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def met(self) -> bool | None:
        """Whether the TTFT SLO was met; None when the lane has none."""
        return None if self.slo is None else self.ttft is not None and self.ttft <= self.slo

    def running(self, gap: float) -> list[tuple[float, float]]:
        """Intervals in which it ran; those at most ``gap`` seconds apart are one, if it was not preempted."""
        merged: list[tuple[float, float]] = []
        stopped = False
        for span in self.spans:
            if span.kind in _RUNNING:
                if merged and not stopped and span.start - merged[-1][1] <= gap:
                    merged[-1] = (merged[-1][0], max(merged[-1][1], span.end))
                else:
                    merged.append((span.start, span.end))
                stopped = False
            elif span.kind == "preempted":
                stopped = True
        return merged

    def intervals(self, kind: SpanKind) -> list[tuple[float, float]]:
        """The spans of one kind as (start, end)."""
        return [(span.start, span.end) for span in self.spans if span.kind == kind]


def lanes(
    spans: Iterable[Span], marks: Iterable[Mark] = (), slos: Mapping[str, float] | None = None
) -> list[Lane]:
    """The lanes of one group, in order of arrival, shifted so that the group's first moment is 0."""
    spans, marks = list(spans), list(marks)
    origin = _origin(spans, marks)
    own: dict[str, list[Span]] = {name: [] for name in [m.lane for m in marks] + [s.lane for s in spans]}
    times: dict[str, dict[str, float]] = {name: {} for name in own}
    for span in spans:
        shifted = dataclasses.replace(span, start=span.start - origin, end=span.end - origin)
        own[span.lane].append(shifted)
    for mark in marks:
        times[mark.lane].setdefault(mark.kind, mark.time - origin)
    out = [_lane(name, own[name], times[name], (slos or {}).get(name)) for name in own]
    return sorted(out, key=lambda lane: lane.arrival)


def _origin(spans: Sequence[Span], marks: Sequence[Mark]) -> float:
    return min([span.start for span in spans] + [mark.time for mark in marks], default=0.0)


def _lane(name: str, spans: list[Span], times: Mapping[str, float], slo: float | None) -> Lane:
    spans.sort(key=lambda span: (span.start, span.end))
    first_moment = min([span.start for span in spans[:1]] + list(times.values()))
    ran_until = max((span.end for span in spans if span.kind in _RUNNING), default=None)
    return Lane(
        name=name,
        spans=tuple(spans),
        arrival=times.get("arrival", first_moment),
        first_token=times.get("first_token", ran_until),
        slo=slo,
    )


def chrome_events(
    spans: Iterable[Span], marks: Iterable[Mark] = (), *, process: str = "fpcompile", pid: int = 1
) -> list[dict[str, Any]]:
    """One group as Chrome's trace events, times in microseconds: a thread per lane, in order of arrival.

    Source: "Trace Event Format", Google, 2016; read by Perfetto.
    """
    spans, marks = list(spans), list(marks)
    origin = _origin(spans, marks)
    tids = {lane.name: tid for tid, lane in enumerate(lanes(spans, marks), start=1)}
    events = [_event("M", "process_name", pid, 0, args={"name": process})]
    for name, tid in tids.items():
        events.append(_event("M", "thread_name", pid, tid, args={"name": name}))
        events.append(_event("M", "thread_sort_index", pid, tid, args={"sort_index": tid}))
    for s in spans:
        times = {"ts": (s.start - origin) * 1e6, "dur": (s.end - s.start) * 1e6}
        events.append(_event("X", s.name, pid, tids[s.lane], cat=s.kind, **times))
    for m in marks:
        events.append(_event("i", m.name, pid, tids[m.lane], cat=m.kind, ts=(m.time - origin) * 1e6, s="t"))
    return events


def _event(phase: str, name: str, pid: int, tid: int, **more: object) -> dict[str, Any]:
    return {"ph": phase, "name": name, "pid": pid, "tid": tid, **more}


def write_chrome_trace(
    path: str | Path,
    spans: Sequence[Span] | Mapping[str, Sequence[Span]],
    marks: Sequence[Mark] | Mapping[str, Sequence[Mark]] = (),
) -> None:
    """Write a JSON file that Perfetto (ui.perfetto.dev) and chrome://tracing open: one thread per request.

    Mappings hold one group per key, each a process of the trace; a plain sequence is the group "fpcompile".
    """
    span_groups: Mapping[str, Sequence[Span]] = spans if isinstance(spans, Mapping) else {"fpcompile": spans}
    mark_groups: Mapping[str, Sequence[Mark]] = marks if isinstance(marks, Mapping) else {"fpcompile": marks}
    if unknown := [name for name, group in mark_groups.items() if group and name not in span_groups]:
        raise InvalidInputError(
            "marks of a group that has no spans", expected=f"groups {list(span_groups)}", got=str(unknown)
        )
    events: list[dict[str, Any]] = []
    for pid, (name, group) in enumerate(span_groups.items(), start=1):
        events += chrome_events(group, mark_groups.get(name, ()), process=name, pid=pid)
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def draw_timeline(
    path: str | Path,
    groups: Mapping[str, Sequence[Span]],
    slos: Mapping[str, float] | None = None,
    *,
    marks: Mapping[str, Sequence[Mark]] | None = None,
    dpi: int = 160,
) -> None:
    """Write a PNG: a panel per group, a lane per request, over one time axis.

    ``slos`` gives the TTFT SLO in seconds by lane; lanes without one are grey. Bars are the intervals in
    which a lane ran, a thin line is waiting, a triangle a preemption and hatching the pause that follows, a
    tick the deadline (left out when it lies beyond the axis); the figures are TTFT / SLO.
    Raises :class:`InvalidInputError` when there is nothing to draw.
    """
    panels = {name: lanes(spans, (marks or {}).get(name, ()), slos) for name, spans in groups.items()}
    end = max((span.end for panel in panels.values() for lane in panel for span in lane.spans), default=0.0)
    if end <= 0:
        raise InvalidInputError("there is nothing to draw", expected="a span longer than 0 s", got="none")
    rows = list(dict.fromkeys(lane.name for panel in panels.values() for lane in panel))
    for panel in panels.values():
        panel.sort(key=lambda lane: rows.index(lane.name))  # one order, however close two arrivals are

    import matplotlib
    from matplotlib.figure import Figure

    sizes = [max(len(panel), 1) for panel in panels.values()]
    gap, top, bottom, lane = 0.5, 0.4, 0.85, 0.33  # inches
    height = lane * sum(sizes) + gap * (len(sizes) - 1) + top + bottom
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "hatch.linewidth": 0.7}):
        figure = Figure(figsize=(10.0, height))
        axes = figure.subplots(len(sizes), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
        for ax, (name, panel) in zip(axes, panels.items(), strict=True):
            _draw_panel(ax, name, panel, end)
        _draw_time_axis(axes[-1], end)
        _draw_legend(figure)
        space = gap * len(sizes) / (lane * sum(sizes))
        figure.subplots_adjust(0.13, bottom / height, 0.985, 1 - top / height, hspace=space)
        figure.savefig(path, dpi=dpi, facecolor="white")


def _draw_panel(ax: Axes, name: str, panel: list[Lane], end: float) -> None:
    judged = [lane.met for lane in panel if lane.met is not None]
    ax.set_title(name, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=7)
    if judged:
        met = f"{sum(judged)} of {len(judged)} in time"
        ax.set_title(met, loc="right", fontsize=9, color=_MET if all(judged) else _MISSED, pad=7)
    for row, lane in enumerate(panel):
        _draw_lane(ax, row, lane, end)
    ax.set_ylim(len(panel) - 0.5, -0.5)
    ax.set_yticks(range(len(panel)), [lane.name for lane in panel], color=_INK)
    ax.tick_params(length=0, labelbottom=False)
    ax.grid(axis="x", color=_RULE, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[:].set_visible(False)


def _draw_lane(ax: Axes, row: int, lane: Lane, end: float) -> None:
    label, color = _RUNS[lane.met]
    paused = lane.intervals("preempted")
    running = lane.running(gap=end / 2000)  # half a pixel
    if waiting := lane.intervals("wait"):
        ax.hlines(
            [row] * len(waiting), *zip(*waiting, strict=True), color=_MUTED, linewidth=1.2, label="waits"
        )
    _bars(ax, row, 0.44, paused, label="paused", facecolor=_PALE, edgecolor=_HATCH, hatch="/////")
    _bars(ax, row, 0.24, lane.intervals("copy"), label="copied", facecolor=_COPY)
    _bars(ax, row, 0.64, running, label=label, facecolor=color)
    _bars(ax, row, 0.34, lane.intervals("decode"), label="decodes", facecolor=_DECODE)
    _dots(ax, row, [lane.arrival], label="arrives", marker="o", markersize=4, markeredgewidth=0)
    preempted = [start for start, _ in paused]
    _dots(ax, row - 0.4, preempted, label="is preempted", marker="v", markersize=5, markeredgewidth=0)
    text_at = max((span.end for span in lane.spans), default=lane.arrival)
    if lane.slo is not None and (deadline := lane.arrival + lane.slo) <= end:
        _dots(
            ax, row, [deadline], label="deadline", color=_LATE, marker="|", markersize=21, markeredgewidth=1.8
        )
        if text_at <= deadline <= text_at + _FIGURES * end:
            text_at = deadline
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    ax.text(text_at + 0.009 * end, row, _verdict(lane), va="center", fontsize=8, color=_MUTED, bbox=box)


def _bars(ax: Axes, row: float, height: float, intervals: list[tuple[float, float]], **style: Any) -> None:
    if intervals:
        widths = [(start, stop - start) for start, stop in intervals]
        ax.broken_barh(widths, (row - height / 2, height), linewidth=0, zorder=3, **style)


def _dots(ax: Axes, row: float, times: list[float], *, color: str = _INK, **style: Any) -> None:
    if times:
        ax.plot(times, [row] * len(times), linestyle="", color=color, zorder=5, **style)


def _verdict(lane: Lane) -> str:
    """``88 / 250 ms ✓``: the lane's TTFT and its SLO."""
    if lane.ttft is None:
        return "no first token"
    scale, unit = (1e3, "ms") if (lane.slo or lane.ttft) < 1 else (1.0, "s")
    ttft = f"{lane.ttft * scale:.3g}" if lane.ttft * scale < 1000 else f"{lane.ttft * scale:.0f}"
    if lane.slo is None:
        return f"{ttft} {unit}"
    return f"{ttft} / {lane.slo * scale:g} {unit} {'✓' if lane.met else '✗'}"


def _draw_time_axis(ax: Axes, end: float) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    scale, unit = (1e3, "ms") if end < 2 else (1.0, "s")
    ax.set_xlim(-0.005 * end, (1 + _FIGURES) * end)
    ax.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * scale:g}"))
    ax.tick_params(axis="x", labelbottom=True, labelcolor=_MUTED)
    ax.set_xlabel(f"time since the first arrival ({unit})", color=_MUTED)


def _draw_legend(figure: Figure) -> None:
    """One line under the panels, with the signs that occur in them."""
    signs: dict[str, Any] = {}
    for ax in figure.axes:
        signs.update({label: sign for sign, label in zip(*ax.get_legend_handles_labels(), strict=True)})
    labels = sorted(signs, key=_LEGEND.index)
    legend = figure.legend(
        [signs[label] for label in labels],
        labels,
        loc="lower center",
        ncols=len(labels),
        frameon=False,
        fontsize=8,
        labelcolor=_MUTED,
        handlelength=1.4,
    )
    for line in legend.get_lines():
        line.set_markersize(min(line.get_markersize(), 9))

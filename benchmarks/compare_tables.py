"""The Markdown of a comparison, out of its JSON report; and its place in a page of the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["BEGIN", "END", "markdown_of", "put_into"]

BEGIN = "<!-- figures: written by benchmarks/compare_servers.py -->"
END = "<!-- end of the figures -->"

_TITLES = {
    "first": "One token per request: TTFT",
    "tokens": "16 to 64 tokens per request: TTFT and time between tokens",
}


def markdown_of(report: Mapping[str, Any]) -> str:
    """Tables of the goodputs, of the cells, of the settings that were tried; versions and commands."""
    model, machine = report["model"], report["machine"]
    lines = [
        f"Measured {machine['time'][:10]} on {machine['cpu_count']} cores of {machine['device_name']}, "
        f"load average {report['load_average'][0]:.1f} before and {report['load_average'][1]:.1f} behind, in "
        f"{report['minutes']:.0f} minutes: {report['requests']} requests per cell from {report['trace']}, "
        f"prompts {report['length_scale']:g} times as long; Qwen3 with {model['num_hidden_layers']} layers "
        f"of width {model['hidden_size']}, {model['dtype']}; load 1 is {report['capacity']:.1f} requests/s.",
        "",
        "SLOs (first token / mean between tokens): "
        + ", ".join(
            f"{klass} {1e3 * slo['ttft']:.0f} / {1e3 * slo['tbt']:.0f} ms"
            for klass, slo in report["slos"].items()
        )
        + ".",
    ]
    if report["note"]:
        lines += ["", f"**{report['note']}**"]
    for mode, title in _TITLES.items():
        lines += ["", f"### {title}", "", *_goodputs(report, mode), "", *_cells(report, mode)]
    lines += ["", "### Mixed throughput", "", *_backlogs(report), "", "### Settings that were tried", ""]
    lines += [*_settings(report), "", "### Versions and commands", "", *_commands(report)]
    return "\n".join(lines) + "\n"


def put_into(page: Path, markdown: str) -> None:
    """Replace what stands between :data:`BEGIN` and :data:`END`. Raises ValueError where they are missing."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the marks {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{markdown}\n{END}{after}", encoding="utf-8")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---|---" + "|---:" * (len(head) - 2) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _goodputs(report: Mapping[str, Any], mode: str) -> list[str]:
    rows = []
    for peer, entry in report["peers"].items():
        done = entry.get(mode)
        if done is None:
            rows.append([_title(entry, peer), f"not measured: {entry.get('failure', 'no time')}", "", ""])
            continue
        rows.append(
            [
                _title(entry, peer), "; then: ".join(filter(None, (done["setting"], entry.get("failure")))),
                _rate(done, "goodput", report), _rate(done, "paper_goodput", report),
            ]
        )  # fmt: skip
    return _table(("server", "best setting", "goodput (req/s)", "paper goodput"), rows)


def _rate(done: Mapping[str, Any], name: str, report: Mapping[str, Any]) -> str:
    rate, narrowed = done[name], done[f"{name}_narrowed"]
    if not rate:
        return f"< {report['rates'][0]:.2f}" if narrowed else "not found"
    return f"{'' if narrowed else '≥ '}{rate:.2f}"


def _cells(report: Mapping[str, Any], mode: str) -> list[str]:
    rows = []
    for peer, entry in report["peers"].items():
        for cell in sorted((entry.get(mode) or {}).get("cells", ()), key=lambda cell: cell["rate"]):
            rows.append(
                [
                    _title(entry, peer), f"{cell['load']:.1f}", f"{100 * cell['worst']:.0f} %",
                    f"{100 * cell['overall']:.0f} %", f"{100 * cell['every_token']:.0f} %",
                    _ms(cell["ttft_p50"]), _ms(cell["ttft_p99"]),
                    _ms(cell["tbt_mean"]), _ms(cell["gap_p99"]),
                    str(sum(cell["errors"].values())),
                ]
            )  # fmt: skip
    head = (
        "server", "load", "worst class in time", "all in time", "with every token in time",
        "TTFT p50 (ms)", "p99", "mean between tokens",
        "p99 gap", "unfinished or failed",
    )  # fmt: skip
    return _table(head, rows)


def _backlogs(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for peer, entry in report["peers"].items():
        done = entry.get("backlog")
        if done is not None:
            rows.append(
                [
                    _title(entry, peer), done["setting"], f"{done['complete']} of {done['requests']}",
                    f"{done['seconds']:.1f}", f"{done['prompt_tokens_per_s']:.0f}",
                    f"{done['output_tokens_per_s']:.0f}",
                ]
            )  # fmt: skip
    head = ("server", "setting", "requests", "seconds", "prompt tokens/s", "output tokens/s")
    return ["All requests at once, 16 to 64 tokens each, until the last has ended.", "", *_table(head, rows)]


def _settings(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for peer, entry in report["peers"].items():
        for name, cells in entry["screened"].items():
            if "failure" in cells:
                rows.append([_title(entry, peer), name, cells["failure"].splitlines()[0], "", ""])
                continue
            marks = [
                f"{100 * cells[mode]['worst']:.0f} / {100 * cells[mode]['overall']:.0f} %" for mode in _TITLES
            ]
            rows.append([_title(entry, peer), name, *marks, f"{cells['start_s']:.0f} s"])
        rows += [[_title(entry, peer), name, "not tried", "", ""] for name in entry["untried"]]
    head = ("server", "setting", "one token: worst class / all", "16 to 64 tokens", "start")
    return [
        f"One run each of {report['screening_requests']} requests at load {report['screening_load']:g}.", "",
        *_table(head, rows),
    ]  # fmt: skip


def _commands(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for peer, entry in report["peers"].items():
        versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
        lines += [f"- **{_title(entry, peer)}**: {versions}"]
        if entry["command"]:
            variables = " ".join(f"{name}={value}" for name, value in entry["environment"].items())
            lines += ["", "  ```bash", f"  {variables} {entry['command']}", "  ```", ""]
            for name, modes in _best_of(entry).items():
                flags = " ".join(entry["flags"].get(name, ())) or "(no more flags)"
                lines += [f"  {' and '.join(modes)}: `{flags}`", ""]
    same = {None: "was not compared", True: "is the same", False: "differs"}[report["same_text"]]
    return [*lines, "", f"The text that the servers make of one prompt (8 tokens, temperature 0) {same}."]


def _best_of(entry: Mapping[str, Any]) -> dict[str, list[str]]:
    """Setting -> what it was best at."""
    found: dict[str, list[str]] = {}
    for mode, title in _TITLES.items():
        if entry.get(mode) is not None:
            found.setdefault(entry[mode]["setting"], []).append(title.partition(" per")[0])
    return found


def _title(entry: Mapping[str, Any], peer: str) -> str:
    return str(entry.get("title", peer))


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.0f}"

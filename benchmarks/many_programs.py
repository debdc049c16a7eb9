"""An LLM, an embedder and a cross-encoder on one device, under one bound on blocking time.

    python benchmarks/many_programs.py                              prefills of 8192 tokens, bound 20 ms
    python benchmarks/many_programs.py --tokens 2048 --prefills 1 --max-blocking-ms 50

One engine holds all three. While the LLM prefills long prompts, short requests of three kinds come, each an
exponential time after the one before was answered: a chat prompt, a batch of texts to embed, a pair to score.
*Blocking time* is from the moment such a request is submitted to the moment the long prefill has given the
device up for it. Requests that come while the prefill is paused, or has ended, wait for nobody and are only
counted.

Target: p99 within the bound, for each kind. The encoders are random BERT models of ``--encoder-layers``
layers, compiled by the generic route. Exit code 1 when a result has not the bits of the unmodified encoder,
or of the uninterrupted run of the LLM.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any directory

from benchmarks import common
from fpcompile import Engine, segment
from fpcompile.cli.bits import compare_outputs
from fpcompile.cli.guard import quiet, remedied
from fpcompile.cli.interleave import percentile
from fpcompile.cli.load import forward_arguments, random_ids

KINDS = ("chat", "embed", "rerank")
VARIETY = 4


def arguments() -> argparse.Namespace:
    """The command line."""
    made = common.parser("Blocking times of three programs on one engine.")
    made.add_argument("--tokens", type=int, default=8192, help="of the long prompts")
    made.add_argument("--prefills", type=int, default=3, help="long prompts, one after the other")
    made.add_argument("--requests", type=int, default=150, help="mean number of short requests per prefill")
    made.add_argument("--max-blocking-ms", type=float, default=20.0, help="the bound")
    made.add_argument("--short", type=int, default=64, help="tokens of a chat prompt, and of a text")
    made.add_argument("--batch", type=int, default=4, help="texts of an embedding request")
    made.add_argument("--encoder-layers", type=int, default=4)
    made.add_argument("--encoder-width", type=int, default=256)
    return made.parse_args()


@dataclass
class Kind:
    """One kind of short request: its inputs, what they give, and the blocking times seen."""

    inputs: list[dict[str, Any]]
    expected: list[Any]
    blocked: list[float] = field(default_factory=list)
    requests: int = 0
    different: int = 0


def encoder(kind: type[PreTrainedModel], options: argparse.Namespace, like: PreTrainedModel) -> Any:
    """A random encoder on the LLM's device and of its dtype."""
    config = BertConfig(
        vocab_size=1000,
        hidden_size=options.encoder_width,
        num_hidden_layers=options.encoder_layers,
        num_attention_heads=4,
        intermediate_size=4 * options.encoder_width,
    )
    config.num_labels = 1
    torch.manual_seed(options.seed)
    model: Any = kind(config)
    return model.to(device=like.device, dtype=like.dtype).train(False)


def texts(model: Any, batch: int, length: int, seed: int) -> dict[str, Any]:
    """Token ids of texts of one length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, (batch, length), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def kinds(programs: dict[str, Any], models: dict[str, Any], options: argparse.Namespace) -> dict[str, Kind]:
    """Inputs of each kind, and the bits that they must give."""
    made: dict[str, Kind] = {}
    for name in KINDS:
        inputs: list[dict[str, Any]] = []
        for seed in range(VARIETY):
            if name == "chat":
                ids = random_ids(models[name], options.short, seed=seed)
                inputs.append({"input_ids": ids, **forward_arguments(models[name])})
            else:
                batch = options.batch if name == "embed" else 1
                inputs.append(texts(models[name], batch, options.short, seed))
        whole = programs[name] if name == "chat" else models[name]
        made[name] = Kind(inputs, [whole(**each) for each in inputs])
    return made


def differs(kind: str, got: Any, expected: Any) -> bool:
    """Whether any bit of the output is another one."""
    if kind == "chat":
        return not compare_outputs(got, expected).equal
    return not all(torch.equal(got[name], expected[name]) for name in expected)


def serve(
    engine: Engine, models: dict[str, Any], found: dict[str, Kind], options: argparse.Namespace
) -> None:
    """Long prefills one after the other, with short requests in between."""
    draw = random.Random(options.seed)
    seconds = 0.0
    for number in range(options.prefills + 1):
        ids = random_ids(models["chat"], options.tokens, seed=100 + number)
        handle = engine.submit(ids, program="chat", ttft_slo=36000.0, **forward_arguments(models["chat"]))
        begun = time.perf_counter()
        if number == 0:  # alone: how long it takes
            handle.result()
            seconds = time.perf_counter() - begun
            continue
        short: list[tuple[str, int, Any]] = []
        while not handle.done():
            time.sleep(draw.expovariate(options.requests / seconds))
            name, which = draw.choice(KINDS), draw.randrange(VARIETY)
            inputs = dict(found[name].inputs[which])
            ids = inputs.pop("input_ids")
            short.append((name, which, engine.submit(ids, program=name, ttft_slo=60.0, **inputs)))
            short[-1][2].result()
        collect(engine, handle, short, found)


def collect(engine: Engine, long: Any, short: list[tuple[str, int, Any]], found: dict[str, Kind]) -> None:
    """Blocking times out of the timeline: when the long one gave way to a request that came while it ran."""
    spans = engine.timeline().spans
    paused = [(s.start, s.end) for s in spans if s.lane == long.request_id and s.kind == "preempted"]
    running = long.metrics.started
    gave_way: dict[str, tuple[float, float]] = {}
    for name, (start, end) in zip(long.metrics.preempted_by, paused, strict=True):
        gave_way[name] = running, start
        running = end
    for name, which, handle in short:
        kind = found[name]
        kind.requests += 1
        kind.different += differs(name, handle.result(), kind.expected[which])
        since, until = gave_way.get(handle.request_id, (math.inf, math.inf))
        if handle.metrics.arrival >= since:
            kind.blocked.append(until - handle.metrics.arrival)


def summary(found: dict[str, Kind], bound: float) -> list[dict[str, Any]]:
    """A row for each kind."""
    return [
        {
            "kind": name,
            "requests": kind.requests,
            "blocked": len(kind.blocked),
            "blocking_seconds": {
                "p50": percentile(kind.blocked, 50),
                "p99": percentile(kind.blocked, 99),
                "max": max(kind.blocked),
            },
            "within": percentile(kind.blocked, 99) <= bound,
            "bits_equal": not kind.different,
            "blocking": kind.blocked,
        }
        for name, kind in found.items()
        if kind.blocked
    ]


def plot(rows: list[dict[str, Any]], title: str, options: argparse.Namespace) -> None:
    """The distribution of the blocking times, a curve for each kind."""
    figure, ax = common.canvas(
        f"Blocking time of three programs while one prefills {options.tokens} tokens",
        title,
        x="blocking time (ms)",
        y="requests answered (%)",
    )
    for row, colour in zip(rows, common.COLOURS, strict=False):
        ordered = sorted(1e3 * value for value in row["blocking"])
        share = [100 * (index + 1) / len(ordered) for index in range(len(ordered))]
        ax.step(ordered, share, where="post", color=colour, linewidth=2, label=row["kind"])
    ax.axvline(options.max_blocking_ms, color="#b91c1c", linewidth=0.8, linestyle="--")
    ax.legend(frameon=False, fontsize=8, labelcolor=common.MUTED, loc="lower right")
    common.save_plot(figure, options.output / "many_programs.png")


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    with quiet(), remedied(), torch.no_grad():
        common.warn_if_busy()
        model, title = common.load(options)
        models = {
            "chat": model,
            "embed": encoder(BertModel, options, model),
            "rerank": encoder(BertForSequenceClassification, options, model),
        }
        budget = options.max_blocking_ms
        programs = {name: segment(each, max_blocking_ms=budget) for name, each in models.items()}
        found = kinds(programs, models, options)
        with Engine(programs, policy="s-edf", max_blocking_ms=budget) as engine:
            serve(engine, models, found, options)
        rows = summary(found, budget / 1e3)
        print(f"{title}, {options.tokens} tokens, bound {budget:g} ms")
        head = ("kind", "requests", "blocked", "p50", "p99", "max", "bits")
        cells = [
            (
                row["kind"],
                row["requests"],
                row["blocked"],
                *(f"{row['blocking_seconds'][name] * 1e3:.2f} ms" for name in ("p50", "p99", "max")),
                "equal" if row["bits_equal"] else "DIFFER",
            )
            for row in rows
        ]
        common.print_table(head, cells)
        for row in rows:
            if not row["within"]:
                p99 = row["blocking_seconds"]["p99"] * 1e3
                common.report_missed(f"{row['kind']}: blocking p99 is {p99:.2f} ms, not {budget:g}")
        for name in set(KINDS) - {row["kind"] for row in rows}:
            print(f"no request of kind {name} was blocked: use more --requests")
        plot(rows, title, options)
        content = {"benchmark": "many_programs", "model": title, "tokens": options.tokens, "bound_ms": budget}
        machine = common.machine(model.device)
        common.write_json(
            options.output / "many_programs.json", {**content, "machine": machine, "rows": rows}
        )
        common.fail_if_different([name for name, kind in found.items() if kind.different])  # blocked or not


if __name__ == "__main__":
    main()

"""Seconds of a decode step of many sequences, beside what its matrix products alone take.

    python benchmarks/decode.py                              1, 8, 32 and 128 sequences of 96 to 160 tokens
    python benchmarks/decode.py --contexts 1000 1500 --weights shared

Candidates, in one interleaved run, in random order inside each round:

    abreast   fpcompile's step: one attention call of a layer for all sequences of similar length
    apart     the same with one call for each sequence
    control   ``abreast`` a second time (A/A)
    model     the unmodified model on a padded batch, ``model(input_ids [B, 1], past_key_values)``, its cache
              cropped again each time
    products  the floor: the linear layers alone, in the order of the model, on as many rows

The steps include what chooses the token (argmax). Ratios are taken per round. The lengths of the sequences
are spread evenly over ``--contexts``; the model's padded batch has the longest one.

Exit code 1 when a step's logits differ from the model's by more than rounding allows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any directory

from benchmarks import common
from fpcompile import segment
from fpcompile.cli.guard import quiet, remedied
from fpcompile.cli.interleave import interleave, ratio
from fpcompile.cli.load import random_ids
from fpcompile.executor.decode import PackedDecoder
from fpcompile.executor.packed import PackedProgram
from fpcompile.passes.prepack import LINEAR, can_prepack, pack

ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.05, torch.float32: 1e-4}


def arguments() -> argparse.Namespace:
    """The command line."""
    made = common.parser("Decode steps of many sequences against the matrix products alone.")
    made.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32, 128])
    made.add_argument(
        "--contexts", type=int, nargs=2, default=[96, 160], help="shortest and longest sequence"
    )
    made.add_argument("--repeats", type=int, default=15, help="rounds")
    made.add_argument("--seconds", type=float, default=40.0, help="begin no round later, per number")
    made.add_argument("--weights", default="packed", help="shared, or packed (CPU, bf16)")
    made.add_argument("--backend", default="eager", help="eager or inductor")
    return made.parse_args()


def lengths_of(count: int, contexts: Sequence[int]) -> list[int]:
    """Spread evenly."""
    low, high = contexts
    return [low + (high - low) * i // max(count - 1, 1) for i in range(count)]


def opened(decoder: PackedDecoder, prompts: Sequence[Tensor]) -> list[Any]:
    """The sequences behind their prompts."""
    sequences = []
    for ids in prompts:
        begun = decoder.begin(ids)
        while not begun.run.done:
            begun.run.step()
        sequences.append(decoder.open(begun, begun.run.result())[0])
    return sequences


def stepper(decoder: PackedDecoder, sequences: Sequence[Any], tokens: Sequence[int]) -> Callable[[], Tensor]:
    """One step, undone behind it, so that all rounds are alike; returns the logits."""

    def step() -> Tensor:
        made = decoder.step(sequences, tokens)
        while not made.run.done:
            made.run.step()
        logits = made.logits()
        logits.float().argmax(dim=-1).tolist()
        made.undo()
        return logits

    return step


def padded(model: Any, count: int, length: int, tokens: Sequence[int], seed: int) -> Callable[[], Tensor]:
    """The model's own step over ``count`` sequences of one length."""
    ids = torch.cat([random_ids(model, length, seed=seed + i) for i in range(count)])
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    new = torch.tensor(tokens, device=model.device)[:, None]

    def step() -> Tensor:
        logits: Tensor = model(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1]
        logits.float().argmax(dim=-1).tolist()
        cache.crop(-1)
        return logits

    return step


def products(model: Any, count: int, packed: bool) -> Callable[[], None]:
    """Every linear layer of the model on ``count`` rows."""
    calls: list[Callable[[], Tensor]] = []
    inputs: dict[int, Tensor] = {}
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        width = module.in_features
        x = inputs.setdefault(width, torch.randn(1, count, width, device=model.device).to(model.dtype))
        weight, bias = module.weight, module.bias
        if packed and can_prepack(weight):
            kernel = pack(weight)
            calls.append(lambda x=x, w=kernel, b=bias: LINEAR(x, w, b, "none", [], ""))  # type: ignore[misc]
        else:
            calls.append(lambda x=x, w=weight, b=bias: nn.functional.linear(x, w, b))  # type: ignore[misc]

    def run() -> None:
        for call in calls:
            call()

    return run


def measure(model: Any, program: PackedProgram, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """One number of sequences: raw seconds, ratios, and how far the logits lie from the model's."""
    lengths = lengths_of(count, options.contexts)
    prompts = [random_ids(model, n, seed=options.seed + n) for n in lengths]
    tokens = random_ids(model, count, seed=options.seed)[0].tolist()
    both = [PackedDecoder(program), PackedDecoder(program, abreast=False)]
    steps = [stepper(decoder, opened(decoder, prompts), tokens) for decoder in both]
    rows = [steps[0](), steps[1]()]
    alone = []
    for ids, token in zip(prompts, tokens, strict=True):
        whole = torch.cat([ids, torch.tensor([[token]], device=ids.device)], dim=1)
        alone.append(model(input_ids=whole, logits_to_keep=1).logits[0, -1].float())
    expected = torch.stack(alone)
    differs = [float((got.float() - expected).abs().max() / expected.abs().max()) for got in rows]
    candidates = {
        "abreast": steps[0],
        "control": steps[0],
        "apart": steps[1],
        "model": padded(model, count, max(lengths), tokens, options.seed),
        "products": products(model, count, options.weights == "packed"),
    }
    seconds = interleave(
        candidates,
        rounds=options.repeats,
        warmup=2,
        budget=options.seconds,
        seed=options.seed,
        synchronize=common.synchronizer(model.device),
    )
    return {
        "tokens": count,
        "lengths": lengths,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "to_products": {name: common.spread(ratio(seconds, name, "products")) for name in seconds},
        "to_apart": {name: common.spread(ratio(seconds, name, "apart")) for name in seconds},
        "control": common.spread(ratio(seconds, "control", "abreast")),
        "relative_difference": dict(zip(("abreast", "apart"), differs, strict=True)),
        "seconds": seconds,
    }


def report(rows: Sequence[dict[str, Any]]) -> None:
    """The figures for people."""
    names = ("abreast", "apart", "model", "products")
    common.print_table(
        ("sequences", *names, "abreast / apart", "abreast / products", "A/A", "differs by"),
        [
            (
                row["tokens"],
                *(f"{row['median_seconds'][name] * 1e3:.1f} ms" for name in names),
                f"{row['to_apart']['abreast']['median']:.3f}",
                f"{row['to_products']['abreast']['median']:.3f}",
                f"{row['control']['median']:.3f}",
                f"{row['relative_difference']['abreast']:.2g}",
            )
            for row in rows
        ],
    )


def main() -> None:
    """Measure, and write the report."""
    options = arguments()
    with quiet(), remedied():
        model, title = common.load(options)
        common.warn_if_busy()
        program = segment(model, route="packed", weights=options.weights, backend=options.backend)
        assert isinstance(program, PackedProgram)
        print(title)
        with torch.no_grad():
            rows = [measure(model, program, count, options) for count in options.sequences]
    report(rows)
    figure, ax = common.canvas(
        "Time of a decode step / its matrix products alone",
        f"{title}; sequences of {options.contexts[0]} to {options.contexts[1]} tokens; bars: medians",
        x="sequences",
        y="ratio",
    )
    names = {
        "abreast": "attended abreast",
        "apart": "each by itself",
        "model": "unmodified model, padded",
    }
    common.plot_ratios(ax, rows, names, "products", 1.0)
    common.save_plot(figure, options.output / "decode.png")
    common.write_json(
        options.output / "decode.json",
        {
            "benchmark": "decode",
            "model": title,
            "weights": options.weights,
            "backend": options.backend,
            "contexts": options.contexts,
            "machine": common.machine(model.device),
            "rows": rows,
        },
    )
    limit = ROUNDING[model.dtype]
    common.fail_if_different(
        [
            f"{row['tokens']} sequences {name}"
            for row in rows
            for name, differs in row["relative_difference"].items()
            if not differs <= limit
        ]
    )


if __name__ == "__main__":
    main()

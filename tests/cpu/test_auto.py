"""``granularity="auto"``: fewest launches within the budget, then fewest live bytes; the model's bits."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch

import fpcompile
from fpcompile.errors import InvalidInputError, UnknownNameError
from fpcompile.executor import rates as measuring
from fpcompile.executor.rates import measured_rates
from fpcompile.ir import CONTEXT, ROWS, TOKENS, Cost, CutReason, Granularity, Plan, Refusal
from fpcompile.models.capture import capture
from fpcompile.models.zoo import sample_ids, tiny_model
from fpcompile.passes.auto import NO_BUDGET
from fpcompile.passes.design import Design, Rates, default_rates, value_at
from fpcompile.passes.pipeline import compile_packed
from fpcompile.passes.placement import place
from tests.cpu.support import differences, model_of, outcome, program_of, reference, relay, toy
from tests.cpu.test_cuts import ALIASING
from tests.pure.test_placement import every

RATES = default_rates("cpu", torch.float32)


def plan_of(seconds: float) -> Plan:
    """The plan of a tiny llama for a budget in seconds."""
    design = Design(seconds, RATES, tokens=256)
    return compile_packed(capture(model_of("llama")), Granularity.AUTO, design=design).plan


@pytest.mark.slow
def test_from_one_launch_to_one_for_each_operator() -> None:
    one, few, many = map(plan_of, (float("inf"), 1e-4, 1e-9))
    assert [s.reason for s in one.segments] == [CutReason.END]
    assert 1 < len(few.segments) < len(many.segments)
    assert {s.reason for s in few.segments[:-1]} <= {CutReason.BUDGET, CutReason.BEYOND_BUDGET}
    assert CutReason.BUDGET in {s.reason for s in few.segments}
    assert {s.reason for s in many.segments[:-1]} == {CutReason.BEYOND_BUDGET}
    reasons = {reason for s in few.segments for _, reason in s.refused}
    assert {Refusal.MORE_LAUNCHES, Refusal.NO_SMALLER} <= reasons
    assert all(len(s.refused) == sum(len(p.nodes) for p in s.parts) - 1 for s in few.segments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIASING)
def test_the_cuts_of_a_small_graph_are_the_best_of_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every legal set of cuts, on the pass's own prices of a toy with writes in place."""
    seen: list[tuple[list[int], list[int], list[bool], int]] = []

    def watched(seconds: list[int], held: list[int], legal: list[bool], budget: int) -> object:
        seen.append((seconds, held, legal, budget))
        return place(seconds, held, legal, budget)

    monkeypatch.setattr("fpcompile.passes.auto.place", watched)
    mix, _ = ALIASING[name]
    model = toy(mix, layers=1)
    plan = compile_packed(capture(model), Granularity.AUTO, design=Design(2.5e-6, RATES, tokens=64)).plan
    ((seconds, held, legal, budget),) = seen
    assert len(plan.segments) > 2
    assert not all(legal[:-1]), "a write in place, or picks of one result, forbid cuts"
    # all sets of cuts of 40 nodes are too many: places beside which nothing takes time are thinned out
    thin = [ok and seconds[i] > 0 for i, ok in enumerate(legal)]
    while sum(thin) > 14:
        least = min((i for i, ok in enumerate(thin) if ok), key=lambda i: seconds[i])
        thin[least] = False
    got = place(seconds, held, thin, budget)
    best = min(every(seconds, held, thin, budget))
    assert (len(got.cuts) + 1, sum(held[i] for i in got.cuts)) == best[:2]
    ends = set(itertools.accumulate(sum(len(p.nodes) for p in s.parts) for s in plan.segments))
    assert all(legal[end - 1] for end in ends if end < len(legal)), "no cut separates a value from its write"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "qwen3_moe"])
def test_bits_are_the_models_at_every_cut(arch: str) -> None:
    model = model_of(arch)
    program = fpcompile.segment(
        model, granularity="auto", max_blocking_ms=0.4, design_tokens=512, route="packed"
    )
    assert 2 < len(program.segments) < len(program_of(arch).segments)
    ids = sample_ids(21)
    expected = reference(model, ids)
    free = {"max_blocking_ms": float("inf")}
    assert differences(outcome(program(ids, **free)), expected) == []
    assert differences(relay(program, program.start(ids, **free)), expected) == []
    again = fpcompile.segment(
        model, granularity="auto", max_blocking_ms=0.4, design_tokens=512, verify=False, route="packed"
    )
    assert again.fingerprint == program.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["bloom", "bert"])
def test_the_generic_route_takes_it_too(arch: str) -> None:
    model = tiny_model(arch)
    program = fpcompile.segment(
        model, route="generic", granularity="auto", max_blocking_ms=0.4, design_tokens=512, verify=False
    )
    assert len(program.segments) > 2
    assert {s.reason for s in program.segments[:-1]} <= {CutReason.BUDGET, CutReason.BEYOND_BUDGET}
    ids = sample_ids(21)
    with torch.no_grad():
        expected = model(input_ids=ids)
    got = program(input_ids=ids, max_blocking_ms=float("inf"))
    assert torch.equal(got[0], expected[0])
    assert "cuts for launches of at most 0.4 ms at 512 tokens" in " ".join(program.explain().split())


@pytest.mark.slow
def test_reasons_and_assumptions_are_told() -> None:
    program = fpcompile.segment(
        model_of("llama"), granularity="auto", max_blocking_ms=0.4, design_tokens=512, verify=False
    )
    text = " ".join(program.explain().split())
    assert "granularity auto" in text
    assert "cuts for launches of at most 0.4 ms at 512 tokens, predicted from 1e+11 operations" in text
    assert str(Refusal.MORE_LAUNCHES) in text


@pytest.mark.slow
def test_without_a_budget_cuts_are_those_of_operator() -> None:
    program = fpcompile.segment(model_of("llama"), granularity="auto", verify=False)
    assert program.plan.granularity is Granularity.AUTO
    assert program.segments == program_of("llama").segments
    assert NO_BUDGET in program.plan.notes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"granularity": "auto", "rates": "guessed"}, UnknownNameError, "'default', 'measured'"),
        ({"granularity": "auto", "design_tokens": 0}, InvalidInputError, "design_tokens"),
        ({"granularity": "auto", "design_tokens": True}, InvalidInputError, "design_tokens"),
        ({"design_tokens": 64}, InvalidInputError, "of no use"),
        ({"granularity": "auto", "design_tokens": 64}, InvalidInputError, "how a budget is met"),
        ({"granularity": "auto", "rates": "measured"}, InvalidInputError, "how a budget is met"),
        ({"granularity": "layer", "rates": "measured"}, InvalidInputError, "of no use"),
        ({"granularity": "auto", "max_blocking_ms": -1.0}, InvalidInputError, "max_blocking_ms"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fpcompile.segment(model_of("llama"), **options)  # type: ignore[arg-type]


def test_measured_rates_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FPCOMPILE_CACHE", str(tmp_path))
    cpu = torch.device("cpu")
    first = measured_rates(cpu, torch.float32)
    assert first.flops > 0
    assert first.bytes > 0
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "_measure", lambda *_: pytest.fail("measured again"))
        assert measured_rates(cpu, torch.float32) == first
    monkeypatch.setattr(measuring, "_measure", lambda *_: Rates(7.0, 8.0))
    assert measured_rates(cpu, torch.bfloat16) == Rates(7.0, 8.0), "another dtype"
    (where,) = (p for p in (tmp_path / "costs").iterdir() if json.loads(p.read_text())["flops"] != 7.0)
    where.write_text('{"flops": 1e400}')
    with caplog.at_level(logging.WARNING):
        assert measured_rates(cpu, torch.float32) == Rates(7.0, 8.0)
    assert "measured again" in caplog.text


def test_prices_are_those_of_the_slower_resource() -> None:
    design = Design(1.0, Rates(flops=100.0, bytes=10.0), tokens=3)
    assert design.units(Cost(TOKENS * CONTEXT * 100, TOKENS)) == 9 * 10**15
    assert design.units(Cost(ROWS, TOKENS * 20)) == 6 * 10**15
    assert value_at(ROWS + TOKENS, 5) == 6.0

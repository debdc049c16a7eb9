"""Tiles as they are measured: prices are those of tiles, and what rounds otherwise than the whole is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fpcompile
from fpcompile.executor import cost_cache
from fpcompile.executor import measure_tiles as tiles
from fpcompile.executor.cost_model import Samples
from fpcompile.executor.measure_tiles import TileBits
from fpcompile.executor.schedule import Launch, keys_given, launch_seconds
from fpcompile.executor.tile_costs import BLOCK, COLLECTED, PART, RANGE, ROWS, WRITTEN
from fpcompile.models.attention import AttentionCall
from fpcompile.models.zoo import sample_ids, tiny_model
from tests.cpu.support import differences, finish, outcome, reference

LENGTH = 512


def fresh(arch: str = "llama") -> fpcompile.Program:
    """A program that nobody has measured, with positions for :data:`LENGTH` tokens."""
    model = tiny_model(arch, overrides={"max_position_embeddings": LENGTH})
    return fpcompile.segment(model, route="packed", verify=False)


def stages_only(program: fpcompile.Program) -> Samples:
    """A microsecond for each stage, so that the longest length is taken."""
    return {s.key: ((1, 1e-6), (LENGTH, 2e-6)) for s in program.stages}


def told(program: fpcompile.Program) -> str:
    return " ".join(program.explain().split())


class Clock:
    """Charges each launch what ``price`` says, and counts nothing else. A first block is a second late."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.warm: set[int] = set()
        step, price = fpcompile.Run.step, self.price

        def charged(run: fpcompile.Run) -> None:
            launch = run.schedule[run.at]
            first = launch.tiled and not run.partial
            seconds = price(run, launch, first) if launch.tiled else 0.0
            step(run)
            self.now += seconds

        class Time:
            perf_counter = staticmethod(lambda: self.now)

        monkeypatch.setattr(tiles, "time", Time)
        monkeypatch.setattr(fpcompile.Run, "step", charged)

    def price(self, run: fpcompile.Run, launch: Launch, first: bool) -> float:
        size, stage = launch.stop - launch.start, run.program.stages[launch.first]
        if stage.over == "attention":
            heads = (launch.head_stop - launch.head_start) / run.program.heads()[launch.first].total
            pairs = size * keys_given(launch.stop)
            cold = 0.0 if launch.first in self.warm else 1.0
            self.warm.add(launch.first)
            return cold + heads * 1e-6 * pairs + (2e-5 * run.tokens if first else 0.0)
        if not launch.head_stop:
            return 1e-3 + 1e-5 * size
        if launch.head_start == launch.head_stop:
            return 4e-5 * size
        return 1e-6 * size + 8e-5 * size * (launch.head_stop - launch.head_start) / stage.experts


@pytest.mark.slow
def test_tiles_are_priced_as_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    program = fresh("qwen3_moe")
    samples = stages_only(program)
    Clock(monkeypatch)
    found, bits = tiles.measure_tiles(program, program.use_costs(samples), seconds=1.0)
    assert bits is not None
    assert bits.tokens == LENGTH
    kinds = {name for key in found for name in key if name.startswith(" ")}
    assert kinds == {ROWS, BLOCK, WRITTEN, RANGE, PART, COLLECTED}
    costs = program.use_costs({**samples, **found})
    shape = program.start(sample_ids(LENGTH)).call.shape

    def price(launch: Launch) -> float:
        return launch_seconds(launch, program.stages, shape, costs, program.heads())

    rows = next(i for i, s in enumerate(program.stages) if s.over == "tokens" and not s.experts)
    attention = next(i for i, s in enumerate(program.stages) if s.over == "attention")
    experts = next(i for i, s in enumerate(program.stages) if s.experts)
    heads = program.heads()[attention].total
    for size in (64, 128, 200, 256):
        assert price(Launch(rows, rows + 1, 0, size)) == pytest.approx(1e-3 + 1e-5 * size, rel=0.02)
    whole = price(Launch(attention, attention + 1, 256, 320, 0, 0, heads))
    assert whole == pytest.approx(1e-6 * 64 * 512, rel=0.02)
    assert price(Launch(attention, attention + 1, 256, 320, 0, 0, 1)) == pytest.approx(whole / heads)
    first = price(Launch(attention, attention + 1, 0, 64, 0, 0, heads))
    assert first == pytest.approx(1e-6 * 64 * 512 + 2e-5 * LENGTH, rel=0.02), "keys and values are written"
    assert price(Launch(experts, experts + 1, 0, 300, 0, 4, 4)) == pytest.approx(300 * 4e-5, rel=0.02)
    share = 2 / program.stages[experts].experts  # twice its share for one of them
    expected = 300 * (1e-6 + share * 8e-5)
    assert price(Launch(experts, experts + 1, 0, 300, 0, 0, 1)) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_measuring_tiles_changes_no_bit() -> None:
    program = fresh()
    model = tiny_model("llama", overrides={"max_position_embeddings": LENGTH})
    ids = sample_ids(200)
    expected = reference(model, ids)
    run = program.start(ids)
    run.step()
    tiles.measure_tiles(program, program.use_costs(stages_only(program)), seconds=1.0)
    assert differences(finish(run), expected) == []
    assert differences(outcome(program(ids)), expected) == []


@pytest.mark.slow
def test_tiles_that_round_otherwise_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cost_cache.VARIABLE, str(tmp_path))
    program = fresh()
    assert "tiles" not in told(program)
    own = AttentionCall.attend_block

    def rounded(call: AttentionCall, q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        block = own(call, q, *rest)
        return block + (q.shape[2] == 128)

    monkeypatch.setattr(AttentionCall, "attend_block", rounded)
    program.calibrate()
    text = told(program)
    assert "tiles that round otherwise than the whole: 128 queries, 128 queries of one head (tried" in text
    assert f"of {LENGTH} tokens): model.layers.0.self_attn and 1 more" in text
    assert "64 queries" not in text.split("(tried")[0].split("whole:")[1]
    again = fresh()
    assert "tiles" not in told(again), "nothing is known before the costs are asked for"
    assert again.costs.samples == program.costs.samples
    assert told(again) == text, "kept beside the costs"
    monkeypatch.setattr(cost_cache, "read_bits", lambda program: None)
    other = fresh()
    _ = other.costs
    assert "tiles were not compared with the whole yet" in told(other)


def test_bits_are_plain_data() -> None:
    bits = TileBits(256, {("a", "b"): (("64 rows", True), ("128 rows", False)), ("c",): (("64 rows", True),)})
    assert TileBits.read(bits.plain()) == bits
    with pytest.raises((KeyError, TypeError, ValueError)):
        TileBits.read({"tokens": 3, "compared": [["a"]]})


@pytest.mark.slow
def test_a_program_without_room_for_a_tile_is_measured_without(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama", overrides={"max_position_embeddings": 64})
    program = fpcompile.segment(model, route="packed", verify=False)
    program.calibrate(lengths=(16, 32), seconds=1.0)
    assert set(program.costs.samples) == {s.key for s in program.stages}
    assert program.tile_plan(program.start(sample_ids(40)).call.shape, 1e3)


@pytest.mark.slow
def test_nothing_much_longer_than_what_is_known_is_executed() -> None:
    """From one short prefill it does not follow what a long one takes."""
    program = fresh()
    short: Samples = {s.key: ((1, 1e-6), (64, 1e-6)) for s in program.stages}
    _, bits = tiles.measure_tiles(program, program.use_costs(short), seconds=1e3)
    assert bits is not None
    assert bits.tokens == 128

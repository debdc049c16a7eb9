"""An LLM, an embedder and a cross-encoder on one engine: interleaved with each other, each with its bits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedModel

import fpcompile
from fpcompile.engine.engine import Engine
from fpcompile.models.zoo import sample_ids
from tests.cpu.support import differences, model_of, outcome, program_of, reference, same_bits
from tests.cpu.test_engine_fakes import drive

pytestmark = pytest.mark.slow


@functools.cache
def _encoder(kind: type[PreTrainedModel]) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = kind(config)
        model.train(False)
        return model


@functools.cache
def _programs() -> dict[str, fpcompile.Program]:
    return {
        "chat": program_of("llama"),
        "embed": fpcompile.segment(_encoder(BertModel)),
        "rerank": fpcompile.segment(_encoder(BertForSequenceClassification)),
    }


def _pair(seed: int) -> dict[str, Any]:
    """A question and a document, side by side: what a cross-encoder reads."""
    ids = sample_ids(24, seed=seed)
    kinds = torch.zeros_like(ids)
    kinds[:, 10:] = 1
    return {"input_ids": ids, "token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _assert_bits(name: str, inputs: dict[str, Any], got: Any) -> None:
    if name == "chat":
        assert differences(outcome(got), reference(model_of("llama"), inputs["input_ids"])) == []
        return
    model = _encoder(BertModel if name == "embed" else BertForSequenceClassification)
    expected = model(**inputs)
    assert type(got) is type(expected)
    assert list(got) == list(expected)
    for field in expected:
        assert same_bits(got[field], expected[field]), field


@pytest.mark.parametrize("policy", ["fpcompile", "s-edf"])
def test_interleaved_at_every_cut_each_program_gives_its_models_bits(policy: str) -> None:
    engine = Engine(_programs(), policy=policy, device_thread=False)
    sent: list[tuple[str, dict[str, Any], Any]] = []

    def send(name: str, inputs: dict[str, Any], slo: float) -> Any:
        sent.append((name, inputs, engine.submit(**inputs, program=name, ttft_slo=slo)))
        return sent[-1][2]

    long = send("chat", {"input_ids": sample_ids(100)}, 1000.0)
    while not long.done():
        engine.turn(1)
        if sent[-1][2].done() or sent[-1][2] is long:  # the one before has had its turn
            engine.turn(1)
            seed = len(sent)
            embed: dict[str, Any] = {"input_ids": sample_ids(12, batch=2, seed=seed)}
            embed["attention_mask"] = torch.ones_like(embed["input_ids"])
            send(*(("embed", embed) if seed % 2 else ("rerank", _pair(seed))), 100.0)
        assert len(sent) < 100
    drive(engine)
    for name, inputs, handle in sent:
        _assert_bits(name, inputs, handle.result(0))
    assert {handle.metrics.program for _, _, handle in sent} == {"chat", "embed", "rerank"}
    if policy == "s-edf":
        assert long.metrics.preemptions >= 3
        by = {engine_id for _, _, handle in sent for engine_id in handle.metrics.preempted_by}
        names = {handle.request_id: name for name, _, handle in sent}
        assert {names[i] for i in by} >= {"embed", "rerank"}, "each preempted something"
    statistics = engine.statistics()
    assert (statistics.completed, statistics.paused_bytes) == (len(sent), 0)


def test_a_failing_program_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(_programs(), policy="s-edf", device_thread=False)
    chat = engine.submit(sample_ids(20), program="chat", ttft_slo=1000.0)
    for _ in range(4):
        engine.turn(1)
    broken = engine.submit(**_pair(1), program="rerank", ttft_slo=10.0)

    def fails(*_: Any) -> Any:
        raise ValueError("injected")

    run = engine._registry.get(broken.request_id)
    assert run is not None
    monkeypatch.setattr(fpcompile.Run, "_call", _only(run.run, fails))
    embed: dict[str, Any] = {
        "input_ids": sample_ids(12),
        "attention_mask": torch.ones(1, 12, dtype=torch.int64),
    }
    other = engine.submit(**embed, program="embed", ttft_slo=20.0)
    drive(engine)
    assert broken.metrics.state == "failed"
    monkeypatch.undo()
    _assert_bits("chat", {"input_ids": sample_ids(20)}, chat.result(0))
    _assert_bits("embed", embed, other.result(0))


def _only(broken: Any, fails: Any) -> Any:
    real = fpcompile.Run._call

    def call(run: Any, *arguments: Any) -> Any:
        return fails() if run is broken else real(run, *arguments)

    return call

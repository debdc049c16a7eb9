"""What the worker finds out about models: their lengths, and how their vectors are pooled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import MPNetConfig, RobertaConfig

from fpcompile.errors import InvalidInputError
from fpcompile.serving.server import build as builder
from fpcompile.serving.server.messages import Embed, Generate, Sampling, Terms
from fpcompile.serving.server.metrics import Metrics
from fpcompile.serving.server.models import build_model, parse_models
from fpcompile.serving.server.settings import EngineSettings, ModelSpec
from fpcompile.serving.server.tiny import EMBEDDER


def _folder(path: Path, fields: dict[str, Any]) -> ModelSpec:
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(fields))
    return ModelSpec("embed", str(path))


@pytest.mark.parametrize(
    ("on", "pooling"),
    [
        (["cls_token"], "cls"),
        (["mean_tokens"], "mean"),
        (["mean_sqrt_len_tokens"], "mean"),
        (["lasttoken"], "last"),
        (["max_tokens"], None),
        (["weightedmean_tokens"], None),
        (["cls_token", "mean_tokens"], None),
        ([], None),
    ],
)
def test_pooling_is_the_models_or_refused(on: list[str], pooling: str | None, tmp_path: Path) -> None:
    names = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    fields = {f"pooling_mode_{name}": name in on for name in names} | {"include_prompt": True}
    spec = _folder(tmp_path, {"word_embedding_dimension": 64, **fields})
    if pooling is None:
        with pytest.raises(InvalidInputError, match="pools in a way"):
            builder._pooling_of(spec)
    else:
        assert builder._pooling_of(spec) == pooling


def test_pooling_of_a_hub_id_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _folder(tmp_path, {"pooling_mode_cls_token": True})
    own: dict[str, str | Exception] = {
        "org/cls": f"{spec.source}/1_Pooling/config.json",
        "org/plain": EntryNotFoundError("404"),
    }

    def download(source: str, name: str) -> str:
        assert name == "1_Pooling/config.json"
        found = own.get(source, LocalEntryNotFoundError("no connection"))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(builder, "hf_hub_download", download)
    monkeypatch.setattr(builder, "try_to_load_from_cache", lambda source, name: None)
    assert builder._pooling_of(ModelSpec("e", "org/cls")) == "cls"
    assert builder._pooling_of(ModelSpec("e", "org/plain")) == "mean"
    with pytest.raises(InvalidInputError, match="--pooling"):
        builder._pooling_of(ModelSpec("e", "org/unreachable"))


def test_a_folder_without_pooling_means(tmp_path: Path) -> None:
    assert builder._pooling_of(ModelSpec("e", str(tmp_path))) == "mean"
    assert builder._pooling_of(ModelSpec(EMBEDDER, EMBEDDER, random_weights=True)) == "mean"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RobertaConfig, MPNetConfig], ids=["roberta", "mpnet"])
def test_positions_behind_the_one_of_padding_are_counted(kind: Any, tmp_path: Path) -> None:
    """514 rows are 512 tokens: the longest prompt is served, and one more is no usable length."""
    config = kind(
        vocab_size=260, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    (spec,) = parse_models([], [f"embed={tmp_path}"], ["embed"])
    backend = builder.build(EngineSettings((spec,), threads=1, dtype="float32"))
    try:
        longest = backend.facts["embed"].max_tokens
        assert longest == 38
        ids = tuple(range(2, 2 + longest))
        got = backend.vector(
            "embed", backend.embed(Embed("r", "embed", ids, Terms(backend.engine.now()))).result()
        )
        model = build_model(spec, "embed", config, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            whole = builder.pooled(model(torch.tensor([ids])).last_hidden_state, "mean")
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.tensor([[*ids, 2]]))
        assert torch.allclose(torch.frombuffer(bytearray(got), dtype=torch.float32), whole, atol=1e-5)
    finally:
        backend.close()


@pytest.mark.slow
def test_blocks_of_the_pool_are_told_by_what_holds_them() -> None:
    """While a stream decodes in a pool, and when it has ended: every block has one state."""
    (spec, _) = parse_models([], ["tiny"])
    backend = builder.build(EngineSettings((spec,), threads=1, options={"kv_memory": 1 << 20}))
    metrics = Metrics()

    def told() -> dict[str, float]:
        metrics.update(backend.statistics())
        (family,) = metrics.blocks.collect()
        return {sample.labels["state"]: sample.value for sample in family.samples}

    try:
        total = sum(told().values())
        ask = Generate("r", "tiny", (65,) * 40, 20, Sampling(ignore_eos=True), Terms(backend.engine.now()))
        seen: list[dict[str, float]] = []
        backend.pause()  # behind the first launch, until somebody listens
        handle = backend.generate(ask)
        handle.add_token_callback(lambda token: seen.append(told()))
        backend.resume()
        handle.result(60)
        assert len(seen) == 20
        assert seen[10]["decoding"] >= 4, "40 tokens and 10 more, in blocks of 16"
        assert {sum(states.values()) for states in seen} == {total}
        assert total > 4
        assert told() == {"prefill": 0, "decoding": 0, "cached": 0, "free": total}
    finally:
        backend.close()

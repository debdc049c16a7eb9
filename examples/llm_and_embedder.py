"""A language model and an embedder on one engine: one device, one scheduler.

    python examples/llm_and_embedder.py

While a long prompt is computed and a stream generates, texts are embedded with a tight promise: each of them
stops whatever runs at its next cut. Two engines on one device could not promise that. For a bound on how far
the next cut is, give both programs the same ``max_blocking_ms``. Models are small and random; results are
compared with those of the unmodified models.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from embed_threads import prompt, small_model
from transformers import BertConfig, BertModel

import fpcompile

NEW = 40


def encoder() -> BertModel:
    """A small encoder with random weights."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=2048, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    made: BertModel = BertModel(config).train(False)
    return made


def main() -> None:
    """Generate, prefill and embed at once."""
    llm: Any = small_model()
    embedder: Any = encoder()
    texts = [prompt(length) for length in (12, 30, 12)]
    programs = {"chat": fpcompile.segment(llm), "embed": fpcompile.segment(embedder)}
    with fpcompile.Engine(programs, tbt_slo=0.2) as engine:
        talk = engine.submit(prompt(48), program="chat", max_new_tokens=NEW, ttft_slo=1.0)
        next(talk.tokens())
        long = engine.submit(prompt(3000), program="chat", ttft_slo=60.0, logits_to_keep=1)
        started = threading.Event()
        while long.metrics.started is None:
            started.wait(0.001)
        vectors = []
        for text in texts:
            handle = engine.submit(text, program="embed", ttft_slo=1.0)
            vectors.append(handle.result(timeout=60).last_hidden_state.mean(dim=1))
        overtaken = not long.done()
        logits = long.result(timeout=60).logits
        tokens = talk.result(timeout=60).sequences[0, 48:].tolist()
        statistics = engine.statistics()
    with torch.no_grad():
        equal = {
            "vectors": all(
                torch.equal(vector, embedder(text).last_hidden_state.mean(dim=1))
                for vector, text in zip(vectors, texts, strict=True)
            ),
            "logits": torch.equal(logits, llm(prompt(3000), logits_to_keep=1).logits),
            "tokens": tokens
            == llm.generate(prompt(48), max_new_tokens=NEW, do_sample=False)[0, 48:].tolist(),
        }
    print(f"{len(vectors)} vectors while a long prompt was computed: {overtaken}")
    print(f"{statistics.preemptions} preemptions, {len(tokens)} tokens")
    print("equal to the models': " + ", ".join(f"{name} {found}" for name, found in equal.items()))


if __name__ == "__main__":
    main()

"""Embed the engine in a threaded server: any thread submits, the urgent ones first.

    python examples/embed_threads.py

A long prompt is being computed when short ones with a tight SLO arrive from two other threads. They overtake
it at the next cut; afterwards it goes on where it was stopped. The model is small and random, so that this
takes seconds; every result is compared with the unmodified model's.
"""

from __future__ import annotations

import threading
import time

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import fpcompile


def small_model() -> PreTrainedModel:
    """A real architecture with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=8192,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model: PreTrainedModel = made.eval()
    return model


def prompt(length: int) -> torch.Tensor:
    """Random token ids ``[1, length]``."""
    return torch.randint(2048, (1, length), generator=torch.Generator().manual_seed(length))


def main() -> None:
    """Serve one long and four urgent requests, and show what happened."""
    model = small_model()
    engine = fpcompile.Engine(fpcompile.segment(model), policy="s-edf")
    requests = []

    def client(name: str, lengths: list[int]) -> None:
        for number, length in enumerate(lengths):
            ids = prompt(length)
            handle = engine.submit(ids, ttft_slo=2.0, request_id=f"{name} {number}", logits_to_keep=1)
            requests.append((handle, ids))
            handle.result(timeout=60)  # a thread waits for its own request, and for nothing else

    with engine:
        ids = prompt(3000)
        long = engine.submit(ids, ttft_slo=30.0, request_id="long", logits_to_keep=1)
        requests.append((long, ids))
        while long.metrics.started is None:
            time.sleep(0.001)
        threads = [threading.Thread(target=client, args=(f"client {i}", [48 + i, 64 + i])) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        long.result(timeout=60)
        statistics = engine.statistics()

    print(
        f"{'request':<12} {'tokens':>6} {'TTFT ms':>8} {'SLO':>5} {'paused ms':>9}  bits equal to the model's"
    )
    for handle, ids in sorted(requests, key=lambda item: item[0].metrics.arrival):
        m = handle.metrics
        with torch.no_grad():
            equal = torch.equal(handle.result().logits, model(ids, logits_to_keep=1).logits)
        times = f"{(m.ttft or 0.0) * 1e3:8.1f} {'met' if m.slo_met else 'late':>5} {m.suspended * 1e3:9.1f}"
        print(f"{m.request_id:<12} {m.tokens:6d} {times}  {'yes' if equal else 'NO'}")
    print(
        f"{statistics.preemptions} preemptions; the device was free after "
        f"{statistics.blocking_percentile(50) * 1e3:.2f} ms (median), "
        f"{statistics.blocking_percentile(100) * 1e3:.2f} ms (longest)"
    )


if __name__ == "__main__":
    main()

"""Stream tokens of several requests while a long prompt is computed.

    python examples/generate.py

Two streams decode in shared steps. Then a long prompt comes: the steps go on between its cuts, each at the
latest moment at which the next token is still in time. The model is small and random; greedy tokens are
compared with those of ``model.generate``.
"""

from __future__ import annotations

import threading
from typing import Any

from embed_threads import prompt, small_model
from transformers import GenerationConfig

import fpcompile

NEW = 60


def main() -> None:
    """Serve two streams and a long prompt, and show what became of the time between tokens."""
    model: Any = small_model()
    program = fpcompile.segment(model, max_blocking_ms=50.0)
    with fpcompile.Engine(program, tbt_slo=0.1) as engine:
        greedy = engine.submit(prompt(48), max_new_tokens=NEW, ttft_slo=1.0, request_id="greedy")
        drawn = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.9)  # type: ignore[no-untyped-call]
        sampled = engine.submit(
            prompt(64), max_new_tokens=NEW, generation_config=drawn, seed=7, request_id="sampled"
        )
        reading = threading.Thread(target=lambda: list(sampled.tokens()))
        reading.start()
        tokens = []
        for token in greedy.tokens():  # as they are made; ``async for token in greedy`` in an event loop
            tokens.append(token)
            if len(tokens) == 5:
                long = engine.submit(prompt(3000), ttft_slo=30.0, request_id="long", logits_to_keep=1)
        reading.join()
        long.result(timeout=60)
        statistics = engine.statistics()

    own = model.generate(prompt(48), max_new_tokens=NEW, do_sample=False)[0, 48:].tolist()
    for handle in (greedy, sampled):
        m = handle.metrics
        print(
            f"{m.request_id:<8} {m.tokens_out} tokens, {m.finish_reason}; "
            f"first after {(m.ttft or 0) * 1e3:.0f} ms, then every {(m.tbt_mean or 0) * 1e3:.1f} ms, "
            f"at most {(m.tbt_max or 0) * 1e3:.1f} ms"
        )
    print(f"long     prompt of 3000 tokens: {(long.metrics.ttft or 0) * 1e3:.0f} ms beside the streams")
    print(f"{statistics.tokens_generated} tokens in all; greedy ones equal to generate's: {tokens == own}")


if __name__ == "__main__":
    main()

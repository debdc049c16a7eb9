"""A scheduling policy of your own, in a few lines: paying tenants first, then whoever has least left.

    python examples/custom_policy.py

A policy says in which order requests should have the device; the engine decides, pauses and goes on. This one
gives a sort key, smallest first. The same prompts are served twice, by the policy and first come, first
served; results are compared with the unmodified model's. Registered under a name, a policy can also be given
to `fpcompile replay` and to the simulator, which run the same code.
"""

from __future__ import annotations

import time

import torch
from embed_threads import prompt, small_model

import fpcompile
from fpcompile.scheduler import KeyedPolicy, RequestView, register

PROMPTS = (("free", 3000), ("free", 400), ("free", 40), ("gold", 800))


@register("gold-first")
class GoldFirst(KeyedPolicy):
    """Tenant "gold" before everybody; among equals the shortest remaining prompt."""

    def key(self, view: RequestView, now: float) -> tuple[bool, float]:
        return (view.request.tenant != "gold", view.remaining(now))


def order(program: fpcompile.Program, policy: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Names of the requests as they ended, and their logits."""
    ended: list[str] = []
    with fpcompile.Engine(program, policy=policy) as engine:
        handles = {}
        for tenant, tokens in PROMPTS:
            name = f"{tenant} {tokens}"
            handles[name] = engine.submit(prompt(tokens), tenant=tenant, request_id=name, logits_to_keep=1)
            handles[name].add_done_callback(lambda handle: ended.append(handle.request_id))
            while handles["free 3000"].metrics.started is None:  # the longest one is under way by then
                time.sleep(0.001)
        logits = {name: handle.result(timeout=60).logits for name, handle in handles.items()}
    return ended, logits


def main() -> None:
    """Serve the prompts under two policies."""
    model = small_model()
    program = fpcompile.segment(model)
    for policy in ("fcfs", "gold-first"):
        ended, logits = order(program, policy)
        with torch.no_grad():
            equal = all(
                torch.equal(logits[f"{tenant} {tokens}"], model(prompt(tokens), logits_to_keep=1).logits)
                for tenant, tokens in PROMPTS
            )
        print(f"{policy}: {', '.join(ended)}; bits equal to the model's: {equal}")


if __name__ == "__main__":
    main()

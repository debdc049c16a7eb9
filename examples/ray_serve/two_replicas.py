"""fpcompile inside Ray Serve: two replicas on one machine, requests routed by predicted work.

    pip install 'fpcompile[ray]'
    python examples/ray_serve/two_replicas.py

Each replica is an actor with an engine of its own: a long prompt on it is preempted by urgent ones. In front
of them a deployment of this application keeps, for each replica, the predicted seconds of what it was given
and has not answered, and sends a request where least is predicted to be left; counting requests instead would
put a short one behind a long one as readily as beside it. What
prompts are predicted to take a replica says once.

Ray cancels the task of a caller that goes away; cancelling a task that awaits a handle cancels the request. A
replica whose engine is unhealthy fails Ray's health check, and is replaced.
"""

from __future__ import annotations

import asyncio
import bisect
import sys
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve

import fpcompile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # embed_threads.py lies beside this folder

LENGTHS = (1, 16, 64, 256, 1024, 4096)


class Replica:
    """One engine. Its methods are coroutines: they await, and the actor goes on."""

    def __init__(self) -> None:
        from embed_threads import small_model

        torch.set_num_threads(1)  # replicas share the processor
        self.program = fpcompile.segment(small_model())
        self.engine = fpcompile.Engine(self.program)

    async def predicted(self) -> list[float]:
        """Seconds that prompts of each of :data:`LENGTHS` tokens are predicted to take."""
        return [self.program.predict(tokens=length) for length in LENGTHS]

    async def next_token(self, ids: list[int], ttft_slo: float | None) -> dict[str, float]:
        """The most likely next token, the seconds until it was there, and how often this was preempted."""
        handle = self.engine.submit(torch.tensor([ids]), ttft_slo=ttft_slo, logits_to_keep=1)
        output = await handle
        metrics = handle.metrics
        token = int(output.logits[0, -1].argmax())
        return {"token": token, "ttft": metrics.ttft or 0.0, "preemptions": metrics.preemptions}

    def check_health(self) -> None:
        """Called by Ray; what it raises makes the replica be replaced."""
        health = self.engine.health()
        if not health.healthy:
            raise RuntimeError(health.reason)

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close(drain=False)


class Work:
    """Predicted seconds that each of several replicas has not answered yet."""

    def __init__(self, replicas: int, lengths: tuple[int, ...], seconds: list[float]) -> None:
        self.left = [0.0] * replicas
        self._lengths, self._seconds = lengths, seconds

    def of(self, tokens: int) -> float:
        """Predicted seconds of a prompt, on a line between the lengths that are known."""
        at = min(max(bisect.bisect_left(self._lengths, tokens), 1), len(self._lengths) - 1)
        x0, x1 = self._lengths[at - 1 : at + 1]
        y0, y1 = self._seconds[at - 1 : at + 1]
        return max(y0 + (y1 - y0) * (tokens - x0) / (x1 - x0), min(self._seconds))

    def least(self) -> int:
        """The replica with the least left; the first of equals."""
        return min(range(len(self.left)), key=self.left.__getitem__)


class ByWork:
    """Sends each request to the replica that is predicted to be done first."""

    def __init__(self, *replicas: Any) -> None:
        self.replicas = replicas
        self.work: Work | None = None
        self._asking = asyncio.Lock()

    async def next_token(self, ids: list[int], ttft_slo: float | None) -> dict[str, float]:
        """As :meth:`Replica.next_token`; ``replica`` says where."""
        async with self._asking:
            if self.work is None:
                seconds = await self.replicas[0].predicted.remote()
                self.work = Work(len(self.replicas), LENGTHS, seconds)
        work = self.work
        where, cost = work.least(), work.of(len(ids))
        work.left[where] += cost
        try:
            answer: dict[str, float] = await self.replicas[where].next_token.remote(ids, ttft_slo)
        finally:
            work.left[where] -= cost
        return {**answer, "replica": where}


def application(replicas: int = 2) -> Any:
    """Replicas of one engine each, and the deployment in front of them."""
    options = {"max_ongoing_requests": 100, "health_check_period_s": 5, "ray_actor_options": {"num_cpus": 1}}
    bound = [serve.deployment(Replica, name=f"replica-{n}", **options).bind() for n in range(replicas)]
    return serve.deployment(ByWork, max_ongoing_requests=1000).bind(*bound)


async def clients(front: Any) -> None:
    """Two long prompts and four urgent ones, all at once but in this order."""
    from embed_threads import prompt

    lengths = {"long 0": 3000, "long 1": 3000, "urgent 0": 32, "urgent 1": 32, "urgent 2": 32, "urgent 3": 32}

    async def ask(name: str, length: int) -> tuple[str, dict[str, float]]:
        slo = 60.0 if name.startswith("long") else 5.0
        return name, await front.next_token.remote(prompt(length)[0].tolist(), slo)

    asked = []
    for name, length in lengths.items():
        asked.append(asyncio.create_task(ask(name, length)))
        await asyncio.sleep(0.3 if name == "long 1" else 0.02)
    for name, answer in await asyncio.gather(*asked):
        print(
            f"{name}: replica {answer['replica']}, token {answer['token']}, "
            f"TTFT {answer['ttft'] * 1e3:.0f} ms, preempted {answer['preemptions']} times"
        )


def main() -> None:
    """Serve, be the clients, and end."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="Disabled")  # no HTTP: the clients use the application's handle
    front = serve.run(application())
    asyncio.run(clients(front))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()

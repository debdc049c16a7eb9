"""The measured device: an engine in a process of its own, which is told by pipe what to serve.

The load generator is another process (:mod:`bench_device`) on another core, so that making load costs the
engine nothing but the reading of a pipe. Both read the same monotonic clock of the machine: an arrival is
the moment at which the generator meant to send.

Words
    *plan*   granularity and budget of the program that executes a policy's grain, and the tokens of a slice
             when it executes prompts in slices (:func:`plan_of`).

Protocol: tuples ``(kind, ...)``. ``prepare`` compiles and calibrates the program of a plan and is answered by
its costs; ``alone`` and ``busy`` are answered by seconds for each length; ``engine`` starts an engine under a
policy; ``submit`` is not answered; ``collect`` waits until all requests have ended and is answered by their
records and the engine's blocking times, and ends the engine.
"""

from __future__ import annotations

import gc
import os
import random
import threading
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from fpcompile.api import segment
from fpcompile.engine.engine import Engine
from fpcompile.engine.handle import Handle
from fpcompile.errors import FpcompileError, UsageError
from fpcompile.executor.program import Program
from fpcompile.scheduler.costs import CostTable
from fpcompile.scheduler.policies.neighbours import Vllm
from fpcompile.scheduler.policy import Policy

__all__ = ["Plan", "Record", "alone_policy", "build_model", "plan_of", "serve"]

Plan = tuple[str, float | None, int | None]
"""(granularity, budget in milliseconds or None, tokens of a slice or None for whole prompts)."""

_DEEP = 4  # prompts in a backlog
_GRANULARITY = {"model": "model", "operator": "operator"}
_STOPS = {"layers": "groups of layers", "half-layer": "half layers"}


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one request; ``ttft`` in seconds, None when it was not served (``error``: why).

    ``executed``: device seconds, None when it shared them with others.
    """

    id: str
    ttft: float | None
    preemptions: int
    error: str = ""
    executed: float | None = None


def plan_of(policy: Policy) -> Plan:
    """The program that stops where the policy's grain says: a chunk or a step is one launch of the model.

    Raises :class:`UsageError` for groups of layers and half layers. A program of layers stops behind every
    layer, whatever the policy's groups: a measurement would be of another policy than the simulation.
    """
    grain = policy.grain
    if grain.unit in ("layers", "half-layer"):
        raise UsageError(
            f"policy {policy.name!r} cannot be measured: no program stops where it does and nowhere else",
            expected="a policy that stops at operators, tiles or chunks, or between prompts or steps",
            got=f"stops at {_STOPS[grain.unit]}",
            remedy="use --simulate for it",
        )
    if grain.unit == "tile":
        return ("operator", grain.size / 1e3, None)
    if grain.unit == "tokens":
        return ("model", None, min(policy.threshold, grain.size) if isinstance(policy, Vllm) else grain.size)
    return (_GRANULARITY[grain.unit], None, None)


def alone_policy(plan: Plan) -> str:
    """First come, first served, in the plan's slices if it has any: what one prompt is measured under."""
    return "fcfs" if plan[2] is None else f"chunked:{plan[2]}"


def build_model(path: str | None) -> Any:
    """The model at ``path`` in bf16; by default a Qwen3 of 30 million parameters with random weights.

    4 layers of width 640, 10 heads of 64 in 2 groups, inner width 2048, 16,384 tokens: few operators, so
    that the work of a prompt of a hundred tokens is arithmetic and not launches.
    """
    from transformers import AutoModelForCausalLM, Qwen3Config

    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).train(False)
    config = Qwen3Config(
        num_hidden_layers=4, hidden_size=640, intermediate_size=2048, num_attention_heads=10,
        num_key_value_heads=2, head_dim=64, vocab_size=16384, max_position_embeddings=32768,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    return model.train(False)


def serve(pipe: Any, path: str | None, core: int | None) -> None:
    """The child process: answer the messages of ``pipe`` until it is closed."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    worker = _Worker(path)
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        if message[0] == "submit":
            worker.submit(*message[1:])
            continue
        try:
            pipe.send((None, getattr(worker, message[0])(*message[1:])))
        except FpcompileError as error:
            pipe.send((str(error), None))


class _Worker:
    """One model, its programs by plan, and at most one engine."""

    def __init__(self, path: str | None) -> None:
        self.model = build_model(path)
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        self._programs: dict[tuple[str, float | None], Program] = {}
        self._engine: Engine | None = None
        self._records: dict[str, Record] = {}
        self._ids = torch.zeros(1, 0, dtype=torch.long)

    def describe(self) -> dict[str, Any]:
        """The model, for the report."""
        name = type(self.model).__name__
        return {"model": name, "parameters": self.parameters, "dtype": str(self.model.dtype)}

    def prepare(self, plan: Plan, longest: int) -> CostTable:
        """Compile and calibrate; the table of the segments."""
        granularity, budget, _ = plan
        program = self._programs.get(plan[:2])
        if program is None:
            program = segment(
                self.model, granularity=granularity, max_blocking_ms=budget, weights="packed", verify=False
            )
            program.calibrate()
            self._programs[plan[:2]] = program
        self._ids = program.random_ids(longest)
        costs = program.costs
        rows = []
        for part in program.segments:
            stages = [i for i, owner in enumerate(costs.segments) if owner == part.index]
            a = b = c = 0.0
            for i in stages:
                one = costs.coefficients[i]
                if costs.by_rows[i]:
                    a += one.seconds(1, 1)
                else:
                    a, b, c = a + one.a, b + one.b, c + one.d
            rows.append((f"{part.index}.{part.name}", (a, b, c)))
        return CostTable.from_segments(
            rows, name=f"measured {granularity}", source="calibrated on this machine"
        )

    def engine(self, plan: Plan, policy: str, options: dict[str, Any]) -> None:
        """A fresh engine."""
        gc.collect()
        program = self._programs[plan[:2]]
        self._records = {}
        self._engine = Engine(
            program,
            policy=policy,
            max_queue=None,
            record_timeline=False,
            **options,
        )

    def submit(self, name: str, klass: str, tokens: int, arrival: float, slo: float, priority: int) -> None:
        """One request; ``tenant`` is its class."""
        assert self._engine is not None
        try:
            handle = self._engine.submit(
                self._ids[:, :tokens],
                slo_class=klass,
                arrival=arrival,
                ttft_slo=slo,
                tenant=klass,
                priority=priority,
                request_id=name,
                logits_to_keep=1,
            )
        except FpcompileError as error:
            self._records[name] = Record(name, None, 0, str(error))
            return
        handle.add_done_callback(self._ended)

    def _ended(self, handle: Handle) -> None:
        """Keep what was seen, and neither the handle nor the output."""
        seen = handle.metrics
        why = "" if seen.state == "completed" else seen.state
        self._records[seen.request_id] = Record(
            seen.request_id, seen.ttft, seen.preemptions, why,
            None if seen.numerics == "tolerance" else seen.executed,
        )  # fmt: skip

    def collect(self) -> tuple[list[Record], list[float]]:
        """Wait for the end of everything: records, and blocking times."""
        assert self._engine is not None
        self._engine.close()
        blocking = list(self._engine.statistics().blocking)
        self._engine = None
        return list(self._records.values()), blocking

    def alone(self, plan: Plan, lengths: list[int], repeats: int) -> dict[int, float]:
        """Median TTFT of prompts that find the engine idle, in rounds over all lengths; one to warm up.

        In the slices of the plan, if it has any.
        """
        times: dict[int, list[float]] = {tokens: [] for tokens in lengths}
        with Engine(self._programs[plan[:2]], policy=alone_policy(plan), record_timeline=False) as engine:
            for number in range(repeats + 1):
                for tokens in lengths:
                    handle = engine.submit(self._ids[:, :tokens], ttft_slo=1e6, logits_to_keep=1)
                    handle.result()
                    ttft = handle.metrics.ttft
                    assert ttft is not None
                    if number:
                        times[tokens].append(ttft)
        return {tokens: median(seen) for tokens, seen in times.items()}

    def busy(self, plan: Plan, lengths: list[int], repeats: int) -> dict[int, float]:
        """Median seconds between the end of the prompt before and its own, in a backlog in random order.

        The backlog is kept :data:`_DEEP` prompts deep, so that a prompt's own submission is in its time.
        """
        order = [tokens for tokens in lengths for _ in range(repeats)]
        random.Random(0).shuffle(order)
        times: dict[int, list[float]] = {tokens: [] for tokens in lengths}
        ends: list[float] = []
        places = threading.Semaphore(_DEEP)
        program = self._programs[plan[:2]]
        with Engine(program, policy=alone_policy(plan), record_timeline=False, max_queue=None) as engine:

            def ended(_: Handle) -> None:
                ends.append(engine.now())
                places.release()

            for tokens in (order[0], *order):
                places.acquire()
                handle = engine.submit(self._ids[:, :tokens], ttft_slo=1e6, logits_to_keep=1)
                handle.add_done_callback(ended)
        for tokens, (before, end) in zip(order, pairwise(ends), strict=True):
            times[tokens].append(end - before)
        return {tokens: median(seen) for tokens, seen in times.items()}

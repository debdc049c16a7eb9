"""Cost of one scheduling decision, of a cut where nobody stops, and speed of the simulator.

    python benchmarks/scheduler_cost.py [--policies s-edf,fpcompile] [--waiting 100,10000] [--check]

The core is filled with requests, then fed arrivals and completions in turn, so that the queue keeps its
length; each ``handle`` call is timed by itself. Limits: 20 us with 100 waiting and 60 us with 10,000 for
keyed policies. `fpcompile` looks at every request that is not late: 200 us with 100 waiting, no limit beyond.
The simulator serves 3,000 requests at 0.8 of the capacity (prefill only, at most 100 waiting): at least
10,000 requests per second of wall time for keyed policies, the best of three.
A cut where nobody stops costs what the engine adds to a bare loop over empty segments (needs torch).
``--check`` exits with 1 when a median exceeds its limit, or the simulator is slower. Other work on the
machine shows in these times: the load average is printed with them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from fpcompile.scheduler import (
    SLO_TABLE,
    Arrival,
    Completed,
    CostPredictor,
    Event,
    Launch,
    Pause,
    Request,
    Scheduler,
    Yielded,
)
from fpcompile.scheduler import profile as cost_profile
from fpcompile.scheduler.policy import KeyedPolicy
from fpcompile.scheduler.simulator import simulate
from fpcompile.scheduler.synthetic import synthetic_trace
from fpcompile.scheduler.workload import requests_at

POLICIES = "fcfs,edf,s-edf,srpt,wfq,flowprefill,fpcompile"
LIMITS_US = {("keyed", 100): 20.0, ("keyed", 10_000): 60.0, ("fpcompile", 100): 200.0}
SIMULATED_PER_SECOND = 10_000


class Load:
    """Keeps a core busy with ``waiting`` requests in the queue, none of which is ever late."""

    def __init__(self, policy: str, waiting: int, seed: int = 1) -> None:
        self.table = cost_profile()
        self.core = Scheduler(policy, predictor=CostPredictor(self.table))
        self.draw, self.now, self.count, self.flying = random.Random(seed), 0.0, 0, ""
        self.times: list[float] = []
        self.horizon = 0.2 * waiting + 10.0
        for _ in range(waiting + 1):
            self.send(self.arrival())
        self.times.clear()

    def arrival(self) -> Arrival:
        tokens = self.draw.choice((60, 400, 900, 2000, 6000))
        slo = self.horizon * self.draw.uniform(1.0, 2.0)
        name = f"r{self.count}"
        self.count += 1
        cost = self.table.seconds(tokens)
        return Arrival(self.now, Request(name, self.now, self.now + slo, tokens, cost, slo=slo, klass="x"))

    def send(self, event: Event) -> None:
        begin = time.perf_counter_ns()
        commands = self.core.handle(event)
        self.times.append((time.perf_counter_ns() - begin) / 1e3)
        for command in commands:
            if isinstance(command, Launch):
                self.flying = command.run
            elif isinstance(command, Pause):
                run, self.flying = self.flying, ""
                self.send(Yielded(self.now, run))

    def turn(self) -> None:
        self.now += 0.001
        self.send(self.arrival())
        self.now += 0.001
        run, self.flying = self.flying, ""
        self.send(Completed(self.now, run))


def measure(policy: str, waiting: int, turns: int) -> dict[str, float | int | str]:
    """Median, mean and 99th percentile of the cost of one event, in microseconds."""
    load = Load(policy, waiting)
    for _ in range(turns):
        load.turn()
    times = sorted(load.times)
    return {
        "policy": policy,
        "waiting": waiting,
        "events": len(times),
        "median_us": statistics.median(times),
        "mean_us": statistics.fmean(times),
        "p99_us": times[int(0.99 * len(times))],
    }


def simulator_speed(policy: str, count: int = 3000) -> dict[str, float | int | str]:
    """Requests simulated per second of wall time, at 0.8 of the capacity; the best of three."""
    table, rows = cost_profile(), synthetic_trace(count, seed=1)
    rate = 0.8 * count / sum(table.seconds(row.tokens) for row in rows)
    requests = requests_at(rows, rate, table, {klass: slo for klass, (slo, _) in SLO_TABLE.items()})
    best, peak = 0.0, 0
    for _ in range(3):
        begin = time.perf_counter()
        peak = simulate(policy, requests, table).peak_waiting
        best = max(best, count / (time.perf_counter() - begin))
    return {"policy": policy, "requests_per_second": best, "peak_waiting": peak}


class Nothing:
    """A program and its run in one: ``count`` segments that do nothing, for the engine."""

    rows, tokens, live_bytes, kv_bytes, name, index = 1, 1, 0, 0, "nothing", 0

    def __init__(self, count: int) -> None:
        import torch

        self.device, self.segments, self.left = torch.device("cpu"), (self,), count
        self.cursor, self.next_segment = 0, self

    @property
    def done(self) -> bool:
        return not self.left

    def step(self) -> None:
        self.left -= 1

    def start(self, input_ids: Any, **kwargs: Any) -> Any:
        return self

    def predict(self, **sizes: Any) -> float:
        return 1.0

    def segment_seconds(self, index: int, **sizes: Any) -> float:
        return 1.0

    def result(self) -> None:
        return None

    suspend = release = result


def stop_point_us(count: int = 200_000) -> float:
    """Microseconds that the engine adds at a cut where nobody stops; the least of five."""
    from fpcompile.engine.engine import Engine

    least = float("inf")
    for _ in range(5):
        bare = Nothing(count)
        begin = time.perf_counter()
        while not bare.done:
            bare.step()
        middle = time.perf_counter()
        with Engine(Nothing(count), device_thread=False, record_timeline=False) as engine:
            engine.submit([1])
            began = time.perf_counter()
            while engine.turn(None):
                pass
            engined = time.perf_counter() - began
        least = min(least, (engined - (middle - begin)) / count)
    return 1e6 * least


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--waiting", default="100,10000")
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    rows, failed = [], False
    print(f"{'policy':16} {'waiting':>8} {'median us':>10} {'mean us':>9} {'p99 us':>9}  limit")
    for policy in options.policies.split(","):
        for waiting in map(int, options.waiting.split(",")):
            turns = (
                max(20, options.turns // 50) if policy == "fpcompile" and waiting > 1000 else options.turns
            )
            row = measure(policy, waiting, turns)
            kind = "keyed" if isinstance(Load(policy, 1).core.policy, KeyedPolicy) else policy
            limit = LIMITS_US.get((kind, waiting))
            failed |= limit is not None and float(row["median_us"]) > limit
            rows.append(row)
            figures = f"{row['median_us']:10.1f} {row['mean_us']:9.1f} {row['p99_us']:9.1f}"
            print(f"{policy:16} {waiting:8d} {figures}  {'-' if limit is None else f'{limit:.0f} us'}")
    print(f"\n{'policy':16} {'simulated requests/s':>21} {'most waiting':>13}  limit")
    speeds = [simulator_speed(policy) for policy in options.policies.split(",")]
    for row in speeds:
        keyed = isinstance(Load(str(row["policy"]), 1).core.policy, KeyedPolicy)
        failed |= keyed and float(row["requests_per_second"]) < SIMULATED_PER_SECOND
        figures = f"{row['requests_per_second']:21.0f} {row['peak_waiting']:13d}"
        print(f"{row['policy']:16} {figures}  {SIMULATED_PER_SECOND if keyed else '-'}")
    check = stop_point_us()
    print(f"\na cut where nobody stops: {check:.2f} us")
    load = os.getloadavg()
    print(f"\nload average {load[0]:.2f} on {os.cpu_count()} processors")
    if options.json:
        report = {"decisions": rows, "simulator": speeds, "stop_point_us": check, "load_average": list(load)}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(options.check and failed)


if __name__ == "__main__":
    sys.exit(main())

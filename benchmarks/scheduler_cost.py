"""Cost of one scheduling decision, with a given number of requests waiting.

    python benchmarks/scheduler_cost.py [--policies s-edf,fpcompile] [--waiting 100,10000] [--check]

The core is filled with requests, then fed arrivals and completions in turn, so that the queue keeps its
length; each ``handle`` call is timed by itself. Limits: 20 us with 100 waiting and 60 us with 10,000 for
keyed policies. `fpcompile` looks at every request that is not late: 200 us with 100 waiting, no limit beyond.
``--check`` exits with 1 when a median exceeds its limit.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from fpcompile.scheduler import (
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

POLICIES = "fcfs,edf,s-edf,srpt,wfq,flowprefill,fpcompile"
LIMITS_US = {("keyed", 100): 20.0, ("keyed", 10_000): 60.0, ("fpcompile", 100): 200.0}


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
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(options.check and failed)


if __name__ == "__main__":
    sys.exit(main())

"""Replay of a recorded log: do the decisions agree, and what would another policy or load have done?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from fpcompile.scheduler import (
    CostPredictor,
    CostTable,
    Scheduler,
    load_costs,
    make_policy,
    profile,
)
from fpcompile.scheduler.events import Request
from fpcompile.scheduler.goodput import attainment, percentile
from fpcompile.scheduler.options import make_options
from fpcompile.scheduler.policy import Grain, StepPolicy
from fpcompile.scheduler.record import differences, measured_costs, outcomes_of, read_log, requests_of
from fpcompile.scheduler.simulator import Outcome, Simulator
from fpcompile.scheduler.timeline import Timelines

__all__ = ["replay_table"]


def replay_table(
    path: str | Path,
    policy: str | None = None,
    rate_scale: float = 1.0,
    costs: str | Path | None = None,
    **changes: Any,
) -> tuple[Table, bool]:
    """What was recorded, and the recorded policy and ``policy`` simulated; whether the decisions agree.

    ``changes``: scheduler options that the simulations have in place of the recorded ones.
    Each request costs what it was measured to cost; a request that never completed, or was packed with
    others, costs what was predicted. Packs are predicted from these costs. What was measured holds the chunks
    and stop points of the recorded policy: the simulations charge it, times what the cost table says for
    another policy's over the recorded one's.
    """
    log = read_log(path)
    table = load_costs(costs) if costs is not None else profile()
    found = differences(log, CostPredictor(table))
    measured = measured_costs(log)
    requests = requests_of(log, rate_scale)

    executed = _execution(log.policy, table)

    def slowdown(request: Request) -> float:
        return measured.get(request.id, request.cost) / executed(request.tokens)

    predictor = CostPredictor(table)
    for request in requests:
        if (factor := slowdown(request)) > 0:
            predictor.correct(request.tokens, factor * table.seconds(request.tokens))

    shown = Table(title=f"{Path(path).name}: {len(requests)} requests, {len(log.steps)} decisions")
    for head in ("policy", "class", "attainment", "TTFT p50 (s)", "TTFT p99 (s)", "rejected"):
        shown.add_column(head, justify="left" if head in ("policy", "class") else "right")
    _rows(shown, f"recorded: {log.policy}", outcomes_of(log))
    for name in dict.fromkeys((log.policy, policy or log.policy)):
        options = make_options(make_options(None, log.options), changes)
        core = Scheduler(name, predictor=predictor, options=options)
        result = Simulator(name, table, core=core, slowdown=slowdown, learnt=True).run(requests)
        _rows(shown, f"simulated: {name}", result.outcomes)
    agreed = "identical" if not found else f"{len(found)} differ, the first: {found[0]}"
    torn = "; the last line breaks off and was left out" if log.torn else ""
    shown.caption = f"decisions replayed with {log.policy}: {agreed}{torn}"
    return shown, not found


def _execution(policy: str, table: CostTable) -> Callable[[int], float]:
    """What the table says for a prompt alone under ``policy``: its chunks, and the stop points it passes.

    For a policy that composes steps that of the whole prompt: what it predicts is not in slices, and no
    request of it is measured alone.
    """
    chosen = make_policy(policy)
    timelines = Timelines(table, Grain("model") if isinstance(chosen, StepPolicy) else chosen.grain)
    return lambda tokens: timelines.of([tokens]).length


def _rows(shown: Table, name: str, outcomes: list[Outcome]) -> None:
    met = attainment(outcomes)
    for klass, value in met.by_class.items():
        mine = [outcome for outcome in outcomes if outcome.request.klass == klass]
        times = [outcome.ttft for outcome in mine if outcome.ttft is not None]
        shown.add_row(
            name,
            klass or "(none)",
            f"{100 * value:.1f} %",
            f"{percentile(times, 50) or 0:.3f}",
            f"{percentile(times, 99) or 0:.3f}",
            str(sum(outcome.ttft is None for outcome in mine)),
        )

"""A measurement beside its simulation: crossings, differences and verdicts from given outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fpcompile.scheduler.simulator import Outcome
from fpcompile.scheduler.sweep import CellKey
from fpcompile.serving.bench_compare import Compared, compare, comparison_markdown, crossing
from tests.pure.scheduler.driver import job


def test_a_crossing_is_linear_between_rates() -> None:
    assert crossing([(1, 1.0), (2, 0.8)], 0.9) == pytest.approx(1.5)
    assert crossing([(2, 0.8), (1, 1.0), (3, 1.0), (4, 0.0)], 0.9) == pytest.approx(1.5), "the first one"
    assert crossing([(1, 0.9), (2, 0.9)], 0.9) is None
    assert crossing([(1, 0.5), (2, 0.95), (3, 0.5)], 0.9) is None, "it starts below"


def outcomes(ttfts: Sequence[float | None]) -> list[Outcome]:
    """Requests with an SLO of 1 s."""
    jobs = [job(f"r{i}", float(i), i + 1.0, 0.1, klass="x") for i in range(len(ttfts))]
    return [Outcome(one, ttft, None, 0) for one, ttft in zip(jobs, ttfts, strict=True)]


def report_of(real: list[float], simulated: list[float]) -> dict[str, Any]:
    """Points at rates 1, 2 with these attainments of the worst class."""

    def policies(values: list[float]) -> dict[str, Any]:
        points = [{"rate": float(rate), "worst": value} for rate, value in enumerate(values, 1)]
        return {"policies": {"p": {"max_goodput": 1.0, "points": points}}}

    head = {"model": "M", "parameters": 1, "dtype": "d", "length_scale": 1, "num_prompts": 2, "pace": [1.0]}
    more = {"capacity": 2.0, "target": 0.9, "slos": {"x": 1.0}, "slo_multiples": {"x": 5.0}}
    return {**head, **more, **policies(real), "simulated": policies(simulated)}


def test_agreement_is_judged_at_low_loads_and_at_the_crossing() -> None:
    report = report_of([1.0, 0.8], [1.0, 0.79])
    good, bad = outcomes([0.5] * 50), outcomes([0.5] * 40 + [2.0] * 10)
    alike = compare(report, [Compared(CellKey("p", 1.0, 1), good, outcomes([0.55] * 50), good)])
    assert set(alike["within"].values()) == {True}
    assert alike["goodput"]["p"]["ratio"] == pytest.approx((1 + 0.1 / 0.21) / 1.5)
    row = alike["rows"][0]
    assert (row["load"], row["overall_difference"], row["ttft_ratio"]) == (0.5, 0.0, pytest.approx(1.1))
    assert row["mean_ttft_repeated"] == row["mean_ttft"]
    worse = compare(report, [Compared(CellKey("p", 1.0, 1), good, bad)])
    assert worse["rows"][0]["mean_ttft_repeated"] is None, "requests shared the device"
    assert worse["rows"][0]["class_difference"] == {"x": pytest.approx(-0.2)}
    assert [worse["within"][name] for name in ("attainment", "attainment_of_every_class", "mean_ttft")] == [
        False,
        False,
        False,
    ]
    high = compare(report, [Compared(CellKey("p", 1.8, 1), good, bad)])
    assert not high["within"]["attainment"], "nothing was measured where it counts"
    report["comparison"] = alike
    assert "mean ttft yes" in comparison_markdown(report)


def test_a_rate_at_which_nobody_was_served_is_compared_too() -> None:
    report = report_of([0.0, 0.0], [0.0, 0.0])
    nobody = outcomes([None] * 5)
    found = compare(report, [Compared(CellKey("p", 1.0, 1), nobody, nobody, nobody)])
    assert [found["rows"][0][key] for key in ("mean_ttft", "ttft_ratio", "mean_ttft_repeated")] == [None] * 3
    assert not found["within"]["mean_ttft"]
    report["comparison"] = found
    assert "| - | - | - |" in comparison_markdown(report)


def test_goodputs_that_never_cross_are_not_called_equal() -> None:
    same = outcomes([0.5])
    found = compare(report_of([1.0, 1.0], [1.0, 0.5]), [Compared(CellKey("p", 1.0, 1), same, same)])
    assert found["goodput"]["p"]["ratio"] is None
    assert not found["within"]["goodput"]

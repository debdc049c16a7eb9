"""Golden decisions of each order's rule, ties included."""

from __future__ import annotations

import random
from math import inf

import pytest

from fpcompile.scheduler import Arrival, Completed, Launch, Pause, Request, Scheduler, Yielded, make_policy
from fpcompile.scheduler.job import Job
from fpcompile.scheduler.policies.orders import SlackEdf, Wfq
from fpcompile.scheduler.policy import KeyedPolicy
from fpcompile.scheduler.queue import KeyedQueue


def key(spec: str, now: float, *, due: float, left: float) -> object:
    policy = make_policy(spec)
    assert isinstance(policy, KeyedPolicy)
    return policy.key(Job(Request("x", 0.0, due, 10, left), 0), now)


def published_priority(now: float, due: float, left: float) -> float:
    """S-EDF as written down: sgn(slack) / D, sgn(0) = -1, highest first."""
    slack = (due - now) - max(left, 0.0)
    return (1.0 if slack > 0 else -1.0) / due


def test_s_edf_orders_as_the_published_formula_does() -> None:
    cases = [
        (due, left) for due in (0.5, 1.0, 2.0, 4.0, 8.0) for left in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 9.0)
    ]
    for now in (0.0, 0.25, 0.5, 1.0, 3.0):
        ours = sorted(cases, key=lambda c: key("s-edf", now, due=c[0], left=c[1]))  # type: ignore[arg-type,return-value]
        theirs = sorted(cases, key=lambda c: -published_priority(now, *c))
        assert ours == theirs


def test_s_edf_zero_slack_counts_as_late() -> None:
    assert key("s-edf", 1.0, due=3.0, left=1.5) == (0, 3.0)
    assert key("s-edf", 1.5, due=3.0, left=1.5) == (1, -3.0)
    assert key("s-edf", 1.0, due=inf, left=1.5) == (0, inf)


def run_all(spec: str, requests: list[Request]) -> list[str]:
    """Feed everything at its arrival, acknowledge pauses at once; the log of commands and ends."""
    core = Scheduler(spec)
    log: list[str] = []
    pending = sorted(requests, key=lambda r: r.arrival)
    now, flying, left = 0.0, "", {r.id: r.cost for r in requests}
    while pending or flying:
        ends = now + left[flying] if flying else inf
        if pending and pending[0].arrival <= ends:
            at = pending[0].arrival
            if flying:
                left[flying] -= at - now
            now = at
            batch = [r for r in pending if r.arrival == at]
            del pending[: len(batch)]
            commands = core.handle_all([Arrival(now, r) for r in batch])
        else:
            now, done, flying = ends, flying, ""
            log.append(f"{now:g} done {done}")
            commands = core.handle(Completed(now, done))
        while commands:
            core.validate()
            command = commands[0]
            if isinstance(command, Pause):
                log.append(f"{now:g} pause {command.run}")
                commands = core.handle(Yielded(now, flying, left[flying]))
                flying = ""
            else:
                assert isinstance(command, Launch)
                log.append(f"{now:g} launch {command.run}")
                flying, commands = command.run, ()
    return log


def test_s_edf_golden_log_feasible_first_then_late_by_latest_deadline() -> None:
    requests = [
        Request("long", 0.0, 12.0, 10, 8.0),
        Request("urgent", 1.0, 2.5, 10, 1.0),
        Request("hopeless", 1.0, 3.0, 10, 4.0),
        Request("worse", 1.0, 2.0, 10, 4.0),
        Request("later", 1.5, 11.75, 10, 1.0),
    ]
    assert run_all("s-edf", requests) == [
        "0 launch long",
        "1 pause long",
        "1 launch urgent",
        "2 done urgent",
        "2 launch later",
        "3 done later",
        "3 launch long",
        "10 done long",
        "10 launch hopeless",
        "14 done hopeless",
        "14 launch worse",
        "18 done worse",
    ]


def test_a_feasible_request_becomes_late_while_it_waits_and_loses_its_place() -> None:
    requests = [
        Request("a", 0.0, 4.0, 10, 3.0),
        Request("b", 0.0, 4.5, 10, 2.0),
        Request("c", 0.0, 30.0, 10, 2.0),
    ]
    log = run_all("s-edf", requests)
    assert [line for line in log if "launch" in line] == ["0 launch a", "3 launch c", "5 launch b"]


@pytest.mark.parametrize("spec", ["fcfs", "edf", "s-edf", "srpt", "priority"])
def test_ties_go_by_arrival_then_by_sequence(spec: str) -> None:
    requests = [Request(name, 0.0, 9.0, 10, 1.0) for name in ("first", "second", "third")]
    log = run_all(spec, requests)
    assert [line.split()[-1] for line in log if "launch" in line] == ["first", "second", "third"]
    assert not [line for line in log if "pause" in line], "an equal key does not preempt"


def test_the_other_orders() -> None:
    requests = [
        Request("a", 0.0, 9.0, 10, 4.0, priority=1),
        Request("b", 1.0, 3.5, 10, 3.5, priority=0),
        Request("c", 2.0, 8.0, 10, 1.0, priority=5),
    ]

    def launches(spec: str) -> list[str]:
        return [line.split()[-1] for line in run_all(spec, requests) if "launch" in line]

    assert launches("fcfs") == ["a", "b", "c"]
    assert launches("edf") == ["a", "b", "c", "a"]
    assert launches("srpt") == ["a", "c", "a", "b"]
    assert launches("priority") == ["a", "c", "a", "b"]
    assert launches("s-edf") == ["a", "c", "a", "b"]


def test_the_queue_gives_its_order_lazily_and_skips_what_has_left_or_changed() -> None:
    draw = random.Random(2)
    queue = KeyedQueue(SlackEdf())
    jobs = [Job(Request(f"r{i}", 0.0, draw.randint(1, 30), 10, draw.randint(1, 9)), i) for i in range(300)]
    for job in jobs:
        queue.add(job, 0.0)
    for job in jobs[::3]:
        queue.remove(job)
    for job in jobs[::6]:
        queue.add(job, 5.0)
    live = [job for index, job in enumerate(jobs) if index % 3 or index % 6 == 0]
    policy = SlackEdf()
    expected = sorted(live, key=lambda job: (policy.key(job, 9.0), 0.0, job.sequence))
    assert [job.id for job in queue.ordered(9.0)] == [job.id for job in expected]
    assert next(queue.ordered(9.0)) is queue.best(9.0)


def test_wfq_shares_between_tenants_and_keeps_no_credit() -> None:
    flood = [Request(f"f{i}", 0.0, 99.0, 10, 1.0, tenant="flood") for i in range(4)]
    other = [Request(f"o{i}", 2.5, 99.0, 10, 1.0, tenant="other") for i in range(2)]
    log = run_all("wfq", [*flood, *other])
    assert [line.split()[-1] for line in log if "done" in line] == ["f0", "f1", "f2", "o0", "f3", "o1"]
    log = run_all("wfq:other=2", [*flood, *other])
    assert [line.split()[-1] for line in log if "done" in line] == ["f0", "f1", "f2", "o0", "o1", "f3"]


def test_wfq_pauses_a_long_prompt_as_often_as_the_share_of_the_others_allows() -> None:
    """Tenant `b` overtakes the 4 s of `a` until it would have had more than that."""
    long = Request("long", 0.0, 99.0, 10, 4.0, tenant="a")
    short = [Request(f"s{i}", 0.0, 99.0, 10, 0.75, tenant="b") for i in range(8)]
    done = [line.split()[-1] for line in run_all("wfq", [long, *short]) if "done" in line]
    assert done == ["s0", "s1", "s2", "s3", "s4", "long", "s5", "s6", "s7"]  # 5 x 0.75 < 4 < 6 x 0.75
    done = [line.split()[-1] for line in run_all("wfq:a=2", [long, *short]) if "done" in line]
    assert done == ["s0", "s1", "long", *(f"s{i}" for i in range(2, 8))]


def test_wfq_virtual_time_goes_on_by_the_weights_of_who_has_work() -> None:
    policy = Wfq(b=3.0)
    a, b = (Job(Request(name, 0.0, 99.0, 10, 4.0, tenant=name), i) for i, name in enumerate("ab"))
    policy.arrived(a, 0.0)
    policy.arrived(b, 2.0)  # virtual time 2: a alone
    assert (policy.key(a, 2.0), policy.key(b, 2.0)) == (4.0, 2.0 + 4 / 3)
    policy.ended(a, None, 6.0)  # 3: a quarter as fast
    policy.ended(b, None, 9.0)  # 4: a third
    late = Job(Request("c", 50.0, 99.0, 10, 4.0, tenant="c"), 2)
    policy.arrived(late, 50.0)  # nobody had work meanwhile
    assert policy.key(late, 50.0) == 4.0 + 4.0


def test_wfq_looks_at_all_tenants_once_in_a_while_only() -> None:
    policy = make_policy("wfq")
    assert isinstance(policy, Wfq)
    rebuilt, before = 0, policy._finish
    for i in range(20_000):
        policy.arrived(Job(Request(f"r{i}", 0.0, 9.0, 10, 1.0, tenant=f"t{i}"), i), 0.0)
        rebuilt += policy._finish is not before
        before = policy._finish
    assert len(policy._finish) == 20_000, "all of them have work"
    assert rebuilt <= 4


def test_what_has_left_the_queue_is_not_kept_until_its_key_would_expire() -> None:
    queue = KeyedQueue(SlackEdf())
    for i in range(2000):
        job = Job(Request(f"r{i}", 0.0, 1e6, 10, 1.0), i)
        queue.add(job, 0.0)
        assert queue.best(0.0) is job
        queue.remove(job)
    assert len(queue._heap) <= 65
    assert len(queue._expiry) <= 65
    queue.validate()

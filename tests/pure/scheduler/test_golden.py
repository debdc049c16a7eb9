"""One scenario, every policy: the whole log of decisions, checked by hand against each policy's rule.

The device has 4 layers of 2 operators and needs 10 ms per token, nothing else. `long` runs when `x` and `y`
arrive together, alike in everything (ties go by order of arrival); `late` cannot be in time even alone.

What to look for: `edf` serves the hopeless one first, `s-edf` last. `chunked:100` and `layered:2` stop at
1 s and 2 s, operators at 0.5 s, tiles at once. `vllm:100,60` gives the started ones their slices first. The
published batching packs `x` and `y`. `wfq` lets tenant `b` overtake while its share lasts. `fpcompile` gives
`late` two turns of what it has earned, and goes on with what has a promise.
"""

from __future__ import annotations

import pytest

from fpcompile.scheduler import Command, Completed, CostTable, Event, Launch, Pause, Request, policy_names
from fpcompile.scheduler.simulator import Simulator

TABLE = CostTable.from_segments(
    [(f"layers.{layer}.{name}", (0.0, 0.00125, 0.0)) for layer in range(4) for name in ("attention", "mlp")]
)

REQUESTS = [
    Request("long", 0.0, 9.0, 400, 4.0, slo=9.0, tenant="a", klass="slow", priority=0),
    Request("x", 0.3, 2.3, 60, 0.6, slo=2.0, tenant="b", klass="quick", priority=1),
    Request("y", 0.3, 2.3, 60, 0.6, slo=2.0, tenant="b", klass="quick", priority=1),
    Request("late", 0.4, 0.9, 100, 1.0, slo=0.5, tenant="b", klass="quick", priority=1),
]

GOLDEN: dict[str, str] = {
    "fcfs": """
        0 launch long
        4 done long
        4 launch x
        4.6 done x
        4.6 launch y
        5.2 done y
        5.2 launch late
        6.2 done late
    """,
    "edf": """
        0 launch long
        0.3 pause long
        0.5 launch late
        1.5 done late
        1.5 launch x
        2.1 done x
        2.1 launch y
        2.7 done y
        2.7 launch long
        6.2 done long
    """,
    "s-edf": """
        0 launch long
        0.3 pause long
        0.5 launch x
        1.1 done x
        1.1 launch y
        1.7 done y
        1.7 launch long
        5.2 done long
        5.2 launch late
        6.2 done late
    """,
    "srpt": """
        0 launch long
        0.3 pause long
        0.5 launch x
        1.1 done x
        1.1 launch y
        1.7 done y
        1.7 launch late
        2.7 done late
        2.7 launch long
        6.2 done long
    """,
    "priority": """
        0 launch long
        0.3 pause long
        0.5 launch x
        1.1 done x
        1.1 launch y
        1.7 done y
        1.7 launch late
        2.7 done late
        2.7 launch long
        6.2 done long
    """,
    "wfq": """
        0 launch long
        0.3 pause long
        0.5 launch x
        1.1 done x
        1.1 launch y
        1.7 done y
        1.7 launch late
        2.7 done late
        2.7 launch long
        6.2 done long
    """,
    "chunked:100": """
        0 launch long
        4 done long
        4 launch x
        4.6 done x
        4.6 launch y
        5.2 done y
        5.2 launch late
        6.2 done late
    """,
    "chunked:100,edf": """
        0 launch long
        0.3 pause long
        1 launch late
        2 done late
        2 launch x
        2.6 done x
        2.6 launch y
        3.2 done y
        3.2 launch long
        6.2 done long
    """,
    "vllm:100,60": """
        0 launch long 60
        0.6 launch long+x 60+40
        1.6 launch long+x+y 60+20+20
        2.6 launch long+y 60+40
        3.6 launch long+late 60+40
        4.6 launch long+late 60+40
        5.6 launch long+late 40+20
        6.2 done long
    """,
    "layered:2,edf": """
        0 launch long
        0.3 pause long
        2 launch late
        3 done late
        3 launch x
        3.6 done x
        3.6 launch y
        4.2 done y
        4.2 launch long
        6.2 done long
    """,
    "flowprefill-published": """
        0 launch long
        0.3 pause long
        0.5 launch x+y
        1.7 done x
        1.7 launch long
        5.2 done long
        5.2 launch late
        6.2 done late
    """,
    "flowprefill": """
        0 launch long
        0.3 pause long
        0.5 launch x+y
        1.7 done x
        1.7 launch long
        5.2 done long
        5.2 launch late
        6.2 done late
    """,
    "fpcompile": """
        0 launch long
        0.3 pause long
        0.3 launch x
        0.9 done x
        0.9 launch late
        0.93 pause late
        0.93 launch y
        1.53 done y
        1.53 launch late
        1.5615 pause late
        1.562 launch long
        5.262 done long
        5.262 launch late
        6.2 done late
    """,
}


def log_of(policy: str) -> list[str]:
    """Ends, launches and pauses in order; ``launch`` names the members, and their slices of tokens."""
    log: list[str] = []

    def see(event: Event, commands: tuple[Command, ...]) -> None:
        if isinstance(event, Completed):
            log.append(f"{event.time:g} done {event.run}")
        for command in commands:
            if isinstance(command, Launch):
                slices = "" if command.tokens is None else " " + "+".join(map(str, command.tokens))
                log.append(f"{event.time:g} launch {'+'.join(command.requests)}{slices}")
            elif isinstance(command, Pause):
                log.append(f"{event.time:g} pause {command.run}")

    Simulator(policy, TABLE, log=see).run(REQUESTS)
    return log


@pytest.mark.parametrize("policy", GOLDEN)
def test_the_decisions_are_those_of_the_rule(policy: str) -> None:
    assert log_of(policy) == [line.strip() for line in GOLDEN[policy].strip().splitlines()]


def test_every_policy_has_a_golden_log() -> None:
    shipped = {name for name in policy_names() if not name.startswith("test-")}  # tests register their own
    assert {spec.partition(":")[0] for spec in GOLDEN} == shipped

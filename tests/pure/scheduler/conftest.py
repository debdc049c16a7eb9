"""Whatever drives a core in these tests, its invariants are checked after every call.

Not in tests marked slow, which handle hundreds of thousands of events: those check what they are about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from fpcompile.scheduler import Command, Event, Scheduler


@pytest.fixture(autouse=True)
def _validated(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("slow") is not None:
        yield
        return
    handle_all = Scheduler.handle_all

    def checked(core: Scheduler, events: Iterable[Event]) -> tuple[Command, ...]:
        commands = handle_all(core, events)
        core.validate()
        return commands

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "handle_all", checked)
        yield

"""The parts of the Ray Serve example that need no Ray: what calls that fail or overtake each other do."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fpcompile.errors import RequestCancelledError
from fpcompile.serving.server.messages import Ended, Facts, Generate, Sampling, Terms
from fpcompile.serving.server.metrics import newer
from fpcompile.serving.server.streams import EngineGoneError, RefusedError

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve" / "app.py"


class Call:
    """A method of a replica's handle."""

    def __init__(self, function: Any) -> None:
        self.remote = function

    def options(self, **given: Any) -> Call:
        return self


class Remote:
    """A replica that answers as a test says."""

    def __init__(self, blocking: Sequence[Sequence[float]] = (), error: Exception | None = None) -> None:
        self.cancelled: list[str] = []
        self._blocking, self._error = list(blocking), error
        self.about, self.ask = Call(self._about), Call(self._ask)
        self.answer, self.cancel = Call(self._answer), Call(self.cancelled.append)

    async def _about(self) -> Any:
        if self._error is not None:
            raise self._error
        return {"tiny": Facts("generate", 260, 64)}, {"tiny": [0.1, 0.2, 0.3]}

    async def _ask(self, about: str) -> Any:
        return {"running": 1, "kv_usage": None, "blocking": tuple(self._blocking.pop(0))}

    async def _answer(self, ask: Generate) -> Any:
        await asyncio.Event().wait()
        yield 1


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a Ray that hands out :class:`Remote`."""
    ray: Any = ModuleType("ray")
    ray.serve = SimpleNamespace(get_deployment_handle=lambda name, app_name: ray.replicas[name])
    ray.replicas = {}
    monkeypatch.setitem(sys.modules, "ray", ray)
    spec = importlib.util.spec_from_file_location("ray_serve_app", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _ask(name: str = "r", timeout: float | None = None) -> Generate:
    return Generate(name, "tiny", (1,), 3, Sampling(), Terms(time.monotonic(), timeout=timeout))


async def _engines(example: Any, **replicas: Remote) -> Any:
    example.ray.replicas.update(replicas)
    engines = example.RayEngines(list(replicas))
    engines.start()
    await engines.settled()
    return engines


def test_a_replica_that_cannot_start_is_told(example: Any) -> None:
    async def scene() -> None:
        engines = await _engines(example, a=Remote(), b=Remote(error=RuntimeError("no weights")))
        assert engines.state == "gone"
        assert "no weights" in engines.unready
        for call in (engines.ask("health"), asyncio.to_thread(engines.submit, _ask())):
            with pytest.raises(EngineGoneError, match="no weights"):
                await call

    asyncio.run(scene())


def test_blocking_times_of_replicas_are_one_growing_series(example: Any) -> None:
    readings: dict[str, Sequence[Sequence[float]]] = {
        "a": [(1.0, 2.0), (2.0, 3.0), (2.0, 3.0)],
        "b": [(7.0, 8.0, 9.0), (7.0, 8.0, 9.0), (8.0, 9.0, 10.0)],
    }

    async def scene() -> list[float]:
        engines = await _engines(example, **{name: Remote(blocking) for name, blocking in readings.items()})
        counted: list[float] = []
        before: Sequence[float] = ()
        for _ in range(3):
            now = (await engines.ask("statistics"))["blocking"]
            counted += newer(before, now)
            before = now
        return counted

    assert asyncio.run(scene()) == [1.0, 2.0, 7.0, 8.0, 9.0, 3.0, 10.0]


def test_who_goes_or_is_late_is_not_live(example: Any) -> None:
    async def scene() -> None:
        remote = Remote()
        engines = await _engines(example, a=remote)
        gone = engines.submit(_ask("gone"))
        late = engines.submit(_ask("late", timeout=0.01))
        assert engines.live == 2
        gone.cancel()
        with pytest.raises(RefusedError) as caught:
            await late.end()
        assert caught.value.refused.because == "timeout"
        assert (engines.live, remote.cancelled) == (0, ["gone", "late"])
        for task in list(engines._tasks):
            task.cancel()

    asyncio.run(scene())


class Handle:
    """Of a request that runs until it is cancelled."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.metrics = SimpleNamespace(
            state="cancelled", arrival=0.0, ended=1.0, queued=None, ttft=None, suspended=0.0, executed=0.0,
            predicted_ttft=0.1, preemptions=0, slo_met=None, numerics="bits", finish_reason=None,
        )  # fmt: skip

    def cancel(self) -> None:
        self.cancelled.set()

    async def __aiter__(self) -> Any:
        await self.cancelled.wait()
        for error in (RequestCancelledError("r"),):
            raise error
        yield 1


@pytest.mark.parametrize("early", [True, False])
def test_a_cancellation_that_overtakes_its_request_is_not_lost(
    example: Any, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fpcompile.serving.server.build.build",
        lambda settings: SimpleNamespace(generate=lambda ask: Handle()),
    )

    async def scene() -> None:
        replica = example.Replica(None)
        if early:
            await replica.cancel("r")

        async def read() -> list[Any]:
            return [message async for message in replica.answer(_ask())]

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        if not early:
            await replica.cancel("r")
        (last,) = await asyncio.wait_for(reading, 10)
        assert isinstance(last, Ended)
        assert last.finish_reason is None
        assert not replica._handles
        assert not replica._withdrawn

    asyncio.run(scene())

"""Several devices behind one address with Ray Serve: routing by predicted work.

    pip install 'fpcompile[serve]' 'ray[serve]' openai
    python examples/ray_serve/app.py                 # two CPU replicas of a built-in model, a few requests
    python examples/ray_serve/app.py --stay --port 8000 --replicas 4 --model org/model

Each replica is a Ray actor with an engine of its own. In front is fpcompile's own server, tokenising and
streaming in another actor: it is given :class:`RayEngines` where it otherwise has a worker behind a pipe. A
request goes to the replica with the least predicted work left: each replica's own cost model says how long
prompts take, and what has been sent and not ended is added up.

A generation stays on the replica where it began. A replica that dies gives its clients an error; Ray starts
another one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, final

import ray
from ray import serve

from fpcompile.errors import RequestCancelledError
from fpcompile.serving.server.app import make_app
from fpcompile.serving.server.engines import State
from fpcompile.serving.server.messages import Embed, Ended, Facts, Generate, Refused, Subject
from fpcompile.serving.server.metrics import newer
from fpcompile.serving.server.models import parse_models
from fpcompile.serving.server.settings import EngineSettings, ServerSettings
from fpcompile.serving.server.streams import EngineGoneError, RefusedError, Stream, Watch
from fpcompile.serving.server.worker import record_of, refusal_of

APP = "fpcompile"
LENGTHS = (16, 256, 2048)
REORDERED = 60.0  # seconds by which one call of a replica may overtake another
NEWEST = 4096  # blocking times that are kept


class Replica:
    """One engine on one device: what the server's worker does, as an actor."""

    def __init__(self, settings: EngineSettings) -> None:
        from fpcompile.serving.server.build import build

        self._backend = build(settings)
        self._handles: dict[str, Any] = {}
        self._withdrawn: dict[str, float] = {}
        """When requests were cancelled that were not known: their calls may come later."""

    async def about(self) -> tuple[dict[str, Facts], dict[str, list[float]]]:
        """The models, and the predicted seconds of prompts of :data:`LENGTHS` tokens."""
        costs = {
            name: [program.predict(tokens=tokens) for tokens in LENGTHS]
            for name, program in self._backend.programs.items()
        }
        return dict(self._backend.facts), costs

    async def answer(self, ask: Generate | Embed) -> AsyncIterator[int | Ended | Refused]:
        """Tokens, then how it ended."""
        handle = None
        try:
            if isinstance(ask, Generate):
                handle = self._backend.generate(ask)
            else:
                handle = await asyncio.to_thread(self._backend.embed, ask)
            self._handles[ask.id] = handle
            if self._withdrawn.pop(ask.id, None) is not None:
                handle.cancel()
            if isinstance(ask, Generate):
                async for token in handle:
                    yield int(token)
                await handle
                yield Ended(ask.id, handle.metrics.finish_reason, record_of(handle.metrics))
            else:
                vector = self._backend.vector(ask.program, await handle)
                yield Ended(ask.id, "stop", record_of(handle.metrics), vector)
        except RequestCancelledError:
            assert handle is not None
            yield Ended(ask.id, None, record_of(handle.metrics))
        except Exception as error:
            yield refusal_of(ask.id, error, None if handle is None else record_of(handle.metrics))
        finally:
            if handle is not None:
                handle.cancel()
            self._handles.pop(ask.id, None)

    async def cancel(self, name: str) -> None:
        """End a request at the next cut, also one that is not here yet."""
        if (handle := self._handles.get(name)) is not None:
            handle.cancel()
            return
        now = time.monotonic()
        self._withdrawn = {n: when for n, when in self._withdrawn.items() if now - when < REORDERED}
        self._withdrawn[name] = now

    async def ask(self, about: Subject) -> Any:
        """As the worker's backend answers."""
        return getattr(self._backend, about)()


@final
class RayEngines:
    """Many replicas as the server's :class:`fpcompile.serving.server.engines.Engines`."""

    def __init__(self, names: Sequence[str], *, buffered: int = 4096) -> None:
        self.state: State = "starting"
        self.reason = "replicas are starting"
        self.unready: str | None = None
        self.facts: Mapping[str, Facts] = {}
        self.paused = False
        self.work = [0.0] * len(names)
        """Predicted seconds that each replica has not done yet."""
        self.sent = [0] * len(names)
        self._names, self._buffered = names, buffered
        self._streams: dict[str, Stream] = {}
        self._blocking: deque[float] = deque(maxlen=NEWEST)
        self._seen: list[Sequence[float]] = [() for _ in names]
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Ask the replicas what they have."""
        self._handles = [serve.get_deployment_handle(name, app_name=APP) for name in self._names]
        self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        try:
            found = await asyncio.gather(*(handle.about.remote() for handle in self._handles))
        except Exception as error:
            self.reason = self.unready = f"a replica cannot start: {type(error).__name__}: {error}"[:500]
            self.state = "gone"
            return
        self.facts = found[0][0]
        self._costs: list[dict[str, list[float]]] = [costs for _, costs in found]
        self.state, self.reason = "ready", ""

    async def settled(self) -> None:
        """Replicas have answered, or one of them has failed."""
        await self._starting

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def predicted(self, replica: int, ask: Generate | Embed) -> float:
        """Seconds of a prompt, between the lengths that the replica priced, and of its decode steps."""
        seconds = self._costs[replica][ask.program]
        points = list(zip(LENGTHS, seconds, strict=True))
        tokens = len(ask.ids)
        prompt = seconds[-1] * tokens / LENGTHS[-1]
        for (low, a), (high, b) in itertools.pairwise(points):
            if tokens <= high:
                prompt = max(a + (b - a) * (tokens - low) / (high - low), 0.0)
                break
        steps = ask.max_new_tokens - 1 if isinstance(ask, Generate) else 0
        return prompt + steps * seconds[0]

    def submit(self, ask: Generate | Embed, watch: Watch | None = None) -> Stream:
        """To the replica with the least predicted work left."""
        if self.state != "ready":
            raise EngineGoneError(self.reason)
        replica = min(range(len(self.work)), key=lambda i: self.work[i] + self.predicted(i, ask))
        stream = Stream(
            ask.id, bound=self._buffered, watch=watch, cancel=lambda name: self._cancel(replica, name)
        )
        self._streams[ask.id] = stream
        if (seconds := ask.terms.timeout) is not None:
            left = ask.terms.arrival + seconds - time.monotonic()
            stream.limit(left, f"the request has not ended within {seconds:g} s of its arrival")
        task = asyncio.create_task(self._follow(replica, ask, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def _cancel(self, replica: int, name: str) -> None:
        self._streams.pop(name, None)  # nobody waits for it: it is not live
        self._handles[replica].cancel.remote(name)

    async def _follow(self, replica: int, ask: Generate | Embed, stream: Stream) -> None:
        cost = self.predicted(replica, ask)
        self.work[replica] += cost
        self.sent[replica] += 1
        try:
            async for message in self._handles[replica].answer.options(stream=True).remote(ask):
                if isinstance(message, Ended):
                    stream.finish(message)
                elif isinstance(message, Refused):
                    stream.fail(RefusedError(message))
                else:
                    stream.put((message,))
        except Exception as error:
            stream.fail(EngineGoneError(f"the replica has failed: {type(error).__name__}"))
        finally:
            stream.fail(EngineGoneError("the replica broke off"))  # void when it has ended
            self.work[replica] = max(self.work[replica] - cost, 0.0)
            self._streams.pop(ask.id, None)

    def cancel_all(self, reason: str) -> None:
        """End everything."""
        for stream in list(self._streams.values()):
            stream.cancel()
            stream.fail(EngineGoneError(reason))

    async def ask(self, about: Subject, timeout: float = 2.0) -> Any:
        """Of all replicas: the worst health; statistics added up."""
        if self.state != "ready":
            raise EngineGoneError(self.reason)
        try:
            async with asyncio.timeout(timeout):
                answers = await asyncio.gather(*(handle.ask.remote(about) for handle in self._handles))
        except TimeoutError:
            raise
        except Exception as error:
            raise EngineGoneError(f"a replica does not answer: {type(error).__name__}") from error
        if about == "health":
            return next((answer for answer in answers if not answer[0]), answers[0])
        if about != "statistics":
            return None
        total = dict(answers[0])
        for other in answers[1:]:
            for name, value in other.items():
                if name in ("prediction_error", "kv_usage"):
                    total[name] = max(total[name] or 0.0, value or 0.0)
                else:
                    total[name] = total[name] + value
        total["blocking"] = self._merged([answer["blocking"] for answer in answers])
        return total

    def _merged(self, series: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """One growing series out of each replica's own: what is new in any of them comes last."""
        for replica, now in enumerate(series):
            self._blocking.extend(newer(self._seen[replica], now))
            self._seen[replica] = now
        return tuple(self._blocking)

    async def pause(self) -> None:
        """Hold all devices."""
        await self.ask("pause")
        self.paused = True

    async def resume(self) -> None:
        """Let them go on."""
        await self.ask("resume")
        self.paused = False

    async def close(self, timeout: float = 15.0) -> None:
        """The replicas are Ray's to end."""
        self.cancel_all("the server has ended")


def application(settings: EngineSettings, replicas: int) -> Any:
    """The Ray Serve application: one front, and ``replicas`` deployments with an engine each."""
    names = [f"engine-{number}" for number in range(replicas)]

    def front() -> Any:
        engines = RayEngines(names)
        app = make_app(ServerSettings(settings), engines=engines)

        @app.get("/routing")
        async def routing() -> dict[str, Any]:
            return {"sent": engines.sent, "work": engines.work}

        return app

    # A deployment with a name of its own each: the front says which one gets a request.
    engines = [
        serve.deployment(Replica).options(name=name, max_ongoing_requests=4096).bind(settings)
        for name in names
    ]
    entry = serve.deployment(serve.ingress(front)()).options(name="front", max_ongoing_requests=4096)
    return entry.bind(*engines)


async def _try(url: str, model: str) -> None:
    """A long prompt, then short ones: they go to the replica that has less to do."""
    import httpx2 as httpx
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120) as client:

        async def complete(prompt: str, tokens: int) -> str:
            text = ""
            async for chunk in await client.completions.create(
                model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True
            ):
                text += chunk.choices[0].text
            return text

        long = asyncio.create_task(complete("a long report " * 200, 64))
        await asyncio.sleep(0.05)
        short = await asyncio.gather(*(complete("quick", 8) for _ in range(4)))
        await long
        same = len({await complete("quick", 8) for _ in range(3)} | set(short)) == 1
    async with httpx.AsyncClient(base_url=url, trust_env=False) as plain:
        sent = (await plain.get("/routing")).json()["sent"]
    print(f"requests by replica: {sent}; the same text from each: {same}")


def main() -> None:
    """Start Ray here, serve, be the clients, end."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", help="a hub id or folder; else a tiny model with random weights")
    options.add_argument("--replicas", type=int, default=2)
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--stay", action="store_true", help="serve until Ctrl-C")
    given = options.parse_args()
    specs = parse_models([given.model] if given.model else [], [] if given.model else ["tiny"])
    settings = EngineSettings(specs, threads=1)
    ray.init(num_cpus=given.replicas + 2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": given.port})
        serve.run(application(settings, given.replicas), name=APP, route_prefix="/")
        if given.stay:
            while True:
                asyncio.run(asyncio.sleep(3600))
        asyncio.run(_try(f"http://127.0.0.1:{given.port}", specs[0].name))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()

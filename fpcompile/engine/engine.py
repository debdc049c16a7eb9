"""The engine: programs on one device, requests from anywhere, the urgent ones first.

Typical use
    ``with Engine(program, policy="s-edf") as engine:``
    ``    handle = engine.submit(ids, ttft_slo=0.25)``
    ``    output = handle.result()``        or, in any event loop, ``output = await handle``

The thread that submits validates, appends to an inbox and raises a flag. The device thread reads the flag
between two segments and lets the scheduler decide; see :mod:`fpcompile.engine.driver`. With
``device_thread=False`` there is no thread: the host calls ``turn()`` in its own loop.

Invariants
    ``submit`` never waits for the device. What it refuses, it refuses with a typed error before the request
    exists; every request that exists ends once, as completed, cancelled, rejected or failed.
    After ``close()`` there is no thread, no live request and no memory of one.
    All times are seconds on the engine's clock (``now()``).
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import GenerationConfig

from fpcompile.engine.decisions import check_recordable
from fpcompile.engine.decoding import DecodeOptions
from fpcompile.engine.driver import Driver
from fpcompile.engine.errors import Home
from fpcompile.engine.generation import Generation, GenerationTerms, begin
from fpcompile.engine.handle import Handle
from fpcompile.engine.health import Health
from fpcompile.engine.memory import Memory
from fpcompile.engine.memory_options import MemoryOptions
from fpcompile.engine.metrics import Ticket
from fpcompile.engine.modes import shape_of
from fpcompile.engine.prices import PackPredictor, Prices, seconds_behind, seconds_left
from fpcompile.engine.programs import ProgramLike, Programs, RunLike
from fpcompile.engine.recorder import Recorder, Timeline
from fpcompile.engine.registry import Registry
from fpcompile.engine.statistics import EngineStatistics
from fpcompile.engine.terms import Terms
from fpcompile.engine.thread import let_go, start_device_thread
from fpcompile.errors import InvalidInputError, UsageError
from fpcompile.executor.device import Device, make_device
from fpcompile.executor.loop import Hook
from fpcompile.executor.program import check_budget
from fpcompile.executor.slices import Chunks
from fpcompile.scheduler.core import Scheduler
from fpcompile.scheduler.events import Arrival, Cancelled, Request
from fpcompile.scheduler.policy import Policy, make_policy
from fpcompile.scheduler.record import Answers

__all__ = ["Engine"]


class Engine:
    """Serves requests for one or several programs on one device.

    ``programs``: a program, or a mapping of names to programs on the same device. ``policy``: a registered
    name or an instance. ``max_queue``: requests that may wait to be started; None for any number.
    ``max_blocking_ms`` bounds how far an asynchronous device is driven ahead. ``clock``: seconds, monotonic.
    ``record_timeline`` keeps the newest segments for ``timeline()``. ``on_segment(run, segment, start, end)``
    is called by the device thread after each launch. ``device``: in place of the programs' own, for tests.
    ``device_thread``: False when the host calls ``turn()``. ``record``: a file for the log of all decisions,
    which ``fpcompile replay`` reads; see :mod:`fpcompile.engine.decisions`. ``tbt_slo``: seconds between
    tokens of requests that name none (None: at most two steps and ``max_blocking_ms`` while a prompt has the
    device); ``max_decode_batch``: sequences of one decode step; ``decode_first``:
    whether the time between tokens is kept where that makes a prefill miss its TTFT, or the other way round;
    ``piggyback``: whether a step may be executed with a short prompt: cheaper, and both agree to rounding;
    see :mod:`fpcompile.engine.decoding`. ``kv_blocks`` to ``host_memory`` are those of
    :class:`fpcompile.engine.memory_options.MemoryOptions`: a pool of cache blocks, and bounds on what paused
    runs hold. ``deterministic`` turns off what changes a request's bits beside others: prefix reuse and
    shared decode steps; policies that share launches are refused. Further keyword arguments are those of
    :class:`fpcompile.scheduler.options.SchedulerOptions`.

    Raises :class:`UnknownNameError` for an unknown policy, :class:`InvalidInputError` for what is no program,
    for wrong options, and for policies that pack or slice requests where a program is not of the packed
    route, or (except chunks) where there are several programs.
    """

    def __init__(
        self,
        programs: ProgramLike | Mapping[str, ProgramLike],
        *,
        policy: Policy | str = "fpcompile",
        max_queue: int | None = 1024,
        max_blocking_ms: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        record_timeline: bool = True,
        on_segment: Hook | None = None,
        device: Device | None = None,
        device_thread: bool = True,
        record: str | Path | None = None,
        tbt_slo: float | None = None,
        max_decode_batch: int = 256,
        decode_first: bool = True,
        piggyback: bool = True,
        kv_blocks: int | Mapping[str, int] | None = None,
        kv_memory: int | None = None,
        block_tokens: int = 16,
        prefix_cache: bool = False,
        memory_budget: int | None = None,
        host_memory: int | None = None,
        deterministic: bool = False,
        **scheduler_options: Any,
    ) -> None:
        self._home = Home()
        _check_parts(clock, on_segment, device)
        asked = check_budget(max_blocking_ms)
        max_blocking = None if asked is None else asked / 1e3
        self._programs = Programs(programs)
        batch = 1 if deterministic else max_decode_batch
        launch = max_blocking if max_blocking is not None and math.isfinite(max_blocking) else 0.0
        self._decoding = DecodeOptions(tbt_slo, batch, decode_first, launch, piggyback)
        options = MemoryOptions(
            kv_blocks=kv_blocks, kv_memory=kv_memory, block_tokens=block_tokens, prefix_cache=prefix_cache,
            memory_budget=memory_budget, host_memory=host_memory, deterministic=deterministic,
        )  # fmt: skip
        device = device or make_device(self._programs.device)
        self._recorder = Recorder() if record_timeline else None
        self._memory = Memory(device, self._programs, options, clock, self._recorder)
        scheduler_options = {**self._memory.scheduler_options, **scheduler_options}
        if record is not None:
            check_recordable(policy)
        prices = Prices(self._programs.names)
        plan = _Plan(policy, scheduler_options, self._programs, prices, options, recorded=record is not None)
        self._shape = plan.shape
        self._registry = Registry(max_queue)
        self._clock = clock
        self._driver = Driver(
            self._programs,
            plan.make_core,
            device,
            registry=self._registry,
            prices=prices,
            clock=clock,
            decoding=self._decoding,
            memory=self._memory,
            shape=plan.shape,
            max_blocking=max_blocking,
            recorder=self._recorder,
            on_segment=on_segment,
            record=record,
        )
        self._turning = threading.Lock()
        self._thread = self._start() if device_thread else None
        if self._thread is None:
            self._programs.warm_up()
        weakref.finalize(self, let_go, self._driver, self._home).atexit = False

    def _start(self) -> threading.Thread:
        """Calibrate in the thread that will execute: another one's times are not its times."""
        return start_device_thread(self._driver, self._programs.warm_up)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def __repr__(self) -> str:
        state = "closed" if self._registry.closed else f"{len(self._registry)} live requests"
        return f"<Engine on {self._driver.pilot.device!r}: {state}>"

    def now(self) -> float:
        """The engine's clock in seconds: what ``arrival`` and ``deadline`` are measured by."""
        return self._clock()

    def submit(
        self,
        input_ids: Any,
        *,
        ttft_slo: float | None = None,
        program: str | None = None,
        arrival: float | None = None,
        deadline: float | None = None,
        tenant: str = "",
        priority: int = 0,
        request_id: str | None = None,
        slo_class: str | None = None,
        timeout: float | None = None,
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Any] | None = None,
        seed: int | None = None,
        tbt_slo: float | None = None,
        **model_inputs: Any,
    ) -> Handle:
        """Ask for one forward pass over ``input_ids [batch, length]``; ``model_inputs`` are the model's own.
        With ``max_new_tokens`` or ``generation_config``: continue the sequence ``input_ids [1, length]``.

        ``ttft_slo``: seconds from ``arrival`` (default: now) to the result. ``deadline`` gives the same as a
        time on the engine's clock; without either nothing is promised. ``program`` names one of several.
        ``priority``: higher first, for policies that look at it. ``slo_class`` names the kind of request: of
        each kind a policy may try to serve the same part in time (default: the program's name).
        ``timeout``: seconds after ``arrival``; a request that has not ended by then ends at the next cut with
        :class:`RequestTimeoutError`, state ``failed``. (``handle.result(timeout)`` only stops waiting.)

        ``generation_config`` is transformers' (default: the model's own), ``max_new_tokens`` overrides its;
        ``logits_processor`` are further ones, as ``generate`` takes them, ``seed`` is for sampling. Tokens
        come through the handle; the result is a ``GenerateDecoderOnlyOutput``. ``tbt_slo``: seconds between
        tokens.

        Never blocks. Raises :class:`EngineClosedError`, :class:`QueueFullError` (with ``retry_after``),
        :class:`UnknownNameError` for a program, :class:`InvalidInputError` for anything else that is wrong.
        """
        self._home.check()
        terms = Terms.check(
            now=self._clock(),
            ttft_slo=ttft_slo,
            arrival=arrival,
            deadline=deadline,
            tenant=tenant,
            priority=priority,
            request_id=request_id,
            slo_class=slo_class,
            timeout=timeout,
        )
        name, chosen = self._programs.resolve(program)
        self._registry.check(terms.request_id, self._driver.retry_after)
        wanted = GenerationTerms.check(
            max_new_tokens=max_new_tokens, config=generation_config, processors=logits_processor,
            seed=seed, tbt_slo=tbt_slo, default=self._decoding.tbt_slo,
        )  # fmt: skip
        generation = None if wanted is None else begin(name, chosen, wanted, input_ids, model_inputs)
        run = chosen.start(input_ids, **model_inputs) if generation is None else generation.run
        ticket = self._ticket(name, chosen, run, terms, model_inputs.get("max_blocking_ms"), generation)
        if (device := self._driver.pilot.device).asynchronous:
            ticket.ready = device.caller_event()
        self._registry.admit(ticket, self._driver.retry_after, lambda: self._enter(ticket))
        return ticket.handle

    def _ticket(
        self,
        name: str,
        program: ProgramLike,
        run: RunLike,
        terms: Terms,
        budget: float | None,
        generation: Generation | None,
    ) -> Ticket:
        kept = self._shape(run, budget)
        prompt = self._memory.prompt(name, kept, terms.tenant, generation)
        predicted = (
            seconds_behind(program, kept, prompt.cached)
            if prompt.cached
            else seconds_left(program, kept if isinstance(kept, Chunks) else run)
        )
        request = Request(
            id=terms.request_id or self._registry.new_id(),
            arrival=terms.arrival,
            deadline=terms.deadline,
            tokens=run.tokens,
            cost=self._driver.prices.corrected(name, run.tokens, predicted),
            slo=terms.slo,
            priority=terms.priority,
            tenant=terms.tenant,
            klass=terms.slo_class or name,
            kv_blocks=prompt.blocks,
            decode_tokens=prompt.to_come,
        )
        handle = Handle(
            request.id, ask_cancel=self._ask_cancel, home=self._home, generates=generation is not None
        )
        ticket = Ticket(
            request, program=name, run=kept, handle=handle, predicted=predicted, budget=budget,
            timeout=terms.timeout, generation=generation, prompt=prompt,
        )  # fmt: skip
        handle.bind(ticket.snapshot)
        return ticket

    def _enter(self, ticket: Ticket) -> None:
        self._driver.inbox.put(Arrival(self._clock(), ticket.request))

    def _ask_cancel(self, request_id: str) -> None:
        self._driver.inbox.put(Cancelled(self._clock(), request_id))

    def statistics(self) -> EngineStatistics:
        """Counts and blocking times so far."""
        return self._driver.statistics()

    def health(self) -> Health:
        """Whether cuts still come, and since when; from any thread, without waiting for the device.

        Unhealthy: no cut for 10 times the predicted seconds of the launch under way, and for at least one
        second; or the loop has broken. See :mod:`fpcompile.engine.health`.
        """
        return self._driver.watchdog.health()

    def timeline(self) -> Timeline:
        """What ran when; raises :class:`UsageError` when ``record_timeline`` is off."""
        if self._recorder is None:
            raise UsageError("no timeline was recorded", remedy="Engine(..., record_timeline=True)")
        return self._recorder.timeline()

    def turn(self, max_segments: int | None = 1) -> bool:
        """For hosts that own the loop: hear what has come, and launch at most ``max_segments`` segments.

        False when there is nothing to do. One thread at a time; raises :class:`UsageError` otherwise, and on
        an engine that has a device thread.
        """
        self._home.check()
        most: Any = max_segments
        if most is not None and (type(most) is not int or most < 1):
            raise InvalidInputError(
                "max_segments is wrong", expected="a whole number >= 1, or None", got=repr(most)
            )
        if self._thread is not None:
            raise UsageError("this engine has a device thread", remedy="Engine(..., device_thread=False)")
        if not self._turning.acquire(blocking=False):
            raise UsageError(
                "turn() is called while another turn() runs", remedy="call it from one loop only"
            )
        try:
            return self._driver.turn(max_segments)
        except BaseException as error:
            self._driver.abort(error)
            raise
        finally:
            self._turning.release()

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Admit nothing more and end. May be called again, and from any thread.

        ``drain``: let live requests finish, for at most ``timeout`` seconds; what is live then, or at once
        without ``drain``, is cancelled at the next cut; so is what the policy would hold back for ever.
        Raises ``TimeoutError`` when a segment holds the device for ``timeout`` seconds beyond that; the
        device thread then ends by itself when the segment does.
        """
        self._home.check()
        given: Any = timeout
        if given is not None and not (isinstance(given, (int, float)) and given >= 0):
            raise InvalidInputError("timeout is wrong", expected="seconds >= 0, or None", got=repr(given))
        self._registry.close()
        self._driver.inbox.nudge()
        if not drain:
            self._driver.cancel_all()
        if self._thread is None:
            self._close_turning(timeout)
            return
        if self._thread is threading.current_thread():
            return  # a callback of the device thread closes its own engine: it ends when the callback returns
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._driver.cancel_all()
            self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the device thread has not ended within {timeout} s: a segment is running")

    def _close_turning(self, timeout: float | None) -> None:
        until = math.inf if timeout is None else time.monotonic() + timeout
        while len(self._registry):
            if not self.turn():
                self._driver.give_up_what_is_held()
            if time.monotonic() >= until:
                self._driver.cancel_all()
        self._driver.close_log()


def _check_parts(clock: Any, on_segment: Any, device: Any) -> None:
    """What a host brings along: raise :class:`InvalidInputError` now, not when it is first needed."""
    for name, given in (("clock", clock), ("on_segment", on_segment)):
        if not callable(given) and not (given is None and name == "on_segment"):
            raise InvalidInputError(f"{name} is wrong", expected="a callable", got=repr(given))
    if device is not None and not isinstance(device, Device):
        raise InvalidInputError(
            "device is wrong",
            expected="a Device, such as fpcompile.testing.FakeAsyncDevice(), or None for the programs' own",
            got=repr(device),
            remedy="move the model to its device before fpcompile.segment(model)",
        )


class _Plan:
    """What a policy and its options ask of an engine: checked here, before anything else is made."""

    def __init__(
        self,
        policy: Policy | str,
        options: dict[str, Any],
        programs: Programs,
        prices: Prices,
        memory: MemoryOptions,
        *,
        recorded: bool,
    ) -> None:
        self._policy, self._options, self._recorded = policy, options, recorded
        first = programs.names[0]
        self._predictor = PackPredictor(programs[first], prices.correction(first))
        core = self.make_core()
        memory.check_policy(core.policy, core.packs)
        self.shape = shape_of(core.policy, core.packs, programs)

    def make_core(self) -> Scheduler:
        """A fresh scheduler under the policy."""
        predictor = Answers(self._predictor) if self._recorded else self._predictor
        return Scheduler(make_policy(self._policy), predictor=predictor, **self._options)

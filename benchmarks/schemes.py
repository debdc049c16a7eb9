"""Ways to make a prefill preemptible, all on the same kernels: what ``preemption.py`` compares.

Words
    *whole*          one launch; nothing can stop it.
    *chunked n*      n tokens at a time, each chunk a prefill that continues the cache of the ones before, as
                     servers do. The cache of a bare run is contiguous, so each chunk copies it once.
    *layer*          a launch for each decoder layer.
    *half-layer*     two launches per layer, up to attention and behind it, and the device is synchronised at
                     each check: FlowPrefill as published.
    *operator*       a launch for each operator segment.
    *tiles 1/n*      operator segments and tiles under a budget of 1/n of the whole prefill's time.

A scheme is driven as a run is (``step``, ``done``, ``suspend``, ``result``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from fpcompile import segment
from fpcompile.executor.device import Device
from fpcompile.executor.schedule import Launch
from fpcompile.executor.stages import Stage

Begin = Callable[[], Any]


class Chunks:
    """A prefill of ``ids [1, length]`` by ``size`` tokens at a time."""

    def __init__(self, program: Any, ids: torch.Tensor, size: int, asked: dict[str, Any]) -> None:
        self.program, self.ids, self.size, self.asked = program, ids, size, asked
        self.at = 0
        self.output: Any = None

    @property
    def done(self) -> bool:
        """Whether every chunk has been launched."""
        return self.at >= self.ids.shape[1]

    @property
    def cursor(self) -> int:
        """Number of the next chunk."""
        return self.at // self.size

    @property
    def next_segment(self) -> Any:
        """What the loop's hooks are told."""
        return self.program.segments[0]

    def step(self) -> None:
        """Prefill one chunk."""
        past = None if self.output is None else self.output.past_key_values
        chunk = self.ids[:, self.at : self.at + self.size]
        run = self.program.start(input_ids=chunk, past_key_values=past, **self.asked)
        while not run.done:
            run.step()
        self.output = run.result()
        self.at += self.size

    def suspend(self) -> None:
        """Between chunks nothing but the cache is held."""

    def result(self) -> Any:
        """The last chunk's output, whose cache is the whole one."""
        return self.output


class Synchronised:
    """A run that waits for the device behind each launch."""

    def __init__(self, run: Any, device: Device) -> None:
        self.run, self.device = run, device

    @property
    def done(self) -> bool:
        """Whether every launch has been made."""
        return bool(self.run.done)

    @property
    def cursor(self) -> int:
        """Index of the next segment."""
        return int(self.run.cursor)

    @property
    def next_segment(self) -> Any:
        """The segment that ``step`` goes on with."""
        return self.run.next_segment

    def step(self) -> None:
        """One launch, completed."""
        self.run.step()
        self.device.synchronize()

    def suspend(self) -> None:
        """As the run."""
        self.run.suspend()

    def result(self) -> Any:
        """As the run."""
        return self.run.result()


@dataclasses.dataclass(frozen=True, slots=True)
class Scheme:
    """``begin()`` starts one prefill; ``program`` predicts its launches, None when nothing runs ahead.

    ``exact``: the same kernels on the same shapes as the unmodified model, so the same bits.
    """

    name: str
    begin: Begin
    program: Any
    exact: bool


class Programs:
    """The programs behind the schemes; they share the model's weights, and are calibrated once."""

    def __init__(self, model: Any, asked: dict[str, Any], device: Device, **plan: Any) -> None:
        self.asked, self.device = asked, device
        self.model, self.layer, self.operator = (
            segment(model, granularity=name, **plan) for name in ("model", "layer", "operator")
        )
        self.operator.calibrate()
        if device.asynchronous:
            self.layer.calibrate()
            self.model.calibrate()

    def whole(self, ids: torch.Tensor) -> Scheme:
        """One launch."""
        return Scheme("whole", lambda: self.model.start(input_ids=ids, **self.asked), self.model, exact=True)

    def tiles(self, ids: torch.Tensor, part: int, seconds: float) -> Scheme:
        """Under a budget of 1/``part`` of ``seconds``."""
        budget = 1e3 * seconds / part
        return Scheme(
            f"tiles 1/{part}",
            lambda: self.operator.start(input_ids=ids, max_blocking_ms=budget, **self.asked),
            self.operator,
            exact=False,
        )

    def all(self, ids: torch.Tensor, seconds: float, *, chunks: list[int], parts: list[int]) -> list[Scheme]:
        """Every scheme for one prompt whose whole prefill takes ``seconds``."""
        asked, device = self.asked, self.device
        length = int(ids.shape[1])
        found = [self.whole(ids)]
        for size in (c for c in chunks if c < length):

            def begin(size: int = size) -> Synchronised:
                return Synchronised(Chunks(self.model, ids, size, asked), device)

            found.append(Scheme(f"chunked {size}", begin, None, exact=False))

        def half() -> Synchronised:
            run = self.layer.start(input_ids=ids, **asked)
            run.schedule = half_layers(self.layer.stages)
            return Synchronised(run, device)

        for name, program in (("layer", self.layer), ("operator", self.operator)):
            start = functools.partial(program.start, input_ids=ids, **asked)
            found.append(Scheme(name, start, program, exact=True))
        found.insert(-1, Scheme("half-layer, synchronised", half, None, exact=True))
        return [*found, *(self.tiles(ids, part, seconds) for part in parts)]


def half_layers(stages: tuple[Stage, ...]) -> tuple[Launch, ...]:
    """Launches that end behind each attention call and at the end of each segment."""
    launches: list[Launch] = []
    first = 0
    for i, stage in enumerate(stages):
        last = i + 1 == len(stages) or stages[i + 1].segment != stage.segment
        if (last or stage.over == "attention") and not stage.bound:
            launches.append(Launch(first, i + 1))
            first = i + 1
    return tuple(launches)

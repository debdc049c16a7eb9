"""Several runs of one packed program executed as one: their tokens in one row, each over its own cache.

Words
    *member*  a run that is executed with others; nothing of it may have been executed before.
    *joined*  the run that executes all members: their sequences side by side, without padding.

A member may be anything that ``start`` makes: a prompt, a padded batch, the continuation of a cache, a slice.
Its result is its own: the type, the positions and the cache that its ``start`` asked for, and (to rounding,
for kernels sum in another order at another length) the numbers that it would have had alone.

Invariants
    The members' tile plans are not used: the joined run has one of its own, for the smallest budget. More
    tokens together may need a longer launch than each alone: a strict budget is promised to single runs only.
    After ``result`` every member is done, and holds no memory of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch

from fpcompile.errors import InternalError
from fpcompile.executor.inputs import Group, Layout
from fpcompile.executor.packed import PackedCall
from fpcompile.executor.run import Run
from fpcompile.ir import Segment

__all__ = ["Together", "join", "share"]


def join(members: Sequence[Run], max_blocking_ms: float | None = None) -> Run:
    """A run that executes all ``members`` of one packed program; a single one is its own joined run.

    ``max_blocking_ms`` in place of the program's own; the members must not be stepped themselves any more.
    """
    if len(members) == 1:
        return members[0]
    first = members[0].call
    assert isinstance(first, PackedCall)
    program, groups = first.program, list[Group]()
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in program.live[0]}
    rows = tokens = 0
    use_cache = False
    for run in members:
        call = run.call
        if run.program is not program or not isinstance(call, PackedCall) or run.at:
            raise InternalError("runs that cannot be joined", got=repr(run))
        groups += [Group(g.start + tokens, g.batch, g.length, g.past) for g in call.layout.groups]
        for name, values in parts.items():
            values.append(run.values[name] + tokens if name == "logits_to_keep" else run.values[name])
        rows, tokens, use_cache = rows + call.rows, tokens + call.layout.tokens, use_cache or call.use_cache
    joined = PackedCall(program, Layout(tuple(groups), tokens), rows=rows, kept=rows, use_cache=use_cache)
    return Run(
        program,
        joined,
        {name: torch.cat(values, dim=-1) for name, values in parts.items()},
        [dict(layers) for run in members for layers in run.kv],
        program.tile_plan(joined.shape, max_blocking_ms, warn=False),
    )


def share(joined: Run, members: Sequence[Run]) -> None:
    """Give every member its part of what ``joined``, which is done, has computed: they are done then."""
    if joined is members[0]:
        return
    output = joined.program.plan.output
    packed = joined.values[output]
    row = group = 0
    for run in members:
        call = run.call
        assert isinstance(call, PackedCall)
        groups = len(call.layout.groups)
        run.values = {output: packed[:, row : row + call.rows].clone()}
        run.kv = joined.kv[group : group + groups] if call.use_cache else [{}] * groups
        run.at = len(run.schedule)
        row, group = row + call.rows, group + groups
    joined.release()


@final
class Together:
    """Members as one run, for whoever steps runs; made (if ``members`` is a function) and joined when first
    asked for, so that what fails there fails this run.

    ``collect`` has one function for each member, called once it is done: :meth:`result` is the list of what
    they return.
    """

    __slots__ = ("_collect", "_joined", "_make", "_max_blocking_ms", "_members")

    def __init__(
        self,
        members: Sequence[Run] | Callable[[], Sequence[Run]],
        collect: Sequence[Callable[[], Any]],
        *,
        max_blocking_ms: float | None = None,
    ) -> None:
        self._make = members if callable(members) else None
        self._members = () if callable(members) else tuple(members)
        self._collect = tuple(collect)
        self._max_blocking_ms = max_blocking_ms
        self._joined: Run | None = None

    @property
    def joined(self) -> Run:
        """The run that executes all of them."""
        if self._joined is None:
            if self._make is not None:
                self._members, self._make = tuple(self._make()), None
            self._joined = join(self._members, self._max_blocking_ms)
        return self._joined

    @property
    def made(self) -> bool:
        """Whether they have been joined: asking for anything else joins them."""
        return self._joined is not None

    @property
    def tokens(self) -> int:
        """New tokens of all members."""
        return self.joined.tokens

    @property
    def rows(self) -> int:
        """Positions whose logits are computed, of all members."""
        return self.joined.rows

    @property
    def done(self) -> bool:
        """Whether every launch has been made."""
        return self.joined.done

    @property
    def cursor(self) -> int:
        """Index of the next segment."""
        return self.joined.cursor

    @property
    def next_segment(self) -> Segment:
        """The segment that ``step`` goes on with."""
        return self.joined.next_segment

    @property
    def live_bytes(self) -> int:
        """Bytes of the live values."""
        return self.joined.live_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the caches."""
        return self.joined.kv_bytes

    def step(self) -> None:
        """Make one launch."""
        self.joined.step()

    def result(self) -> list[Any]:
        """What ``collect`` returns for each member, in order."""
        share(self.joined, self._members)
        return [collect() for collect in self._collect]

    def suspend(self) -> None:
        """Drop what can be computed again."""
        if self._joined is not None:
            self._joined.suspend()

    def again(self) -> None:
        """Back to the beginning: what was computed is dropped, the members are joined anew when asked for."""
        if self._joined is not None and all(self._joined is not run for run in self._members):
            self._joined.release()
        self._joined = None

    def release(self) -> None:
        """Drop every tensor."""
        if self._joined is not None:
            self._joined.release()
        for run in self._members:
            run.release()

"""A generation whose cache was dropped: all of its tokens so far as a prompt, for the scheduler to place.

The request is the one that the caller knows, with another prompt: the same ticket, handle and id. When its
run is done the next token follows, as behind any prompt. Kernels see other numbers of rows than in the steps
that made the lost cache, so what follows agrees to rounding: the request's ``numerics`` say so.
"""

from __future__ import annotations

import dataclasses

from fpcompile.engine.generation import DEFAULT_TBT_SLO
from fpcompile.engine.memory import Memory
from fpcompile.engine.metrics import Ticket
from fpcompile.engine.modes import Shape
from fpcompile.engine.prices import Prices, seconds_behind, seconds_left
from fpcompile.engine.programs import Programs
from fpcompile.executor.slices import Chunks
from fpcompile.scheduler.events import Request

__all__ = ["renew"]


def renew(
    ticket: Ticket,
    programs: Programs,
    shape: Shape,
    memory: Memory,
    prices: Prices,
    now: float,
    share: float,
) -> Request:
    """Give ``ticket`` its new run, and return what the scheduler hears.

    The deadline is that of the next token, or as soon as it can be if that is later: else a policy would take
    a request for lost that is late through no fault of its own. ``share`` of the device is what decode steps
    take, as the scheduler was told: it expects the prompt to take so much longer.
    """
    generation, request = ticket.generation, ticket.request
    assert generation is not None
    program = programs[ticket.program]
    run = generation.renew(ticket.budget)
    kept = shape(run, ticket.budget)
    prompt = memory.prompt(ticket.program, kept, request.tenant, generation)
    predicted = (
        seconds_behind(program, kept, prompt.cached)
        if prompt.cached
        else seconds_left(program, kept if isinstance(kept, Chunks) else run)
    )
    ticket.renewed(kept, prompt, predicted)
    cost = prices.corrected(ticket.program, run.tokens, predicted)
    return dataclasses.replace(
        request,
        deadline=max(generation.due, now + cost / (1 - share) + (generation.tbt_slo or DEFAULT_TBT_SLO)),
        tokens=run.tokens,
        cost=cost,
        kv_blocks=prompt.blocks,
        decode_tokens=prompt.to_come,
    )

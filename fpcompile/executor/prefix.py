"""A prompt whose beginning is in the cache already: what can be reused, and the run that goes on behind.

Reused are full blocks of a single prompt that starts at position 0. At least one token is always executed,
and so is every token whose logits are asked for. Kernels then see another number of rows, so the result
agrees with that of the whole prompt to rounding, not to the bit.
"""

from __future__ import annotations

from fpcompile.executor.blocks import prefix_keys
from fpcompile.executor.inputs import Group, Layout
from fpcompile.executor.packed import PackedCall, PackedProgram
from fpcompile.executor.run import Run
from fpcompile.models.attention import MaskKind

__all__ = ["go_on_behind", "prompt_keys", "reusable"]


def prompt_keys(run: Run, block_tokens: int, salt: bytes) -> list[bytes] | None:
    """A key for each full block of the run's prompt; None when its cache depends on more than the tokens.

    That is so for batches, padding, positions of the caller's, the continuation of a cache, attention that
    looks ahead, and rotary frequencies that follow the length of the prompt.
    """
    call, program = run.call, run.program
    if not isinstance(call, PackedCall) or not isinstance(program, PackedProgram):
        return None
    groups = call.layout.groups
    if len(groups) > 1 or groups[0].batch > 1 or groups[0].past or call.padding is not None:
        return None
    if program.follows_length or any(c.mask.kind is MaskKind.BIDIRECTIONAL for c in program.attention):
        return None
    positions = run.values.get("position_ids")
    if positions is not None and positions[0].tolist() != list(range(run.tokens)):
        return None
    return prefix_keys(run.values["input_ids"][0].tolist(), block_tokens, salt)


def reusable(run: Run, block_tokens: int) -> int:
    """How many blocks at the beginning need not be executed for the logits that are asked for."""
    rows = run.values.get("logits_to_keep")
    first = run.tokens - 1 if rows is None else min(rows.tolist())
    return min(first, run.tokens - 1) // block_tokens


def go_on_behind(run: Run, tokens: int, max_blocking_ms: float | None) -> None:
    """Change ``run``, of which nothing is executed, so that it executes what follows ``tokens`` cached ones.

    Its tile plan is a new one, for the shorter prompt; its caches are for the caller to fill.
    """
    call, program = run.call, run.program
    assert isinstance(call, PackedCall)
    left = run.tokens - tokens
    run.call = PackedCall(
        call.program,
        Layout((Group(0, 1, left, tokens),), left),
        rows=call.rows,
        kept=call.kept,
        use_cache=call.use_cache,
        scatter=call.scatter,
        returns_cache=call.returns_cache,
        strict=call.strict,
    )
    run.values = {
        name: value - tokens if name == "logits_to_keep" else value[:, tokens:]
        for name, value in run.values.items()
    }
    run.schedule = program.tile_plan(run.call.shape, max_blocking_ms, warn=False)

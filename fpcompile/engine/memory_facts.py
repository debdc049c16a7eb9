"""Plain facts about memory: what a request asks of the pool, and what an engine tells about its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["NOTHING", "MemoryStatistics", "Prompt"]


@dataclass(frozen=True, slots=True)
class MemoryStatistics:
    """What is held now, and what was moved since the engine was made.

    ``paused_bytes``: device memory of paused runs besides blocks; ``host_bytes``: their copies on the host.
    ``blocks`` = ``blocks_free`` + ``blocks_used`` + ``blocks_cached``; what is cached is nobody's and is
    given away when it is needed. ``block_bytes``: size of one. ``blocks_decoding``: those of ``blocks_used``
    that requests hold whose prompt is done; ``decode_evictions``: how often one of them gave all of its up.
    ``offloads``: runs moved to the host,
    ``copied_bytes`` on the way there; ``recomputations``: runs dropped and begun again.
    ``reused_tokens``: tokens of prompts that were in the cache already.
    """

    paused_bytes: int
    host_bytes: int
    blocks: int
    blocks_free: int
    blocks_used: int
    blocks_cached: int
    block_bytes: int
    blocks_decoding: int
    decode_evictions: int
    offloads: int
    copied_bytes: int
    recomputations: int
    reused_tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request asks of the pool: ``blocks``, and ``keys`` of the full ones, if they may be shared.

    ``reusable``: how many of those need not be executed. ``cached``: tokens that were there at submission.
    ``to_come``: tokens that are expected behind the prompt. ``salt``: what keys of its blocks depend on
    besides the tokens; None when they must not be shared.
    """

    blocks: int = 0
    keys: tuple[bytes, ...] = ()
    reusable: int = 0
    cached: int = 0
    to_come: int = 0
    salt: bytes | None = None


NOTHING: Final = Prompt()
"""It keeps no cache, or a cache of its own."""

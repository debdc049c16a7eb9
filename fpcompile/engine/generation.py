"""What a request that generates has besides its prompt: how tokens are chosen, when the next one is due.

Deadlines
    The first token is due with the prompt's TTFT. Token j (from 0) is then due at the earlier of
    ``base + j * tbt_slo`` and ``last + 3 * tbt_slo``, where ``base`` is the first token's deadline, and
    ``last`` the time of the token before: a stream that is ahead may wait, but not so long that a reader sees
    it stop. ``base`` is the first token's own time instead if that was later, or nothing was promised: a
    first token that was late must not make all that follow late too.
    That is the latest. Token j is *wanted* half a ``tbt_slo`` before ``first + j * tbt_slo``, ``first`` being
    the first token's own time: then the mean time between tokens is kept too, wherever the first one came.
    Without a ``tbt_slo`` nothing is due; how long the lane keeps such a request waiting while a prompt has
    the device is its business (:mod:`fpcompile.engine.decoding`). Where requests are put in an order, for
    memory, it stands as one that asked for :data:`DEFAULT_TBT_SLO` and is ahead.

A generation is written by the engine's driver only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from fpcompile.engine.programs import ProgramLike
from fpcompile.errors import InvalidInputError
from fpcompile.executor.decode import Begun, Decoder, Generates
from fpcompile.executor.sampling import Sampler, Wishes

__all__ = ["DEFAULT_TBT_SLO", "FinishReason", "Generation", "GenerationTerms", "begin"]

DEFAULT_TBT_SLO: Final = 0.2
"""Seconds between tokens, in place of none: faster than people read."""

_LONGEST_GAP: Final = 3
"""Of a stream that is ahead of its deadlines, in ``tbt_slo``."""

_AHEAD: Final = 0.5
"""How far before its mean time a token is wanted, in ``tbt_slo``: what a late one may take."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerationTerms:
    """What a submission says about generating, checked. ``tbt_slo`` in seconds, None for no time."""

    wishes: Wishes
    tbt_slo: float | None

    @classmethod
    def check(
        cls,
        *,
        max_new_tokens: Any,
        config: Any,
        processors: Any,
        seed: Any,
        tbt_slo: Any,
        default: float | None,
    ) -> GenerationTerms | None:
        """The terms, None for one forward pass; raises :class:`InvalidInputError`."""
        if max_new_tokens is None and config is None:
            extra = {"logits_processor": processors, "seed": seed, "tbt_slo": tbt_slo}
            for name, value in extra.items():
                if value is not None:
                    raise InvalidInputError(
                        f"{name} is for requests that generate",
                        expected="max_new_tokens or generation_config besides",
                        got="neither",
                    )
            return None
        return cls(
            Wishes(max_new_tokens, config, processors, seed),
            default if tbt_slo is None else check_tbt_slo(tbt_slo),
        )


def check_tbt_slo(value: Any) -> float:
    """``tbt_slo`` in seconds; raises :class:`InvalidInputError` unless it is a positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise InvalidInputError("tbt_slo is wrong", expected="seconds > 0", got=repr(value))
    return float(value)


def begin(
    name: str, program: ProgramLike, terms: GenerationTerms, input_ids: Any, inputs: dict[str, Any]
) -> Generation:
    """A generation whose prompt is started; raises :class:`InvalidInputError`."""
    if not isinstance(program, Generates):
        raise InvalidInputError(
            f"program {name!r} does not generate",
            expected="a program of a model with a language modelling head",
            got=type(program).__name__,
            remedy="leave out max_new_tokens and generation_config: that is one forward pass",
        )
    decoder = program.decoder()
    begun = decoder.begin(input_ids, **inputs)
    return Generation(decoder, begun, decoder.sampler(begun, terms.wishes), terms.tbt_slo)


@final
class Generation:
    """One request's tokens so far. Times are seconds on the engine's clock."""

    __slots__ = (
        "_base", "_begun", "_longest", "decoder", "finish_reason", "first", "last", "prompt", "renewable",
        "sampler", "sequence", "tbt_slo", "tokens",
    )  # fmt: skip

    def __init__(self, decoder: Decoder, begun: Begun, sampler: Sampler, tbt_slo: float | None) -> None:
        self.decoder, self.sampler, self.tbt_slo = decoder, sampler, tbt_slo
        self.prompt = begun.ids
        """``[1, n]``."""
        tokens_alone = begun.context == int(begun.ids.shape[1]) and not begun.inputs
        self.renewable = tokens_alone and not decoder.follows_length
        """Whether its tokens are all that its cache depends on, so that it can be computed again: not where
        rotary frequencies follow the length of the prompt.
        """
        self._begun: Begun | None = begun
        self.sequence: Any = None
        """What the decoder continues; None before the prompt is done, and behind the end."""
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.first: float | None = None
        """When the first token was there."""
        self.last = -math.inf
        """When the newest token was there."""
        self._base = math.inf
        self._longest = 0.0

    @property
    def run(self) -> Any:
        """The run of the prompt, which nobody has stepped."""
        assert self._begun is not None
        return self._begun.run

    def open(self, output: Any) -> int:
        """The prompt is done, with ``output``: keep what is continued, and return the first token.

        The next one, of a generation that was renewed. If it raises it can be called again.
        """
        begun = self._begun
        assert begun is not None
        self.sequence, logits = self.decoder.open(begun, output)
        token = int(self.sampler.choose(logits))
        self._begun = None
        return token

    def renew(self, budget: float | None) -> Any:
        """Its cache is lost: the run, of which nothing is executed, of a prompt of all its tokens so far.

        Whoever executes it gives the result to ``open``, as for the first prompt.
        """
        self._begun = self.decoder.begin(self._ids(), max_blocking_ms=budget)
        self.sequence = None
        return self._begun.run

    def _ids(self) -> torch.Tensor:
        ids = self.prompt
        return torch.cat([ids, torch.tensor([self.tokens], device=ids.device, dtype=ids.dtype)], dim=-1)

    @property
    def due(self) -> float:
        """When the next token is due, once there is a first one."""
        if self.tbt_slo is None:
            return self.last + _LONGEST_GAP * DEFAULT_TBT_SLO
        ahead = self._base + len(self.tokens) * self.tbt_slo
        return min(ahead, self.last + _LONGEST_GAP * self.tbt_slo)

    @property
    def wanted(self) -> float:
        """When the next token is wanted: not after it is due. For who asked for a time between tokens."""
        assert self.first is not None
        assert self.tbt_slo is not None
        return min(self.first + (len(self.tokens) - _AHEAD) * self.tbt_slo, self.due)

    @property
    def tbt_max(self) -> float | None:
        """Longest time between two tokens."""
        return self._longest if len(self.tokens) > 1 else None

    @property
    def tbt_mean(self) -> float | None:
        """Mean time between two tokens."""
        if self.first is None or len(self.tokens) < 2:
            return None
        return (self.last - self.first) / (len(self.tokens) - 1)

    @property
    def nbytes(self) -> int:
        """Bytes that its sequence holds."""
        sequence = self.sequence  # asked by any thread: it may be released meanwhile
        return 0 if sequence is None else self.decoder.nbytes(sequence)

    def took(self, token: int, now: float, deadline: float) -> None:
        """The next token is there; ``deadline`` is that of the first one."""
        if self.first is None:
            self.first = now
            self._base = deadline if now <= deadline < math.inf else now
        else:
            self._longest = max(self._longest, now - self.last)
        self.last = now
        self.tokens.append(token)
        self.sampler.took(token)
        if token in self.sampler.stops:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.sampler.max_new_tokens:
            self.finish_reason = "length"

    def output(self) -> GenerateDecoderOnlyOutput:
        """``sequences [1, n + new]``, as ``generate(return_dict_in_generate=True)`` gives them."""
        sequences: Any = self._ids()
        return GenerateDecoderOnlyOutput(sequences=sequences)

    def release(self) -> None:
        """Drop what the sequence holds."""
        self.sequence = self._begun = None

"""Choosing tokens as transformers does: its GenerationConfig, its logits processors, its order of them.

The settings of a request are merged and checked once, when it is submitted. Then :meth:`Sampler.choose` is
what ``generate`` does between two forward passes, for one sequence: logits as float32, processors, and argmax
or a draw. Draws come from a generator of the request's own, so that ``seed`` gives the same tokens for the
same logits whoever shares the device; ``generate`` gives them after ``torch.manual_seed`` of the same seed.

Words
    *wishes*  what a request asks for, unchecked.
    *plain*   greedy without any processor: the sampler need not be asked, an argmax over many rows will do.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList

from fpcompile.errors import InvalidInputError

__all__ = ["Sampler", "Wishes"]

_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0),
    "diversity_penalty": (None, 0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "dola_layers": (None,),
    "guidance_scale": (None, 1),
    "is_assistant": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "speculation_type": (None,),
    "use_mtp": (None, False),
    "token_healing": (None, False),
    "stop_strings": (None,),
    "max_time": (None,),
    "prefill_chunk_size": (None,),
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
}
"""Fields of a GenerationConfig that change more than the choice of a token, and the values that do not."""

_REMEDIES: Final = {
    "stop_strings": "look for them in the text that the tokens decode to, and cancel the request",
    "max_time": "submit(..., timeout=seconds)",
}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Wishes:
    """``max_new_tokens`` overrides the config's; ``processors``: the ``logits_processor`` of ``generate``."""

    max_new_tokens: int | None = None
    config: GenerationConfig | None = None
    processors: Sequence[Any] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        count: Any = self.max_new_tokens
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise InvalidInputError("max_new_tokens is wrong", expected="an int >= 1", got=repr(count))
        if self.config is not None and not isinstance(self.config, GenerationConfig):
            raise InvalidInputError(
                "generation_config is wrong",
                expected="a transformers.GenerationConfig",
                got=type(self.config).__name__,
            )
        seed: Any = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise InvalidInputError("seed is wrong", expected="an int, or None", got=repr(seed))
        processors: Any = self.processors
        if processors is not None and (
            not isinstance(processors, (list, tuple)) or not all(map(callable, processors))
        ):
            raise InvalidInputError(
                "logits_processor is wrong",
                expected="a list of callables (input_ids, scores) -> scores",
                got=repr(processors),
            )


@final
class Sampler:
    """The tokens of one request, chosen one after the other. ``max_new_tokens`` and ``stops`` end it.

    ``past`` tokens lie before the prompt ``ids [1, n]`` in the cache that it continues; processors do not see
    them. ``limit``: positions that the model has, None for any number.
    """

    __slots__ = ("_count", "_generator", "_ids", "_processors", "_sample", "max_new_tokens", "stops")

    def __init__(self, model: Any, wishes: Wishes, ids: Tensor, *, past: int = 0, limit: int | None) -> None:
        settings = _settings(model, wishes, ids)
        self._sample = bool(settings.do_sample)
        self._count = int(ids.shape[1])
        self.max_new_tokens = int(settings.max_length) - self._count
        if self.max_new_tokens < 1:
            raise InvalidInputError(
                "max_length leaves no room for a token",
                expected=f"more than the prompt's {self._count} tokens",
                got=str(settings.max_length),
                remedy="use max_new_tokens",
            )
        if limit is not None and past + self._count + self.max_new_tokens - 1 > limit:
            raise InvalidInputError(
                "the generation is longer than the model's positions",
                expected=f"at most {limit} tokens (max_position_embeddings), prompt and cached ones included",
                got=f"{past + self._count} tokens and max_new_tokens={self.max_new_tokens}",
            )
        eos = settings._eos_token_tensor
        self.stops = frozenset() if eos is None else frozenset(eos.tolist())
        """Token ids that end the generation."""
        self._processors = _processors(model, settings, wishes, ids)
        self._ids = ids
        self._generator: torch.Generator | None = None
        if self._sample:
            self._generator = torch.Generator(ids.device)
            if wishes.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(wishes.seed)

    @property
    def plain(self) -> bool:
        """Whether the next token is the argmax of the logits as they are."""
        return not self._sample and not self._processors

    def choose(self, logits: Tensor) -> Tensor:
        """The next token ``[1]`` for the logits ``[vocabulary]``, on their device."""
        scores: Tensor = logits[None].to(copy=True, dtype=torch.float32)
        if self._processors:
            ids: Any = self._ids[:, : self._count]
            scores = self._processors(ids, scores)
        if not self._sample:
            return scores.argmax(dim=-1)
        probabilities = nn.functional.softmax(scores, dim=-1)
        if not bool(torch.isfinite(probabilities).all()):  # on CUDA a draw would end the device's context
            raise InvalidInputError(
                "there is no token to choose from",
                expected="at least one finite score behind the processors",
                got="scores that are NaN, or all -inf",
                remedy="look at logits_processor and at the model's weights",
            )
        return torch.multinomial(probabilities, num_samples=1, generator=self._generator).squeeze(1)

    def took(self, token: int) -> None:
        """The token that was chosen belongs to the sequence: processors see it from now on."""
        if not self._processors:
            return
        if self._count == self._ids.shape[1]:
            grown = self._ids.new_empty(1, self._count + max(64, self._count // 4))
            grown[:, : self._count] = self._ids
            self._ids = grown
        self._ids[0, self._count] = token
        self._count += 1


def _settings(model: Any, wishes: Wishes, ids: Tensor) -> GenerationConfig:
    """The request's, the model's own and transformers' defaults, merged as ``generate`` merges them."""
    config, own = wishes.config, model.generation_config
    given: dict[str, Any] = {}
    if wishes.max_new_tokens is not None:
        if config is None:
            given["max_new_tokens"] = wishes.max_new_tokens
        else:
            config = copy.deepcopy(config)
            config.max_new_tokens = wishes.max_new_tokens
    defaults = {
        f"has_default_{name}": (config is None or getattr(config, name) is None)
        and getattr(own, name) is None
        for name in ("max_length", "min_length")
    }
    try:
        settings, _ = model._prepare_generation_config(config, **given)
        _check(settings)
        model._prepare_special_tokens(settings, True, device=ids.device, batch_size=1)
        prepared: GenerationConfig = model._prepare_generated_length(
            settings,
            **defaults,
            model_input_name="input_ids",
            input_ids_length=int(ids.shape[1]),
            inputs_tensor=ids,
        )
    except ValueError as error:
        raise _refused(error) from error
    return prepared


def _check(settings: GenerationConfig) -> None:
    for name, allowed in _UNSUPPORTED.items():
        value = getattr(settings, name, None)
        if value not in allowed:
            raise InvalidInputError(
                f"generation_config.{name} is not supported",
                expected=" or ".join(map(repr, allowed)),
                got=repr(value),
                remedy=_REMEDIES.get(name),
            )


def _processors(model: Any, settings: GenerationConfig, wishes: Wishes, ids: Tensor) -> LogitsProcessorList:
    own = LogitsProcessorList(wishes.processors or ())
    try:
        made: LogitsProcessorList = model._get_logits_processor(
            generation_config=settings,
            input_ids_seq_length=int(ids.shape[1]),
            encoder_input_ids=ids,
            logits_processor=own,
            device=ids.device,
            model_kwargs={},
        )
    except (ValueError, TypeError) as error:
        raise _refused(error) from error
    return made


def _refused(error: Exception) -> InvalidInputError:
    if isinstance(error, InvalidInputError):
        return error
    return InvalidInputError(
        "generation_config is wrong", expected="what model.generate accepts", got=str(error)
    )

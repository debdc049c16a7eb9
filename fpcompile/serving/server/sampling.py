"""The worker's part of sampling: a generation config out of the model's own and what a request asks for.

``temperature`` 0 is greedy; another one, ``top_p``, ``top_k`` or ``min_p`` samples. What a request leaves
open is as the model's generation config has it. OpenAI's penalties and biases are logits processors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fpcompile.serving.server.messages import Sampling

__all__ = ["Biased", "Penalised", "config_for", "processors_for"]


def config_for(
    own: GenerationConfig, asked: Sampling, max_new_tokens: int, vocabulary: int
) -> GenerationConfig:
    """A copy of the model's ``own`` generation config with what was ``asked``."""
    config = copy.deepcopy(own)
    config.max_length, config.max_new_tokens = None, max_new_tokens
    if asked.ignore_eos:
        config.eos_token_id = vocabulary  # no token has this id
    if asked.repetition_penalty is not None:
        config.repetition_penalty = asked.repetition_penalty
    if asked.temperature == 0:
        config.do_sample = False
        config.temperature = config.top_p = config.top_k = config.min_p = None
        return config
    for name in ("temperature", "top_p", "top_k", "min_p"):
        if (value := getattr(asked, name)) is not None:
            setattr(config, name, value)
            config.do_sample = True
    return config


def processors_for(asked: Sampling, prompt: int) -> LogitsProcessorList:
    """What changes the logits before they are drawn from; ``prompt``: its tokens are not penalised."""
    processors = LogitsProcessorList()
    if asked.presence_penalty or asked.frequency_penalty:
        processors.append(Penalised(prompt, asked.presence_penalty, asked.frequency_penalty))
    if asked.logit_bias:
        processors.append(Biased(asked.logit_bias))
    return processors


class Penalised(LogitsProcessor):
    """OpenAI's penalties: logit - frequency x count - presence x (count > 0), over the generated tokens."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self._prompt, self._presence, self._frequency = prompt, presence, frequency

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``input_ids [rows, tokens so far]``, ``scores [rows, vocabulary]``."""
        made = input_ids[:, self._prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, made, torch.ones_like(made, dtype=scores.dtype))
        penalised: torch.FloatTensor = scores - self._frequency * counts - self._presence * (counts > 0)  # type: ignore[assignment]
        return penalised


class Biased(LogitsProcessor):
    """OpenAI's ``logit_bias``: a number is added to the logits of some tokens."""

    def __init__(self, bias: Sequence[tuple[int, float]]) -> None:
        self._ids = torch.tensor([token for token, _ in bias])
        self._values = torch.tensor([value for _, value in bias])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``scores [rows, vocabulary]``."""
        biased = scores.clone()
        biased[:, self._ids.to(scores.device)] += self._values.to(scores.device, scores.dtype)
        return biased  # type: ignore[return-value]

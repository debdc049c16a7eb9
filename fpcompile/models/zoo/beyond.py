"""Tiny models beyond causal LMs: encoders and their heads, encoder-decoders, vision, vision-language, audio.

Words
    *case*    a class of transformers, how its config is made tiny, and a *recipe* for its inputs.
    *recipe*  a name of :data:`fpcompile.models.zoo.inputs.RECIPES`: config and size to keyword arguments.

Typical use
    ``model, small, large = tiny_any("WhisperForConditionalGeneration")``
    ``model(**small), model(**large)``

Invariants
    Same as for causal LMs: CPU, eval mode, deterministic, a few hundred thousand parameters.
    ``small`` and ``large`` have the same names, ranks and dtypes; the dimensions in which they differ are the
    ones that an export must keep symbolic. No dimension that varies is 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from fpcompile.errors import UnknownNameError
from fpcompile.models.zoo.beyond_cases import CASES
from fpcompile.models.zoo.inputs import LARGE_SIZE, RECIPES, SMALL_SIZE
from fpcompile.models.zoo.shrink import shrunk_arguments
from fpcompile.models.zoo.weights import instantiate

__all__ = ["ANY_NAMES", "TinyCase", "dynamic_dims", "tiny_any"]

ANY_NAMES: tuple[str, ...] = tuple(CASES)
"""The classes that :func:`tiny_any` knows."""


class TinyCase(NamedTuple):
    """A model and keyword arguments for its forward, at two sizes."""

    model: PreTrainedModel
    small: dict[str, torch.Tensor]
    large: dict[str, torch.Tensor]


def tiny_any(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> TinyCase:
    """A tiny model of the transformers class ``name``, of :data:`ANY_NAMES`, and inputs at two sizes.

    Floating-point inputs have the model's ``dtype``. Raises :class:`UnknownNameError` for other names.
    """
    if name not in CASES:
        raise UnknownNameError("class", name, known=ANY_NAMES)
    case = CASES[name]
    model_class: type[PreTrainedModel] = getattr(transformers, name)
    config_class = cast(type[PretrainedConfig], model_class.config_class)
    config = config_class(**shrunk_arguments(config_class, case.changes))
    model = instantiate(model_class, config, dtype=dtype, seed=seed)
    sizes = [RECIPES[case.recipe](config, size) for size in (SMALL_SIZE, LARGE_SIZE)]
    small, large = ({key: _cast(value, dtype) for key, value in inputs.items()} for inputs in sizes)
    return TinyCase(model, small, large)


def dynamic_dims(case: TinyCase) -> Mapping[str, tuple[int, ...]]:
    """Input name -> dimensions in which the two sizes differ."""
    differing = {
        name: tuple(
            i for i, (a, b) in enumerate(zip(value.shape, case.large[name].shape, strict=True)) if a != b
        )
        for name, value in case.small.items()
    }
    return MappingProxyType(differing)


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value

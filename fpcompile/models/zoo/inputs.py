"""Recipes: example keyword arguments for models beyond causal LMs, at two sizes.

Shapes use B rows, T tokens, C channels, H and W pixels, F feature bins, S samples or frames.

Invariants
    Deterministic. Token ids are plain (:func:`fpcompile.models.zoo.build.sample_ids`) except image
    placeholders, of which there are exactly as many as the image yields features.
    The last row of a padded batch is padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from transformers import PretrainedConfig

from fpcompile.models.zoo.build import sample_ids

__all__ = ["LARGE_SIZE", "RECIPES", "SMALL_SIZE", "Inputs", "Size"]

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    """``rows`` of a batch, ``tokens`` of text, ``side`` of an image in patches of 8 pixels, ``seed``."""

    rows: int
    tokens: int
    side: int
    seed: int


SMALL_SIZE = Size(rows=2, tokens=12, side=4, seed=1)
LARGE_SIZE = Size(rows=3, tokens=37, side=6, seed=2)

_PATCH = 8
_FIXED_SIDE = 4
_PAD = 3


def _pixels(size: Size, rows: int, side: int) -> torch.Tensor:
    """``[rows, 3, H, W]`` normal pixels of ``side`` x ``side`` patches."""
    generator = torch.Generator().manual_seed(size.seed)
    return torch.randn(rows, 3, side * _PATCH, side * _PATCH, generator=generator)


def _wave(size: Size, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(size.seed))


def text(config: PretrainedConfig, size: Size) -> Inputs:
    """``input_ids`` and ``attention_mask`` ``[B, T]``; the last row is padded."""
    ids = sample_ids(size.tokens, batch=size.rows, seed=size.seed)
    mask = torch.ones_like(ids)
    ids[-1, -_PAD:] = config.pad_token_id or 0
    mask[-1, -_PAD:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def text_and_end(config: PretrainedConfig, size: Size) -> Inputs:
    """:func:`text` with the end token as the last real one of every row."""
    inputs = text(config, size)
    inputs["input_ids"][:, -_PAD - 1] = config.eos_token_id
    inputs["input_ids"][:, -_PAD:] = config.pad_token_id
    inputs["attention_mask"][:, -_PAD:] = 0
    return inputs


def long_text(config: PretrainedConfig, size: Size) -> Inputs:
    """:func:`text` of at least 40 tokens, for attention that is sparse only from some length on."""
    return text(config, replace(size, tokens=size.tokens + 28))


def seq2seq(config: PretrainedConfig, size: Size) -> Inputs:
    """:func:`text` for the encoder and ``decoder_input_ids`` ``[B, T']``, a decoder prefill."""
    decoder = sample_ids(size.tokens // 2 + 1, batch=size.rows, seed=size.seed + 10)
    return text(config, size) | {"decoder_input_ids": decoder}


def image(config: PretrainedConfig, size: Size) -> Inputs:
    """``pixel_values`` ``[B, 3, 32, 32]``: the side that learned positions are made for."""
    return {"pixel_values": _pixels(size, size.rows, _FIXED_SIDE)}


def image_any_side(config: PretrainedConfig, size: Size) -> Inputs:
    """``pixel_values`` ``[B, 3, H, W]`` of a side that varies."""
    return {"pixel_values": _pixels(size, size.rows, size.side * 2)}


def video(config: PretrainedConfig, size: Size) -> Inputs:
    """``pixel_values`` ``[B, frames, 3, 32, 32]``."""
    return {"pixel_values": _wave(size, size.rows, int(config.num_frames), 3, 32, 32)}


def image_and_text(config: PretrainedConfig, size: Size) -> Inputs:
    """One image per row and a text of its own, as two-tower models take them."""
    return image(config, size) | text(config.get_text_config(), size)


def image_in_text(features: int) -> Callable[[PretrainedConfig, Size], Inputs]:
    """A prompt ``[1, T + features]`` with one image of ``features`` placeholders."""

    def recipe(config: PretrainedConfig, size: Size) -> Inputs:
        return _prompt(config, size, features) | {"pixel_values": _pixels(size, 1, _FIXED_SIDE)}

    return recipe


def typed_image_in_text(features: int) -> Callable[[PretrainedConfig, Size], Inputs]:
    """:func:`image_in_text` with ``token_type_ids`` that mark the placeholders."""

    def recipe(config: PretrainedConfig, size: Size) -> Inputs:
        inputs = image_in_text(features)(config, size)
        inputs["token_type_ids"] = (inputs["input_ids"] == config.image_token_id).long()
        return inputs

    return recipe


def tiled_image_in_text(features: int) -> Callable[[PretrainedConfig, Size], Inputs]:
    """:func:`image_in_text` with ``pixel_values`` ``[1, images, 3, H, W]``."""

    def recipe(config: PretrainedConfig, size: Size) -> Inputs:
        inputs = image_in_text(features)(config, size)
        return inputs | {"pixel_values": inputs["pixel_values"][:, None]}

    return recipe


def patches_in_text(config: PretrainedConfig, size: Size) -> Inputs:
    """Qwen-VL: ``pixel_values`` ``[patches, 384]``, ``image_grid_thw`` ``[1, 3]``: 4 patches a token."""
    grid = torch.tensor([[1, size.side, 4]])
    patches = size.side * 4
    inputs = _prompt(config, size, patches // 4)
    return inputs | {
        "pixel_values": _wave(size, patches, 3 * 2 * _PATCH * _PATCH),
        "image_grid_thw": grid,
        "mm_token_type_ids": (inputs["input_ids"] == config.image_token_id).int(),
    }


def waveform(config: PretrainedConfig, size: Size) -> Inputs:
    """``input_values`` ``[B, S]``: raw audio."""
    return {"input_values": _wave(size, size.rows, 40 * size.tokens)}


def spectrogram(config: PretrainedConfig, size: Size) -> Inputs:
    """``input_values`` ``[B, S, F]`` of the one length that learned positions are made for."""
    return {"input_values": _wave(size, size.rows, int(config.max_length), int(config.num_mel_bins))}


def log_mel(config: PretrainedConfig, size: Size) -> Inputs:
    """Whisper: ``input_features`` ``[B, F, S]`` of the one length it takes."""
    frames = 2 * int(config.max_source_positions)
    return {"input_features": _wave(size, size.rows, int(config.num_mel_bins), frames)}


def log_mel_and_text(config: PretrainedConfig, size: Size) -> Inputs:
    """:func:`log_mel` and a decoder prefill ``[B, T]``."""
    ids = sample_ids(size.tokens, batch=size.rows, seed=size.seed)
    return log_mel(config, size) | {"decoder_input_ids": ids}


def frames_and_text(config: PretrainedConfig, size: Size) -> Inputs:
    """Speech2Text: ``input_features`` ``[B, S, F]`` of any length and a decoder prefill."""
    features = _wave(size, size.rows, 4 * size.tokens, int(config.input_feat_per_channel))
    ids = sample_ids(size.tokens // 2 + 1, batch=size.rows, seed=size.seed)
    return {"input_features": features, "decoder_input_ids": ids}


def image_to_text(config: PretrainedConfig, size: Size) -> Inputs:
    """Image encoder with a text decoder: ``pixel_values`` and a decoder prefill."""
    ids = sample_ids(size.tokens, batch=size.rows, seed=size.seed)
    return image(config, size) | {"decoder_input_ids": ids}


def series(config: PretrainedConfig, size: Size) -> Inputs:
    """``past_values`` ``[B, S, C]``: a multivariate time series."""
    return {"past_values": _wave(size, size.rows, int(config.context_length), int(config.num_input_channels))}


def _prompt(config: PretrainedConfig, size: Size, features: int) -> Inputs:
    """Text around ``features`` image placeholders, ``[1, T + features]``, and a mask of ones."""
    ids = sample_ids(size.tokens, seed=size.seed)
    image_ids = torch.full((1, features), int(config.image_token_id))
    cut = size.tokens // 3
    whole = torch.cat([ids[:, :cut], image_ids, ids[:, cut:]], dim=1)
    return {"input_ids": whole, "attention_mask": torch.ones_like(whole)}


RECIPES: Mapping[str, Callable[[PretrainedConfig, Size], Inputs]] = MappingProxyType(
    {
        "text": text,
        "text_and_end": text_and_end,
        "long_text": long_text,
        "seq2seq": seq2seq,
        "image": image,
        "image_any_side": image_any_side,
        "video": video,
        "image_and_text": image_and_text,
        "image_16_in_text": image_in_text(16),
        "typed_image_4_in_text": typed_image_in_text(4),
        "typed_image_16_in_text": typed_image_in_text(16),
        "tiled_image_4_in_text": tiled_image_in_text(4),
        "patches_in_text": patches_in_text,
        "waveform": waveform,
        "spectrogram": spectrogram,
        "log_mel": log_mel,
        "log_mel_and_text": log_mel_and_text,
        "frames_and_text": frames_and_text,
        "image_to_text": image_to_text,
        "series": series,
    }
)

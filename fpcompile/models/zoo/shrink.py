"""Generic shrinking: from a transformers config class to keyword arguments of a tiny config of that class.

Words
    *fact table*  :data:`SMALL`: field name -> tiny value, for the names that architectures share.
    *kind*        one value of a ``layer_types`` / ``mlp_layer_types`` pattern (``"sliding_attention"``, ...).

Invariants
    Only fields that the class declares are set, so nothing that the class derives is overridden by accident.
    A pattern field gets every kind that the default config mixes, each at least twice.
    Windows, chunks, top-k and similar thresholds are small enough to be exceeded by 40 tokens.
    Token ids stay inside the tiny vocabulary: special ids sit below ``FIRST_PLAIN_ID`` or from
    ``END_PLAIN_ID`` on, ids between the two have no meaning to any model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

__all__ = ["END_PLAIN_ID", "FIRST_PLAIN_ID", "SMALL", "VOCAB_SIZE", "merged", "shrunk_arguments"]

VOCAB_SIZE = 128
FIRST_PLAIN_ID = 8
END_PLAIN_ID = 112
_WINDOW = 16
_CHUNK = 16
_HEAD_DIM = 16

SMALL: Mapping[str, object] = MappingProxyType(
    {
        # sizes
        "vocab_size": VOCAB_SIZE,
        **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size"), 64),
        **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "d_inner", "dff"), 96),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "feed_forward_size"), 96),
        **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
        **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
        **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
        **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
        **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
        **dict.fromkeys(("head_dim", "d_head", "dim_head", "attention_head_size", "kv_channels"), _HEAD_DIM),
        **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
        **dict.fromkeys(("max_target_positions", "model_max_length", "context_length"), 512),
        # latent attention (MLA)
        **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 24),
        **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 16),
        "qk_rope_head_dim": 8,
        "rotary_dim": 8,
        # windows, chunks, sparse attention
        **dict.fromkeys(
            ("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), _WINDOW
        ),
        **dict.fromkeys(("attention_chunk_size", "chunk_size", "mamba_chunk_size", "block_size"), _CHUNK),
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 8,  # enough that the scores, sums of ReLUs, are rarely tied at zero
        # experts
        **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
        **dict.fromkeys(
            ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2
        ),
        **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
        **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
        **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 48),
        **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 48),
        **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
        "decoder_sparse_step": 1,
        # vision and audio towers
        **dict.fromkeys(("image_size", "img_size"), 32),
        **dict.fromkeys(("patch_size", "output_channels"), 8),
        **dict.fromkeys(("mlp_dim", "vision_intermediate_size"), 96),
        **dict.fromkeys(("depth", "num_blocks"), 2),
        **dict.fromkeys(("out_hidden_size", "hidden_size_per_layer_input"), 64),
        "vocab_size_per_layer_input": VOCAB_SIZE,
        # recurrent and convolutional mixers
        **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
        **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
        **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
        **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
        **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
        **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
        "linear_num_value_heads": 4,
        "lru_width": 64,
        # special tokens
        **dict.fromkeys(("image_token_id", "image_token_index"), 120),
        **dict.fromkeys(("video_token_id", "video_token_index"), 121),
        **dict.fromkeys(("audio_token_id", "audio_token_index"), 122),
        **dict.fromkeys(("boi_token_id", "boi_token_index", "vision_start_token_id"), 123),
        **dict.fromkeys(("eoi_token_id", "eoi_token_index", "vision_end_token_id"), 124),
        **dict.fromkeys(("boa_token_id", "eoa_token_id", "eoa_token_index"), 125),
    }
)

_SPECIAL_IDS: Mapping[str, int] = MappingProxyType(
    {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    | {"decoder_start_token_id": 1, "forced_eos_token_id": 2, "eod_token_id": 3, "mask_token_id": 4}
)
"""Used when the default id does not fit the tiny vocabulary."""

_PATTERNS = ("layer_types", "mlp_layer_types")


def shrunk_arguments(config_class: type[PretrainedConfig], changes: Mapping[str, object]) -> dict[str, Any]:
    """Keyword arguments for a tiny ``config_class``; ``changes`` win, and are merged into nested configs.

    A value in ``changes`` that is a mapping, under the name of a nested config, changes that nested config.
    """
    default = config_class()
    values = _field_values(default)
    changes = _by_field_name(config_class, changes)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        name = field.name
        if name in config_class.sub_configs:
            nested = _shrunk_nested(config_class, name, values[name], changes.get(name))
            if nested is not None:
                arguments[name] = nested
        elif name in changes:
            arguments[name] = changes[name]
        else:
            _shrink_field(arguments, name, values.get(name))
    arguments.update({name: value for name, value in changes.items() if name not in arguments})
    _shrink_latent_attention(arguments, values, changes)
    _shrink_patterns(arguments, values, changes)
    return arguments


def merged(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """``base`` updated by ``over``; mappings inside are merged one level down, recursively."""
    result = dict(base)
    for name, value in over.items():
        old = result.get(name)
        result[name] = (
            merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def _field_values(config: PretrainedConfig) -> dict[str, object]:
    """Declared fields of ``config``; some are stored under another name, that of ``attribute_map``."""
    stored = vars(config)
    names = (field.name for field in dataclasses.fields(config))
    return {name: stored.get(config.attribute_map.get(name, name)) for name in names}


def _by_field_name(config_class: type[PretrainedConfig], changes: Mapping[str, object]) -> dict[str, object]:
    """``changes`` under the names that the class declares, where they use those it stores."""
    declared = {field.name for field in dataclasses.fields(config_class)}
    renamed = {new: old for old, new in config_class.attribute_map.items() if old in declared}
    return {name if name in declared else renamed.get(name, name): value for name, value in changes.items()}


def _shrink_field(arguments: dict[str, Any], name: str, default: object) -> None:
    """Set ``arguments[name]`` when the field has a tiny value; a field whose default is None stays None."""
    if name in _SPECIAL_IDS:
        if isinstance(default, int) and default >= FIRST_PLAIN_ID:
            arguments[name] = _SPECIAL_IDS[name]
        elif isinstance(default, list):
            arguments[name] = [_SPECIAL_IDS[name]]
    elif name in SMALL and isinstance(default, int | float | str) and not isinstance(default, bool):
        arguments[name] = SMALL[name]


def _shrunk_nested(
    owner: type[PretrainedConfig], name: str, default: object, changes: object
) -> dict[str, Any] | PretrainedConfig | None:
    if isinstance(changes, PretrainedConfig):
        return changes
    wanted = dict(changes) if isinstance(changes, Mapping) else {}
    model_type = wanted.pop("model_type", None)
    if model_type is not None:
        named: type[PretrainedConfig] = CONFIG_MAPPING[str(model_type)]
        return named(**shrunk_arguments(named, wanted))
    if isinstance(default, PretrainedConfig):
        nested_class: type[PretrainedConfig] = type(default)
    elif wanted:
        nested_class = owner.sub_configs[name]
    else:
        return None
    arguments = shrunk_arguments(nested_class, wanted)
    return {"model_type": nested_class.model_type} | arguments


def _shrink_latent_attention(
    arguments: dict[str, Any], default: Mapping[str, object], changes: Mapping[str, object]
) -> None:
    """MLA has a key and a value per query head, and calls the rotated part ``head_dim``."""
    if default.get("kv_lora_rank") is None:
        return
    if "num_key_value_heads" in arguments and "num_key_value_heads" not in changes:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    if "head_dim" in arguments and default.get("head_dim") == default.get("qk_rope_head_dim"):
        arguments["head_dim"] = arguments["qk_rope_head_dim"]


def _shrink_patterns(
    arguments: dict[str, Any], default: Mapping[str, object], changes: Mapping[str, object]
) -> None:
    """Give every pattern field each of its kinds twice, and the config as many layers as that takes.

    The kinds of one pattern alternate, those of the other come in blocks, so that they are crossed.
    """
    values = {name: value for name in _PATTERNS if isinstance(value := default.get(name), list)}
    values |= {name: value for name in _PATTERNS if isinstance(value := changes.get(name), list)}
    if not values:
        return
    kinds = {name: list(dict.fromkeys(value)) for name, value in values.items()}
    given = [len(values[name]) for name in values if name in changes]
    layers = changes.get("num_hidden_layers")
    count = layers if isinstance(layers, int) else max(given + [2 * len(found) for found in kinds.values()])
    arguments["num_hidden_layers"] = count
    for name, found in kinds.items():
        if name in changes:
            continue
        if name == "layer_types":
            arguments[name] = [found[i % len(found)] for i in range(count)]
        else:
            arguments[name] = [found[i * len(found) // count] for i in range(count)]

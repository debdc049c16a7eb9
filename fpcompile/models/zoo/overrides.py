"""Per-architecture data: config fields that generic shrinking does not know or gets wrong.

A value that is a mapping, under the name of a nested config, changes that nested config.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["MAIN_ARCHS", "OVERRIDES", "UNBUILDABLE"]

MAIN_ARCHS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox", "granite"),
    *("qwen3_moe", "mixtral", "gpt_oss"),
)
"""The architectures that the first release supports; the zoo's most used entries."""

_GEMMA = {"query_pre_attn_scalar": 16}

OVERRIDES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "gemma2": _GEMMA,
        "gemma3_text": _GEMMA,
        "mixtral": {"head_dim": 16},
        "phi3": {"sliding_window": 16},
        "gpt_neox": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        },
        "granite": {"attention_multiplier": 0.25, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}
        | {"logits_scaling": 0.5},
        "gpt_oss": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 16.0,
                "truncate": False,
            }
            | {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 32}
        },
    }
)

UNBUILDABLE: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "a draft head: its forward needs the hidden states and the shared keys and values of a target model",
    )
)
"""Entries of the causal LM mapping that are no causal LM of their own, and why."""

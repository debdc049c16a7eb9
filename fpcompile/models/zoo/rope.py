"""Rotary variants at tiny size: every threshold sits at 32 positions, far below 512."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from fpcompile.errors import UnknownNameError

__all__ = ["ROPE_THRESHOLD", "ROPE_VARIANTS", "rope_changes"]

ROPE_THRESHOLD = 32
"""Positions after which a variant with a threshold behaves differently."""

ROPE_VARIANTS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

_KEPT_WITH_NAME = ("rope_theta", "partial_rotary_factor")
_POSITIONS = 512
"""``max_position_embeddings`` of a tiny config; yarn and longrope want its ratio to the threshold."""


def rope_changes(config: PretrainedConfig, rope: str | Mapping[str, object]) -> dict[str, Any]:
    """Config changes that give ``config`` the rotary variant ``rope``.

    ``rope`` is a name of :data:`ROPE_VARIANTS`, or ``rope_parameters`` entries which are merged over the
    config's. With per-layer-type parameters (gemma3), a name or a flat mapping applies to ``full_attention``
    alone, as transformers does with ``rope_scaling``; a mapping keyed by layer type is merged key by key.
    """
    changes: dict[str, Any] = {}
    base = dict(getattr(config, "rope_parameters", None) or {})
    nested = {key: value for key, value in base.items() if isinstance(value, Mapping)}
    target = next((key for key in ("full_attention", *nested) if key in nested), None)
    old = base[target] if target is not None else base
    if isinstance(rope, str):
        entries = {key: old[key] for key in _KEPT_WITH_NAME if key in old} | _variant(
            rope, rotary_dim(config)
        )
        if rope == "dynamic":
            changes["max_position_embeddings"] = ROPE_THRESHOLD
        if "original_max_position_embeddings" in entries and hasattr(
            config, "original_max_position_embeddings"
        ):
            changes["original_max_position_embeddings"] = ROPE_THRESHOLD
    elif nested and set(rope) <= set(nested):
        by_layer = {
            key: {**nested[key], **value} for key, value in rope.items() if isinstance(value, Mapping)
        }
        return {"rope_parameters": base | by_layer}
    else:
        entries = {**old, **rope}
    changes["rope_parameters"] = entries if target is None else base | {target: entries}
    return changes


def rotary_dim(config: PretrainedConfig) -> int:
    """Dimensions of a head that are rotated."""
    for name in ("qk_rope_head_dim", "rotary_dim"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(head * parameters.get("partial_rotary_factor", 1.0))


def _variant(name: str, dim: int) -> dict[str, Any]:
    if name not in ROPE_VARIANTS:
        raise UnknownNameError("rope variant", name, known=ROPE_VARIANTS)
    entries: dict[str, Any] = {"rope_type": name}
    if name in ("linear", "dynamic", "llama3"):
        entries["factor"] = 4.0
    if name in ("yarn", "longrope"):
        entries["factor"] = float(_POSITIONS // ROPE_THRESHOLD)
    if name in ("yarn", "longrope", "llama3"):
        entries["original_max_position_embeddings"] = ROPE_THRESHOLD
    if name == "llama3":
        entries |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if name == "longrope":
        entries["short_factor"] = [1.0 + 0.05 * i for i in range(dim // 2)]
        entries["long_factor"] = [1.0 + 0.5 * i for i in range(dim // 2)]
    return entries

"""The tiny zoo: every architecture of transformers at a size that builds in a fraction of a second.

Random weights, real classes: what the zoo gives away is structure (windows, experts, recurrent states, rotary
variants), small enough for a test and wide enough for a wrong mask, position or state to show in the logits.
"""

from __future__ import annotations

from fpcompile.models.zoo.beyond import ANY_NAMES, TinyCase, dynamic_dims, tiny_any
from fpcompile.models.zoo.build import CAUSAL_ARCHS, sample_ids, tiny_config, tiny_model
from fpcompile.models.zoo.facts import FACTS, STATES, ArchFacts, arch_facts
from fpcompile.models.zoo.overrides import MAIN_ARCHS, UNBUILDABLE
from fpcompile.models.zoo.rope import ROPE_THRESHOLD, ROPE_VARIANTS

__all__ = [
    "ANY_NAMES",
    "CAUSAL_ARCHS",
    "FACTS",
    "MAIN_ARCHS",
    "ROPE_THRESHOLD",
    "ROPE_VARIANTS",
    "STATES",
    "UNBUILDABLE",
    "ArchFacts",
    "TinyCase",
    "arch_facts",
    "dynamic_dims",
    "sample_ids",
    "tiny_any",
    "tiny_config",
    "tiny_model",
]

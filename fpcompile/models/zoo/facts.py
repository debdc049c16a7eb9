"""What was seen of each tiny causal LM: the states it carries, whether it is causal, what is odd about it.

The table lists the architectures that differ from the common case: key/value states only, causal, runnable
from one token on, no state outside its outputs. A slow test compares every row with the running model.

Words
    *state*  what a layer hands from one forward to the next, named in :data:`STATES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from fpcompile.errors import InternalError

__all__ = ["FACTS", "STATES", "ArchFacts", "arch_facts"]

STATES: Mapping[str, str] = MappingProxyType(
    {
        "kv": "keys and values of every position",
        "window": "keys and values of the last window",
        "indexed": "keys and values of every position, and the keys of a sparse indexer",
        "compressed": "keys and values of a window, and of compressed groups of positions",
        "recurrent": "a state of fixed size: convolution, SSM, linear attention",
        "recurrent+kv": "both in one layer",
        "recurrent+window": "both in one layer",
        "stateless": "a layer without state, or which reads another layer's",
        "hidden": "hidden states of earlier positions",
        "module": "buffers or attributes of the module itself, changed by every forward",
    }
)


@dataclass(frozen=True, slots=True)
class ArchFacts:
    """Facts of one architecture at tiny size.

    ``states`` are the kinds its layers carry, in order of first use; empty when it carries none at all.
    ``continues`` says how transformers' own class goes on from its state so that the last logits are those
    of a whole prefill: ``"yes"`` with any number of tokens, ``"positions"`` when ``position_ids`` are passed,
    ``"single"`` with one token at a time, ``"no"`` in no way that was found.
    ``causal`` is False when a token changes the logits of earlier positions.
    ``left_as_found`` is False when a forward changes parameters, buffers or attributes of the module.
    ``note`` is the oddity that a test or a compiler must know.
    """

    states: tuple[str, ...] = ("kv",)
    continues: Literal["yes", "positions", "single", "no"] = "yes"
    causal: bool = True
    left_as_found: bool = True
    note: str = ""

    def __post_init__(self) -> None:
        if unknown := set(self.states) - set(STATES):
            raise InternalError("a fact names unknown states", expected=str(set(STATES)), got=str(unknown))


def arch_facts(arch: str) -> ArchFacts:
    """The facts of ``arch``; those of the common case when the table has no row for it."""
    return FACTS.get(arch, _COMMON)


_COMMON = ArchFacts()
_WINDOW = ArchFacts(states=("window",))
_WINDOW_KV = ArchFacts(states=("window", "kv"))
_KV_WINDOW = ArchFacts(states=("kv", "window"))
_INDEXED = ArchFacts(states=("indexed",))
_INDEXED_WINDOW = ArchFacts(states=("indexed", "window"))
_RECURRENT = ArchFacts(states=("recurrent",))
_SINGLE = "several tokens at once restart its SSM state"
_STEP = "a step of one token differs from a prefill by 5e-4 of the logits' spread"
_RECURRENT_KV = ArchFacts(states=("recurrent", "kv"))
_SHARED_KV = ArchFacts(
    states=("window", "kv", "stateless"), note="the last layers read others' keys and values"
)


def _group(facts: ArchFacts, archs: str) -> dict[str, ArchFacts]:
    return dict.fromkeys(archs.split(), facts)


FACTS: Mapping[str, ArchFacts] = MappingProxyType(
    _group(_WINDOW, "ministral mistral phi3")
    | _group(
        _WINDOW_KV, "afmoe beam cohere2 cohere2_moe cohere_compass_text exaone4 exaone_moe gemma2 gemma3"
    )
    | _group(_WINDOW_KV, "gemma3_text gemma4 gemma4_unified gemma4_unified_text gpt_oss kolibri1 llama4")
    | _group(_WINDOW_KV, "llama4_text olmo3 vaultgemma")
    | _group(
        _KV_WINDOW, "cwm flint granite_swa granitemoe_swa laguna mellum mimo_v2_flash modernbert-decoder"
    )
    | _group(_SHARED_KV, "gemma3n gemma3n_text gemma4_text")
    | _group(_INDEXED, "axk2 deepseek_v32 glm_moe_dsa hy_v4")
    | _group(_INDEXED_WINDOW, "dots3_note dots3_note_text")
    | _group(_RECURRENT, "mamba2 xlstm")
    | _group(ArchFacts(states=("recurrent",), continues="single", note=_SINGLE), "falcon_mamba mamba")
    | _group(_RECURRENT_KV, "bailing_hybrid granitemoehybrid kimi_linear lfm2 lfm2_moe minimax")
    | _group(_RECURRENT_KV, "olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next")
    | _group(ArchFacts(states=("recurrent", "indexed")), "qwen4_exp qwen4_exp_text")
    | _group(ArchFacts(states=("recurrent+window", "recurrent+kv")), "inkling_text")
    | _group(
        ArchFacts(note="one code book, so that ids are a plain [batch, tokens]"), "musicgen musicgen_melody"
    )
    | _group(
        ArchFacts(states=(), continues="no", note="returns no state: each forward is a whole prefill"),
        "openai-gpt xlm",
    )
    | {
        "bamba": ArchFacts(
            states=("recurrent", "kv"),
            continues="positions",
            note="counts positions from 0 whatever the cache",
        ),
        "blt": ArchFacts(continues="no", note="the number of patches depends on the tokens' values"),
        "cpmant": ArchFacts(
            continues="no", causal=False, note="every position sees every other; learned prompt in front"
        ),
        "deepseek_v4": ArchFacts(states=("window", "compressed")),
        "doge": ArchFacts(
            continues="no",
            note="keeps the top 16 keys; equal tokens tie, and topk breaks ties by the layout of its input",
        ),
        "falcon_h1": ArchFacts(states=("recurrent+kv",)),
        "hrm_text": ArchFacts(note="each layer runs several times in a forward, with a cache of its own"),
        "inkling2_text": ArchFacts(
            states=("recurrent+window", "recurrent+kv"), note="120 logits, the vocabulary without its padding"
        ),
        "jamba": ArchFacts(states=("recurrent", "kv"), continues="single", note=_SINGLE),
        "lfm3": ArchFacts(states=("recurrent", "kv", "window")),
        "longcat_flash": ArchFacts(note="two attentions to a layer"),
        "minimax_m3_vl_text": ArchFacts(states=("kv", "indexed")),
        "mllama": ArchFacts(note="its cross-attention layers are skipped when there is no image"),
        "moshi": ArchFacts(states=("window",), note="its window bounds the cache but not the mask"),
        "nemotron_h": ArchFacts(states=("recurrent", "stateless", "kv"), note=_STEP),
        "prophetnet": ArchFacts(continues="no", note="also predicts the token after the next: logits_ngram"),
        "recurrent_gemma": ArchFacts(
            states=("module",),
            continues="no",
            left_as_found=False,
            note="two forwards on one module share their states",
        ),
        "reformer": ArchFacts(
            states=("hidden",),
            continues="no",
            causal=False,
            note="sorts positions into buckets, from the second chunk on; pads to a multiple of the chunk",
        ),
        "rwkv": ArchFacts(
            states=("recurrent",),
            left_as_found=False,
            note="the first forward in eval mode rescales the weights in place; "
            "a batch of several single tokens mixes its rows",
        ),
        "xlnet": ArchFacts(states=("hidden",)),
        "zamba": ArchFacts(states=("recurrent", "recurrent+kv"), continues="single", note=_SINGLE),
        "zamba2": ArchFacts(states=("recurrent", "recurrent+kv"), note=_STEP),
        "zaya": ArchFacts(states=("recurrent+kv", "recurrent+window")),
    }
)

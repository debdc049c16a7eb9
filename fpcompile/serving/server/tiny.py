"""A language model, an embedder and a tokenizer that are made in code: to try the server without a download.

The tokenizer has one token for each byte, so that every text goes there and back unchanged; weights are drawn
from a fixed seed, so that two processes make the same model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["EMBEDDER", "GENERATOR", "byte_tokenizer", "config_of"]

GENERATOR = "tiny"
EMBEDDER = "tiny-embed"

_SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ('system', 'user', 'assistant') -%}"
    "{{ raise_exception('roles are system, user and assistant') }}"
    "{%- endif -%}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
_VOCABULARY = 256 + len(_SPECIAL)
_LENGTH = 4096


def byte_tokenizer() -> Any:
    """One token per byte, four special ones, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    made: Any = PreTrainedTokenizerFast
    tokenizer = made(
        tokenizer_object=raw,
        eos_token=_SPECIAL[0],
        pad_token=_SPECIAL[0],
        additional_special_tokens=list(_SPECIAL[1:]),
        clean_up_tokenization_spaces=False,
        model_max_length=_LENGTH,
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def config_of(name: str) -> PretrainedConfig:
    """The configuration of :data:`GENERATOR` (a Qwen3) or :data:`EMBEDDER` (a BERT)."""
    from transformers import BertConfig, Qwen3Config

    end = 256
    if name == EMBEDDER:
        return BertConfig(
            vocab_size=_VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, max_position_embeddings=512, pad_token_id=end, eos_token_id=end,
            architectures=["BertModel"],
        )  # fmt: skip
    return Qwen3Config(
        vocab_size=_VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=128, max_position_embeddings=_LENGTH,
        tie_word_embeddings=False, initializer_range=0.2, eos_token_id=end, pad_token_id=end,
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip

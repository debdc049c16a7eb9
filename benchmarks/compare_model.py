"""The folder that all servers load: a small model with random weights, a tokenizer of one token per letter.

The model is the one of ``fpcompile bench goodput --real``: a Qwen3 of 30 million parameters in bf16. Its
tokenizer has one token for each printable ASCII character and a visible word for every other id, so that a
prompt of n letters has n tokens in every server, and every token that is made is text that a server can send
at once. There is no token that ends an answer: an answer is as long as was asked.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

__all__ = ["ALPHABET", "prompt_of", "save_model", "vocabulary"]

ALPHABET = string.ascii_lowercase
_PRINTABLE = "".join(chr(code) for code in range(32, 127))
UNKNOWN = "<unknown>"


def vocabulary(size: int) -> dict[str, int]:
    """Token -> id: the printable characters, one unknown token, and words of one length for the other ids."""
    tokens = [*_PRINTABLE, UNKNOWN]
    tokens += [f"t{number:06d}" for number in range(len(tokens), size)]
    return {token: number for number, token in enumerate(tokens)}


def prompt_of(tokens: int, seed: str) -> str:
    """``tokens`` random letters: no two prompts share a prefix worth caching."""
    return "".join(random.Random(seed).choices(ALPHABET, k=tokens))


def save_model(folder: Path) -> None:
    """Write configuration, weights and tokenizer into ``folder``; nothing is downloaded."""
    from transformers import GenerationConfig

    from fpcompile.serving.bench_worker import build_model

    model = build_model(None)
    model.config.architectures = [type(model).__name__]
    model.config.eos_token_id = model.config.bos_token_id = model.config.pad_token_id = None
    model.generation_config = GenerationConfig(do_sample=False)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    _tokenizer(int(model.config.vocab_size), int(model.config.max_position_embeddings)).save_pretrained(
        folder
    )


def parameters_of(folder: Path) -> dict[str, Any]:
    """What the report says about the model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = (
        "architectures", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "dtype",
    )  # fmt: skip
    return {name: config[name] for name in names if name in config}


def _tokenizer(size: int, longest: int) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(vocabulary(size), unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    raw.decoder = decoders.Fuse()
    made: Any = PreTrainedTokenizerFast
    return made(
        tokenizer_object=raw,
        unk_token=UNKNOWN,
        pad_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=longest,
    )

"""Text of tokenizers as SentencePiece has them: bytes where no token fits, spaces at the front of words."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from fpcompile.serving.server.text import Detokenizer
from fpcompile.serving.server.tiny import byte_tokenizer
from fpcompile.serving.server.tokens import Tokenizer

WORDS = ("<unk>", "</s>", "▁", "▁a", "▁b", "c")
UNKNOWN, END, SPACE, A, B, C = range(len(WORDS))


def _bytes(text: str) -> list[int]:
    return [len(WORDS) + byte for byte in text.encode()]


def _tokenizer(decoder: Any) -> Tokenizer:
    vocabulary = [*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    raw = Raw(
        models.BPE(
            vocab={word: n for n, word in enumerate(vocabulary)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    raw.decoder = decoder
    made: Any = PreTrainedTokenizerFast
    return Tokenizer(made(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>"))


LLAMA = _tokenizer(
    decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
)
METASPACE = _tokenizer(decoders.Metaspace())


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def test_a_character_of_several_byte_tokens_comes_whole() -> None:
    ids = [A, *_bytes("😀"), C, *_bytes("é")]
    assert LLAMA.decode(ids) == "a😀cé"
    assert _pieces(LLAMA, ids) == ["a", "", "", "", "😀", "c", "", "é", ""]


def test_bytes_that_are_no_text_are_given_out_in_the_end() -> None:
    broken = _bytes("😀")[:3]
    assert _pieces(LLAMA, [A, *broken]) == ["a", "", "", "", "\ufffd" * 3]
    assert "".join(_pieces(LLAMA, broken * 100)) == "\ufffd" * 300
    detokenizer = Detokenizer(LLAMA.decode)
    assert any(detokenizer.push(token) for token in broken * 100), "held back for a while, not for ever"


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE], ids=["llama", "metaspace"])
def test_a_space_behind_a_special_token_stays(tokenizer: Tokenizer) -> None:
    ids = [A, END, B, END, END, A]
    assert tokenizer.decode(ids) == "a b a"
    assert _pieces(tokenizer, ids) == ["a", "", " b", "", "", " a", ""]


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE], ids=["llama", "metaspace"])
@given(words=st.lists(st.sampled_from([SPACE, A, B, C, END, -1]), max_size=40))
def test_pieces_joined_are_the_text(tokenizer: Tokenizer, words: list[int]) -> None:
    ids = [token for word in words for token in (_bytes("é😀") if word < 0 else [word])]
    if tokenizer is METASPACE:  # it has no text for bytes
        ids = [token for token in ids if token < len(WORDS)]
    assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_windows_stay_short() -> None:
    """Whatever the tokens are, few are decoded for each one."""
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return LLAMA.decode(ids)

    detokenizer = Detokenizer(decode)
    for token in [END] * 300 + [A] + [END] * 300 + [SPACE] * 300 + _bytes("😀")[:1] * 300:
        detokenizer.push(token)
    assert longest <= 130


def test_padding_and_truncation_of_a_tokenizers_file_are_not_for_prompts() -> None:
    wrapped = byte_tokenizer()
    wrapped.backend_tokenizer.enable_padding(length=32, pad_id=256, pad_token="<|end|>")
    wrapped.backend_tokenizer.enable_truncation(32)
    tokenizer = Tokenizer(wrapped)
    assert len(asyncio.run(tokenizer.encode("hi"))) == 2
    assert len(asyncio.run(tokenizer.encode("x" * 100))) == 100
    assert wrapped.backend_tokenizer.padding is not None, "who gave it still has it as it was"

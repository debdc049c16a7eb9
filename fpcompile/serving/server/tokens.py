"""A model's tokenizer as the front uses it: from any thread, and never for long on the event loop.

Long texts, many texts and long conversations are worked on in a thread of their own, and without the
interpreter's lock where the tokenizer has a backend in Rust. What is surely longer than a model takes is not
tokenised at all.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from typing import Any, Final, final

from fpcompile.errors import InvalidInputError
from fpcompile.serving.server.failures import ApiError

__all__ = ["Tokenizer"]

_SHORT: Final = 2048  # characters that are worked on at once; longer texts would hold up the event loop
_EACH: Final = 64  # characters that a text costs besides its own
_COUNTED: Final = 1 << 16  # characters of a text that is tokenised in any case, to count


@final
class Tokenizer:
    """Wraps a tokenizer of transformers. Text with lone surrogates is refused: no tokenizer takes it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = _whole(getattr(tokenizer, "backend_tokenizer", None))  # Rust: safe in several threads
        self._lock = threading.Lock()
        self._longest = max(map(len, tokenizer.get_vocab()), default=1)

    async def encode(self, text: str, *, special: bool = True, most: int | None = None) -> list[int]:
        """Ids of ``text``; ``special``: with the tokens that the model wants around a text.

        ``most``: tokens that the model takes; :class:`ApiError` for a text that surely has more.
        """
        (ids,) = await self._all([text], special, most)
        return ids

    async def encode_all(
        self, given: str | list[str] | list[int] | list[list[int]], *, most: int | None = None
    ) -> list[list[int]]:
        """Ids of one or several texts, or of what is ids already; at least one prompt is given."""
        if isinstance(given, str):
            return [await self.encode(given, most=most)]
        if isinstance(given[0], str):  # the first says what all of them are: there may be very many
            return await self._all(given, True, most)
        if isinstance(given[0], list):
            return given
        return [given]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    async def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as the tokenizer's own template writes it. Raises :class:`InvalidInputError`."""
        if _is_short([message["content"] for message in messages]):
            return self._chat(messages)
        return await asyncio.to_thread(self._chat, messages)

    def _chat(self, messages: Sequence[dict[str, str]]) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise InvalidInputError(
                "this model has no chat template", remedy="use /v1/completions, or serve a chat model"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like about what they are given
            raise InvalidInputError(
                "the model's chat template refuses the messages", got=f"{type(error).__name__}: {error}"
            ) from error
        return text

    async def _all(self, texts: list[str], special: bool, most: int | None) -> list[list[int]]:
        if most is not None and (longest := max(map(len, texts))) > max(most * self._longest, _COUNTED):
            raise ApiError(
                400,
                f"the model takes {most} tokens; a text has {longest} characters",
                code="context_length_exceeded",
            )
        if _is_short(texts):
            return [self._encode(text, special) for text in texts]
        return await asyncio.to_thread(lambda: [self._encode(text, special) for text in texts])

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidInputError("a text has half of a surrogate pair", expected="Unicode text") from None
        if (
            self._backend is not None
        ):  # a batch of one: only batches are encoded without the interpreter's lock
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
            return ids
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])


def _is_short(texts: Sequence[str]) -> bool:
    return sum(map(len, texts)) + _EACH * (len(texts) - 1) <= _SHORT


def _whole(backend: Any) -> Any:
    """``backend``, or a copy without the padding and truncation that its file may ask for."""
    if backend is None or (backend.padding is None and backend.truncation is None):
        return backend
    backend = copy.deepcopy(backend)
    backend.no_padding()
    backend.no_truncation()
    return backend

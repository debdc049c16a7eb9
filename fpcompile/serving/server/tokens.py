"""A model's tokenizer as the front uses it: from any thread, long texts in a thread of their own."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from typing import Any, Final, final

from fpcompile.errors import InvalidInputError

__all__ = ["Tokenizer"]

_SHORT: Final = 2048  # characters that are tokenised at once; longer texts would hold up the event loop


@final
class Tokenizer:
    """Wraps a tokenizer of transformers. Text with lone surrogates is refused: no tokenizer takes it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = _whole(getattr(tokenizer, "backend_tokenizer", None))  # Rust: safe in several threads
        self._lock = threading.Lock()

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of ``text``; ``special``: with the tokens that the model wants around a text."""
        if len(text) <= _SHORT:
            return self._encode(text, special)
        return await asyncio.to_thread(self._encode, text, special)

    async def encode_all(self, given: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        """Ids of one or several texts, or of what is ids already; at least one prompt is given."""
        if isinstance(given, str):
            return [await self.encode(given)]
        if given and isinstance(given[0], int):
            return [[int(token) for token in given]]
        return [await self.encode(one) if isinstance(one, str) else list(one) for one in given]  # type: ignore[arg-type]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def chat(self, messages: Sequence[dict[str, Any]]) -> str:
        """The conversation as the tokenizer's own template writes it. Raises :class:`InvalidInputError`."""
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

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidInputError("a text has half of a surrogate pair", expected="Unicode text") from None
        if self._backend is not None:
            ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
            return ids
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])


def _whole(backend: Any) -> Any:
    """``backend``, or a copy without the padding and truncation that its file may ask for."""
    if backend is None or (backend.padding is None and backend.truncation is None):
        return backend
    backend = copy.deepcopy(backend)
    backend.no_padding()
    backend.no_truncation()
    return backend

"""The bodies of answers, as OpenAI's API has them."""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fpcompile.serving.server.failures import ascii_json

__all__ = ["Kind", "Shape", "Usage", "embedding_answer", "model_list"]

Kind = Literal["completion", "chat"]


@dataclass(slots=True)
class Usage:
    """Tokens counted while they come."""

    prompt: int = 0
    completion: int = 0

    @property
    def body(self) -> dict[str, int]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True, slots=True)
class Shape:
    """What completions and chat completions differ in. ``id``: of the whole answer.

    ``counted``: the last chunk has the usage, and each other one says that it has none.
    """

    kind: Kind
    id: str
    model: str
    created: int
    counted: bool = False

    @classmethod
    def new(cls, kind: Kind, request_id: str, model: str, *, counted: bool = False) -> Shape:
        """For an answer that begins now."""
        prefix = "cmpl" if kind == "completion" else "chatcmpl"
        return cls(kind, f"{prefix}-{request_id}", model, int(time.time()), counted)

    def whole(self, texts: Sequence[tuple[str, str]], usage: Usage) -> dict[str, Any]:
        """An answer that is not streamed; ``texts``: (text, finish reason) of each choice."""
        choices: list[dict[str, Any]] = []
        for index, (text, reason) in enumerate(texts):
            choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
            if self.kind == "chat":
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choices.append(choice)
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head(name), "choices": choices, "usage": usage.body}

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk that says who speaks, if there is one."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self.kind == "chat" else None

    def piece(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """A chunk with text; the last of a choice has the finish reason."""
        if self.kind == "chat":
            return self._chunk(index, {"content": text} if text else {}, reason)
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
        return {**self._head("text_completion"), "choices": [choice], **self._none_yet()}

    def counts(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, where it was asked for."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self._head(name), "choices": [], "usage": usage.body}

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **self._none_yet()}

    def _none_yet(self) -> dict[str, None]:
        return {"usage": None} if self.counted else {}

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}


async def embedding_answer(
    model: str, vectors: Sequence[bytes], tokens: int, form: Literal["float", "base64"]
) -> bytes:
    """The whole answer; ``vectors``: little-endian float32.

    Written one vector after the other, with a turn of the event loop between them: a thousand numbers take
    a millisecond, and there may be hundreds of vectors.
    """
    data = []
    for index, vector in enumerate(vectors):
        written: str | list[float] = (
            base64.b64encode(vector).decode("ascii")
            if form == "base64"
            else list(struct.unpack(f"<{len(vector) // 4}f", vector))
        )
        data.append(ascii_json({"object": "embedding", "index": index, "embedding": written}))
        await asyncio.sleep(0)
    usage = ascii_json({"prompt_tokens": tokens, "total_tokens": tokens})
    head = b'{"object":"list","data":['
    return head + b",".join(data) + b'],"model":' + ascii_json(model) + b',"usage":' + usage + b"}"


def model_list(names: Sequence[str], created: int) -> dict[str, Any]:
    """``GET /v1/models``."""
    data = [{"id": name, "object": "model", "created": created, "owned_by": "fpcompile"} for name in names]
    return {"object": "list", "data": data}

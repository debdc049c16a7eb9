"""The bodies of requests: OpenAI's fields, the usual ones of other servers (``top_k``), and ours.

Unknown fields are refused. Fields whose effect is not there (``logprobs``, ``tools``, ``suffix``) are refused
unless they ask for nothing; those that say something about the caller only (``user``, ``metadata``) are taken
and not used. ``slo_class``, ``ttft_slo`` and ``tbt_slo`` (seconds) are ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "ChatBody",
    "CompletionBody",
    "EmbeddingBody",
    "GenerationBody",
    "Message",
    "StreamOptions",
    "TextPart",
]


def _nothing(value: Any) -> Any:
    if value is None or value is False or value in ([], {}, "none"):
        return None
    raise ValueError("this is not supported by this server")


def _one(value: Any) -> Any:
    if value in (None, 1):
        return None
    raise ValueError("only 1 is supported by this server")


def _auto(value: Any) -> Any:
    if value in (None, "auto", "default"):
        return None
    raise ValueError("only 'auto' and 'default' are supported by this server")


def _plain_text(value: Any) -> Any:
    if value in (None, {"type": "text"}):
        return None
    raise ValueError("only {'type': 'text'} is supported by this server")


def _no_template(value: Any) -> Any:
    if value is None:
        return None
    raise ValueError("templates in requests are refused: the model's own is used")


Unsupported = Annotated[None, BeforeValidator(_nothing), Field(description="Not supported.")]
OnlyOne = Annotated[None, BeforeValidator(_one), Field(description="Only 1 is supported.")]
OnlyAuto = Annotated[None, BeforeValidator(_auto), Field(description="Only auto is supported.")]
OnlyText = Annotated[None, BeforeValidator(_plain_text), Field(description="Only text is supported.")]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """What every request may say."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Name
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    slo_class: Name | None = None
    ttft_slo: Seconds | None = None


class StreamOptions(BaseModel):
    """``include_usage``: a last chunk with the counts."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class GenerationBody(Body):
    """What completions of both kinds may say."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tbt_slo: Seconds | None = None
    service_tier: OnlyAuto = None
    store: Unsupported = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    best_of: OnlyOne = None
    echo: Unsupported = None
    suffix: Unsupported = None
    logprobs: Unsupported = None


class TextPart(BaseModel):
    """One part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation; which roles there are is the template's business."""

    model_config = ConfigDict(extra="forbid")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart]
    name: Annotated[str, Field(max_length=256)] | None = None

    @property
    def text(self) -> str:
        """The parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: OnlyText = None
    logprobs: Unsupported = None
    top_logprobs: Unsupported = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    parallel_tool_calls: Annotated[Any, Field(description="Not used: there are no tools.")] = None
    chat_template: Annotated[None, BeforeValidator(_no_template)] = None


class EmbeddingBody(Body):
    """``POST /v1/embeddings``."""

    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

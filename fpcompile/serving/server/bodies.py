"""The bodies of requests: OpenAI's fields, the usual ones of other servers (``top_k``), and ours.

Unknown fields are refused. Fields whose effect is not there (``logprobs``, ``tools``, ``suffix``) are refused
unless they ask for nothing; those that say something about the caller only (``user``, ``metadata``) are taken
and not used. ``slo_class``, ``ttft_slo`` and ``tbt_slo`` (seconds) are ours.

However long a body is, few of its mistakes are described: lists end at the first one, objects have a limit of
fields, and what may be of several kinds is told apart by a look at it before anything inside is checked.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    model_validator,
)

__all__ = [
    "ChatBody",
    "CompletionBody",
    "EmbeddingBody",
    "GenerationBody",
    "Message",
    "StreamOptions",
    "TextPart",
]

_FIELDS: Final = 64
"""What an object, or a list of few things, may have."""
_PROMPTS: Final = 1 << 12
_IDS: Final = 1 << 20
"""Prompts or messages, and ids of all prompts, that are looked at; a server's own limits are lower."""


def _only(*taken: Any, says: str) -> BeforeValidator:
    """None for what is one of ``taken``, also by its type; anything else is refused with ``says``."""

    def check(value: Any) -> None:
        if not any(type(value) is type(one) and value == one for one in taken):
            raise ValueError(says)

    return BeforeValidator(check)


def _few(value: Any) -> Any:
    """No object with very many fields, each of which would be an error of its own."""
    if isinstance(value, dict) and len(value) > _FIELDS:
        raise ValueError(f"at most {_FIELDS} fields are taken")
    return value


def _are_ids(value: list[Any]) -> bool:
    """Whether all are whole numbers >= 0; JSON's 1.0 and true are none."""
    return len(value) <= _IDS and set(map(type, value)) <= {int} and min(value, default=0) >= 0


def _prompts(value: Any) -> Any:
    """A text, texts, ids, or lists of ids; one error, whatever is wrong and wherever."""
    if isinstance(value, str) or value == []:
        return value
    if not isinstance(value, list):
        raise ValueError("a text, texts, token ids or lists of token ids are expected")
    if _are_ids(value):
        return value
    if isinstance(value[0], str | list) and len(value) > _PROMPTS:
        raise ValueError(f"at most {_PROMPTS} texts or lists of token ids are taken")
    if isinstance(value[0], str) and all(isinstance(one, str) for one in value):
        return value
    lists = isinstance(value[0], list) and all(isinstance(one, list) and _are_ids(one) for one in value)
    if lists and sum(map(len, value)) <= _IDS:
        return value
    raise ValueError(
        f"all texts, all token ids (whole numbers >= 0, at most {_IDS}) or all lists of them are expected"
    )


def _texts(value: Any) -> Any:
    """A text or a few."""
    several = isinstance(value, list) and len(value) <= _FIELDS and all(isinstance(one, str) for one in value)
    if value is None or isinstance(value, str) or several:
        return value
    raise ValueError(f"a text or at most {_FIELDS} texts are expected")


def _content(value: Any) -> str:
    """The text of a message, of its parts joined; of an answer's null, none."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list) or len(value) > _PROMPTS:
        raise ValueError(f"a text, or at most {_PROMPTS} parts, are expected")
    texts = []
    for part in value:
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"):
            raise ValueError(
                "parts are {'type': 'text', 'text': ...}; others are not supported by this server"
            )
        if not isinstance(part["text"], str):
            raise ValueError("the text of a part is a text")
        texts.append(part["text"])
    return "".join(texts)


def _biases(value: Any) -> Any:
    """Numbers by token id; an id has one spelling."""
    if value is None:
        return value
    if not isinstance(value, dict) or len(value) > 1024:
        raise ValueError("an object with at most 1024 token ids is expected")
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 12 and token == str(int(token))):
            raise ValueError("logit_bias names tokens by their ids")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError("a bias is a number from -100 to 100")
    return value


def _greedy_or_drawn(value: float) -> float:
    """Logits over less than this leave the range of floats."""
    if 0 < value < 1e-3:
        raise ValueError("0 (greedy), or a number from 0.001 to 2, is expected")
    return value


def _nothing(*more: Any) -> BeforeValidator:
    """For a field that may only ask for nothing: null, or one of ``more``."""
    return _only(None, *more, says="this is not supported by this server")


OnlyOne = Annotated[None, _only(None, 1, says="only 1 is supported by this server")]
OnlyAuto = Annotated[
    None, _only(None, "auto", "default", says="only 'auto' and 'default' are supported by this server")
]
OnlyText = Annotated[
    None, _only(None, {"type": "text"}, says="only {'type': 'text'} is supported by this server")
]
NoTemplate = Annotated[None, _only(None, says="templates in requests are refused: the model's own is used")]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Note = Annotated[str, Field(max_length=512)]
Notes = Annotated[
    dict[Annotated[str, Field(max_length=64)], Note], Field(max_length=16), BeforeValidator(_few)
]
Prompts = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[TokenId] | list[list[TokenId]]),
]
Texts = Annotated[
    str | list[str] | None, PlainValidator(_texts, json_schema_input_type=str | list[str] | None)
]
Biases = Annotated[
    dict[str, float] | None, PlainValidator(_biases, json_schema_input_type=dict[str, Bias] | None)
]


class Fields(BaseModel):
    """An object of a request: known fields only, and few others to complain about."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _look(cls, value: Any) -> Any:
        return _few(value)


class Body(Fields):
    """What every request may say."""

    model: Name
    user: Note | None = None
    metadata: Notes | None = None
    safety_identifier: Note | None = None
    slo_class: Name | None = None
    ttft_slo: Seconds | None = None


class StreamOptions(Fields):
    """``include_usage``: a last chunk with the counts."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class GenerationBody(Body):
    """What completions of both kinds may say."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_greedy_or_drawn)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Texts = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tbt_slo: Seconds | None = None
    service_tier: OnlyAuto = None
    store: Annotated[None, _nothing(False)] = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: Prompts
    best_of: OnlyOne = None
    echo: Annotated[None, _nothing(False)] = None
    suffix: Annotated[None, _nothing()] = None
    logprobs: Annotated[None, _nothing()] = None


class TextPart(Fields):
    """One part of a message."""

    type: Literal["text"]
    text: str


class Message(Fields):
    """One message of a conversation; which roles there are is the template's business.

    What an answer of this API has may be sent back: ``refusal`` and the like, as long as they are empty.
    """

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[TextPart] | None)]
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: Annotated[None, _nothing("")] = None
    tool_calls: Annotated[None, _nothing([])] = None
    function_call: Annotated[None, _nothing({})] = None
    audio: Annotated[None, _nothing({})] = None
    annotations: Annotated[None, _nothing([])] = None

    @property
    def plain(self) -> dict[str, str]:
        """As templates take it."""
        name = {} if self.name is None else {"name": self.name}
        return {"role": self.role, **name, "content": self.content}


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=_PROMPTS)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: OnlyText = None
    logprobs: Annotated[None, _nothing(False)] = None
    top_logprobs: Annotated[None, _nothing()] = None
    tools: Annotated[None, _nothing([])] = None
    tool_choice: Annotated[None, _nothing("none")] = None
    functions: Annotated[None, _nothing([])] = None
    function_call: Annotated[None, _nothing("none")] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="Not used: there are no tools.")] = None
    chat_template: NoTemplate = None


class EmbeddingBody(Body):
    """``POST /v1/embeddings``."""

    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

"""Completions of both kinds: from a checked body to asks, from streams to an answer or to events.

Words
    *choice*  one continuation of one prompt: ``n`` of them for each prompt, in the order of the prompts.

The status line is sent with the first token: whatever is refused before has a status of its own. An error
behind it is an event, and no ``[DONE]`` follows. Whoever stops reading, by going away or by having enough,
cancels what is live.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from starlette.requests import Request
from starlette.responses import Response

from fpcompile.serving.server.answers import Shape, Usage
from fpcompile.serving.server.bodies import ChatBody, CompletionBody, GenerationBody
from fpcompile.serving.server.failures import ApiError, api_error, ascii_json
from fpcompile.serving.server.front import Front
from fpcompile.serving.server.messages import Generate, Sampling
from fpcompile.serving.server.metrics import RequestWatch
from fpcompile.serving.server.promises import Account
from fpcompile.serving.server.sse import DONE, SseResponse, event, gone
from fpcompile.serving.server.streams import EngineGoneError, Stream
from fpcompile.serving.server.text import Detokenizer, Stops
from fpcompile.serving.server.tokens import Tokenizer

__all__ = ["answer", "or_gone"]

logger = logging.getLogger("fpcompile.server")


async def answer(
    front: Front, request: Request, account: Account, body: CompletionBody | ChatBody
) -> Response:
    """The whole way of one request."""
    streamed = body.stream
    choices, shape = await _begun(front, request, account, body)
    del body  # it may be long, and so may be the time to the answer's end
    if not streamed:
        return await _at_once(request, choices, shape)
    try:
        await or_gone(request, choices.started())
    except BaseException:
        choices.cancel()
        raise
    events = _events(request, choices, shape)
    return SseResponse(events, write_s=front.settings.limits.write_s, ended=choices.cancel)


async def _begun(
    front: Front, request: Request, account: Account, body: CompletionBody | ChatBody
) -> tuple[_Choices, Shape]:
    """All choices, submitted. They keep the stop strings, and nothing else that the body says."""
    front.check_open()
    facts = front.facts(body.model, "generate")
    count = _check_limits(front, body)
    terms = front.terms(request, account, body, body.tbt_slo)
    tokenizer = front.tokenizers[body.model]
    wanted = _new_tokens(body)
    with front.seats(count):
        prompts = await _prompts(tokenizer, body, front.longest(facts))
        asks = []
        for number, prompt in enumerate(prompts):
            new = front.check_length(facts, prompt, wanted)
            ids = array("q", prompt)
            for copy in range(body.n or 1):
                name = f"{request.state.unique}-{number * (body.n or 1) + copy}"
                sampling = _sampling(body, copy, facts.vocabulary)
                asks.append(Generate(name, body.model, ids, new, sampling, terms))
        choices = _Choices(front, asks, tokenizer, body.stops, sum(map(len, prompts)))
    request.state.facts.update(prompt_tokens=choices.usage.prompt)
    if front.settings.log_prompts:
        logger.info("id=%s prompts=%s", request.state.request_id, [tokenizer.decode(one) for one in prompts])
    counted = body.stream_options is not None and body.stream_options.include_usage
    shape = Shape.new(
        "chat" if isinstance(body, ChatBody) else "completion",
        request.state.unique,
        body.model,
        counted=counted,
    )
    return choices, shape


def _check_limits(front: Front, body: CompletionBody | ChatBody) -> int:
    """How many choices there will be. Raises :class:`ApiError`."""
    limits = front.settings.limits
    if len(body.stops) > limits.stops:
        raise ApiError(400, f"at most {limits.stops} stop strings are taken", param="stop")
    if any(not 0 < len(stop) <= limits.stop_chars for stop in body.stops):
        raise ApiError(400, f"a stop string has 1 to {limits.stop_chars} characters", param="stop")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options need stream=true", param="stream_options")
    if isinstance(body, ChatBody) and len(body.messages) > limits.messages:
        raise ApiError(400, f"at most {limits.messages} messages are taken", param="messages")
    count = body.n or 1
    if isinstance(body, CompletionBody) and isinstance(body.prompt, list):
        if not body.prompt:
            raise ApiError(400, "there is no prompt", param="prompt")
        count *= 1 if isinstance(body.prompt[0], int) else len(body.prompt)
    if count > limits.choices:
        raise ApiError(400, f"at most {limits.choices} choices are taken: n x prompts", param="n")
    return count


async def _prompts(tokenizer: Tokenizer, body: CompletionBody | ChatBody, most: int) -> list[list[int]]:
    if isinstance(body, ChatBody):
        messages = [message.plain for message in body.messages]
        return [await tokenizer.encode(await tokenizer.chat(messages), special=False, most=most)]
    return await tokenizer.encode_all(body.prompt, most=most)


def _new_tokens(body: CompletionBody | ChatBody) -> int | None:
    """Completions have 16 by default, as OpenAI's; chats as many as fit."""
    if isinstance(body, CompletionBody):
        return 16 if body.max_tokens is None else body.max_tokens
    if (
        None not in (body.max_tokens, body.max_completion_tokens)
        and body.max_tokens != body.max_completion_tokens
    ):
        raise ApiError(400, "max_tokens and max_completion_tokens differ", param="max_tokens")
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


def _sampling(body: GenerationBody, copy: int, vocabulary: int) -> Sampling:
    bias = []
    for text, value in (body.logit_bias or {}).items():
        if not (text.isascii() and text.isdigit() and int(text[:12]) < vocabulary):
            raise ApiError(400, "logit_bias names tokens by their ids", param="logit_bias")
        bias.append((int(text[:12]), value))
    seed = None if body.seed is None else (body.seed + copy) % (1 << 63)
    return Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple(bias),
        seed=seed,
        ignore_eos=body.ignore_eos,
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Text of one choice; ``reason`` with its last piece."""

    index: int
    text: str
    reason: str | None


@final
class _Choice:
    """One stream read as text."""

    def __init__(self, index: int, stream: Stream, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.index, self.stream = index, stream
        self._detokenizer, self._stops = Detokenizer(tokenizer.decode), Stops(stops)

    async def pieces(self, usage: Usage) -> AsyncIterator[_Piece]:
        """A piece for each token, with the text that is certain now, perhaps none; the last has the reason.

        Raises what ended the request otherwise.
        """
        async for token in self.stream:
            usage.completion += 1
            text = self._stops.push(self._detokenizer.push(token))
            if self._stops.found:
                self.stream.cancel("stop")
                yield _Piece(self.index, text, "stop")
                return
            yield _Piece(self.index, text, None)
        reason = (await self.stream.end()).finish_reason
        if reason is None:
            raise EngineGoneError("the request was cancelled by the server")
        text = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        yield _Piece(self.index, text, "stop" if self._stops.found else reason)


@final
class _Choices:
    """All choices of one answer: submitted together, read together."""

    def __init__(
        self, front: Front, asks: Sequence[Generate], tokenizer: Tokenizer, stops: Sequence[str], prompt: int
    ) -> None:
        self.usage = Usage(prompt=prompt)
        self.watches: list[RequestWatch] = []
        self._list: list[_Choice] = []
        try:
            for index, ask in enumerate(asks):
                counted = len(ask.ids) if index == 0 or asks[index - 1].ids is not ask.ids else 0
                watch = RequestWatch(front.metrics, ask.program, ask.terms, counted)
                self.watches.append(watch)
                self._list.append(_Choice(index, front.link.submit(ask, watch), tokenizer, stops))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Nobody reads any more."""
        for choice in self._list:
            choice.stream.cancel()

    async def started(self) -> None:
        """Return with the first token of any choice; raise what ends one before."""
        waiting = [asyncio.ensure_future(choice.stream.started()) for choice in self._list]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def pieces(self) -> AsyncGenerator[_Piece, None]:
        """Of all choices, as they come."""
        if len(self._list) == 1:
            async for piece in self._list[0].pieces(self.usage):
                yield piece
            return
        queue: asyncio.Queue[_Piece | Exception] = asyncio.Queue(len(self._list))
        tasks = [asyncio.create_task(self._pump(choice, queue)) for choice in self._list]
        try:
            left = len(tasks)
            while left:
                got = await queue.get()
                if isinstance(got, Exception):
                    raise got
                left -= got.reason is not None
                yield got
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, choice: _Choice, queue: asyncio.Queue[_Piece | Exception]) -> None:
        try:
            async for piece in choice.pieces(self.usage):
                await queue.put(piece)
        except Exception as error:
            await queue.put(error)

    async def texts(self) -> list[tuple[str, str]]:
        """(text, finish reason) of every choice, once all have ended."""
        texts = ["" for _ in self._list]
        reasons = ["" for _ in self._list]
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.index] += piece.text
                reasons[piece.index] = piece.reason or reasons[piece.index]
        return list(zip(texts, reasons, strict=True))

    def tell(self, request: Request, outcome: str) -> None:
        """For the log."""
        first = self.watches[0].ttft if self.watches else None
        request.state.facts.update(
            completion_tokens=self.usage.completion,
            ttft=None if first is None else f"{first:.4f}",
            outcome=outcome,
        )


async def or_gone(request: Request, work: Any) -> Any:
    """The result of ``work``; when the client goes away before, work is cancelled and ApiError is raised."""
    working, watching = asyncio.ensure_future(work), asyncio.create_task(gone(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(400, "the client went away", code="client_gone")
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _at_once(request: Request, choices: _Choices, shape: Shape) -> Response:
    outcome = "failed"
    try:
        texts = await or_gone(request, choices.texts())
        outcome = ",".join(reason for _, reason in texts)
        return Response(ascii_json(shape.whole(texts, choices.usage)), media_type="application/json")
    finally:
        choices.cancel()
        choices.tell(request, outcome)


async def _events(request: Request, choices: _Choices, shape: Shape) -> AsyncGenerator[bytes, None]:
    begun: set[int] = set()
    outcome = "gone"
    try:
        async with contextlib.aclosing(choices.pieces()) as pieces:
            async for piece in pieces:
                if piece.index not in begun:
                    begun.add(piece.index)
                    if (first := shape.first(piece.index)) is not None:
                        yield event(ascii_json(first))
                yield event(ascii_json(shape.piece(piece.index, piece.text, piece.reason)))
        if shape.counted:
            yield event(ascii_json(shape.counts(choices.usage)))
        outcome = "complete"
        yield DONE
    except Exception as error:
        found = api_error(error)
        outcome = found.code or "failed"
        yield event(ascii_json(found.body))
    finally:
        choices.cancel()
        choices.tell(request, outcome)

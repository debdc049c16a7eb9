"""What the handlers share: the link, the tokenizers, the limits, who may do what, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from starlette.requests import Request

from fpcompile.errors import FpcompileError
from fpcompile.serving.server.bodies import Body
from fpcompile.serving.server.engines import Engines
from fpcompile.serving.server.failures import ApiError
from fpcompile.serving.server.link import Link
from fpcompile.serving.server.messages import Facts, Kind, Terms
from fpcompile.serving.server.metrics import Metrics
from fpcompile.serving.server.parsing import Parser
from fpcompile.serving.server.promises import Account, digest_of
from fpcompile.serving.server.settings import ServerSettings
from fpcompile.serving.server.streams import EngineGoneError
from fpcompile.serving.server.tokens import Tokenizer

__all__ = ["Front"]

_KEY_NEEDED = "a valid API key is needed: Authorization: Bearer KEY"
_MILLISECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")


@final
class Front:
    """The state of one server. Belongs to one event loop."""

    def __init__(
        self, settings: ServerSettings, tokenizers: Mapping[str, Any], engines: Engines | None = None
    ) -> None:
        self.settings = settings
        self.tokenizers = {name: Tokenizer(tokenizer) for name, tokenizer in tokenizers.items()}
        self.link: Engines = engines or Link(settings.engine, buffered=settings.limits.buffered_tokens)
        self.metrics = Metrics()
        self.parser = Parser()
        self.created = int(time.time())
        self.draining = False
        self._seats = 0
        """Places that are kept for what is not submitted yet."""
        self.drained_by = 0.0
        """When draining ends, on the monotonic clock."""

    def account(self, request: Request) -> Account:
        """Whose key it is. Raises :class:`ApiError` 401."""
        account = self.settings.accounts.account(_bearer(request))
        if account is None:
            self.metrics.refused("key")
            raise ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key"
            )
        return account

    def check_admin(self, request: Request, *, reading: bool) -> None:
        """Raise unless the request has the admin key; ``reading`` is free on loopback where no key is set."""
        digest = self.settings.admin_digest
        if digest is None:
            if reading and self.settings.loopback:
                return
            raise ApiError(403, "no admin key is set: this is switched off", code="no_admin_key")
        key = _bearer(request)
        if key is None or not hmac.compare_digest(digest, digest_of(key)):
            raise ApiError(401, "the admin key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    def check_open(self) -> None:
        """Raise :class:`ApiError` when no request can be taken now."""
        if self.draining:
            self.metrics.refused("draining")
            left = self.drained_by - time.monotonic()
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=left)
        if self.link.state != "ready":
            self.metrics.refused("unavailable")
            raise ApiError(503, self.link.reason, code="engine_unavailable", retry_after=5)

    @contextlib.contextmanager
    def seats(self, count: int) -> Iterator[None]:
        """For a block that ends by submitting ``count`` asks: places are kept for them from its beginning on.

        Raises :class:`ApiError` 429 when there are not so many.
        """
        most = self.settings.limits.live
        if count > most:
            raise ApiError(400, f"at most {most} requests are served at once; this body has {count}")
        if self.link.live + self._seats + count > most:
            self.metrics.refused("live")
            raise ApiError(429, "too many requests are being served", code="too_many_requests", retry_after=1)
        self._seats += count
        try:
            yield
        finally:
            self._seats -= count

    def facts(self, model: str, kind: Kind) -> Facts:
        """Of a model that does this. Raises :class:`ApiError` 404, or 400 for a model of the other kind."""
        facts = self.link.facts.get(model)
        if facts is None:
            known = ", ".join(self.link.facts)
            raise ApiError(
                404,
                f"there is no model {model!r}; models are: {known}",
                param="model",
                code="model_not_found",
            )
        if facts.kind != kind:
            does = "gives embeddings only" if facts.kind == "embed" else "gives no embeddings"
            raise ApiError(400, f"model {model!r} {does}", param="model", code="wrong_kind")
        return facts

    def terms(self, request: Request, account: Account, body: Body, tbt_slo: float | None) -> Terms:
        """What this request is promised. Raises :class:`ApiError`."""
        ttft = _one_of(body.ttft_slo, _header_slo(request))
        try:
            promise = self.settings.accounts.promise(
                account, slo_class=body.slo_class, ttft=ttft, tbt=tbt_slo
            )
        except FpcompileError:
            self.metrics.refused("slo")
            raise
        facts = request.state.facts
        facts.update(model=body.model, tenant=account.tenant or None, slo_class=promise.slo_class)
        return Terms(
            arrival=request.state.arrival,
            ttft_slo=promise.ttft,
            tbt_slo=promise.tbt,
            tenant=account.tenant,
            slo_class=promise.slo_class,
            timeout=self.settings.limits.request_s,
            min_tbt=account.min_tbt,
        )

    def longest(self, facts: Facts) -> int:
        """Tokens of prompt and answer that the model takes."""
        return min(x for x in (facts.max_tokens, self.settings.limits.tokens, 1 << 30) if x is not None)

    def check_length(self, facts: Facts, ids: Sequence[int], new: int | None) -> int:
        """New tokens behind ``ids``: ``new``, or as many as fit. Raises :class:`ApiError`."""
        if not ids:
            raise ApiError(400, "the prompt has no tokens", code="empty_prompt")
        longest = self.longest(facts)
        room = longest - len(ids)
        if room < (0 if facts.kind == "embed" else 1) or (new is not None and new > room):
            asked = "" if new is None else f" and {new} new ones"
            raise ApiError(
                400,
                f"the model takes {longest} tokens; the prompt has {len(ids)}{asked}",
                code="context_length_exceeded",
            )
        if (worst := max(ids)) >= facts.vocabulary:
            raise ApiError(400, f"token {worst} is not in the vocabulary of {facts.vocabulary}")
        return room if new is None else new

    def drain_is_over(self) -> None:
        """What is live now is ended, and told so."""
        self.link.cancel_all("the server is shutting down")

    def start(self) -> None:
        """Begin to start what runs beside: the worker, and who parses long bodies."""
        self.link.start()
        self.parser.start()

    async def close(self) -> None:
        """End the worker."""
        await self.link.close()
        await asyncio.to_thread(self.parser.close)

    async def ready(self) -> tuple[bool, str]:
        """Whether requests are taken, and come to an end."""
        if self.draining:
            return False, "draining"
        if self.link.state != "ready":
            return False, self.link.reason
        return await self.healthy()

    async def healthy(self) -> tuple[bool, str]:
        """Whether the worker lives and its engine comes to cuts."""
        if self.link.state == "starting":
            return True, self.link.reason
        try:
            well, reason = await self.link.ask("health", timeout=5.0)
        except EngineGoneError as error:
            return False, error.what or ""
        except TimeoutError:
            return False, "the engine's process does not answer"
        return bool(well), str(reason)


def _bearer(request: Request) -> str | None:
    header: str = request.headers.get("authorization", "")
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _header_slo(request: Request) -> float | None:
    text: str | None = request.headers.get("x-slo-ttft-ms")
    if text is None:
        return None
    if not _MILLISECONDS.fullmatch(text) or not float(text) > 0:
        raise ApiError(400, "x-slo-ttft-ms is wrong: expected milliseconds > 0", param="x-slo-ttft-ms")
    return float(text) / 1e3


def _one_of(body: float | None, header: float | None) -> float | None:
    if body is not None and header is not None and body != header:
        raise ApiError(400, "ttft_slo and x-slo-ttft-ms differ", param="ttft_slo")
    return header if body is None else body

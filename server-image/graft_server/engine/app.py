"""The HTTP routes of the engine."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

from aiohttp import web
from graft import __version__
from pydantic import BaseModel as Body

from graft_server import callers
from graft_server.connections import answer_guarded, handler_args
from graft_server.engine.adapters import AdapterWeights, Limits, read_adapter
from graft_server.engine.answers import Answers, Generator
from graft_server.engine.calls import CallsOfChoice, check_request
from graft_server.engine.generation import Capacity, Engine
from graft_server.engine.metrics import Metrics
from graft_server.engine.model import BaseModel
from graft_server.engine.network import Network
from graft_server.engine.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    LoadLoraRequest,
    UnloadLoraRequest,
    parse_body,
    unavailable,
)
from graft_server.engine.registry import AdapterRegistry
from graft_server.engine.residency import Residency
from graft_server.engine.sequence import Output
from graft_server.engine.settings import Settings
from graft_server.engine.shapes import Choice, Shapes, TokenTexts, model_card, token_id, usage
from graft_server.inflight import Account, Full, InFlight, weight
from graft_server.receiving import Refused, receive
from graft_server.threads import in_thread

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Body)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SMALL = 64 << 10  # bytes; parsing a smaller body takes less time than a change of threads
MAX_LOAD_BYTES = 64 << 10  # of a request to load or unload an adapter
EVERYBODY = "everybody"
PROBES = frozenset({"/health", "/metrics"})
REQUEST_ID = re.compile(r"[!-~]{1,128}")  # valid X-Request-Id values; the id becomes part of the answer's id


class Server:
    """One base model behind its routes. Create it on the running event loop and call `close` at the end."""

    def __init__(self, settings: Settings, base: BaseModel) -> None:
        limits = Limits(base.modules, base.hidden_size, settings.max_lora_rank, base.max_model_len, base.names)

        def read(path: str) -> AdapterWeights:
            return read_adapter(path, limits)

        self.engine = Engine(
            Network(base),
            Residency(settings.max_cpu_loras),
            read,
            Capacity(
                max_num_seqs=settings.max_num_seqs,
                max_waiting=settings.max_waiting_requests,
                queue_timeout=settings.queue_timeout,
                max_loras=settings.max_loras,
            ),
        )
        self._settings = settings
        self._base = base
        names = settings.served_model_names
        self._token_texts = TokenTexts(base.tokenizer)
        self.registry = AdapterRegistry(self.engine, read, names)
        self._metrics = Metrics(names[0], settings.max_loras, self.engine.activity)
        self._generator = Generator(
            base,
            names,
            self.engine,
            self.registry,
            self._metrics,
            settings.max_num_seqs + settings.max_waiting_requests,
            settings.request_timeout,
            trusts_templates=settings.trust_request_chat_template,
        )
        self.bytes = InFlight()
        self._parsing = asyncio.Lock()  # a large body becomes many objects: one at a time
        self._callers = callers.Callers(settings.callers) if settings.callers else None
        self._started = int(time.time())
        self._draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.engine.start()

    def application(self) -> web.Application:
        """Return the aiohttp application. Run it with handler_cancellation, so that a lost client frees its slot."""
        app = web.Application(
            client_max_size=self._settings.max_body_bytes,
            middlewares=[self._errors, self._guard],
            handler_args=handler_args(self._settings.keepalive_timeout),
        )
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completion)
        if self._settings.runtime_loading:
            app.router.add_post("/v1/load_lora_adapter", self._load)
            app.router.add_post("/v1/unload_lora_adapter", self._unload)
        return app

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests from now on. Wait at most `seconds` for the running ones. Return whether all ended."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop the engine. Requests that still run end with a 503."""
        await asyncio.to_thread(self.engine.stop)

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        def answer(crowded: bool) -> Awaitable[web.StreamResponse]:
            return self._guarded(request, _too_crowded if crowded and request.path not in PROBES else handler)

        return await answer_guarded(request, answer)

    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
            return web.json_response(error.body, status=error.status, headers=headers)
        except web.HTTPException as error:
            wrapped = ApiError(error.status, error.reason, error.reason)
            return web.json_response(wrapped.body, status=error.status)
        except Refused as error:
            wrapped = ApiError(error.status, HTTPStatus(error.status).phrase, str(error))
            return web.json_response(wrapped.body, status=error.status)
        except Full as error:
            if error.never:
                wrapped = ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Request Entity Too Large", str(error))
            else:
                wrapped = unavailable(f"the server is overloaded: {error}")
            headers = {} if error.never else {"Retry-After": "2"}
            return web.json_response(wrapped.body, status=wrapped.status, headers=headers)
        except ConnectionError:
            raise  # the client disconnected; aiohttp handles it
        except Exception as error:
            log.exception("unexpected error while answering %s", request.path)
            wrapped = ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError", f"unexpected error: {error!r}")
            return web.json_response(wrapped.body, status=500)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._callers is not None:
            key = request.headers.get("Authorization")
            given = None if key is None else key.encode(errors="surrogateescape")  # a header may hold any bytes
            if status := self._callers.refusal(request.method, request.path, given):
                return web.json_response(callers.error(status), status=status)
        if request.path.startswith("/v1") and not self._authorized(request):
            return web.json_response({"error": "Unauthorized"}, status=HTTPStatus.UNAUTHORIZED)
        if request.method != "POST":
            return await handler(request)
        if self._draining:
            raise unavailable("the server is shutting down")
        self._in_flight += 1
        self._idle.clear()
        try:
            return await handler(request)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    def _authorized(self, request: web.Request) -> bool:
        if not self._settings.api_keys:
            return True
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        given = key.strip().encode(errors="surrogateescape")  # a header may hold any bytes
        matches = [hmac.compare_digest(given, known.encode()) for known in self._settings.api_keys]
        return scheme.lower() == "bearer" and any(matches)

    async def _health(self, request: web.Request) -> web.Response:
        healthy = self.engine.alive and not self._draining
        return web.Response(status=HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": __version__})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        body = await asyncio.to_thread(self._metrics.text)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _models(self, request: web.Request) -> web.Response:
        names, started = self._settings.served_model_names, self._started
        cards = [
            model_card(name, self._settings.model, started, max_model_len=self._base.max_model_len) for name in names
        ]
        for name, entry in self.registry.entries.items():
            cards.append(model_card(name, entry.adapter.path, entry.created, parent=names[0]))
        return web.json_response({"object": "list", "data": cards})

    async def _load(self, request: web.Request) -> web.Response:
        body = await self._small(LoadLoraRequest, request)
        # Shielded: if the client disconnects, the load still completes. Otherwise an adapter without a name could stay
        # in memory.
        return web.Response(text=await asyncio.shield(self.registry.load(body)))

    async def _unload(self, request: web.Request) -> web.Response:
        body = await self._small(UnloadLoraRequest, request)
        return web.Response(text=await asyncio.shield(self.registry.unload(body)))

    async def _small(self, kind: type[M], request: web.Request) -> M:
        """Return the body of an agent's request. It does not wait for the bodies of clients."""
        body = await receive(request, MAX_LOAD_BYTES, self._settings.body_timeout, None)
        return parse_body(kind, request.content_type, body, self._settings.max_body_values)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(ChatRequest, request)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(CompletionRequest, request)

    async def _answer(
        self, kind: type[ChatRequest] | type[CompletionRequest], request: web.Request
    ) -> web.StreamResponse:
        settings = self._settings
        share = self.bytes.begin([Account(EVERYBODY, "all clients", settings.max_bytes_in_flight, shared=True)])
        try:
            body = await receive(request, settings.max_body_bytes, settings.body_timeout, share)
            values = settings.max_body_values
            share.add(weight(body, values))
            parsed: ChatRequest | CompletionRequest
            if len(body) <= SMALL:
                parsed = parse_body(kind, request.content_type, body, values)
            else:
                parsed = await in_thread(self._parsing, parse_body, kind, request.content_type, body, values)
            del body
            return await self._generate(request, parsed)
        finally:
            share.close()

    async def _generate(self, request: web.Request, body: ChatRequest | CompletionRequest) -> web.StreamResponse:
        asked = request.headers.get("X-Request-Id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        model = body.model or self._settings.served_model_names[0]
        texts = token_id if body.return_tokens_as_token_ids else self._token_texts
        shapes = Shapes(isinstance(body, ChatRequest), request_id, model, texts)
        if isinstance(body, ChatRequest):
            check_request(body, self._settings.tool_call_parser)
        async with await self._generator.start(body) as answers:
            readers = self._call_readers(body, len(answers.sequences))
            if body.stream:
                return await _stream(request, answers, shapes, readers, body)
            choices = [_piece(answers, index) for index in range(len(answers.sequences))]
            async for index, output in answers:
                _extend(choices[index], output)
            for reader, choice in zip(readers, choices, strict=False):
                reader.split(choice)
            counts = usage(answers.prompt_tokens, answers.completion_tokens)
            return web.json_response(shapes.answer(choices, counts))

    def _call_readers(self, body: ChatRequest | CompletionRequest, choices: int) -> list[CallsOfChoice]:
        """Return a reader of calls for each choice, or none if the request wants no calls."""
        parser = self._settings.tool_call_parser
        if parser is None or not isinstance(body, ChatRequest) or not body.reads_calls:
            return []
        return [CallsOfChoice(parser, parallel=body.parallel_tool_calls is not False) for _ in range(choices)]


async def _too_crowded(_: web.Request) -> web.StreamResponse:
    """Refuse a request on a connection beyond the bound."""
    raise unavailable("the server has too many connections")


def _piece(answers: Answers, index: int, first: bool = True) -> Choice:
    asked = answers.sequences[index].sampling.logprobs is not None
    return Choice(answers.echoes[index] if first else "", None, [] if asked else None)


def _extend(choice: Choice, output: Output) -> None:
    choice.text += output.text
    choice.finish_reason = output.finish_reason
    if choice.logprobs is not None:
        choice.logprobs += [*output.prompt_logprobs, *([output.logprob] if output.logprob else [])]


async def _stream(
    request: web.Request,
    answers: Answers,
    shapes: Shapes,
    readers: Sequence[CallsOfChoice],
    body: ChatRequest | CompletionRequest,
) -> web.StreamResponse:
    """Write server-sent events. The status is sent with the first event: an earlier failure gets an error status."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    )
    opened: set[int] = set()

    async def send(event: dict[str, Any]) -> None:
        if not response.prepared:
            await response.prepare(request)
        await response.write(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")

    try:
        async for index, output in answers:
            piece = _piece(answers, index, first=index not in opened)
            if index not in opened and (opening := shapes.opening(index)):
                await send(opening)
            opened.add(index)
            _extend(piece, output)
            if readers:
                readers[index].split(piece)
            if piece.text or piece.logprobs or piece.finish_reason:
                counts = usage(answers.prompt_tokens, answers.completion_tokens) if body.continuous_usage else None
                await send(shapes.chunk(index, piece) | {"usage": counts})
        if body.include_usage:
            await send(shapes.counts(usage(answers.prompt_tokens, answers.completion_tokens)))
    except ApiError as error:
        if not response.prepared:
            raise
        await send(error.body)
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response

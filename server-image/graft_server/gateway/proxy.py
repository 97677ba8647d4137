"""The forwarding of one request to a replica that has the adapter.

If a replica fails before the first byte, another replica gets the request. If a stream breaks later, another replica
continues it where that is possible.
"""

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import aiohttp
from aiohttp import web
from graft.bounded import Limits, OutOfBounds
from graft.contracts.gateway import Backend, RouteTarget

from graft_server.gateway.apikeys import ANYBODY, ApiKeys, Caller
from graft_server.gateway.errors import ApiError, busy, engine_error, timed_out, unavailable, upstream_broke
from graft_server.gateway.fields import for_engine
from graft_server.gateway.keys import Keys
from graft_server.gateway.ledger import Reservation
from graft_server.gateway.metrics import Metrics
from graft_server.gateway.rewrite import Differs, StreamRewriter, Words, error_event, rewrite_answer
from graft_server.gateway.settings import Settings
from graft_server.gateway.table import Balancer, Model
from graft_server.inflight import Full, Share
from graft_server.threads import in_thread

log = logging.getLogger(__name__)

# Of the client's headers, only these and the request's id reach the engine. Of the engine's headers, only the
# Retry-After of an error reaches the client. So neither credentials nor hop-by-hop headers are passed on.
REQUEST_HEADERS = ("traceparent", "tracestate")
VALID_HEADER = re.compile(r"[ -~]{1,512}")
SECONDS = re.compile(r"[0-9]{1,5}")
REQUEST_ID = web.RequestKey("request_id", str)
BROKEN = web.RequestKey("broken", bool)  # the stream ended with an error event
ANSWER_DEPTH = 64  # of nested objects and arrays
LARGE = 32 * 1024  # bytes; a stream of tokens has more at once only if its client does not read
SMALL = 64 * 1024  # bytes; rewriting a smaller body takes less time than a change of threads
ERROR_LIMIT = 64 * 1024
STOPPED_SENDING = "the engine stopped sending in the middle of its answer"
HIGHEST_STATUS = 599
ANSWERS_ELSEWHERE = frozenset({502, 503})


class Elsewhere(Exception):
    """An attempt failed, and another replica may answer. `avoid`: do not choose this replica for `avoid_seconds`."""

    def __init__(self, reason: str, message: str, *, avoid: bool = False, again: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.avoid = avoid
        self.again = again  # retry the same replica once: probably only the idle connection was stale


@dataclass
class Call:
    """One parsed request, with its model and its target."""

    request: web.Request
    model: Model
    target: RouteTarget
    payload: dict[str, Any]
    began: float
    share: Share  # of the bytes in flight
    caller: Caller = ANYBODY
    reservation: Reservation | None = None  # of its key's limits
    before: list[dict[str, Any]] = field(default_factory=list)  # for a sequence: the finished steps
    spent: dict[str, int] = field(default_factory=dict)  # tokens of the finished steps
    for_client: bool = True  # if False, the answer becomes the next step's question
    sending: "Sending | None" = None  # set when the first bytes of a stream are sent to the client

    def worked(self) -> None:
        """Note that an engine has worked on the request, so it costs tokens."""
        if self.reservation is not None:
            self.reservation.uncounted = True

    @property
    def repeatable(self) -> bool:
        """Return whether every replica gives the same answer. If so, another replica can continue a broken stream."""
        fixed = self.payload.get("temperature") == 0 or self.payload.get("seed") is not None
        return fixed and not any(self.payload.get(name) for name in ("logprobs", "tools", "functions"))

    @property
    def words(self) -> Words:
        """Return the values for the answer: the model name, the `graft` object, and the tokens of earlier steps."""
        return Words(
            self.model.name,
            {
                "adapter": self.target.adapter,
                "version": self.target.version,
                "deployment": self.model.deployment,
                "namespace": self.model.namespace,
                **({"steps": [*self.before, self.step]} if self.before else {}),
            },
            self.spent,
        )

    @property
    def step(self) -> dict[str, Any]:
        """Return the entry of this call in a sequence's `steps`."""
        return {"adapter": self.target.adapter, "version": self.target.version}


@dataclass
class Sending:
    """A stream that is being sent to the client."""

    response: web.StreamResponse
    rewriter: StreamRewriter
    words: Words


class Proxy:
    """The client of the engines: it sends calls and returns the answers."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: Settings,
        metrics: Metrics,
        keys: Keys | None = None,
        api_keys: ApiKeys | None = None,
    ) -> None:
        self._session = session
        self._keys = keys or Keys()
        self._api_keys = api_keys or ApiKeys()
        self._settings = settings
        self._metrics = metrics
        self._limits = Limits(settings.max_answer_bytes, ANSWER_DEPTH, settings.max_answer_values)
        self._rewriting = asyncio.Lock()  # a large answer becomes many objects: one at a time
        self.balancer = Balancer(random.Random())  # noqa: S311 - spreads load
        self._timeout = aiohttp.ClientTimeout(
            total=settings.total_timeout, sock_connect=settings.connect_timeout, sock_read=settings.idle_timeout
        )

    async def answer(self, call: Call, replicas: Callable[[], tuple[Backend, ...]]) -> web.StreamResponse:
        """Return the answer of the first replica that gives one.

        `replicas` is called before each attempt, because the table may change. If a stream breaks after its first bytes
        and the call is repeatable, another replica continues it. Otherwise the stream ends with an error event.
        """
        try:
            async with self._api_keys.held(call.caller, call.model.name):
                return await self._answer(call, replicas)
        except (ApiError, Full) as failure:
            error = busy(failure) if isinstance(failure, Full) else failure
            if call.sending is None:
                raise error from failure
            call.request[BROKEN] = True
            log.warning("%s: %s", call.model.name, error)
            await call.sending.response.write(call.sending.rewriter.gap() + error_event(error.body))
            await call.sending.response.write_eof()
            return call.sending.response
        finally:
            if call.sending is not None:
                self._count(call, call.sending.words)

    def _count(self, call: Call, words: Words) -> None:
        """Count the tokens of an answer, and of what its key may use."""
        self._metrics.count_tokens(call.model.name, words.used)
        if call.reservation is not None:
            call.reservation.count(words.used.get("total_tokens", 0))

    async def _answer(self, call: Call, replicas: Callable[[], tuple[Backend, ...]]) -> web.StreamResponse:
        tried: set[str] = set()
        again = True
        failure: Elsewhere | None = None
        for _ in range(self._settings.attempts):
            backend = self.balancer.choose(replicas(), tried, time.monotonic())
            if backend is None:
                break
            if failure is not None:
                self._metrics.retries.labels(failure.reason).inc()
            tried.add(backend.address)
            try:
                return await self._attempt(call, backend)
            except Elsewhere as error:
                failure = error
                if error.avoid:
                    self.balancer.avoid(backend.address, time.monotonic() + self._settings.avoid_seconds)
                if error.again and again:
                    again = False
                    tried.discard(backend.address)
                log.warning(
                    "%s: the attempt at pod %s failed: %s (%r)",
                    call.model.name,
                    backend.pod,
                    error,
                    error.__cause__,
                    extra={"request_id": call.request[REQUEST_ID], "reason": error.reason, "pod": backend.pod},
                )
        raise unavailable(
            call.model.name, f"{failure}" if failure else call.model.why_not or "no replica has it loaded"
        )

    async def _attempt(self, call: Call, backend: Backend) -> web.StreamResponse:
        self.balancer.begin(backend.address)
        upstream: aiohttp.ClientResponse | None = None
        try:
            try:
                upstream = await self._send(call, backend)
            except (asyncio.CancelledError, ApiError):
                call.worked()  # until the client disconnected, or the time was over
                raise
            if upstream.status >= 400:
                await self._refused(call, upstream)
            call.worked()
            if upstream.content_type == "text/event-stream":
                return await self._stream(call, upstream)
            if upstream.status != 200:
                raise upstream_broke(f"the engine answered with status {upstream.status}")
            if call.sending is not None:
                raise upstream_broke("the stream broke, and the replica that took over does not stream")
            return await self._plain(call, upstream)
        finally:
            if upstream is not None and not upstream.closed:
                # An error occurred or the client disconnected. Closing the connection makes the engine stop.
                upstream.close()
            self.balancer.end(backend.address)

    async def _send(self, call: Call, backend: Backend) -> aiohttp.ClientResponse:
        headers = {
            name: value
            for name in REQUEST_HEADERS
            if VALID_HEADER.fullmatch(value := call.request.headers.get(name, ""))
        }
        headers["X-Request-Id"] = call.request[REQUEST_ID]
        headers["Content-Type"] = "application/json"
        headers["Accept-Encoding"] = "identity"  # uncompressed, because the answer is rewritten
        body = json.dumps(for_engine(call.payload, call.target, call.request.path), ensure_ascii=False).encode()
        keys = self._keys.of(call.model.uid)
        response = await self._post(call, backend, headers, body, keys[0] if keys else None)
        for key in keys[1:]:
            if response.status != 401:
                break
            response.close()  # the engine has not learned the newer key yet
            response = await self._post(call, backend, headers, body, key)
        self.balancer.well(backend.address)
        return response

    async def _post(
        self, call: Call, backend: Backend, headers: dict[str, str], body: bytes, key: str | None
    ) -> aiohttp.ClientResponse:
        certificate = backend.certificate
        try:
            return await self._session.post(
                f"{'https' if certificate else 'http'}://{backend.address}{call.request.path}",
                ssl=_pinned(certificate) if certificate else True,
                data=body,
                headers=headers if key is None else headers | {"Authorization": f"Bearer {key}"},
                timeout=self._timeout,
                allow_redirects=False,
                auto_decompress=False,
            )
        except aiohttp.ServerFingerprintMismatch as error:
            raise Elsewhere("certificate", "the replica has another certificate", avoid=True) from error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Elsewhere("connect", "the replica cannot be reached", avoid=True) from error
        except TimeoutError as error:
            raise timed_out(
                call.model.name, f"the engine did not answer within {self._settings.idle_timeout:g} s"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Elsewhere("disconnect", "the connection to the replica broke", again=True) from error

    async def _refused(self, call: Call, upstream: aiohttp.ClientResponse) -> None:
        """Raise the error that the engine's status stands for: Elsewhere or ApiError."""
        body = b""
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            body = await upstream.content.read(ERROR_LIMIT)
        if upstream.status > HIGHEST_STATUS:
            raise upstream_broke(f"the engine answered with status {upstream.status}")
        error = engine_error(upstream.status, body, call.target.engine_model, call.model.name)
        if upstream.status in ANSWERS_ELSEWHERE:
            raise Elsewhere(str(upstream.status), f"the replica answered {upstream.status}: {error}", avoid=True)
        if upstream.status == 404 and (error.param == "model" or call.model.name in str(error)):
            raise Elsewhere("not_loaded", "the replica does not have the adapter loaded now")
        if upstream.status == 401:
            raise Elsewhere("key", "the replica does not accept the gateway's key yet")
        if upstream.status == 403:
            raise upstream_broke(f"the engine refused the gateway's request: {upstream.status} {error}")
        if SECONDS.fullmatch(seconds := upstream.headers.get("Retry-After", "")):
            error.retry_after = int(seconds)
        raise error

    def _headers(self, call: Call) -> dict[str, str]:
        headers = {"X-Request-Id": call.request[REQUEST_ID]}
        if call.target.adapter:
            headers["X-Graft-Adapter"] = call.target.adapter
        if call.target.version:
            headers["X-Graft-Version"] = call.target.version
        return headers | (dict(call.reservation.headers) if call.reservation is not None else {})

    async def _plain(self, call: Call, upstream: aiohttp.ClientResponse) -> web.Response:
        try:
            body = await _read(upstream, self._settings.max_answer_bytes, call.share)
        except TimeoutError as error:
            raise timed_out(call.model.name, STOPPED_SENDING) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Elsewhere("broken", "the connection to the replica broke before its answer was complete") from error
        words = call.words
        try:
            if len(body) <= SMALL:
                body = rewrite_answer(body, words, self._limits)
            else:
                body = await in_thread(self._rewriting, rewrite_answer, body, words, self._limits)
        except OutOfBounds as error:
            raise upstream_broke(str(error)) from error
        self._count(call, words)
        if call.for_client:
            self._metrics.first_byte.labels(self._metrics.label(call.model.name)).observe(time.monotonic() - call.began)
        return web.Response(
            body=body, status=upstream.status, content_type="application/json", headers=self._headers(call)
        )

    async def _stream(self, call: Call, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
        """Pass on each chunk when it arrives.

        Nothing is sent before the engine's first bytes, so until then another replica can take over.
        """
        sending = call.sending or self._new_stream(call)
        response, rewriter = sending.response, sending.rewriter
        chunks = upstream.content.iter_any()
        held = 0  # bytes of an unusually long line
        while True:
            broken: ApiError | None = None
            try:
                chunk = await anext(chunks, b"")
                if not chunk and not rewriter.done:
                    broken = upstream_broke("the stream ended before the answer was complete")
            except TimeoutError:
                chunk, broken = b"", timed_out(call.model.name, STOPPED_SENDING)
            except (aiohttp.ClientError, OSError):
                chunk, broken = b"", upstream_broke("the connection to the engine broke before the answer was complete")
            if broken is not None:
                if broken.status == 504:
                    raise broken
                if response.prepared:
                    if not (call.repeatable and rewriter.can_begin_again):
                        raise broken
                    if gap := rewriter.begin_again():
                        await response.write(gap)
                raise Elsewhere("broken", str(broken), again=False)
            if not response.prepared:
                self._metrics.first_byte.labels(self._metrics.label(call.model.name)).observe(
                    time.monotonic() - call.began
                )
                call.sending = sending
                await response.prepare(call.request)
            try:
                out = rewriter.feed(chunk) if chunk else rewriter.rest()
            except Differs as error:
                raise upstream_broke("the stream broke, and another replica's answer is not the same") from error
            if rewriter.pending > LARGE or held:
                call.share.remove(held)
                held = rewriter.pending
                call.share.add(held)
            if len(out) > LARGE:
                call.share.add(len(out))
                await response.write(out)  # waits for a client that reads slowly
                call.share.remove(len(out))
            elif out:
                await response.write(out)
            if not chunk:
                await response.write_eof()
                return response

    def _new_stream(self, call: Call) -> Sending:
        response = web.StreamResponse(headers=self._headers(call))
        response.content_type = "text/event-stream"
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"  # else nginx in front of the gateway buffers the stream
        words, asked = call.words, call.payload.get("stream_options")
        return Sending(response, StreamRewriter(words, repeatable=call.repeatable, asked=asked), words)


@lru_cache(4096)
def _pinned(certificate: str) -> aiohttp.Fingerprint:
    """Return aiohttp's check of a certificate. It is the same object each time: else no connection is used twice."""
    return aiohttp.Fingerprint(bytes.fromhex(certificate))


async def _read(upstream: aiohttp.ClientResponse, limit: int, share: Share) -> bytes:
    parts, size = [], 0
    async for part in upstream.content.iter_any():
        size += len(part)
        if size > limit:
            raise upstream_broke(f"the engine's answer is larger than {limit} bytes")
        share.add(len(part))
        parts.append(part)
    return b"".join(parts)

"""The HTTP routes of the gateway. Other paths get 404, above all the engine's routes to load and unload adapters."""

import asyncio
import logging
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import aiohttp
from aiohttp import web
from graft.contracts.gateway import Backend, RouteTarget

from graft_server.configmaps import Snapshot
from graft_server.connections import answer_guarded, handler_args
from graft_server.gateway import fields
from graft_server.gateway.apikeys import ANYBODY, NOBODY, ApiKeys, Caller
from graft_server.gateway.bodies import Bodies
from graft_server.gateway.cards import Listing, card
from graft_server.gateway.demand import Waiting
from graft_server.gateway.errors import ApiError, busy, crowded, no_route, unavailable, unknown_model
from graft_server.gateway.fields import CHAT, COMPLETIONS
from graft_server.gateway.keys import Keys
from graft_server.gateway.ledger import Ledger, Reservation
from graft_server.gateway.metrics import UNKNOWN, Metrics
from graft_server.gateway.parts import Parts
from graft_server.gateway.proxy import BROKEN, REQUEST_ID, Call, Proxy
from graft_server.gateway.sequence import answer_in_steps
from graft_server.gateway.settings import Settings
from graft_server.gateway.table import Model
from graft_server.inflight import Full, InFlight, Share
from graft_server.threads import in_thread

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
MODEL = web.RequestKey("model", str)  # set once the model is known to exist
CALLER = web.RequestKey("caller", Caller)  # set if clients need a key
NOT_COUNTED = frozenset({"/healthz", "/readyz"})
VALID_ID = re.compile(r"[!-~]{1,128}")  # of a request; it becomes a header again


class Gateway:
    """One gateway: its HTTP routes and the newest routing table."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: Settings,
        table_age: Callable[[], float | None],
        keys: Keys | None = None,  # None: engines need no key
        api_keys: ApiKeys | None = None,  # None: clients need no key
        ledger: Ledger | None = None,  # None: keys have no limits
    ) -> None:
        self.metrics = Metrics()
        self.draining = False
        self.in_flight = 0
        self._settings = settings
        self._table_age = table_age
        self._keys = keys
        self._api_keys = api_keys
        self._ledger = ledger
        self._proxy = Proxy(session, settings, self.metrics, keys, api_keys)
        self.waiting = Waiting(settings, self.metrics)
        self.bytes = InFlight()
        self._bodies = Bodies(settings)
        self.parts = Parts()
        self._problems: list[str] = []
        self._synced = False
        self._chance = random.Random()  # noqa: S311 - spreads traffic
        self._listing = Listing(int(time.time()))
        self._writing = asyncio.Lock()  # of the listing, which is written beside the event loop

    def update(self, configmaps: Snapshot) -> None:
        """Replace the parts of the routing table that changed. Running requests keep their model and target."""
        changed = self.parts.update(configmaps)
        problems = self.parts.problems
        if problems != self._problems:
            for problem in problems:
                log.error("refused a part of the routing table: %s", problem)
            self._problems = problems
            self.metrics.problems.set(len(problems))
        if self._synced and not changed:
            return
        self._synced = True
        size = self.parts.table.size
        log.info("the routing table has %d models", size, extra={"models": size})
        self._proxy.balancer.keep_only(self.parts.addresses)
        if self._keys is not None:
            self._keys.keep_only(self.parts.uids)
        self.waiting.keep_only(self.parts.sleepers)
        self.waiting.table_changed()
        self.metrics.models.set(size)
        self.metrics.keep_only(lambda name: self.waiting.holds(name) or self.parts.table.find(name) is not None)

    def drain(self) -> None:
        """Report unready. Requests that wait for a deployment to wake end with 503 and Retry-After."""
        self.draining = True
        self.waiting.close()

    def application(self) -> web.Application:
        """Return the aiohttp application.

        Run it with handler_cancellation: if a client disconnects, its request then also ends in the engine.
        """
        app = web.Application(
            client_max_size=self._settings.max_body_bytes,
            middlewares=[self._observe],
            handler_args=handler_args(self._settings.keepalive_timeout),
        )
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_post(CHAT, partial(self._complete, CHAT))
        app.router.add_post(COMPLETIONS, partial(self._complete, COMPLETIONS))
        app.on_response_prepare.append(self._close_when_draining)
        return app

    def metrics_application(self) -> web.Application:
        """Return the application with the metrics. They name the models of all tenants, so clients do not reach its port."""
        app = web.Application(handler_args=handler_args(self._settings.keepalive_timeout))
        app.router.add_get("/metrics", self._show_metrics)
        return app

    @web.middleware
    async def _observe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Give every request an id, count it, and answer errors in OpenAI's shape."""
        caller = self._bodies.caller(request)
        return await answer_guarded(request, lambda crowded: self._observed(request, handler, crowded=crowded), caller)

    async def _observed(self, request: web.Request, handler: Handler, *, crowded: bool) -> web.StreamResponse:
        began = time.monotonic()
        if request.path in NOT_COUNTED:
            return await handler(request)
        self.in_flight += 1
        self.metrics.in_flight.inc()
        status = "499"  # stays if the client disconnects before an answer
        asked = request.headers.get("X-Request-Id", "")[:128]
        request[REQUEST_ID] = asked if VALID_ID.fullmatch(asked) else uuid.uuid4().hex
        try:
            response = await self._guarded(request, too_crowded if crowded else handler)
            status = "broken" if request.get(BROKEN) else str(response.status)
            if not response.prepared:
                response.headers.setdefault("X-Request-Id", request[REQUEST_ID])
            return response
        except ConnectionError:
            raise  # while writing: the client disconnected, and aiohttp handles it
        finally:
            seconds = time.monotonic() - began
            model = request.get(MODEL, UNKNOWN)
            label = self.metrics.label(model) if model else UNKNOWN
            self.in_flight -= 1
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(label, status).inc()
            if model != UNKNOWN:
                self.metrics.seconds.labels(label).observe(seconds)
            log.info(
                "%s %s %s",
                request.method,
                request.path,
                status,
                extra={
                    "request_id": request[REQUEST_ID],
                    "model": model,
                    "status": status,
                    "seconds": round(seconds, 3),
                }
                | ({"api_keys": caller.names} if (caller := request.get(CALLER)) is not None else {}),
            )

    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if self._api_keys is not None and request.path.startswith("/v1/"):
                request[CALLER] = self._caller(request, self._api_keys)
            return await handler(request)
        except ApiError as error:
            return error.response()
        except Full as error:
            return busy(error).response()
        except web.HTTPException as error:
            if error.status in (404, 405):
                return no_route(request.method, request.path).response()
            return ApiError(error.status, str(error.status), error.reason).response()
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception(
                "unexpected error while answering %s", request.path, extra={"request_id": request[REQUEST_ID]}
            )
            message = "Unexpected error in the gateway. Its log has the cause, with the X-Request-Id of this answer."
            return ApiError(500, "internal_error", message, kind="server_error").response()

    def _caller(self, request: web.Request, api_keys: ApiKeys) -> Caller:
        """Return who sends a request. Raises ApiError 401."""
        if not api_keys.read:
            raise unavailable("The gateway", "it has not read the API keys yet", retry_after=2)
        sent = request.headers.getall("Authorization", [])
        return api_keys.caller(sent[0] if len(sent) == 1 else None)

    def _opens(self, request: web.Request, name: str) -> bool:
        return self._api_keys is None or self._api_keys.opens(request.get(CALLER, NOBODY), name)

    async def _close_when_draining(self, request: web.Request, response: web.StreamResponse) -> None:
        if self.draining:
            response.force_close()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"ok": True})

    async def _readyz(self, _: web.Request) -> web.Response:
        reason = "shutting down" if self.draining else None if self._synced else "the routing table was not read yet"
        if reason is None and self._keys is not None and not self._keys.read:
            reason = "the keys of the engines were not read yet"
        if reason is None and self._api_keys is not None and not self._api_keys.read:
            reason = "the API keys were not read yet"
        return web.json_response({"ready": reason is None, "reason": reason}, status=503 if reason else 200)

    async def _show_metrics(self, _: web.Request) -> web.Response:
        age = self._table_age()
        self.metrics.table_age.set(-1 if age is None else age)
        text = await asyncio.to_thread(self.metrics.text)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _models(self, request: web.Request) -> web.Response:
        self._check_synced()
        share = self.bytes.begin(self._bodies.accounts(request))
        try:
            caller = request.get(CALLER, NOBODY)
            opened = None if self._api_keys is None else self._api_keys.models(caller)
            body = await in_thread(self._writing, self._listing.of, self.parts.table, opened)
            share.add(len(body))
            response = web.Response(body=body, content_type="application/json", headers=self._id(request))
            await response.prepare(request)
            await response.write_eof()
            return response
        finally:
            share.close()

    async def _model(self, request: web.Request) -> web.Response:
        return web.json_response(card(self._find(request, request.match_info["model"]), self._listing.created))

    def _id(self, request: web.Request) -> dict[str, str]:
        return {"X-Request-Id": request[REQUEST_ID]}

    def _check_synced(self) -> None:
        if not self._synced:
            raise unavailable("The gateway", "it has not read its routing table yet", retry_after=2)

    def _find(self, request: web.Request, name: str) -> Model:
        """Return a model. One that the caller may not use does not exist for it."""
        self._check_synced()
        model = self.parts.table.find(name)
        if model is None or not self._opens(request, name):
            raise unknown_model(name)
        return model

    def _found_again(self, request: web.Request, name: str) -> Model:
        """Return a model after a wait. Raises ApiError 401 if the key of the request was revoked meanwhile."""
        if self._api_keys is not None:
            request[CALLER] = self._caller(request, self._api_keys)
        return self._find(request, name)

    async def _complete(self, path: str, request: web.Request) -> web.StreamResponse:
        began = time.monotonic()
        share = self.bytes.begin(self._bodies.accounts(request))
        try:
            payload = await self._bodies.payload(request, path, share)
            model = self._find(request, payload["model"])
            request[MODEL] = model.name
            async with self._reserved(request, model, payload) as reservation:
                model = self._found_again(request, model.name)
                return await self._answer(request, model, payload, began, share, reservation)
        finally:
            share.close()

    @asynccontextmanager
    async def _reserved(
        self, request: web.Request, model: Model, payload: dict[str, Any]
    ) -> AsyncIterator[Reservation | None]:
        """Reserve what a request may spend of the limits of its key. Raises ApiError 429."""
        caller = request.get(CALLER)
        limits = [] if self._api_keys is None or caller is None else self._api_keys.limits(caller, model.name)
        if not limits or self._ledger is None:
            yield None
            return
        tokens = fields.most_tokens(payload, self._settings.step_tokens) * max(1, len(model.steps))
        async with self._ledger.reserved(limits, tokens) as reservation:
            yield reservation

    async def _answer(
        self,
        request: web.Request,
        model: Model,
        payload: dict[str, Any],
        began: float,
        share: Share,
        reservation: Reservation | None,
    ) -> web.StreamResponse:
        with self.waiting.counted(model):
            model, target = await self._target(request, model)
            caller = request.get(CALLER, ANYBODY)
            call = Call(request, model, target, payload, began, share, caller, reservation)
            if model.steps:
                return await answer_in_steps(
                    self._proxy, call, partial(self._newest, model.name), self._settings.step_tokens
                )

            def replicas() -> tuple[Backend, ...]:
                newest = self._newest(model.name)
                return newest.replicas(target) if newest else ()

            return await self._proxy.answer(call, replicas)

    def _newest(self, name: str) -> Model | None:
        return self.parts.table.find(name)

    async def _target(self, request: web.Request, model: Model) -> tuple[Model, RouteTarget]:
        """Return the model and the target that answers it (for a sequence, its first step).

        If the deployment sleeps, wait until it is awake.
        """
        target = model.pick(self._chance)
        if target is not None:
            return model, target
        if model.idle_seconds is None:
            raise unavailable(model.name, model.why_not or "no replica has it loaded")

        def find() -> tuple[Model, RouteTarget | None]:
            newest = self._found_again(request, model.name)
            return newest, newest.pick(self._chance)

        return await self.waiting.hold(model, find)


async def too_crowded(_: web.Request) -> web.StreamResponse:
    """Refuse a request on a connection beyond the bound."""
    raise crowded()

"""The HTTP routes of the gateway. Other paths get 404, above all the engine's routes to load and unload adapters."""

import asyncio
import json
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp
from aiohttp import web
from graft.contracts.gateway import Backend, Routes, RouteTarget

from graft_server.configmaps import Snapshot
from graft_server.gateway.demand import Waiting
from graft_server.gateway.errors import ApiError, bad_request, no_route, too_large, unavailable, unknown_model
from graft_server.gateway.metrics import UNKNOWN, Metrics
from graft_server.gateway.proxy import BROKEN, REQUEST_ID, Call, Proxy
from graft_server.gateway.sequence import answer_in_steps
from graft_server.gateway.settings import Settings
from graft_server.gateway.table import Model, Table, read_parts

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
MODEL = web.RequestKey("model", str)  # set once the model is known to exist
NOT_COUNTED = frozenset({"/healthz", "/readyz", "/metrics"})


class Gateway:
    """One gateway: its HTTP routes and the newest routing table."""

    def __init__(
        self, session: aiohttp.ClientSession, settings: Settings, table_age: Callable[[], float | None]
    ) -> None:
        self.metrics = Metrics()
        self.draining = False
        self.in_flight = 0
        self._settings = settings
        self._table_age = table_age
        self._proxy = Proxy(session, settings, self.metrics)
        self.waiting = Waiting(settings, self.metrics)
        self._table = Table()
        self._parts: dict[str, Routes] = {}
        self._synced = False
        self._chance = random.Random()  # noqa: S311 - spreads traffic
        self._started = int(time.time())

    def update(self, configmaps: Snapshot) -> None:
        """Replace the routing table. Running requests keep their model and target."""
        self._parts, problems = read_parts(configmaps, self._parts)
        table, more = Table.of(self._parts.values())
        for problem in (*problems, *more):
            log.error("refused a part of the routing table: %s", problem)
        if table != self._table or not self._synced:
            log.info("the routing table has %d models", len(table.models), extra={"models": len(table.models)})
        self._table, self._synced = table, True
        self._proxy.balancer.keep_only(table.addresses)
        self.waiting.keep_only(table.sleepers)
        self.waiting.table_changed()
        self.metrics.models.set(len(table.models))
        self.metrics.problems.set(len(problems) + len(more))

    def drain(self) -> None:
        """Report unready. Requests that wait for a deployment to wake end with 503 and Retry-After."""
        self.draining = True
        self.waiting.close()

    def application(self) -> web.Application:
        """Return the aiohttp application.

        Run it with handler_cancellation: if a client disconnects, its request then also ends in the engine.
        """
        app = web.Application(client_max_size=self._settings.max_body_bytes, middlewares=[self._observe])
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        app.on_response_prepare.append(self._close_when_draining)
        return app

    @web.middleware
    async def _observe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Give every request an id, count it, and answer errors in OpenAI's shape."""
        began = time.monotonic()
        if request.path in NOT_COUNTED:
            return await handler(request)
        self.in_flight += 1
        self.metrics.in_flight.inc()
        status = "499"  # stays if the client disconnects before an answer
        request[REQUEST_ID] = request.headers.get("X-Request-Id", "")[:128] or uuid.uuid4().hex
        try:
            response = await self._guarded(request, handler)
            status = "broken" if request.get(BROKEN) else str(response.status)
            if not response.prepared:
                response.headers.setdefault("X-Request-Id", request[REQUEST_ID])
            return response
        except ConnectionError:
            raise  # while writing: the client disconnected, and aiohttp handles it
        finally:
            seconds = time.monotonic() - began
            model = request.get(MODEL, UNKNOWN)
            self.in_flight -= 1
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(model, status).inc()
            if model != UNKNOWN:
                self.metrics.seconds.labels(model).observe(seconds)
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
                },
            )

    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            return error.response()
        except web.HTTPRequestEntityTooLarge:
            return too_large(self._settings.max_body_bytes).response()
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

    async def _close_when_draining(self, request: web.Request, response: web.StreamResponse) -> None:
        if self.draining:
            response.force_close()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"ok": True})

    async def _readyz(self, _: web.Request) -> web.Response:
        reason = "shutting down" if self.draining else None if self._synced else "the routing table was not read yet"
        return web.json_response({"ready": reason is None, "reason": reason}, status=503 if reason else 200)

    async def _show_metrics(self, _: web.Request) -> web.Response:
        age = self._table_age()
        self.metrics.table_age.set(-1 if age is None else age)
        return web.Response(body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _models(self, _: web.Request) -> web.Response:
        self._check_synced()
        cards = [self._card(model) for _, model in sorted(self._table.models.items())]
        return web.json_response({"object": "list", "data": cards})

    async def _model(self, request: web.Request) -> web.Response:
        return web.json_response(self._card(self._find(request.match_info["model"])))

    def _card(self, model: Model) -> dict[str, Any]:
        reason = model.why_not
        target = model.targets[0] if model.targets else None
        asleep = model.idle_seconds is not None and not model.backends
        replicas = {backend.pod for one in (*model.targets, *model.steps) for backend in model.replicas(one)}
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": model.namespace,
            "graft": {
                "adapter": target.adapter if target else None,
                "version": target.version if target else None,
                **(
                    {"steps": [{"adapter": one.adapter, "version": one.version} for one in model.steps]}
                    if model.steps
                    else {}
                ),
                "deployment": model.deployment,
                "namespace": model.namespace,
                "base_model": model.base_model,
                "state": "asleep" if asleep else "unavailable" if reason else "available",
                "reason": reason,
                "replicas": len(replicas),
            },
        }

    def _check_synced(self) -> None:
        if not self._synced:
            raise unavailable("The gateway", "it has not read its routing table yet", retry_after=2)

    def _find(self, name: str) -> Model:
        self._check_synced()
        model = self._table.models.get(name)
        if model is None:
            raise unknown_model(name)
        return model

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        began = time.monotonic()
        payload = await self._payload(request)
        name = payload.get("model")
        if not isinstance(name, str) or not name:
            raise bad_request("The request has no model. Set model to <namespace>/<route>.", "model")
        model = self._find(name)
        request[MODEL] = model.name
        with self.waiting.counted(model):
            model, target = await self._target(model)
            call = Call(request, model, target, payload, began)
            if model.steps:
                newest = partial(self._table_model, model.name)
                return await answer_in_steps(self._proxy, call, newest, self._settings.step_tokens)

            def replicas() -> tuple[Backend, ...]:
                newest = self._table_model(model.name)
                return newest.replicas(target) if newest else ()

            return await self._proxy.answer(call, replicas)

    def _table_model(self, name: str) -> Model | None:
        return self._table.models.get(name)

    async def _target(self, model: Model) -> tuple[Model, RouteTarget]:
        """Return the model and the target that answers it (for a sequence, its first step).

        If the deployment sleeps, wait until it is awake.
        """
        target = model.pick(self._chance)
        if target is not None:
            return model, target
        if model.idle_seconds is None:
            raise unavailable(model.name, model.why_not or "no replica has it loaded")

        def find() -> tuple[Model, RouteTarget | None]:
            newest = self._find(model.name)
            return newest, newest.pick(self._chance)

        return await self.waiting.hold(model, find)

    async def _payload(self, request: web.Request) -> dict[str, Any]:
        if (request.content_length or 0) > self._settings.max_body_bytes:
            raise too_large(self._settings.max_body_bytes)
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                body = await request.read()
        except TimeoutError as error:
            message = f"The request's body did not arrive within {self._settings.body_timeout:g} s."
            raise ApiError(408, "request_timeout", message) from error
        try:
            payload = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"The request's body is not valid JSON: {error}") from error
        if not isinstance(payload, dict):
            raise bad_request("The request's body must be a JSON object.")
        return payload

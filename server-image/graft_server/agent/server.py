"""The agent's HTTP server: probes for the kubelet and metrics for Prometheus."""

from collections.abc import Callable

from aiohttp import web

from graft_server.agent.agent import Agent
from graft_server.agent.engine.client import EngineDown

STUCK_SECONDS = 60.0  # a round waits only for answers of the engine, and these time out after a few seconds


def application(agent: Agent, wanted_age: Callable[[], float | None]) -> web.Application:
    """Return the application with GET /readyz, /livez, /metrics and /engine/metrics."""

    async def readyz(_: web.Request) -> web.Response:
        reason = await agent.not_ready()
        return web.json_response({"ready": reason is None, "reason": reason}, status=503 if reason else 200)

    async def livez(_: web.Request) -> web.Response:
        age = agent.loop_age
        return web.json_response({"loopAgeSeconds": round(age, 1)}, status=200 if age < STUCK_SECONDS else 503)

    async def metrics(_: web.Request) -> web.Response:
        age = wanted_age()
        agent.metrics.wanted_age.set(-1 if age is None else age)
        return web.Response(body=agent.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def engine_metrics(_: web.Request) -> web.Response:
        """Return the engine's metrics. Prometheus has no key of the engine."""
        try:
            text = await agent.engine_metrics()
        except EngineDown as error:
            return web.Response(status=503, text=f"{error}\n")
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4"})

    app = web.Application()
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/livez", livez)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/engine/metrics", engine_metrics)
    return app

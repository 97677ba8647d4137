"""A gateway with fake engines behind it and a client in front of it."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web
from graft.contracts.gateway import ROUTES_KEY, Backend, RouteEntry, Routes, RouteTarget
from graft.contracts.usage import Usage
from graft_server.configmaps import KubeError
from graft_server.gateway.apikeys import ApiKeys
from graft_server.gateway.app import Gateway
from graft_server.gateway.ledger import Ledger
from graft_server.gateway.settings import Settings

from worlds.serving import FakeEngine, listening

ENGINE_MODEL = "team-a--support-1.0.0--0123456789ab"
MODEL = "team-a/support"
GRAFT = {"adapter": "support-1.0.0", "version": "1.0.0", "deployment": "dep", "namespace": "team-a"}


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def table(*addresses: str, **fields: Any) -> Routes:
    return Routes(
        namespace="team-a",
        deployment="dep",
        base_model="base",
        routes=[
            RouteEntry(
                model=MODEL,
                targets=[RouteTarget(engine_model=ENGINE_MODEL, adapter="support-1.0.0", version="1.0.0")],
            ),
            RouteEntry(model="team-a/plain", targets=[RouteTarget(engine_model="base")]),
        ],
        backends=[
            Backend(pod=f"pod-{index}", address=address, loaded=["base", ENGINE_MODEL])
            for index, address in enumerate(addresses)
        ],
        **fields,
    )


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


class Record:
    """The ConfigMap graft-usage. `lost`: the number of writes whose answer does not arrive."""

    def __init__(self, data: dict[str, str]) -> None:
        self.data, self.lost, self.writes = data, 0, 0

    async def get(self, name: str) -> dict[str, Any]:
        return {"data": dict(self.data)}

    async def replace_keys(self, name: str, config_map: dict[str, Any], keys: dict[str, str | None]) -> dict[str, Any]:
        self.data = {key: text for key, text in (self.data | keys).items() if text is not None}
        self.writes += 1
        if self.lost:
            self.lost -= 1
            raise KubeError(0, "the answer was lost")
        return {"data": dict(self.data)}

    def month(self, key: str) -> int:
        window = Usage.read(self.data[key]).month
        assert window is not None
        return window.tokens


class World:
    """The engines, the gateway and the client."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession, url: str) -> None:
        self.gateway, self.session, self.url, self.metrics_url = gateway, session, url, ""
        self.engines: list[FakeEngine] = []
        self.addresses: list[str] = []

    def update(self, *parts: Routes) -> None:
        self.gateway.update({f"routes-{index}": {ROUTES_KEY: part.json_text()} for index, part in enumerate(parts)})

    def post(
        self, body: Any = None, path: str = "/v1/chat/completions", key: str | None = "sk-secret", **fields: Any
    ) -> Any:
        body = {"model": MODEL, "messages": [], **fields} if body is None else body
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.session.post(self.url + path, data=data, headers=bearer(key) | {"TE": "x"})

    def get(self, path: str, key: str | None = None) -> Any:
        return self.session.get(self.url + path, headers=bearer(key))

    async def metric(self, line: str) -> bool:
        async with self.session.get(self.metrics_url) as response:
            return line in (await response.text()).splitlines()


@asynccontextmanager
async def world(
    engines: int = 1, api_keys: ApiKeys | None = None, ledger: Ledger | None = None, **settings: Any
) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        outward = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        client = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        options = Settings(**{"connect_timeout": 0.5, **settings})
        gateway = Gateway(outward, options, lambda: 2.5, api_keys=api_keys, ledger=ledger)
        made = World(gateway, client, "")
        for _ in range(engines):
            engine = FakeEngine()
            engine.adapters[ENGINE_MODEL] = f"/adapters/{ENGINE_MODEL}"
            made.engines.append(engine)
            made.addresses.append(await stack.enter_async_context(listening(engine.app())))
        made.url = "http://" + await stack.enter_async_context(listening(gateway.application()))
        shown = await stack.enter_async_context(listening(gateway.metrics_application()))
        made.metrics_url = f"http://{shown}/metrics"
        if engines:
            made.update(table(*made.addresses))
        yield made


def chunk(text: str) -> bytes:
    return b"data: " + json.dumps({"model": ENGINE_MODEL, "choices": [{"text": text}]}).encode() + b"\n\n"


def events(body: bytes) -> list[Any]:
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) if line != b"[DONE]" else "[DONE]" for line in lines]


@asynccontextmanager
async def sse(request: web.Request) -> AsyncIterator[web.StreamResponse]:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    yield response


async def refused(response: aiohttp.ClientResponse, status: int, code: str) -> dict[str, Any]:
    """Check that the response is an error in OpenAI's form. Return the error."""
    assert response.status == status, await response.text()
    error: dict[str, Any] = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == code
    return error

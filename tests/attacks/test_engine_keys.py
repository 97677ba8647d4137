"""Neighbours in the network that call an engine, and callers that ask for more than their role allows. The engine, the agent's
part and the gateway are the real ones."""

from __future__ import annotations

import json
import logging
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from graft.contracts.enginekeys import deployment_key, fingerprint, new_key
from graft.contracts.gateway import ROUTES_KEY, Backend, RouteEntry, Routes, RouteTarget
from graft.contracts.mounts import CALLERS_FILE, CERTIFICATE_FILE, MODULES_DIR, PRIVATE_KEY_FILE
from graft_server.agent.engine.access import MODULE, Access
from graft_server.agent.engine.client import EngineClient, EngineDown
from graft_server.callers import AGENT, GATEWAY, ROUTES, Callers, OnlyCallers
from graft_server.connections import ConnectionLimits, Connections
from graft_server.engine.settings import Settings as EngineSettings
from graft_server.gateway.app import Gateway
from graft_server.gateway.keys import Keys
from graft_server.gateway.settings import Settings
from worlds.engine import BASE, Api, make_base, running
from worlds.serving import listening

UID, OTHER_UID = "uid-of-the-deployment", "uid-of-another"
ROOT, NEXT_ROOT = new_key().encode(), new_key().encode()
COMPLETION = {"model": BASE, "prompt": "hi", "max_tokens": 2}
FREE = ("GET", "/health")
# Routes of vLLM that change or show its state, and names that a careless comparison takes for another route.
OTHERS = [
    ("POST", "/sleep"), ("POST", "/wake_up"), ("POST", "/reset_prefix_cache"), ("GET", "/server_info"),
    ("POST", "/collective_rpc"), ("POST", "/tokenize"), ("POST", "/v1/embeddings"), ("POST", "/v1/responses"),
    ("POST", "/invocations"), ("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/v1/load_lora_adapter/"),
    ("OPTIONS", "/v1/load_lora_adapter"),
    ("POST", "/health"), ("HEAD", "/metrics"),
]  # fmt: skip
ODD = [("POST", "//v1/load_lora_adapter"), ("POST", "/health/../v1/load_lora_adapter")]  # clients normalise them


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def access(tmp_path: Path) -> Access:
    made = Access(tmp_path / "engine")
    made.admit([fingerprint(deployment_key(ROOT, UID))])
    return made


@asynccontextmanager
async def guarded(base: Path, folder: Path) -> AsyncIterator[Api]:
    async with running(base, callers=str(folder / "engine" / CALLERS_FILE)) as api:
        yield api


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def status(api: Api, method: str, path: str, headers: dict[str, str] | None = None, body: Any = None) -> int:
    async with api.client.request(method, path, json=body, headers=headers) as response:
        return int(response.status)


def routes_of(api: Api) -> list[tuple[str, str]]:
    found = api.server.application().router.routes()
    return [(route.method, route.resource.canonical) for route in found if route.resource]


async def test_a_neighbour_without_a_key(base: Path, tmp_path: Path, access: Access) -> None:
    """Call every route of an engine without a key, with a wrong key, or with another deployment's key -> 401"""
    gateway = deployment_key(ROOT, UID)
    wrong = [
        {}, bearer(""), bearer("x"), bearer(deployment_key(ROOT, OTHER_UID)), bearer(fingerprint(gateway)),
        {"Authorization": f"Basic {gateway}"}, {"Authorization": gateway}, bearer("x" * 8000), bearer(gateway[:-1]),
        {"X-Api-Key": gateway}, {"Authorization": "Bearer \udcff"},
    ]  # fmt: skip
    async with guarded(base, tmp_path) as api:
        routes = routes_of(api)
        assert ("POST", "/v1/load_lora_adapter") in routes and len(routes) >= 8
        for method, path in {*routes, *OTHERS} - {FREE}:
            for headers in wrong:
                assert await status(api, method, path, headers) == 401, (method, path, headers)
        assert await status(api, *FREE) == 200  # the kubelet's probes


async def test_the_gateway_cannot_load_adapters(base: Path, tmp_path: Path, access: Access) -> None:
    """Take over the gateway and call load, unload, or a route that shows or changes the engine -> 403"""
    headers = bearer(deployment_key(ROOT, UID))
    async with guarded(base, tmp_path) as api:
        for method, path in {*routes_of(api), *OTHERS} - ROUTES[GATEWAY] - {FREE}:
            assert await status(api, method, path, headers, {"lora_name": "x", "lora_path": "/etc"}) == 403, path
        assert await status(api, "POST", "/v1/completions", headers, COMPLETION) == 200


async def test_the_agent_has_no_more_routes_than_it_needs(base: Path, tmp_path: Path, access: Access) -> None:
    """Use an agent's key for anything but the adapters and their check -> 403"""
    async with guarded(base, tmp_path) as api:
        for method, path in {*routes_of(api), *OTHERS} - ROUTES[AGENT] - {FREE}:
            assert await status(api, method, path, access.headers) == 403, path
        assert await status(api, "GET", "/v1/models", access.headers) == 200
        body = {"lora_name": "x", "lora_path": "/nowhere"}
        assert await status(api, "POST", "/v1/load_lora_adapter", access.headers, body) == 404


async def test_without_valid_callers_nobody_may_call(base: Path, tmp_path: Path, access: Access) -> None:
    """Make the file of the callers disappear or invalid -> 401 for everybody; the agent's next write repairs it"""
    file = tmp_path / "engine" / CALLERS_FILE
    async with guarded(base, tmp_path) as api:
        for content in (None, b"", b"{}", b"[]", b'{"gateway": [5]}', b'{"gateway": 5}', b"\xff", b"x" * 70_000):
            access.admit([fingerprint(deployment_key(ROOT, UID))])
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)
            for headers in ({}, bearer(deployment_key(ROOT, UID)), access.headers):
                assert await status(api, "POST", "/v1/completions", headers, COMPLETION) == 401, content
            access.admit([fingerprint(deployment_key(NEXT_ROOT, UID))])
            assert (
                await status(api, "POST", "/v1/completions", bearer(deployment_key(NEXT_ROOT, UID)), COMPLETION) == 200
            )


async def test_an_upgrade_opens_only_the_answers(base: Path, tmp_path: Path, access: Access) -> None:
    """Call an engine while gateways of an earlier release still run -> completions only, load and unload stay closed"""
    access.admit(None)
    async with guarded(base, tmp_path) as api:
        for headers in ({}, bearer("unknown"), bearer(deployment_key(ROOT, UID))):
            assert await status(api, "POST", "/v1/completions", headers, COMPLETION) == 200
            for method, path in {*routes_of(api), *OTHERS} - ROUTES[GATEWAY] - {FREE}:
                assert await status(api, method, path, headers) == 401, path
        assert await status(api, "GET", "/v1/models", access.headers) == 200


async def test_a_restarted_agent_has_a_new_key(base: Path, tmp_path: Path, access: Access) -> None:
    """Use the key of an agent that has ended -> 401; the gateways keep their access meanwhile"""
    old = access.headers
    async with guarded(base, tmp_path) as api:
        new = Access(tmp_path / "engine")
        assert await status(api, "GET", "/v1/models", old) == 401
        assert await status(api, "GET", "/v1/models", new.headers) == 200
        assert await status(api, "POST", "/v1/completions", bearer(deployment_key(ROOT, UID)), COMPLETION) == 200


async def test_vllm_asks_every_caller_for_its_key(tmp_path: Path, access: Access) -> None:
    """Call vLLM's other routes or a WebSocket, with the module that its pod has -> 401, 403 or closed; nothing reaches vLLM"""
    copied: dict[str, Any] = {"__name__": "graft_callers"}
    exec((tmp_path / "engine" / MODULES_DIR / MODULE).read_text(), copied)
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    guard = copied["OnlyCallers"](app, copied["Callers"](tmp_path / "engine" / CALLERS_FILE))
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def call(kind: str, method: str, path: str, headers: dict[str, str]) -> dict[str, Any]:
        sent.clear()
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await guard({"type": kind, "method": method, "path": path, "headers": raw}, receive, send)
        return sent[0] if sent else {}

    gateway = bearer(deployment_key(ROOT, UID))
    for method, path in [*OTHERS, *ODD, *(ROUTES[AGENT] - ROUTES[GATEWAY])]:
        assert (await call("http", method, path, {}))["status"] == 401
        assert (await call("http", method, path, gateway))["status"] == 403
    for path in ("/v1/realtime", "/v1/completions"):
        assert await call("websocket", "GET", path, gateway) == {"type": "websocket.close", "code": 1008}
    assert reached == []
    for method, path in ROUTES[AGENT]:
        await call("http", method, path, access.headers)
    await call("http", "POST", "/v1/completions", gateway)
    await call("http", "GET", "/health", {})
    await call("lifespan", "", "lifespan", {})
    assert sorted(reached) == sorted([*(path for _, path in ROUTES[AGENT]), "/v1/completions", "/health", "lifespan"])
    assert isinstance(OnlyCallers(app, Callers("x")), OnlyCallers)


def routes(address: str, **backend: Any) -> dict[str, dict[str, str]]:
    part = Routes(
        namespace="team-a",
        deployment="dep",
        uid=UID,
        base_model=BASE,
        routes=[RouteEntry(model="team-a/base", targets=[RouteTarget(engine_model=BASE)])],
        backends=[Backend(pod="pod-1", address=address, loaded=[BASE], **backend)],
    )
    return {"routes": {ROUTES_KEY: part.json_text()}}


def secret(**roots: bytes) -> dict[str, dict[str, str]]:
    return {"graft-gateway-keys": {name: b64encode(root).decode() for name, root in roots.items()}}


@asynccontextmanager
async def door(keys: Keys, table: dict[str, dict[str, str]]) -> AsyncIterator[Any]:
    """A gateway, as a function that sends one request and returns its status and answer."""
    async with aiohttp.ClientSession() as session:
        gateway = Gateway(session, Settings(connect_timeout=0.5), lambda: 0.0, keys)
        gateway.update(table)
        async with listening(gateway.application()) as front:

            async def ask(**headers: str) -> tuple[int, str]:
                url, body = f"http://{front}/v1/completions", {**COMPLETION, "model": "team-a/base"}
                async with session.post(url, json=body, headers=headers) as response:
                    return response.status, await response.text()

            yield ask


async def test_root_keys_are_rotated_under_requests(
    base: Path, tmp_path: Path, access: Access, caplog: pytest.LogCaptureFixture
) -> None:
    """Rotate the root key -> every request is answered, an old key ends with its root, and no log shows a key"""
    caplog.set_level(logging.DEBUG)
    keys = Keys()
    first, second = (fingerprint(deployment_key(root, UID)) for root in (ROOT, NEXT_ROOT))
    async with guarded(base, tmp_path) as api, door(keys, routes(f"{api.client.host}:{api.client.port}")) as ask:
        status_, answer = await ask()
        assert status_ == 503 and "key" in answer  # the gateway has read no root key yet
        assert (await ask(Authorization=f"Bearer {deployment_key(ROOT, UID)}"))[
            0
        ] == 503  # a client's header goes nowhere
        keys.update(secret(a=ROOT))
        assert (await ask())[0] == 200
        keys.update(secret(a=ROOT, b=NEXT_ROOT))  # the engine does not know b yet
        assert (await ask())[0] == 200
        access.admit([first, second])
        assert (await ask())[0] == 200
        keys.update(secret(b=NEXT_ROOT))
        access.admit([second])
        assert (await ask())[0] == 200
        keys.update(secret())  # an invalid Secret changes nothing
        keys.update({})
        assert (await ask())[0] == 200
        assert await status(api, "POST", "/v1/completions", bearer(deployment_key(ROOT, UID)), COMPLETION) == 401
    held = [ROOT.decode(), NEXT_ROOT.decode(), access.headers["Authorization"].removeprefix("Bearer ")]
    held += [deployment_key(root, UID) for root in (ROOT, NEXT_ROOT)]
    assert not [key for key in held if key in caplog.text]


@asynccontextmanager
async def encrypted(base: Path, folder: Path) -> AsyncIterator[str]:
    """An engine that listens with TLS. Yield its address."""
    settings = EngineSettings(
        model=str(base), served_model_names=(BASE,),
        ssl_certfile=str(folder / CERTIFICATE_FILE), ssl_keyfile=str(folder / PRIVATE_KEY_FILE),
    )  # fmt: skip
    async with running(base, callers=str(folder / CALLERS_FILE)) as api:
        runner = web.AppRunner(api.server.application(), access_log=None)
        await runner.setup()
        await Connections(ConnectionLimits()).site(runner, "127.0.0.1", 0, settings.tls).start()
        try:
            yield f"127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


async def test_another_certificate_gets_no_request(base: Path, tmp_path: Path) -> None:
    """Answer in the place of an engine with TLS -> gateway and agent see another certificate, and send no key"""
    access, other = Access(tmp_path / "engine", tls=True), Access(tmp_path / "other", tls=True)
    assert access.certificate != other.certificate
    assert Access(tmp_path / "engine", tls=True).certificate == access.certificate  # a pod keeps it
    access = Access(tmp_path / "engine", tls=True)
    access.admit([fingerprint(deployment_key(ROOT, UID))])
    keys = Keys()
    keys.update(secret(a=ROOT))
    async with encrypted(base, tmp_path / "engine") as address, aiohttp.ClientSession() as session:
        async with door(keys, routes(address, certificate=access.certificate)) as ask:
            assert [(await ask())[0] for _ in range(3)] == [200, 200, 200]
        assert BASE in await EngineClient(session, f"https://{address}", access).models()
        async with door(keys, routes(address, certificate=other.certificate)) as ask:
            status_, answer = await ask()
            assert status_ == 503 and "certificate" in answer
        with pytest.raises(EngineDown):
            await EngineClient(session, f"https://{address}", other).models()
        async with door(keys, routes(address)) as ask:  # plain HTTP is not answered either
            assert (await ask())[0] == 503


async def test_what_the_agent_leaves_in_the_pod(tmp_path: Path, access: Access) -> None:
    """Read everything that the engine can read -> SHA-256 sums of keys, but no key"""
    Access(tmp_path / "engine", tls=True)
    key = access.headers["Authorization"].removeprefix("Bearer ")
    for path in (tmp_path / "engine").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert key not in text and deployment_key(ROOT, UID) not in text
            assert (
                path.stat().st_mode & 0o137 == 0
            )  # neither others nor the group may change it, and others cannot read it
    callers = json.loads((tmp_path / "engine" / CALLERS_FILE).read_text())
    assert callers[GATEWAY] == [fingerprint(deployment_key(ROOT, UID))]

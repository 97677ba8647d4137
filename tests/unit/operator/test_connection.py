"""Requests to the API server: bounded in time, and through the proxy that the environment names."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from graft import connection
from graft.connection import Connection, KubeError, proxy_of
from kubernetes.aio import client

Handler = Callable[[web.Request], web.Response]


@asynccontextmanager
async def serving(answer: Handler) -> AsyncIterator[str]:
    """Serve every request by `answer`. Yield the address. It can be a proxy: requests then have an absolute URL."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        return answer(request)  # type: ignore[arg-type]

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


def test_the_proxy_is_the_one_that_the_environment_names(environment: pytest.MonkeyPatch) -> None:
    assert proxy_of("https://10.0.0.1:443") is None
    environment.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert proxy_of("https://10.0.0.1:443") == "http://proxy:3128"
    assert proxy_of("http://localhost:8001") is None
    environment.setenv("NO_PROXY", "10.0.0.1,.svc")
    assert proxy_of("https://10.0.0.1:443") is None
    assert proxy_of("https://kubernetes.default.svc") is None
    assert proxy_of("https://10.0.0.2:6443") == "http://proxy:3128"


async def test_requests_go_through_the_proxy_and_read_the_environment_once(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def proxy(request: web.Request) -> web.Response:
        asked.append(str(request.url))
        return web.json_response({"ok": True})

    async with serving(proxy) as address:
        environment.setenv("HTTP_PROXY", address)
        cluster = {"name": "k", "cluster": {"server": "http://api.example:6443"}}
        config = {
            "clusters": [cluster], "users": [{"name": "u", "user": {}}], "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        }  # fmt: skip
        file = tmp_path / "config"
        file.write_text(json.dumps(config))
        environment.setenv("KUBECONFIG", str(file))
        environment.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
        opened_connection = Connection(await connection.connect())
        environment.setenv("HTTP_PROXY", "http://nowhere.invalid:1")
        try:
            assert await opened_connection.answer("GET", "/version") == b'{"ok": true}'
        finally:
            await opened_connection.close()
    assert asked == ["http://api.example:6443/version"]


async def test_a_request_ends_before_it_has_taken_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An API server answers 503 and asks to wait -> the request fails within the patience, and the reconcile is retried."""
    asked: list[str] = []

    def busy(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({"message": "busy"}, status=503, headers={"Retry-After": "1"})

    monkeypatch.setattr(connection, "PATIENCE", 2.0)
    monkeypatch.setattr(connection, "CONNECT", 0.5)
    async with serving(busy) as address:
        opened = Connection(client.ApiClient(client.Configuration(host=address)))
        started = time.monotonic()
        try:
            with pytest.raises(KubeError) as raised:
                await opened.answer("GET", "/api")
        finally:
            await opened.close()
    assert raised.value.status == 503 and 1 < len(asked) < connection.ATTEMPTS
    assert time.monotonic() - started < 10


async def test_who_does_not_lead_reads_and_writes_nothing() -> None:
    asked: list[str] = []
    leads = True

    def answer(request: web.Request) -> web.Response:
        asked.append(request.method)
        return web.json_response({})

    async with serving(answer) as address:
        opened = Connection(client.ApiClient(client.Configuration(host=address)), lambda: 8.0 if leads else 0.0)
        try:
            await opened.answer("POST", "/api", {})
            leads = False
            await opened.answer("GET", "/api")
            for method in ("POST", "PUT", "PATCH", "DELETE"):
                with pytest.raises(KubeError, match="another operator leads"):
                    await opened.answer(method, "/api", {})
        finally:
            await opened.close()
    assert asked == ["POST", "GET"]


async def test_a_write_that_hangs_ends_before_another_operator_may_lead() -> None:
    """The API server accepts the connection and does not answer. A read may take longer."""
    left, arrived = [0.3], list[str]()
    silent = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.append((await reader.readline()).decode().split()[0])
        await silent.wait()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    address = "http://127.0.0.1:{1}".format(*server.sockets[0].getsockname())
    opened = Connection(client.ApiClient(client.Configuration(host=address)), lambda: left.pop() if left else 0.0)
    began = time.monotonic()
    try:
        with pytest.raises(KubeError, match="another operator leads"):  # instead of a second attempt
            await opened.answer("PATCH", "/api", {})
    finally:
        silent.set()
        await opened.close()
        server.close()
    assert arrived == ["PATCH"] and time.monotonic() - began < 5


async def test_a_field_that_the_schema_does_not_have_is_refused_once() -> None:
    """The API server answers 500, but a retry would get the same answer."""
    asked: list[str] = []

    def refuse(request: web.Request) -> web.Response:
        asked.append(request.path)
        text = f"failed to create typed patch object: .status.etaText: {connection.UNDECLARED}"
        return web.json_response({"message": text}, status=500)

    async with serving(refuse) as address:
        opened = Connection(client.ApiClient(client.Configuration(host=address)))
        try:
            with pytest.raises(KubeError, match=r"status\.etaText"):
                await opened.answer("PATCH", "/api", {})
        finally:
            await opened.close()
    assert len(asked) == 1

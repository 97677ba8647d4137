"""A gateway in a test, with the chart's rights, keys for its clients, and an engine that answers every request."""

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp
import urllib3
from aiohttp import web
from graft.contracts.apikeys import API_KEYS_SECRET
from graft_server.configmaps import ConfigMaps, Follower
from graft_server.gateway.__main__ import GRANTS, SELECTOR
from graft_server.gateway.apikeys import ApiKeys
from graft_server.gateway.app import Gateway
from graft_server.gateway.demand import Reporter
from graft_server.gateway.ledger import Ledger
from graft_server.gateway.settings import Settings
from kubernetes.aio.client import ApiClient, Configuration
from testbed.shell import wait_for

from worlds.cluster.api import Api
from worlds.cluster.operator_process import SYSTEM
from worlds.cluster.tenant import Tenant


class _IPv6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


class _Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"id": "c1", "model": asked["model"], "choices": [{"text": "hi"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def engine(address: str, port: int) -> Iterator[None]:
    """Run an engine on a loopback address, in place of the engine of a pod."""
    server = (_IPv6 if ":" in address else ThreadingHTTPServer)((address, port), _Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class FrontDoor:
    """A client of one gateway."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._pool = urllib3.PoolManager(retries=False, timeout=60)

    def ready(self) -> bool:
        return self._pool.request("GET", f"{self.url}/readyz").status == 200

    def ask(self, model: str, key: str | None = None) -> urllib3.BaseHTTPResponse:
        body = {"model": model, "prompt": "hello"}
        return self._pool.request("POST", f"{self.url}/v1/completions", json=body, headers=_bearer(key))

    def models(self, key: str | None) -> list[str] | int:
        """Return the names of the models that a key may use, or the status of the refusal."""
        answer = self._pool.request("GET", f"{self.url}/v1/models", headers=_bearer(key))
        return [item["id"] for item in answer.json()["data"]] if answer.status == 200 else answer.status


def _bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


@contextmanager
def front_door(api: Api, name: str, clock: Callable[[], float] = time.time, **settings: Any) -> Iterator[FrontDoor]:
    """Run the gateway on loopback, with its service account. Clients need no key unless `authentication` is keys.

    At the end it does not give back what it has leased, as if it were killed. `clock`: of the limits.
    """
    started, urls, stop, loop = threading.Event(), list[str](), asyncio.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        configuration = Configuration(host=api.server)
        configuration.ssl_ca_cert = str(api.pki / "ca.crt")
        configuration.api_key = {"authorization": f"Bearer {api.token(SYSTEM, 'graft-gateway')}"}
        client = ApiClient(configuration)
        configmaps = ConfigMaps(client, SYSTEM)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            options = Settings(**{"namespace": SYSTEM, "name": name, "authentication": "none", **settings})
            api_keys = ApiKeys() if options.authentication == "keys" else None
            ledger = Ledger(configmaps, name, clock)
            gateway = Gateway(session, options, lambda: follower.age, api_keys=api_keys, ledger=ledger)
            follower = Follower(configmaps, SELECTOR, gateway.update)
            runner = web.AppRunner(gateway.application(), handler_cancellation=True, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            reporter = Reporter(configmaps, gateway.waiting, name)
            tasks = [asyncio.create_task(follower.run()), asyncio.create_task(reporter.run())]
            if api_keys is not None:
                tasks.append(asyncio.create_task(Follower(configmaps, GRANTS, api_keys.update).run()))
                tasks.append(asyncio.create_task(api_keys.watch()))
                tasks.append(asyncio.create_task(ledger.run()))
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            started.set()
            await stop.wait()
            gateway.drain()
            for task in tasks:
                task.cancel()
            await runner.cleanup()
        await client.close()

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()])
    thread.start()
    try:
        assert started.wait(30), "the gateway did not start within 30 s"
        door = FrontDoor(urls[0])
        wait_for(door.ready, 30, "the gateway has read its routes")
        yield door
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


def ask_for(tenant: Tenant, name: str, **spec: Any) -> None:
    tenant.api.create(tenant.resource("ApiKey", name, spec))


def key_of(tenant: Tenant, name: str) -> str:
    secret = tenant.get("Secret", API_KEYS_SECRET)
    return base64.b64decode(secret["data"][name]).decode()

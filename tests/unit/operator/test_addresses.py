"""IPv6 and dual stack: no address is put together by hand, and servers listen for both families."""

import re
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from graft.api import AdapterDeployment
from graft.connection import proxy_of
from graft.contracts.addresses import IPV4_ANY, IPV6_ANY, any_address, host_port
from graft.crdgen import ROOT
from graft.reconcile.adapterdeployment.deploymentstatus import World
from graft_server.connections import ConnectionLimits, Connections, GuardedSite
from prometheus_client import start_http_server

PACKAGES = ("operator/graft", "server-image/graft_server", "trainer-image/graft_trainer")


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert host_port("10.0.0.1", 8000) == "10.0.0.1:8000"
    assert host_port("fd00::1", 8000) == "[fd00::1]:8000"
    assert host_port("a.b.svc", 80) == "a.b.svc:80"


def test_a_kernel_without_ipv6_listens_for_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any_address() == IPV6_ANY

    def refused(*_: Any) -> socket.socket:
        raise OSError("Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", refused)
    assert any_address() == IPV4_ANY


def test_the_gateway_gets_the_address_of_an_ipv6_pod_in_brackets() -> None:
    spec = {"baseModel": "tiny", "adapters": ["a@latest"]}
    deployment = AdapterDeployment.model_validate(
        {"metadata": {"name": "a", "namespace": "b", "uid": "u"}, "spec": spec}
    )
    container: dict[str, Any] = {"name": "engine", "command": []}
    pod = {
        "metadata": {"name": "a-1", "uid": "p", "annotations": {}}, "spec": {"containers": [container]},
        "status": {"podIP": "fd00::7", "podIPs": [{"ip": "fd00::7"}, {"ip": "10.0.0.7"}]},
    }  # fmt: skip
    (replica,) = World(deployment, None, None, [], [], None, None, pods=[pod]).replicas
    assert replica.address == "[fd00::7]:8000"


@pytest.mark.parametrize("host", [None, IPV6_ANY])
async def test_servers_answer_both_families(host: str | None) -> None:
    """The probes of a dual-stack pod use its first address, a Service both, and the agent 127.0.0.1."""
    app = web.Application()
    app.router.add_get("/", lambda _: web.Response(text="here"))
    runner = web.AppRunner(app)
    await runner.setup()
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    site = GuardedSite(runner, host, port, Connections(ConnectionLimits()))
    await site.start()
    try:
        assert site.name == f"http://[::]:{port}"
        async with aiohttp.ClientSession() as session:
            for address in ("127.0.0.1", "::1"):
                async with session.get(f"http://{host_port(address, port)}/") as answer:
                    assert await answer.text() == "here"
    finally:
        await runner.cleanup()


async def test_the_metrics_of_the_operator_answer_both_families() -> None:
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    server, thread = start_http_server(port, any_address())
    try:
        async with aiohttp.ClientSession() as session:
            for address in ("127.0.0.1", "::1"):
                async with session.get(f"http://{host_port(address, port)}/metrics") as answer:
                    assert answer.status == 200
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_no_proxy_excepts_an_api_server_with_an_ipv6_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "localhost,fd00::1,10.96.0.1")
    assert proxy_of("https://[fd00::1]:443") is None and proxy_of("https://10.96.0.1:443") is None
    assert proxy_of("https://[fd00::2]:443") == "http://proxy:3128"


def test_no_address_is_put_together_by_hand() -> None:
    """`f"{ip}:{port}"` is wrong for IPv6: use graft.contracts.addresses.host_port."""
    glued = re.compile(r"\{[\w.]*(ip|host|address)\}:\{")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for package in PACKAGES
        for path in sorted(Path(ROOT / package).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if glued.search(line) and path.name != "addresses.py"
    ]
    assert found == []

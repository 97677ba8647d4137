"""A platform behind a proxy, whose store and hub have certificates of a private authority.

The environment is what the chart gives the operator's container. Store and hub have names that only the proxy knows.
"""

import os
import select
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from testbed import pki
from testbed.controlplane import free_port
from testbed.objectstore import S3Server
from worlds.cluster.chart import Template, helm, template
from worlds.hub import Handler, Hub

__all__ = ["helm", "template"]  # fixtures
STORE, HUB = "store.example.test", "hub.example.test"
MOUNTED = "/etc/graft-ca/ca.crt"
USE_STORE = """
import sys
from graft.artifacts.identity import VersityIdentity
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
store = S3Store(StorageConfig.from_dir(sys.argv[1]), attempts=1)
store.create_bucket()
store.put("shop/a", b"kept")
identity = VersityIdentity(store, store.config.endpoint)
key = identity.draw("shop")
identity.accept("shop", key.secret_access_key)
print(store.get("shop/a").decode(), *identity.tenants())
"""
USE_HUB = """
import sys
from graft.artifacts.sources import describe
print(describe("hf://org/model", None, sys.argv[1]).revision)
"""


class Tunnel(BaseHTTPRequestHandler):
    """A proxy that knows the two names, and nothing else."""

    def do_CONNECT(self) -> None:
        server: Proxy = self.server  # type: ignore[assignment]
        server.asked.append(self.path)
        port = server.ports.get(self.path)
        if port is None:
            self.send_error(502)
            return
        with socket.create_connection(("127.0.0.1", port)) as target:
            self.send_response(200)
            self.end_headers()
            pair = {self.connection: target, target: self.connection}
            while True:
                for ready in select.select(list(pair), [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    pair[ready].sendall(data)

    def log_message(self, *_: object) -> None:
        pass


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.ports: dict[str, int] = {}  # host:port -> port on loopback
        self.asked: list[str] = []


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    pki.authority(folder)
    pki.certificate(folder, "server", "/CN=server", (STORE, HUB, "127.0.0.1"))
    return folder


@pytest.fixture(scope="module")
def store(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("store"), free_port(), "root", "a-root-key", tls=keys)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def hub(keys: Path) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Handler)
    server.files, server.tokens, server.heads = {"org/model/config.json": b"{}"}, set(), {}
    server.files["org/model/model.safetensors"] = b"weights"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server.crt", keys / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy(store: S3Server, hub: Hub) -> Iterator[Proxy]:
    server = Proxy()
    server.ports = {f"{STORE}:443": store.port, f"{HUB}:443": hub.server_address[1]}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def environment(template: Template, proxy: Proxy, keys: Path) -> dict[str, str]:
    """Return the variables of the operator's container, with the mounted bundle at its place on this machine."""
    made = template({
        "proxy": {"httpsProxy": f"http://127.0.0.1:{proxy.server_address[1]}"}, "trustedCA": {"configMap": "ca"},
    })  # fmt: skip
    (deployment,) = (
        item for item in made if item["kind"] == "Deployment" and item["metadata"]["name"] == "graft-operator"
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    given = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    return {name: value.replace(MOUNTED, str(keys / "ca.crt")) for name, value in given.items()}


def run(program: str, argument: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-c", program, argument], env=kept | environment, capture_output=True, text=True, check=False
    )


def mounted(store: S3Server) -> Path:
    """Return the folder with the store's address and key, by the name that only the proxy knows."""
    folder = store.secret_dir("graft")
    (folder / "endpoint").write_text(f"https://{STORE}")
    return folder


def test_the_operator_reaches_the_store_and_its_identity_service(
    environment: dict[str, str], store: S3Server, proxy: Proxy
) -> None:
    done = run(USE_STORE, str(mounted(store)), environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["kept", "shop"]
    assert set(proxy.asked) == {f"{STORE}:443"}


def test_the_operator_reads_a_model_of_the_hub(environment: dict[str, str], proxy: Proxy) -> None:
    done = run(USE_HUB, f"https://{HUB}", environment | {"HF_HUB_DISABLE_TELEMETRY": "1"})
    assert done.returncode == 0, done.stderr
    assert set(proxy.asked) == {f"{HUB}:443"}


@pytest.mark.parametrize("missing", ["trustedCA", "proxy"])
def test_without_either_nothing_is_reached(environment: dict[str, str], store: S3Server, missing: str) -> None:
    names = {"HTTPS_PROXY"} if missing == "proxy" else {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"}
    left = {name: value for name, value in environment.items() if name not in names}
    done = run(USE_STORE, str(mounted(store)), left)
    assert done.returncode != 0 and "StoreError" in done.stderr

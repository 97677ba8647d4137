"""A private network: store and hub have certificates of a private authority, and names that only the proxy knows."""

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from testbed import pki
from testbed.controlplane import free_port
from testbed.objectstore import S3Server

from worlds.hub import Handler, Hub

STORE, HUB = "store.example.test", "hub.example.test"
MOUNTED = "/etc/graft-ca/ca.crt"  # the bundle of authorities in a container


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
    handle_error = lambda self, request, address: None  # noqa: E731 - a client that goes is no error

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.ports: dict[str, int] = {}  # host:port -> port on loopback
        self.asked: list[str] = []


def certificates(folder: Path) -> Path:
    """Make the authority, and the certificate of store and hub. Return the folder."""
    pki.authority(folder)
    pki.certificate(folder, "server", "/CN=server", (STORE, HUB, "127.0.0.1"))
    return folder


@contextlib.contextmanager
def secured_store(keys: Path, state: Path) -> Iterator[S3Server]:
    """Run an S3 server with the certificate during the block."""
    server = S3Server(state, free_port(), "root", "a-root-key", tls=keys)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def secured_hub(keys: Path, config: bytes = b"{}") -> Iterator[Hub]:
    """Run a hub with the certificate and the model org/model during the block. `config`: its config.json."""
    server = Hub(("127.0.0.1", 0), Handler)
    server.files, server.tokens, server.heads = {"org/model/config.json": config}, set(), {}
    server.files["org/model/model.safetensors"] = b"weights"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server.crt", keys / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with served(server):
        yield server


@contextlib.contextmanager
def the_proxy(store: S3Server, hub: Hub) -> Iterator[Proxy]:
    """Run the proxy during the block."""
    server = Proxy()
    server.ports = {f"{STORE}:443": store.port, f"{HUB}:443": hub.server_address[1]}
    with served(server):
        yield server


@contextlib.contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[None]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def values(proxy: Proxy) -> dict[str, Any]:
    """Return the values of the chart for this network."""
    address = f"http://127.0.0.1:{proxy.server_address[1]}"
    return {"proxy": {"httpsProxy": address}, "trustedCA": {"configMap": "ca"}}


def variables(container: dict[str, Any], keys: Path) -> dict[str, str]:
    """Return the variables of a container, with the mounted bundle at its place on this machine."""
    given = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    return {name: value.replace(MOUNTED, str(keys / "ca.crt")) for name, value in given.items()}

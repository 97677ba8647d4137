"""Forward a local port to a Service through the API server, with the user's kubeconfig, as `kubectl port-forward` does."""

import re
import selectors
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from graft.cli.failure import CliFailure

if TYPE_CHECKING:
    from graft.cli.cluster import Cluster

SERVICE = re.compile(r"([a-z0-9-]+)\.([a-z0-9-]+)\.svc(?:\.[a-z0-9.-]+)?")
PORTS = {"http": 80, "https": 443}
PIECE = 256 * 1024  # bytes


@dataclass(frozen=True)
class ServiceAddress:
    """The address of a Service, as it is written in a URL."""

    namespace: str
    name: str
    port: int


def service_of(url: str) -> ServiceAddress | None:
    """Return the Service that a URL names, None if its host is no name of a Service (PURE)."""
    parts = urlsplit(url)
    found = SERVICE.fullmatch(parts.hostname or "")
    return ServiceAddress(found[2], found[1], parts.port or PORTS.get(parts.scheme, 80)) if found else None


@contextmanager
def reachable(cluster: "Cluster", url: str) -> Iterator[str]:
    """Yield a URL that reaches `url` from here. If it names a Service and its name has no address here, a port is
    forwarded during the block."""
    service = service_of(url)
    if service is None or _known(urlsplit(url).hostname or ""):
        yield url
        return
    if url.startswith("https:"):  # the certificate is for the Service's name, not for this machine
        raise CliFailure(
            f"{url} is reachable only inside the cluster, and no port can be forwarded to it because it uses TLS",
            "Run the command in a pod, or give a URL of the store that is reachable from here with --endpoint.",
        )
    pod, port = cluster.pod_behind(service.namespace, service.name, service.port)
    cluster.connect(service.namespace, pod, port).close()  # raises CliFailure if it is not allowed
    with _Server(cluster, service.namespace, pod, port) as server:
        thread = threading.Thread(target=server.serve_forever, name="forward", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def _known(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


class _Server(socketserver.ThreadingTCPServer):
    """A port of the loopback interface. Each connection is one connection to the pod."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, cluster: "Cluster", namespace: str, pod: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.open: Callable[[], Any] = lambda: cluster.connect(namespace, pod, port)

    def handle_error(self, request: Any, client_address: Any) -> None:
        print(f"a connection to the pod failed: {sys.exception()}", file=sys.stderr)


class _Connection(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        with closing(self.server.open()) as far, suppress(OSError):
            pump(self.request, far)


def pump(near: socket.socket, far: Any) -> None:
    """Copy bytes in both directions until one end closes the connection."""
    with selectors.DefaultSelector() as selector:
        selector.register(near, selectors.EVENT_READ, far)
        selector.register(far, selectors.EVENT_READ, near)
        while True:
            for key, _ in selector.select():
                data = key.fileobj.recv(PIECE)  # type: ignore[union-attr]
                if not data:
                    return
                key.data.sendall(data)

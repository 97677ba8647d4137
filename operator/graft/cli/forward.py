"""Forward a local port to a Service through the API server, with the user's kubeconfig, as `kubectl port-forward` does."""

import re
import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from graft.cli.failure import CliFailure
from graft.cli.podstream import PodStream, Stream, TlsStream, pump

if TYPE_CHECKING:
    from graft.cli.cluster import Cluster

SERVICE = re.compile(r"([a-z0-9-]+)\.([a-z0-9-]+)\.svc(?:\.[a-z0-9.-]+)?")
PORTS = {"http": 80, "https": 443}


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
def reachable(cluster: "Cluster", url: str, ca_file: str | None = None) -> Iterator[str]:
    """Yield a URL that reaches `url` from here. If it names a Service and its name has no address here, a port is forwarded
    during the block.

    For https:, TLS ends in this process: the certificate is checked for the Service's name, by the CAs of `ca_file` or of this
    machine. The forwarded port itself has no TLS and is on the loopback interface.
    """
    host, service = urlsplit(url).hostname or "", service_of(url)
    if service is None or _known(host):
        yield url
        return
    pod, port = cluster.pod_behind(service.namespace, service.name, service.port)
    context = _context(ca_file) if url.startswith("https:") else None

    def connect() -> Stream:
        stream = PodStream(cluster.connect(service.namespace, pod, port))
        return stream if context is None else TlsStream(stream, context, host)

    try:
        connect().close()  # raises CliFailure if it is not allowed
    except (ssl.SSLError, ConnectionError) as error:
        raise CliFailure(
            f"no TLS connection to {url}: {error}",
            "If a private CA signed its certificate, ask your platform team to put the CA into the entry ca.crt of the Secret "
            "graft-storage. The certificate must have the name of the Service, as the URL has it.",
        ) from error
    with _Server(connect) as server:
        thread = threading.Thread(target=server.serve_forever, name="forward", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def _context(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        raise CliFailure(
            f"the CA of the object store cannot be read: {error}",
            "Correct the entry ca.crt of the Secret graft-storage: it has certificates in PEM form.",
        ) from error


def _known(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


class _Server(socketserver.ThreadingTCPServer):
    """A port of the loopback interface. Each connection is one connection to the pod."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, connect: Callable[[], Stream]) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.open = connect

    def handle_error(self, request: Any, client_address: Any) -> None:
        print(f"a connection to the pod failed: {sys.exception()}", file=sys.stderr)


class _Connection(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        with closing(self.server.open()) as far:
            pump(self.request, far)

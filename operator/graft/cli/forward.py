"""Forward a local port to a Service through the API server, with the user's kubeconfig, as `kubectl port-forward` does.

The protocol is v4.channel.k8s.io: the first byte of a frame is its channel, 0 for data and 1 for an error. The first frame of
each channel has the number of the port.
"""

import re
import selectors
import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from graft.cli.failure import CliFailure

if TYPE_CHECKING:
    from websocket import WebSocket

    from graft.cli.cluster import Cluster

SERVICE = re.compile(r"([a-z0-9-]+)\.([a-z0-9-]+)\.svc(?:\.[a-z0-9.-]+)?")
PORTS = {"http": 80, "https": 443}
PIECE = 64 * 1024  # bytes
DATA = b"\0"  # the channel


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
        with closing(self.server.open()) as far:
            pump(self.request, far)


def pump(near: socket.socket, far: "WebSocket") -> None:
    """Copy bytes in both directions until one end closes the connection. No piece is read before the last one is written, so a
    fast sender waits for a slow reader. Raises CliFailure if the pod refuses the connection."""
    from websocket import ABNF, WebSocketException

    begun, sock = set[int](), far.sock
    if sock is None:
        return
    with selectors.DefaultSelector() as selector, suppress(OSError, WebSocketException):
        selector.register(near, selectors.EVENT_READ)
        selector.register(sock, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if near in ready:
                data = near.recv(PIECE)
                if not data:
                    return
                far.send(DATA + data, ABNF.OPCODE_BINARY)
            while sock in ready:
                opcode, frame = far.recv_data_frame(True)
                if opcode == ABNF.OPCODE_CLOSE:
                    return
                if opcode == ABNF.OPCODE_BINARY and frame.data:
                    channel, data = frame.data[0], frame.data[1:]
                    if channel not in begun:
                        begun.add(channel)
                    elif channel != DATA[0]:
                        raise CliFailure(data.decode(errors="replace"), "Check the pods of the Service.")
                    else:
                        near.sendall(data)
                # TLS may have decrypted more than one frame, which the selector does not see.
                if not (isinstance(sock, ssl.SSLSocket) and sock.pending()):
                    break

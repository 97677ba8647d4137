"""The bytes of a connection to a pod through the API server, with or without TLS inside.

The protocol is v4.channel.k8s.io: the first byte of a frame is its channel, 0 for data and 1 for an error. The first frame of
each channel has the number of the port.
"""

import selectors
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from graft.cli.failure import CliFailure

if TYPE_CHECKING:
    from websocket import WebSocket

PIECE = 64 * 1024  # bytes
DATA = b"\0"  # the channel


class Stream(Protocol):
    """A connection to a port of a pod."""

    sock: socket.socket | None

    def send(self, data: bytes) -> None: ...

    def receive(self) -> bytes | None:
        """Return the next bytes, b"" if a frame had none for the reader, None if the pod closed the connection."""

    def close(self) -> None: ...


class PodStream:
    """The data of a WebSocket to a pod's port."""

    def __init__(self, far: "WebSocket") -> None:
        self.sock = far.sock
        self._far = far
        self._begun = set[int]()

    def send(self, data: bytes) -> None:
        """Send bytes to the pod."""
        from websocket import ABNF

        self._far.send(DATA + data, ABNF.OPCODE_BINARY)

    def receive(self) -> bytes | None:
        """Return the next bytes. Raises CliFailure if the pod refuses the connection."""
        from websocket import ABNF

        opcode, frame = self._far.recv_data_frame(True)
        if opcode == ABNF.OPCODE_CLOSE:
            return None
        if opcode != ABNF.OPCODE_BINARY or not frame.data:
            return b""
        channel, data = frame.data[0], bytes(frame.data[1:])
        if channel not in self._begun:
            self._begun.add(channel)
            return b""
        if channel != DATA[0]:
            raise CliFailure(data.decode(errors="replace"), "Check the pods of the Service.")
        return data

    def close(self) -> None:
        """Close the WebSocket."""
        self._far.close()


class TlsStream:
    """TLS inside another stream. The certificate must be valid for `host`."""

    def __init__(self, inner: Stream, context: ssl.SSLContext, host: str) -> None:
        self.sock = inner.sock
        self._inner = inner
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host)
        self._shake_hands()

    def _shake_hands(self) -> None:
        """Raises ssl.SSLError if the certificate is not trusted, and ConnectionError if the pod ends the connection."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if (data := self._inner.receive()) is None:
                    raise ConnectionError("the connection ended during the TLS handshake") from None
                self._in.write(data)
            else:
                return self._flush()

    def _flush(self) -> None:
        if data := self._out.read():
            self._inner.send(data)

    def send(self, data: bytes) -> None:
        """Encrypt bytes and send them."""
        self._tls.write(data)
        self._flush()

    def receive(self) -> bytes | None:
        """Return the next decrypted bytes."""
        data = self._inner.receive()
        if data is None:
            return None
        self._in.write(data)
        pieces = []
        try:
            while piece := self._tls.read(PIECE):
                pieces.append(piece)
        except ssl.SSLWantReadError:
            self._flush()
        else:
            return b"".join(pieces) or None  # the other end has closed TLS
        return b"".join(pieces)

    def close(self) -> None:
        """Close the stream below."""
        self._inner.close()


def pump(near: socket.socket, far: Stream) -> None:
    """Copy bytes in both directions until one end closes the connection. No piece is read before the last one is written, so a
    fast sender waits for a slow reader. Raises CliFailure if the pod refuses the connection."""
    from websocket import WebSocketException

    sock = far.sock
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
                far.send(data)
            while sock in ready:
                received = far.receive()
                if received is None:
                    return
                near.sendall(received)
                # TLS to the API server may have decrypted more than one frame, which the selector does not see.
                if not (isinstance(sock, ssl.SSLSocket) and sock.pending()):
                    break

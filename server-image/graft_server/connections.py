"""Bounds on the connections of a server: on their number, and on the time in which a request's head must arrive.

The head is the request's line and headers. aiohttp has no deadline for an unfinished head and no bound on connections.
It waits without end for a client that does not read. A Guard is between the transport and aiohttp's protocol. It gets
the bytes that arrive, and asyncio notifies it when the transport's buffer is full. Bytes that are sent do not pass
through it.
"""

import asyncio
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from graft.contracts.addresses import IPV6_ANY, any_address, host_port

LINGER_SECONDS = 5.0  # to read the rest of a refused body, so that the client sees the answer
MAX_HEADERS = 64
BLANK_LINE = b"\r\n\r\n"
PIPELINED = 2  # parsed requests that may wait while one runs. Current clients wait for the answer first
SPARE = 64  # connections beyond the bound, so that probes and refusals still get through
SPARE_PER_PEER = 16
YOUNG = 1.0  # seconds for which a connection may wait for a request, even if the server is full
SLOWEST = 16 * 1024  # bytes that a client must read within `send_seconds`


@dataclass(frozen=True)
class ConnectionLimits:
    """The bounds on connections. Times are in seconds."""

    most: int = 2048
    per_peer: int = 1024  # an Ingress is one peer, or a few
    head_seconds: float = 10.0  # from a head's first byte (of the first head: from the connection) to its last
    head_bytes: int = 64 * 1024
    send_seconds: float = 60.0  # in which a client must read SLOWEST bytes of a waiting answer


class Connections:
    """The open connections of one server."""

    def __init__(self, limits: ConnectionLimits, shared: Callable[[str], bool] = lambda _: False) -> None:
        """`shared` returns whether the peer with an address is a proxy, whose connections carry many callers' requests."""
        self.limits = limits
        self._shared = shared
        self.open: set[Guard] = set()
        self.refused = 0  # connections so far
        self._peers: Counter[str] = Counter()
        self._idle: dict[Guard, float] = {}  # no complete head yet -> since when (time.monotonic()), longest first

    def site(
        self, runner: web.BaseRunner, host: str | None, port: int, tls: ssl.SSLContext | None = None
    ) -> "GuardedSite":
        """Return a site that listens on an address and guards its connections."""
        return GuardedSite(runner, host, port, self, tls)

    def admit(self, guard: "Guard") -> bool:
        """Count a new connection. Return whether it may stay.

        If the bound is reached, the connection that has waited longest for a request is closed.
        """
        peer, crowded = guard.peer, False
        guard.shared = self._shared(peer)
        if not guard.shared and self._peers[peer] >= self.limits.per_peer:
            crowded = not self._make_room(peer)
        elif len(self.open) >= self.limits.most:
            crowded = not self._make_room(None)
        if crowded and (
            len(self.open) >= self.limits.most + SPARE or self._peers[peer] >= self.limits.per_peer + SPARE_PER_PEER
        ):
            self.refused += 1
            return False
        guard.crowded = crowded
        self.open.add(guard)
        if not guard.shared:
            self._count(guard, peer)
        self.idle(guard)
        return True

    def serve(self, guard: "Guard", caller: str) -> bool:
        """Count a proxy's connection for the caller of its present request. Return whether the caller may have it.

        A connection of a client itself is counted from its beginning.
        """
        if not guard.shared or guard not in self.open:
            return True
        self._release(guard)
        if self._peers[caller] >= self.limits.per_peer:
            return False
        self._count(guard, caller)
        return True

    def idle(self, guard: "Guard") -> None:
        """Note that a connection waits for a request."""
        if guard.shared:
            self._release(guard)
        self._idle[guard] = time.monotonic()

    def busy(self, guard: "Guard") -> None:
        """Note that a connection has sent a request's head."""
        self._idle.pop(guard, None)

    def lost(self, guard: "Guard") -> None:
        """Forget a connection. A second call has no effect."""
        self._idle.pop(guard, None)
        if guard in self.open:
            self.open.discard(guard)
            self._release(guard)

    def _count(self, guard: "Guard", caller: str) -> None:
        guard.counted = caller
        self._peers[caller] += 1

    def _release(self, guard: "Guard") -> None:
        caller, guard.counted = guard.counted, None
        if caller is not None:
            self._peers[caller] -= 1
            if not self._peers[caller]:
                del self._peers[caller]

    def _make_room(self, peer: str | None) -> bool:
        before = time.monotonic() - YOUNG
        for guard, since in self._idle.items():
            if since > before:
                return False
            if peer is None or guard.peer == peer:
                self.lost(guard)
                guard.abort()
                return True
        return False


class Guard(asyncio.Protocol):
    """One connection. aiohttp's protocol is behind it."""

    def __init__(self, connections: Connections, make: Callable[[], asyncio.Protocol]) -> None:
        self.peer = ""
        self.shared = False  # the peer is a proxy: its connections are counted for the callers of its requests
        self.counted: str | None = None  # the address that this connection is counted for
        self.crowded = False  # it is beyond the bound: only probes are answered on it
        self._connections = connections
        self._make = make
        self._inner: asyncio.Protocol | None = None
        self._transport: asyncio.Transport | None = None
        self._in_head = True  # inside a request's head, or before it
        self._head_bytes = 0
        self._end = b""  # of the head so far
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admit the connection, or close it."""
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"{transport!r} is no stream")
        self._transport = transport
        name = transport.get_extra_info("peername")
        self.peer = str(name[0]) if isinstance(name, tuple) else ""
        if not self._connections.admit(self):
            transport.abort()
            return
        self._start_deadline()
        self._inner = self._make()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on. Close the connection if its head is too large, or if it sends requests in advance."""
        if self._inner is None or self._transport is None:
            return
        if self._in_head and not self._fits(data):
            self._refuse(b"431 Request Header Fields Too Large")
            return
        self._inner.data_received(data)
        if len(getattr(self._inner, "_messages", ())) > PIPELINED:
            self.abort()

    def eof_received(self) -> bool | None:
        """Pass the end on."""
        return self._inner.eof_received() if self._inner else None

    def pause_writing(self) -> None:
        """Start the deadline of a client that does not read."""
        if self._inner is not None:
            self._inner.pause_writing()
            self._watch_sending()

    def resume_writing(self) -> None:
        """Stop that deadline."""
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        """Forget the connection."""
        self._connections.lost(self)
        for timer in (self._deadline, self._stalled):
            if timer is not None:
                timer.cancel()
        if self._inner is not None:
            self._inner.connection_lost(error)

    def serve(self, caller: str) -> bool:
        """Count the connection for the caller of a request. Return whether the caller may have one more."""
        return self._connections.serve(self, caller)

    def began(self) -> None:
        """Note that the application got a request: its head was complete."""
        self._in_head = False
        self._connections.busy(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def answered(self) -> None:
        """Note that the application has answered and the whole body has arrived. The next bytes are a head again."""
        self._in_head, self._head_bytes, self._end = True, 0, b""
        if self in self._connections.open:
            self._connections.idle(self)

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _fits(self, data: bytes) -> bool:
        """Count the bytes of a head. Return whether it may still become one."""
        if not self._head_bytes:
            data = data.lstrip(b"\r\n")  # blank lines before a request are ignored
            if not data:
                return True
            if self._deadline is None:
                self._start_deadline()
        seen = self._end + data
        end = seen.find(BLANK_LINE)
        self._in_head = end < 0
        self._head_bytes += len(data) if end < 0 else end
        self._end = seen[-3:]
        return self._head_bytes <= self._connections.limits.head_bytes

    def _start_deadline(self) -> None:
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._connections.limits.head_seconds, self._too_late)

    def _too_late(self) -> None:
        self._deadline = None
        if self._head_bytes:
            self._refuse(b"408 Request Timeout")
        else:
            self.abort()

    def _refuse(self, status: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 " + status + b"\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self._transport.close()

    def _watch_sending(self, before: int | None = None) -> None:
        """Close the connection if its client has read less than SLOWEST bytes since the last call."""
        if self._transport is None:
            return
        left = self._transport.get_write_buffer_size()
        if before is not None and before - left < min(SLOWEST, before):
            self.abort()
            return
        loop = asyncio.get_running_loop()
        self._stalled = loop.call_later(self._connections.limits.send_seconds, self._watch_sending, left)


def guard_of(request: web.BaseRequest) -> Guard | None:
    """Return the guard of a request's connection, or None if it has none."""
    protocol = request.transport.get_protocol() if request.transport is not None else None
    return protocol if isinstance(protocol, Guard) else None


async def answer_guarded(
    request: web.Request, answer: Callable[[bool], Awaitable[web.StreamResponse]], caller: str = ""
) -> web.StreamResponse:
    """Answer a request, and tell the guard of its connection when it begins and ends.

    `answer` gets whether the connection is beyond the bound. `caller` is whom the request counts for, if the peer may
    be a proxy. If the request's body is still arriving after the answer, aiohttp closes the connection. It reads the
    rest of the body first, for at most LINGER_SECONDS: many clients read the answer only after they have sent the whole
    body.
    """
    guard = guard_of(request)
    if guard is None:
        return await answer(False)
    guard.began()
    try:
        response = await answer(guard.crowded or not guard.serve(caller))
        if not request.content.is_eof() and not response.prepared:
            response.force_close()
        return response
    finally:
        request.content.on_eof(guard.answered)  # now, or when the rest of the body has arrived


def handler_args(keepalive_timeout: float) -> dict[str, Any]:
    """Return the arguments of aiohttp's connections. `keepalive_timeout` is in seconds."""
    return {
        "auto_decompress": False,  # encodings are refused before the body is read
        "keepalive_timeout": keepalive_timeout,
        "lingering_time": LINGER_SECONDS,
        "max_headers": MAX_HEADERS,
    }


class GuardedSite(web.BaseSite):
    """A site whose connections have guards."""

    def __init__(
        self,
        runner: web.BaseRunner,
        host: str | None,
        port: int,
        connections: Connections,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(runner, ssl_context=tls, backlog=1024)
        self._address = (host, port)
        self._connections = connections

    @property
    def name(self) -> str:
        """Return the URL on which it listens."""
        host, port = self._address
        return f"{'https' if self._ssl_context else 'http'}://{host_port(host or any_address(), port)}"

    async def start(self) -> None:
        """Listen."""
        await super().start()
        server = self._runner.server
        if server is None:
            raise RuntimeError("the runner is not set up")
        host, port = self._address
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Guard(self._connections, server),
            # asyncio makes a socket for `::` that refuses IPv4. None listens for all families that the kernel has.
            None if host == IPV6_ANY else host,
            port,
            backlog=self._backlog,
            ssl=self._ssl_context,
            ssl_handshake_timeout=self._connections.limits.head_seconds if self._ssl_context else None,
        )

"""A proxy in front of a real HTTP server. It injects the faults of networks and of overloaded stores.

It forwards the Host header and the raw path unchanged, so that S3 signatures stay valid. It runs in its own thread, so
that tests with and without an event loop can use it. `worlds/faults/apiproxy.py` extends it for the Kubernetes API.
"""

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeVar

import aiohttp
from aiohttp import web
from yarl import URL

PIECE = 16 * 1024  # bytes; the proxy sends smaller pieces than a reader asks for, so that it can limit the rate
SMOOTH = 0.01  # seconds between two pieces of a slow line, about
HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"})


@dataclass(frozen=True)
class Fault:
    """A fault of the requests whose path contains `match`. It occurs `times` times, or until it is lifted.

    Byte positions count in the body of the response. With `hang_at`, the response stops after that many bytes. With
    `hang_at` 0 even the headers do not come.
    """

    match: str = ""
    times: int | None = None
    latency: float = 0.0  # seconds before the response
    bytes_per_second: float | None = None  # of each response
    cut_at: int | None = None
    hang_at: int | None = None
    flip_at: int | None = None  # the byte of which one bit is flipped
    status: int | None = None  # the proxy itself responds with this status and S3's error `code`
    code: str = ""
    retry_after: int | None = None  # seconds


SLOW_DOWN = Fault(status=503, code="SlowDown", retry_after=1)
EXPIRED_TOKEN = Fault(status=403, code="ExpiredToken")


@dataclass(frozen=True)
class Seen:
    """A request that the proxy received."""

    method: str
    path: str
    range: str | None


class Strike(Enum):
    """What happens to one request. In all three cases the client gets no answer, because its connection is reset."""

    BEFORE = "before"  # the client is killed, and the request is not forwarded
    AFTER = "after"  # the request is forwarded, then the client is killed
    RESET = "reset"  # the request is forwarded, and the client lives: it cannot know whether the write was done


class Line:
    """A line that transfers `bytes_per_second`, from its creation on.

    The clock sets the pace. If a sleep takes too long, or if work delays a piece, the next pieces come earlier.
    """

    def __init__(
        self,
        bytes_per_second: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._rate, self._clock, self._sleep = bytes_per_second, clock, sleep
        self._began, self._bytes = clock(), 0
        self.piece = max(1, min(PIECE, int(bytes_per_second * SMOOTH)))  # bytes to send at once

    async def bring(self, size: int) -> None:
        """Wait until `size` more bytes are due."""
        self._bytes += size
        left = self._began + self._bytes / self._rate - self._clock()
        if left > 0:
            await self._sleep(left)


class FaultyProxy:
    """A running proxy. `endpoint` is its URL."""

    def __init__(self, upstream: str, tls: ssl.SSLContext | None = None) -> None:
        self._upstream, self._tls = upstream.rstrip("/"), tls
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._lifted = asyncio.Event()
        self.endpoint = ""
        self.seen: list[Seen] = []
        self.on_request: Callable[[], None] = lambda: None  # called before the request is forwarded
        # Decides about each request by its method, path and body.
        self.strike: Callable[[str, str, bytes], Strike | None] = lambda method, path, body: None
        self.kill: Callable[[], None] = lambda: None  # kills the client

    def inject(self, *faults: Fault) -> None:
        """Replace the faults. The first fault that matches a request applies."""
        with self._lock:
            self._faults = list(faults)

    def lift(self) -> None:
        """Remove all faults. Requests that hang are cut."""
        self.inject()
        self._loop.call_soon_threadsafe(self._lifted.set)

    def reads(self, part: str) -> list[Seen]:
        """Return the requests for paths that contain `part`."""
        return [seen for seen in list(self.seen) if part in seen.path]

    def _subject(self, request: web.Request) -> str:
        """Return the text that `Fault.match` is looked for in."""
        return request.raw_path

    def _refusal(self, fault: Fault) -> tuple[str, str]:
        """Return body and content type of the proxy's own answer."""
        return f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>", "application/xml"

    def _fault_of(self, subject: str) -> Fault:
        with self._lock:
            for index, fault in enumerate(self._faults):
                if fault.match in subject and fault.times != 0:
                    if fault.times is not None:
                        self._faults[index] = replace(fault, times=fault.times - 1)
                    return fault
        return Fault()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(Seen(request.method, request.raw_path, request.headers.get("Range")))
        self.on_request()
        fault = self._fault_of(self._subject(request))
        await asyncio.sleep(fault.latency)
        if fault.hang_at == 0:
            await self._hang(request)
        if fault.status is not None:
            headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
            text, content_type = self._refusal(fault)
            return web.Response(status=fault.status, text=text, content_type=content_type, headers=headers)
        body = await request.read()
        strike = self.strike(request.method, request.raw_path, body)
        if strike is Strike.BEFORE:
            self.kill()
            self._cut(request)
        url = URL(self._upstream + self._path(request), encoded=True)
        async with request.app[SESSION].request(
            request.method, url, headers=request.headers, data=body or None, allow_redirects=False
        ) as answer:
            if strike is not None:
                await answer.read()
                if strike is Strike.AFTER:
                    self.kill()
                self._cut(request)
            return await self._pass_on(request, answer, fault)

    def _path(self, request: web.Request) -> str:
        """Return the path and query to ask the upstream for."""
        return request.raw_path

    async def _pass_on(self, request: web.Request, answer: aiohttp.ClientResponse, fault: Fault) -> web.StreamResponse:
        headers = {key: value for key, value in answer.headers.items() if key.lower() not in HOP_BY_HOP}
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        sent = 0
        stops = [stop for stop in (fault.cut_at, fault.hang_at) if stop is not None]
        line = Line(fault.bytes_per_second) if fault.bytes_per_second else None
        async for piece in answer.content.iter_chunked(line.piece if line else PIECE):
            data = bytearray(piece)
            if fault.flip_at is not None and sent <= fault.flip_at < sent + len(data):
                data[fault.flip_at - sent] ^= 1
            data = data[: max(0, min([len(data), *(stop - sent for stop in stops)]))]
            if line:
                await line.bring(len(data))
            await response.write(bytes(data))
            sent += len(data)
            if fault.cut_at is not None and sent >= fault.cut_at:
                self._cut(request)
            if fault.hang_at is not None and sent >= fault.hang_at:
                await self._hang(request)
        return response

    async def _hang(self, request: web.Request) -> None:
        self._lifted.clear()
        await self._lifted.wait()
        self._cut(request)

    def _cut(self, request: web.Request) -> None:
        if request.transport is not None:
            request.transport.abort()
        raise asyncio.CancelledError  # the connection is closed, and aiohttp must not write to it

    def _serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        async def run() -> None:
            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", "/{path:.*}", self._handle)
            limits = aiohttp.ClientTimeout(total=None, sock_connect=5)
            connector = aiohttp.TCPConnector(limit=0, ssl=self._tls or True)
            async with aiohttp.ClientSession(connector=connector, auto_decompress=False, timeout=limits) as session:
                app[SESSION] = session
                runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
                await runner.setup()
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                host, port = runner.addresses[0][:2]
                self.endpoint = f"http://{host}:{port}"
                started.set()
                await stop.wait()
                await runner.cleanup()

        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(run())
        self._loop.close()


SESSION = web.AppKey("session", aiohttp.ClientSession)


@contextlib.contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """Run a proxy in front of `upstream` during the block."""
    with running(FaultyProxy(upstream)) as proxy:
        yield proxy


P = TypeVar("P", bound=FaultyProxy)


@contextlib.contextmanager
def running(proxy: P) -> Iterator[P]:
    """Run a proxy during the block."""
    started, stop = threading.Event(), asyncio.Event()
    thread = threading.Thread(target=proxy._serve, args=(started, stop), name="faulty-proxy", daemon=True)
    thread.start()
    try:
        if not started.wait(10):
            raise RuntimeError("the proxy did not start within 10 s")
        yield proxy
    finally:
        proxy.lift()
        proxy._loop.call_soon_threadsafe(stop.set)
        thread.join(10)

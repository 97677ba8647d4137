"""A proxy in front of a real HTTP server that does what networks and overloaded stores do to it.

Host header and raw path go through unchanged, so S3's signatures stay valid. It runs in a thread of its own: tests with and
without an event loop use it alike.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

import aiohttp
from aiohttp import web
from yarl import URL

PIECE = 16 * 1024  # bytes; bandwidth and cuts are counted in smaller steps than a reader asks for
SMOOTH = 0.01  # seconds; a slow line brings smaller pieces, about as often as this
HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"})


@dataclass(frozen=True)
class Fault:
    """What happens to requests whose path contains `match`, `times` times or until it is lifted.

    Byte positions are those of the answer's body. `hang_at`: nothing comes after so many bytes, not even headers at 0.
    """

    match: str = ""
    times: int | None = None
    latency: float = 0.0  # seconds before the answer
    bytes_per_second: float | None = None  # of each answer
    cut_at: int | None = None
    hang_at: int | None = None
    flip_at: int | None = None  # one bit of this byte
    status: int | None = None  # answered by the proxy, with S3's error `code`
    code: str = ""
    retry_after: int | None = None


SLOW_DOWN = Fault(status=503, code="SlowDown", retry_after=1)
EXPIRED_TOKEN = Fault(status=403, code="ExpiredToken")


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    method: str
    path: str
    range: str | None


class Line:
    """A line that brings so many bytes a second from now on.

    Paced by the clock: a sleep that takes longer than asked, or work between two pieces, is made up for by the next ones.
    """

    def __init__(
        self,
        bytes_per_second: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._rate, self._clock, self._sleep = bytes_per_second, clock, sleep
        self._began, self._bytes = clock(), 0
        self.piece = max(1, min(PIECE, int(bytes_per_second * SMOOTH)))  # bytes to give at once

    async def bring(self, size: int) -> None:
        """Wait until as many more bytes are due."""
        self._bytes += size
        left = self._began + self._bytes / self._rate - self._clock()
        if left > 0:
            await self._sleep(left)


class FaultyProxy:
    """A running proxy; `endpoint` is its URL."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream.rstrip("/")
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._lifted = asyncio.Event()
        self.endpoint = ""
        self.seen: list[Seen] = []
        self.on_request: Callable[[], None] = lambda: None  # before the request goes on

    def inject(self, *faults: Fault) -> None:
        """From now on these; the first that matches counts."""
        with self._lock:
            self._faults = list(faults)

    def lift(self) -> None:
        """No faults any more; what hangs is cut."""
        self.inject()
        self._loop.call_soon_threadsafe(self._lifted.set)

    def reads(self, part: str) -> list[Seen]:
        """Requests for paths that contain `part`."""
        return [seen for seen in list(self.seen) if part in seen.path]

    def _fault_of(self, path: str) -> Fault:
        with self._lock:
            for index, fault in enumerate(self._faults):
                if fault.match in path and fault.times != 0:
                    if fault.times is not None:
                        self._faults[index] = replace(fault, times=fault.times - 1)
                    return fault
        return Fault()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(Seen(request.method, request.raw_path, request.headers.get("Range")))
        self.on_request()
        fault = self._fault_of(request.raw_path)
        await asyncio.sleep(fault.latency)
        if fault.hang_at == 0:
            await self._hang(request)
        if fault.status is not None:
            headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
            text = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>"
            return web.Response(status=fault.status, text=text, content_type="application/xml", headers=headers)
        body = await request.read()
        url = URL(self._upstream + request.raw_path, encoded=True)
        async with request.app[SESSION].request(
            request.method, url, headers=request.headers, data=body or None, allow_redirects=False
        ) as answer:
            return await self._pass_on(request, answer, fault)

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
        raise asyncio.CancelledError  # the connection is gone, and so is what would be written to it

    def _serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        async def run() -> None:
            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", "/{path:.*}", self._handle)
            limits = aiohttp.ClientTimeout(total=None, sock_connect=5)
            async with aiohttp.ClientSession(auto_decompress=False, timeout=limits) as session:
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
    """A proxy of its own in front of `upstream`, gone afterwards."""
    proxy = FaultyProxy(upstream)
    started, stop = threading.Event(), asyncio.Event()
    thread = threading.Thread(target=proxy._serve, args=(started, stop), name="faulty-proxy", daemon=True)
    thread.start()
    try:
        if not started.wait(10):
            raise RuntimeError("the proxy does not start")
        yield proxy
    finally:
        proxy.lift()
        proxy._loop.call_soon_threadsafe(stop.set)
        thread.join(10)

"""What the attack tests of servers share: raw connections, guarded servers, and the memory and the pauses of a process."""

from __future__ import annotations

import asyncio
import http.client
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from aiohttp import web
from graft_server.connections import ConnectionLimits, Connections

from worlds.gateway import MODEL


@asynccontextmanager
async def guarded(
    app: web.Application, shared: Callable[[str], bool] = lambda _: False, **limits: Any
) -> AsyncIterator[tuple[str, int, Connections]]:
    """Serve an application as the gateway's process does; host, port and its connections."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    connections = Connections(ConnectionLimits(**limits), shared)
    await connections.site(runner, "127.0.0.1", 0).start()
    try:
        host, port = runner.addresses[0][:2]
        yield host, port, connections
    finally:
        await runner.cleanup()


class Raw:
    """One TCP connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self, seconds: float = 10.0) -> bytes:
        """Return the head of the answer, or nothing if the connection was closed."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), seconds)
        return b""

    async def closed(self, seconds: float = 10.0) -> bool:
        """Wait until the server closes the connection."""
        with suppress(ConnectionError):
            await asyncio.wait_for(self.reader.read(), seconds)
        return True


@asynccontextmanager
async def raw(host: str, port: int, count: int = 1) -> AsyncIterator[list[Raw]]:
    """Open connections, and close them at the end."""
    async with AsyncExitStack() as stack:
        opened = [Raw(*await asyncio.open_connection(host, port)) for _ in range(count)]
        for one in opened:
            stack.callback(one.writer.close)
        yield opened


class LongestPause:
    """The longest time for which the event loop did nothing else, in seconds of the process's CPU time.

    Other processes of a busy machine do not change it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    async def __aenter__(self) -> LongestPause:
        self._task = asyncio.create_task(self._watch())
        await asyncio.sleep(0.02)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.01)
        self._task.cancel()

    async def _watch(self) -> None:
        while True:
            before = time.process_time()
            await asyncio.sleep(0.005)
            self.seconds = max(self.seconds, time.process_time() - before)


def send_then_read(host: str, port: int, size: int, path: str, **headers: str) -> tuple[int, str | None]:
    """Send a body of `size` bytes with a blocking client, which reads only after the last byte.

    Return the status and the Connection header of the answer.
    """
    connection = http.client.HTTPConnection(host, port, timeout=20)
    try:
        connection.request("POST", path, b"x" * size, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        response.read()
        return response.status, response.getheader("Connection")
    finally:
        connection.close()


class Slowed:
    """A function that runs in a thread and does not return before `go` is set."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.calls = 0
        self.go = threading.Event()
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        assert self.go.wait(30)
        return self._call(*args, **kwargs)


def body_of(fields: str) -> bytes:
    """Return a completion request to the gateway's model, with further fields as JSON text."""
    return f'{{"model": "{MODEL}", "prompt": "x", {fields}}}'.encode()


def request(body: bytes, *heads: bytes) -> bytes:
    """Return a completion request as the bytes of HTTP."""
    lines = [b"POST /v1/completions HTTP/1.1", b"Host: x", f"Content-Length: {len(body)}".encode(), *heads]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body

"""What the attack tests of servers share: raw connections, guarded servers, and the memory and the pauses of a process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from aiohttp import web
from graft_server.connections import ConnectionLimits, Connections

from worlds.gateway import MODEL


@asynccontextmanager
async def guarded(app: web.Application, **limits: Any) -> AsyncIterator[tuple[str, int, Connections]]:
    """Serve an application as the gateway's process does; host, port and its connections."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    connections = Connections(ConnectionLimits(**limits))
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


def body_of(fields: str) -> bytes:
    """Return a completion request to the gateway's model, with further fields as JSON text."""
    return f'{{"model": "{MODEL}", "prompt": "x", {fields}}}'.encode()


def request(body: bytes, *heads: bytes) -> bytes:
    """Return a completion request as the bytes of HTTP."""
    lines = [b"POST /v1/completions HTTP/1.1", b"Host: x", f"Content-Length: {len(body)}".encode(), *heads]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body

"""The body of a request or of an answer, received within bounds on its bytes, its time and the bytes in flight."""

import asyncio

import aiohttp
from aiohttp import web

from graft_server.inflight import Share


class Refused(Exception):
    """A body that is not accepted. `status` is its HTTP status: 400, 408, 413 or 415."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def beginning(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Return at most the first `most` bytes of an answer. If there are more, the connection is closed."""
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part[: most - size])
        size += len(parts[-1])
        if size >= most:
            response.close()
            break
    return b"".join(parts)


async def receive(request: web.Request, most: int, seconds: float, share: Share | None) -> bytes:
    """Return the body. Its bytes are added to `share` as they arrive.

    Raises Refused, and Full if too many bytes are in flight. The server must not decompress bodies by itself: pass
    `auto_decompress=False` to its handler.
    """
    for encoding in request.headers.getall("Content-Encoding", ()):
        if encoding.strip().lower() not in ("", "identity"):
            raise Refused(415, f"Content-Encoding {encoding[:100]!a} is not accepted. Send the body uncompressed.")
    if (request.content_length or 0) > most:
        raise Refused(413, f"The request's body is larger than {most} bytes.")
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.content.iter_any():
                size += len(part)
                if size > most:
                    raise Refused(413, f"The request's body is larger than {most} bytes.")
                if share is not None:
                    share.add(len(part))
                parts.append(part)
    except TimeoutError as error:
        raise Refused(408, f"The request's body did not arrive within {seconds:g} s.") from error
    except web.RequestPayloadError as error:
        raise Refused(400, "The request's body cannot be read: it contradicts its headers.") from error
    return b"".join(parts)

"""Receive the answers of an engine within bounds.

The engine runs code and weights from other authors, so its answers are not trusted.
"""

import aiohttp

from graft_server import receiving


class AnswerTooLarge(Exception):
    """An answer has more bytes than its reader accepts, or it is encoded."""


def open_session() -> aiohttp.ClientSession:
    """Return a session for the requests to the engine. It keeps no cookies: an engine could set a new one in each answer."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar())


async def received(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Return the body of an answer. Raises AnswerTooLarge, after which the connection is closed."""
    body = await beginning(response, most + 1)
    if len(body) > most:
        raise AnswerTooLarge(f"the answer has more than {most} bytes")
    return body


async def beginning(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Return at most the first `most` bytes of the body. If there are more, the connection is closed.

    Raises AnswerTooLarge if the body is encoded: a few bytes may become many.
    """
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        response.close()
        raise AnswerTooLarge("the answer is compressed, although the request does not allow it")
    return await receiving.beginning(response, most)

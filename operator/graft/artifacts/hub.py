"""huggingface_hub with bounds on the answers of the hub. Graft imports the library's functions from this module only.

The library reads every JSON answer whole, and follows redirects with bodies of any size. A hub is less trusted than its
reader: it may be a mirror, and the authors of repositories decide what it lists. Files are streamed to the disk, so they
have no bound here.
"""

from collections.abc import Iterator
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_download, set_client_factory, snapshot_download

from graft.bounded import Limits, OutOfBounds, check_json

__all__ = ["ANSWER", "AnswerTooLarge", "HfApi", "hf_hub_download", "snapshot_download"]

ANSWER = Limits(size=16 * 1024 * 1024, depth=32, values=300_000)  # a repository with 10,000 files lists 3 MB
ERROR_BYTES = 256 * 1024  # of an answer that is a redirect or an error
TIMEOUT = 60.0  # seconds without a byte, where the library sets no time of its own
STREAMED = "graft-streamed"  # an extension of a request: its answer is a file


class AnswerTooLarge(httpx2.HTTPError):
    """An answer of the hub exceeds ANSWER or ERROR_BYTES, or is compressed although the request forbids it."""


class _Bounded(httpx2.SyncByteStream):
    """The bytes of an answer. Raises AnswerTooLarge beyond `most`."""

    def __init__(self, stream: httpx2.SyncByteStream, most: int, url: str) -> None:
        self._stream, self._most, self._url = stream, most, url

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self._stream:
            size += len(chunk)
            if size > self._most:
                raise AnswerTooLarge(f"the answer to {self._url} has more than {self._most} bytes")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _bound(response: httpx2.Response) -> None:
    """Bound an answer before anything reads it. The client calls this for each answer, redirects included."""
    failed = response.is_redirect or response.is_error
    if not failed and response.request.extensions.get(STREAMED):
        return
    url = str(response.request.url.copy_with(query=None))
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise AnswerTooLarge(f"the answer to {url} is compressed, although the request forbids it")
    assert isinstance(response.stream, httpx2.SyncByteStream)  # noqa: S101 - the client is synchronous
    response.stream = _Bounded(response.stream, ERROR_BYTES if failed else ANSWER.size, url)


class _Client(httpx2.Client):
    """A client that reads no answer whole unless it is within the bounds."""

    def send(self, request: httpx2.Request, *, stream: bool = False, **how: Any) -> httpx2.Response:
        request.extensions = {**request.extensions, STREAMED: stream}
        if not stream:
            request.headers["Accept-Encoding"] = "identity"
        response = super().send(request, stream=stream, **how)
        if not stream and response.content.lstrip()[:1] in {b"{", b"["}:
            try:
                check_json(response.content, ANSWER, "the hub's answer")
            except OutOfBounds as error:
                raise AnswerTooLarge(str(error)) from error
        return response


def _client() -> httpx2.Client:
    return _Client(event_hooks=HOOKS | {"response": [_bound]}, follow_redirects=True, timeout=TIMEOUT)


# The library would ask huggingface.co which program uses it, also if the values name another hub.
constants.HF_HUB_DISABLE_TELEMETRY = True
HOOKS = get_session().event_hooks  # of the library's own client: offline mode, ids of requests
set_client_factory(_client)

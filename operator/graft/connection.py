"""A connection to the API server: requests and streams with bounds on time and bytes. It knows no kind.

It uses the generic calls of the official async client, with plain dicts. A request is retried on 429, 5xx and broken
connections, and honours Retry-After. Retries are safe because all calls are idempotent: server-side apply, and deletes with a
UID precondition.
"""

import asyncio
import json
import logging
import os
import random
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from kubernetes.aio import client, config

log = logging.getLogger(__name__)

CONNECT = 5.0  # seconds
TIMEOUT = 20.0  # seconds for one attempt
ATTEMPTS = 5
PATIENCE = 30.0  # seconds for all attempts: a reconcile holds its place meanwhile, and is retried
LARGEST_ANSWER = 16 * 2**20  # bytes of one answer, after decompression
# bytes of one event of a watch. etcd stores at most 1.5 MiB of an object, which escaping in JSON makes at most 6 times as
# long. So only a cluster with larger limits has an event that is left out.
LARGEST_EVENT = 16 * 2**20
SILENCE = 100  # seconds without any bytes in a watch; the API server sends a bookmark at least every 75 s
TOO_LARGE = "TooLarge"  # reason of the KubeError for an answer above the bound
# In the message of a 500: a server-side apply with a field that the CRD does not have. A retry gets the same answer.
UNDECLARED = "field not declared in schema"
JSON = "application/json"


class KubeError(Exception):
    """A call that failed, with the API server's answer. status is 0 if there was no answer, or none that can be used."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


async def connect(most: int = 64) -> Any:
    """Return a client with the pod's service account, or with KUBECONFIG outside a cluster. It opens at most `most`
    connections."""
    configuration = client.Configuration()
    if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
        config.load_incluster_config(client_configuration=configuration)
    else:
        await config.load_kube_config(client_configuration=configuration)
    configuration.connection_pool_maxsize = most
    configuration.proxy = configuration.proxy or proxy_of(configuration.host)
    # Otherwise aiohttp reads .netrc and the proxies from the environment again for each request, in a thread.
    configuration.client_session_kwargs = {"trust_env": False}
    return client.ApiClient(configuration)


def proxy_of(host: str) -> str | None:
    """Return the proxy that HTTPS_PROXY or HTTP_PROXY names for a URL, or None. NO_PROXY names exceptions."""
    address = urlsplit(host)
    if urllib.request.proxy_bypass(address.hostname or ""):
        return None
    return urllib.request.getproxies().get(address.scheme)


class Connection:
    """Requests to one API server. `api` is the official async client's ApiClient.

    `write_seconds` is asked before each request that changes something: for how long it may take. 0: it is not sent.
    """

    def __init__(self, api: Any, write_seconds: Callable[[], float] = lambda: TIMEOUT) -> None:
        self._api, self._write_seconds = api, write_seconds

    async def close(self) -> None:
        await self._api.close()

    async def answer(
        self,
        method: str,
        path: str,
        body: Any = None,
        query: dict[str, Any] | None = None,
        *,
        content_type: str = JSON,
        accept: str = JSON,
    ) -> bytes:
        """Send one request, and retry while the server is busy, restarting or unreachable. Return the answer's bytes.

        Raises KubeError with the server's answer, or with the reason TOO_LARGE.
        """
        deadline = time.monotonic() + PATIENCE
        for attempt in range(1, ATTEMPTS + 1):
            left = min(TIMEOUT, deadline - time.monotonic())
            if method != "GET":
                left = min(left, self._write_seconds())
                if left <= 0:
                    raise KubeError(0, "NotLeading", f"{method} {path}: another operator leads now")
            try:
                status, headers, data = await self._once(method, path, body, query, content_type, accept, left)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                failure, wait = KubeError(0, "Unreachable", f"{method} {path}: {error!r}"), None
            else:
                if status < 300:
                    return data
                failure = _error(status, data, method, path)
                if (status != 429 and status < 500) or UNDECLARED in str(failure):
                    raise failure
                wait = headers.get("Retry-After")
            pause = float(wait) if wait and wait.isdigit() else 0.2 * 2**attempt
            pause = min(pause, 10) * random.uniform(0.5, 1)  # noqa: S311 - jitter
            if attempt == ATTEMPTS or time.monotonic() + pause + CONNECT > deadline:
                raise failure
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _once(
        self,
        method: str,
        path: str,
        body: Any,
        query: dict[str, Any] | None,
        content_type: str,
        accept: str,
        seconds: float,
    ) -> tuple[int, Any, bytes]:
        headers = {"Accept": accept, "Content-Type": content_type}
        serialized = await self._api.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        timeout = aiohttp.ClientTimeout(total=seconds, connect=CONNECT)
        response = await self._api.call_api(*serialized, _request_timeout=timeout)
        data = bytearray()
        async with response.response as raw:
            async for chunk in raw.content.iter_any():
                data += chunk
                if len(data) > LARGEST_ANSWER:
                    raw.close()
                    text = f"{method} {path}: the answer has more than {LARGEST_ANSWER >> 20} MiB"
                    raise KubeError(0, TOO_LARGE, text)
        return response.status, response.headers, bytes(data)

    async def stream(self, path: str, query: dict[str, Any], seconds: int, accept: str) -> AsyncIterator[Any]:
        """Yield the events of a watch that the server ends after `seconds`. Raises KubeError if it refuses the watch."""
        query = query | {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": seconds}
        serialized = await self._api.param_serialize(
            "GET",
            path,
            query_params=list(query.items()),
            header_params={"Accept": accept},
            auth_settings=["BearerToken"],
        )
        silence = float(os.environ.get("GRAFT_WATCH_SILENCE", SILENCE))
        timeout = aiohttp.ClientTimeout(total=seconds + 30, connect=CONNECT, sock_read=silence)
        response = await self._api.call_api(*serialized, _request_timeout=timeout)
        async with response.response as raw:
            if raw.status != 200:
                raise _error(raw.status, await raw.content.read(2**16), "WATCH", path)
            async for line in lines(raw.content, LARGEST_EVENT):
                yield parse(line)


async def lines(content: Any, longest: int) -> AsyncIterator[bytes]:
    """Yield the lines of a stream.

    A line of more than `longest` bytes is left out: one user's object must not end the watch of all objects. The resync
    covers it.
    """
    held, skipped = bytearray(), False
    async for chunk in content.iter_any():
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            skipped = skipped or len(held) + len(end) > longest
            line = b"" if skipped else bytes(held + end)
            if skipped:
                log.warning("an event of a watch has more than %d MiB and is left out", longest >> 20)
            held.clear()
            skipped = False
            if line:
                yield line
        skipped = skipped or len(held) + len(rest) > longest
        if skipped:
            held.clear()
        else:
            held += rest


def parse(data: bytes) -> Any:
    """Return the JSON in an answer. Raises KubeError, which does not quote it."""
    try:
        return json.loads(data) if data else {}
    except (ValueError, RecursionError) as error:
        raise KubeError(0, "WrongAnswer", f"the API server's answer is not JSON: {type(error).__name__}") from None


def _error(status: int, data: bytes, method: str, path: str) -> KubeError:
    try:
        answer = json.loads(data)
        message = str(answer.get("message", data.decode(errors="replace")))
        return KubeError(status, str(answer.get("reason", ""))[:100], message[:2000])
    except (ValueError, AttributeError, RecursionError):
        return KubeError(status, "", f"{method} {path}: {status} {data[:300].decode(errors='replace')}")

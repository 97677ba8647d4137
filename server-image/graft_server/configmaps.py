"""ConfigMap access for the agent and the gateway: follow selected ConfigMaps of a namespace, and write one key of one.

It sends raw JSON through the authenticated client of kubernetes.aio, without its models. To follow means LIST, then
WATCH. A watch lasts about a minute; then a new LIST replaces it. So a lost event or a silently dead connection delays a
change by about a minute at most.
"""

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.client.exceptions import ApiException

from graft_server.receiving import beginning

log = logging.getLogger(__name__)

WATCH_SECONDS = 60.0
REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=20, sock_connect=5)
PAGE = 20  # objects in one answer of a LIST
# The API server is trusted, but others write the ConfigMaps. Kubernetes allows 1 MiB of data in one. JSON escapes can double
# it, and the managed fields come on top.
OBJECT_BYTES = 4 * 1024 * 1024
PAGE_BYTES = PAGE * OBJECT_BYTES
ERROR_BYTES = 64 * 1024
MOST_OBJECTS = 20_000
Snapshot = Mapping[str, Mapping[str, str]]  # name -> data


class KubeError(Exception):
    """The API server refused the request (`status` is its HTTP status), or did not answer (`status` is 0)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def api_client() -> ApiClient:
    """Return a client for $KUBECONFIG if that is set, else for the pod's service account."""
    configuration = Configuration()
    if os.environ.get("KUBECONFIG"):
        await kube_config.load_kube_config(client_configuration=configuration)
    else:
        kube_config.load_incluster_config(client_configuration=configuration)
    return ApiClient(configuration)


class ConfigMaps:
    """The ConfigMaps of one namespace, or its Secrets. The values of a Secret are in base64."""

    def __init__(
        self, client: ApiClient, namespace: str, plural: Literal["configmaps", "secrets"] = "configmaps"
    ) -> None:
        self._client = client
        self._path = f"/api/v1/namespaces/{quote(namespace, safe='')}/{plural}"

    async def list(self, selector: Mapping[str, str]) -> tuple[dict[str, dict[str, str]], str]:
        """Return (data by name, resource version). `selector` is {"fieldSelector": …} or {"labelSelector": …}."""
        items: dict[str, dict[str, str]] = {}
        query = {**selector, "limit": str(PAGE)}
        while True:
            answer = await self._json("GET", self._path, query, most=PAGE_BYTES)
            items |= {item["metadata"]["name"]: item.get("data") or {} for item in answer.get("items") or []}
            if len(items) > MOST_OBJECTS:
                raise KubeError(0, f"GET {self._path}: there are more than {MOST_OBJECTS} objects")
            if not (token := answer["metadata"].get("continue")):
                return items, answer["metadata"]["resourceVersion"]
            query["continue"] = token

    async def watch(
        self, selector: Mapping[str, str], resource_version: str, seconds: float
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Yield (event type, object) until the server ends the watch.

        Raises KubeError(410) if the resource version is too old.
        """
        query = {
            **selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(max(1, round(seconds))),
        }
        # The server ends the watch after timeoutSeconds. If the connection is still open 10 s later, it is dead.
        limits = aiohttp.ClientTimeout(total=seconds + 10, sock_connect=5)
        try:
            response = await self._send("GET", self._path, query, limits=limits)
            try:
                while line := await response.content.readline(max_line_length=OBJECT_BYTES):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        status = event["object"]
                        raise KubeError(int(status.get("code") or 500), str(status.get("message")))
                    yield event["type"], event["object"]
            finally:
                response.close()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
            raise KubeError(0, f"watch: {error!r}") from error

    async def get(self, name: str) -> dict[str, Any]:
        """Return the whole ConfigMap. Raises KubeError(404) if it does not exist."""
        return await self._json("GET", f"{self._path}/{quote(name, safe='')}", {})

    async def apply_key(self, name: str, uid: str, key: str, value: str, manager: str) -> None:
        """Set one key of an existing ConfigMap by server-side apply. Other keys stay unchanged.

        `uid` is a precondition: if the operator has deleted the ConfigMap, the apply fails and does not recreate it.
        """
        body = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, "uid": uid},
            "data": {key: value},
        }
        query = {"fieldManager": manager, "force": "true"}
        await self._json("PATCH", f"{self._path}/{quote(name, safe='')}", query, body)

    async def replace_keys(
        self, name: str, config_map: Mapping[str, Any], keys: Mapping[str, str | None]
    ) -> dict[str, Any]:
        """Set or remove keys of a ConfigMap, if it is still as it was read. Return it as it is then.

        `config_map`: the ConfigMap as it was read. Raises KubeError(409) if somebody has changed it, KubeError(404) if it
        was deleted.
        """
        metadata = {key: config_map["metadata"][key] for key in ("uid", "resourceVersion")}
        body = {"metadata": metadata, "data": dict(keys)}
        return await self._json("PATCH", f"{self._path}/{quote(name, safe='')}", {}, body, content="merge-patch+json")

    async def _json(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: object = None,
        *,
        most: int = OBJECT_BYTES,
        content: str = "apply-patch+yaml",
    ) -> dict[str, Any]:
        try:
            response = await self._send(method, path, query, body, content=content)
            async with response:
                data = await beginning(response, most + 1)
            if len(data) > most:
                raise KubeError(0, f"{method} {path}: the answer has more than {most} bytes")
            answer: dict[str, Any] = json.loads(data)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise KubeError(0, f"{method} {path}: {error!r}") from error
        return answer

    async def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: object = None,
        limits: aiohttp.ClientTimeout = REQUEST_TIMEOUT,
        content: str = "apply-patch+yaml",
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = f"application/{content}"
        try:
            _, url, headers, body, _ = await self._client.param_serialize(
                method, path, header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            url += "?" + urlencode(query) if query else ""
            answer = await self._client.rest_client.request(method, url, headers, body=body, _request_timeout=limits)
        except (ApiException, kube_config.ConfigException) as error:
            raise KubeError(0, f"{method} {path}: {error}") from error
        response: aiohttp.ClientResponse = answer.response
        if response.status >= 300:
            async with response:
                text = (await beginning(response, ERROR_BYTES)).decode(errors="replace")
            with suppress(ValueError, AttributeError, RecursionError):
                text = str(json.loads(text).get("message") or text)
            raise KubeError(response.status, f"{method} {path}: {response.status} {text[:500]}")
        return response


class Follower:
    """A follower of the selected ConfigMaps. It passes every new snapshot to `changed`.

    While the API server is unavailable, it keeps the last snapshot.
    """

    def __init__(
        self,
        configmaps: ConfigMaps,
        selector: Mapping[str, str],
        changed: Callable[[Snapshot], None],
        *,
        watch_seconds: float = WATCH_SECONDS,
        backoff: tuple[float, float] = (0.5, 15.0),
    ) -> None:
        self._configmaps = configmaps
        self._selector = dict(selector)
        self._changed = changed
        self._watch_seconds = watch_seconds
        self._backoff = backoff
        self.contact: float | None = None  # time.monotonic() of the API server's last answer or event
        self.relists = 0
        self.failures = 0

    @property
    def age(self) -> float | None:
        """Return the seconds since the API server's last answer or event, or None before the first LIST."""
        return None if self.contact is None else time.monotonic() - self.contact

    async def run(self) -> None:
        """Follow the ConfigMaps until cancelled."""
        failed = 0  # failures in a row
        while True:
            started = time.monotonic()
            try:
                await self._list_and_watch()
                # If the server ends every watch immediately, back off instead of sending LISTs in a tight loop.
                failed = failed + 1 if time.monotonic() - started < min(1.0, self._watch_seconds / 2) else 0
            except KubeError as error:
                self.failures += 1
                expired = error.status == 410
                failed = 1 if time.monotonic() - started > 5 else failed + 1
                if not expired:
                    log.warning(
                        "cannot follow ConfigMaps or Secrets, retrying: %s",
                        error,
                        extra={"selector": self._selector, "status": error.status},
                    )
                if expired and failed == 1:
                    continue
            if failed:
                first, most = self._backoff
                await asyncio.sleep(min(most, first * 2 ** min(failed - 1, 10)) * random.uniform(0.5, 1.0))  # noqa: S311

    async def _list_and_watch(self) -> None:
        found, version = await self._configmaps.list(self._selector)
        self._heard()
        self.relists += 1
        items: dict[str, dict[str, str]] = dict(found)
        self._changed(dict(items))
        seconds = self._watch_seconds * random.uniform(0.8, 1.2)  # noqa: S311 - spreads the LISTs of many pods
        async for kind, item in self._configmaps.watch(self._selector, version, seconds):
            self._heard()
            if kind == "BOOKMARK":
                continue
            name = item["metadata"]["name"]
            if kind == "DELETED":
                items.pop(name, None)
            else:
                items[name] = item.get("data") or {}
            self._changed(dict(items))
        self._heard()

    def _heard(self) -> None:
        self.contact = time.monotonic()

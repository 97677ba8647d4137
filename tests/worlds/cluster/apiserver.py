"""A small API server over HTTP with lists, watches, merge patches and compaction, whose events a test can hold back."""

import asyncio
import copy
import functools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from graft.kinds import KINDS
from graft.kube import Kube
from kubernetes.aio import client

Object = dict[str, Any]
BY_PLURAL = {kind.plural: (name, kind) for name, kind in KINDS.items()}


class ApiServer:
    """The objects of one API server. All requests are in `requests`, as (method, path, query)."""

    def __init__(self) -> None:
        self.version = 100
        self.compacted = 0  # a watch cannot start before this version
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.events: list[tuple[int, str, Object]] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.accepted: list[str] = []
        self.held_back = False  # whether watches send no events
        self.broken = asyncio.Event()  # set: all watches end without a last event
        self.raw: asyncio.Queue[bytes] = asyncio.Queue()  # lines that the watch sends as they are
        self._changed = asyncio.Condition()

    async def change(self, kind: str, name: str, namespace: str = "shop", **parts: Any) -> Object:
        """Create or replace an object."""
        self.version += 1
        key = (kind, namespace, name)
        before = self.objects.get(key)
        metadata = parts.pop("metadata", {})
        uid = before["metadata"]["uid"] if before is not None else f"uid-{self.version}"
        found = {
            "apiVersion": KINDS[kind].api_version,
            "kind": kind,
            "metadata": {"uid": uid}
            | metadata
            | {"name": name, "namespace": namespace, "resourceVersion": str(self.version)},
            **parts,
        }
        self.objects[key] = found
        await self._tell("MODIFIED" if before is not None else "ADDED", found)
        return copy.deepcopy(found)

    async def remove(self, kind: str, name: str, namespace: str = "shop") -> None:
        self.version += 1
        found = copy.deepcopy(self.objects.pop((kind, namespace, name)))
        found["metadata"]["resourceVersion"] = str(self.version)
        await self._tell("DELETED", found)

    async def release(self) -> None:
        """Send the events that were held back."""
        async with self._changed:
            self.held_back = False
            self._changed.notify_all()

    async def send(self, event: Object) -> None:
        """Send an event that no change has caused."""
        await self.raw.put(json.dumps(event).encode() + b"\n")
        async with self._changed:
            self._changed.notify_all()

    async def break_watches(self) -> None:
        self.broken.set()
        async with self._changed:
            self._changed.notify_all()
        await asyncio.sleep(0)
        self.broken = asyncio.Event()

    def count(self, method: str, what: str = "") -> int:
        return sum(found == method and what in path for found, path, _ in self.requests)

    async def _tell(self, type_: str, found: Object) -> None:
        async with self._changed:
            self.events.append((self.version, type_, copy.deepcopy(found)))
            self._changed.notify_all()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        query = dict(request.query)
        self.requests.append((request.method, request.path, query))
        self.accepted.append(request.headers.get("Accept", ""))
        parts = request.path.strip("/").split("/")
        namespace, rest = "", parts[2:] if parts[0] == "api" else parts[3:]
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        kind, name = BY_PLURAL[rest[0]][0], rest[1] if len(rest) > 1 else None
        partial = "PartialObjectMetadata" in request.headers.get("Accept", "")
        if name is not None:
            return await self._one(request, kind, namespace, name)
        if "watch" in query:
            return await self._watch(request, kind, int(query["resourceVersion"]), partial)
        items = [
            item for (of, where, _), item in sorted(self.objects.items()) if of == kind and namespace in {"", where}
        ]
        begin, limit = int(query.get("continue", 0)), int(query["limit"])
        more = str(begin + limit) if begin + limit < len(items) else ""
        metadata = {"resourceVersion": str(self.version), "continue": more}
        kinds = ("meta.k8s.io/v1", "PartialObjectMetadataList") if partial else (KINDS[kind].api_version, f"{kind}List")
        found = [_partial(item) if partial else item for item in items[begin : begin + limit]]
        return web.json_response({"apiVersion": kinds[0], "kind": kinds[1], "metadata": metadata, "items": found})

    async def _one(self, request: web.Request, kind: str, namespace: str, name: str) -> web.Response:
        found = self.objects.get((kind, namespace, name))
        if found is None:
            return web.json_response({"code": 404, "message": "not found"}, status=404)
        if request.method == "PATCH":
            patch = json.loads(await request.read())
            rest = {key: value for key, value in patch.items() if key not in {"metadata", "apiVersion", "kind"}}
            parts = {key: value for key, value in found.items() if key not in {"metadata", "apiVersion", "kind"}}
            metadata = found["metadata"] | patch.get("metadata", {})
            found = await self.change(kind, name, namespace, metadata=metadata, **parts | rest)
        return web.json_response(found)

    async def _watch(self, request: web.Request, kind: str, version: int, partial: bool) -> web.StreamResponse:
        if version < self.compacted:
            return web.json_response({"code": 410, "reason": "Expired", "message": "too old"}, status=410)
        response = web.StreamResponse()
        await response.prepare(request)
        broken = self.broken
        while True:
            async with self._changed:
                await self._changed.wait_for(functools.partial(self._ready, broken, version))
            if broken.is_set():
                break
            while not self.raw.empty():
                await response.write(self.raw.get_nowait())
            for at, type_, found in self._pending(version):
                version = at
                if found["kind"] == kind:
                    sent = _partial(found) if partial else found
                    await response.write(json.dumps({"type": type_, "object": sent}).encode() + b"\n")
        if request.transport is not None:
            request.transport.abort()
        return response

    def _ready(self, broken: asyncio.Event, version: int) -> bool:
        return broken.is_set() or not self.raw.empty() or bool(self._pending(version))

    def _pending(self, version: int) -> list[tuple[int, str, Object]]:
        return [] if self.held_back else [item for item in self.events if item[0] > version]


def _partial(item: Object) -> Object:
    return {"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": item["metadata"]}


@asynccontextmanager
async def api_server() -> AsyncIterator[tuple[ApiServer, Kube]]:
    """Run an API server. Yield it with a client."""
    server = ApiServer()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    kube = Kube(client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")))
    try:
        yield server, kube
    finally:
        await kube.close()
        await server.break_watches()
        await runner.cleanup()

"""A bare client of the API server for the benchmarks: many requests at the same time, no retries, no checks."""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from worlds.cluster.api import ALL_KINDS, Refused

Object = dict[str, Any]
T = TypeVar("T")
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
LARGEST_LINE = 2**24  # bytes of one event of a watch
PAGE = 500  # objects in one answer


class Wire:
    """One identity at one API server."""

    def __init__(self, server: str, pki: Path, token: str | None = None) -> None:
        tls = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        if token is None:
            tls.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self.server = server
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls, limit=64),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            read_bufsize=LARGEST_LINE,
        )

    async def __aenter__(self) -> "Wire":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def call(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Object:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": content_type}
        async with self._session.request(method, self.server + path, data=data, headers=headers) as answer:
            text = await answer.read()
            if answer.status >= 300:
                raise Refused(answer.status, f"{method} {path}: {text[:500].decode(errors='replace')}")
            return dict(json.loads(text))

    async def create(self, manifest: Object) -> Object:
        return await self.call(
            "POST", ALL_KINDS[manifest["kind"]].path(manifest["metadata"].get("namespace")), manifest
        )

    async def apply(self, manifest: Object, subresource: str | None = None) -> Object:
        metadata = manifest["metadata"]
        path = ALL_KINDS[manifest["kind"]].path(metadata.get("namespace"), metadata["name"], subresource)
        return await self.call("PATCH", f"{path}?fieldManager=bench&force=true", manifest, APPLY)

    async def merge(
        self, kind: str, namespace: str, name: str, patch: Object, subresource: str | None = None
    ) -> Object:
        return await self.call("PATCH", ALL_KINDS[kind].path(namespace, name, subresource), patch, MERGE)

    async def delete_jobs(self, *namespaces: str) -> None:
        """Delete the FineTuneJobs of these namespaces, and wait until they and their Jobs no longer exist."""
        collections = [ALL_KINDS[kind].path(name) for name in namespaces for kind in ("FineTuneJob", "Job")]

        async def gone() -> bool:
            while collections and not (await self.call("GET", f"{collections[0]}?limit=1"))["items"]:
                collections.pop(0)
            return not collections

        async def deleted(path: str) -> bool:
            try:
                await self.call("DELETE", path)
            except Refused as error:
                if error.status != 504:
                    raise
                return False  # the API server has deleted some of them in its time limit
            return True

        for path in collections[::2]:
            await until(partial(deleted, path), what="the jobs are being deleted")
        await until(gone, what="the jobs are deleted")

    async def pages(self, kind: str, labels: str = "") -> AsyncIterator[list[Object]]:
        """Yield all objects of a kind in all namespaces, page by page."""
        rest = ""
        while True:
            query = f"?limit={PAGE}" + (f"&labelSelector={labels}" if labels else "") + rest
            answer = await self.call("GET", ALL_KINDS[kind].path(None) + query)
            yield answer["items"]
            token = answer["metadata"].get("continue")
            if not token:
                return
            rest = f"&continue={token}"

    async def watch(self, kind: str, opened: asyncio.Event | None = None) -> AsyncIterator[Object]:
        """Yield the events after `opened` is set. Only the metadata of the objects is read."""
        path = ALL_KINDS[kind].path(None)
        version = (await self.call("GET", f"{path}?limit=1"))["metadata"]["resourceVersion"]
        if opened is not None:
            opened.set()
        query = f"?watch=true&resourceVersion={version}"
        async with self._session.get(self.server + path + query, headers={"Accept": METADATA}) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                yield json.loads(line)


class Arrivals:
    """When the Job of each FineTuneJob was seen, by the UID of the FineTuneJob (time.monotonic)."""

    def __init__(self, wire: Wire) -> None:
        self.at: dict[str, float] = {}
        self.opened = asyncio.Event()
        self._changed = asyncio.Condition()
        self._task = asyncio.create_task(self._follow(wire))

    async def _follow(self, wire: Wire) -> None:
        async for event in wire.watch("Job", self.opened):
            for owner in event["object"]["metadata"].get("ownerReferences") or []:
                if event["type"] == "ADDED":
                    self.at.setdefault(owner["uid"], time.monotonic())
            async with self._changed:
                self._changed.notify_all()

    async def of(self, uids: Iterable[str], patience: float) -> list[float]:
        """Wait until each of the FineTuneJobs has a Job, at most `patience` seconds. Return when the Jobs were seen."""
        wanted = set(uids)
        try:
            async with asyncio.timeout(patience), self._changed:
                await self._changed.wait_for(lambda: wanted <= self.at.keys() or self._task.done())
        except TimeoutError:
            pass
        if self._task.done():
            self._task.result()
        return [self.at[uid] for uid in wanted if uid in self.at]

    def stop(self) -> None:
        self._task.cancel()


async def until(
    question: Callable[[], Awaitable[object]], patience: float = 600, what: str = "the benchmark's step"
) -> None:
    """Ask until the answer is true. Raises TimeoutError after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not await question():
        if time.monotonic() > deadline:
            raise TimeoutError(f"timed out after {patience:.0f} s. Expected: {what}")
        await asyncio.sleep(0.1)


async def together(calls: Iterable[Callable[[], Awaitable[T]]], at_once: int = 16) -> list[T]:
    """Make the calls, at most `at_once` at the same time. Return their results in the order of the calls."""
    turns = asyncio.Semaphore(at_once)

    async def one(call: Callable[[], Awaitable[T]]) -> T:
        async with turns:
            return await call()

    return list(await asyncio.gather(*(one(call) for call in calls)))

"""What a standby does before it leads, and what a new leader knows before it works."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from graft import handlers, wakes
from graft.api import FineTuneJob
from graft.cache.cache import Cache
from graft.contracts.message import BaseModelRef
from graft.kube import KubeError
from graft.reconcile.finetunejob.reservation import reserve_version
from worlds.cluster.apiserver import ApiServer, api_server
from worlds.reconciling import MemoryStore, context

BASE = BaseModelRef(name="tiny", uri="hf://tiny/base")
KINDS = {"FineTuneJob", "Adapter", "AdapterDeployment"}
SPEC = {
    "baseModel": "tiny",
    "dataset": {"train": {"uri": "s3://graft/shop/train.jsonl"}},
    "output": {"adapter": "support"},
    "method": {"lora": {}},
}
RESERVED = {"version": "1.0.0", "recipe": "r", "baseModelUri": BASE.uri, "baseModelDigest": BASE.uri}


class Standby:
    """An operator that waits for a Lease. `ended`: whether it has sent itself SIGTERM."""

    def __init__(self, server: ApiServer, cache: Cache, kube: Any) -> None:
        self.server, self.cache = server, cache
        self.ctx: Any = context(kube, MemoryStore())
        self.ctx.cache, self.ctx.elected = cache, True
        self.acquired, self.lost, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.queue: Any = SimpleNamespace(woken=[])
        self.queue.wake = lambda *key, **_: self.queue.woken.append(key)
        self.queue.forget = self.queue.wake
        self.election: Any = SimpleNamespace(acquire=self.acquired.wait, keep=self.lost.wait)

    def stand(self) -> asyncio.Task[None]:
        return asyncio.create_task(handlers._stand(self.ctx, self.cache, self.queue, self.election))


@asynccontextmanager
async def standby(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Standby]:
    async with api_server() as (server, kube):
        sources = [source for source in wakes.sources("graft-system") if source.kind in KINDS]
        cache = Cache(kube, sources, changed=handlers.changed)
        found = Standby(server, cache, kube)
        operator = handlers.Operator()
        operator.ctx, operator.cache, operator.queue = found.ctx, cache, found.queue
        monkeypatch.setattr(handlers, "operator", operator)
        monkeypatch.setattr(handlers.os, "kill", lambda *_: found.ended.set())  # type: ignore[attr-defined]
        operator.tasks = [*cache.start(), found.stand()]
        try:
            async with asyncio.timeout(10):
                await cache.synced()
                yield found
        finally:
            for task in operator.tasks:
                task.cancel()
            await asyncio.gather(*operator.tasks, return_exceptions=True)


async def test_a_new_leader_knows_the_reservations_that_no_event_has_told_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = asyncio.Queue[Any]()

    async with standby(monkeypatch) as seen:

        async def write_status(*_: Any, **__: Any) -> None:
            """Accept it."""

        async def lead(*_: Any) -> None:
            await versions.put(await reserve_version(seen.ctx, raw, FineTuneJob.model_validate(raw), BASE, None))

        monkeypatch.setattr(handlers, "_lead", lead)
        seen.ctx.write_status = write_status
        raw = await seen.server.change("FineTuneJob", "second", spec=SPEC)
        seen.server.held_back = True  # the watch of the standby is late
        await seen.server.change("FineTuneJob", "first", spec=SPEC, status={"resolved": RESERVED})
        assert seen.cache.objects("FineTuneJob").get("shop", "first") is None
        seen.acquired.set()
        assert await versions.get() == "1.1.0"


async def test_a_standby_does_no_work_that_events_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    async with standby(monkeypatch) as seen:
        await seen.server.change("AdapterDeployment", "d", spec={"adapter": "support"})
        while seen.cache.objects("AdapterDeployment").get("shop", "d") is None:  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.01)
        await seen.server.remove("AdapterDeployment", "d")
        while seen.cache.objects("AdapterDeployment").get("shop", "d") is not None:  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.01)
        assert not seen.queue.woken and not handlers.operator.errands and not handlers.operator.leads
        assert {method for method, _, _ in seen.server.requests} == {"GET"}


async def test_who_loses_the_lease_or_cannot_begin_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lead(*_: Any) -> None:
        """Work."""

    async def refused(*_: Any) -> None:
        raise KubeError(403, "Forbidden", "not allowed")

    for begin, lost in ((lead, True), (refused, False)):
        monkeypatch.setattr(handlers, "_lead", begin)
        async with standby(monkeypatch) as seen:
            seen.acquired.set()
            assert not seen.ended.is_set()
            if lost:
                seen.lost.set()
            await seen.ended.wait()

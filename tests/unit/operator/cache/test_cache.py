"""The cache against an API server over HTTP whose watches break, lose, repeat and reorder events."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from graft import connection
from graft.cache import informer
from graft.cache.cache import Cache, Change, Source
from graft.kube import Kube, KubeError
from graft.manifests.metadata import OWNER_UID
from worlds.cluster.apiserver import ApiServer, Object, api_server

LABELLED = Source("ConfigMap", labels={OWNER_UID: None}, listed=False, watched=False)
RUNS = Source("Pod", labels={OWNER_UID: None}, listed=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(informer, "PAUSE_FIRST", 0.01)


class Followed:
    """A cache with the changes that it reported, as (name, "created", "changed" or "deleted")."""

    def __init__(self, server: ApiServer, kube: Kube, cache: Cache, changes: list[tuple[str, str]]) -> None:
        self.server, self.kube, self.cache, self.changes = server, kube, cache, changes

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not done():  # noqa: ASYNC110 - the cache has no event for each test's condition
                await asyncio.sleep(0.01)

    async def told(self, *wanted: tuple[str, str]) -> None:
        await self.until(lambda: set(wanted) <= set(self.changes))


@asynccontextmanager
async def following(*sources: Source, before: Callable[[ApiServer], Any] | None = None) -> AsyncIterator[Followed]:
    changes: list[tuple[str, str]] = []

    def changed(source: Source, change: Change) -> None:
        how = "created" if change.before is None else "deleted" if change.after is None else "changed"
        changes.append((change.place[1], how))

    async with api_server() as (server, kube):
        if before is not None:
            await before(server)
        cache = Cache(kube, sources or [Source("Adapter")], changed=changed)
        tasks = cache.start()
        await cache.synced()
        try:
            yield Followed(server, kube, cache, changes)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def reads(server: ApiServer) -> int:
    return sum("watch" not in query for _, _, query in server.requests)


def version(followed: Followed, name: str, kind: str = "Adapter") -> int:
    held = followed.cache.objects(kind).get("shop", name)
    return held.version if held is not None else 0


async def many(server: ApiServer) -> None:
    for number in range(450):
        await server.change("Adapter", f"a{number}", spec={"n": number})


async def test_a_list_page_by_page_and_reads_without_requests() -> None:
    async with following(before=many) as seen:
        assert len(await seen.cache.list("Adapter", "shop")) == 450 and reads(seen.server) == 3
        found = await seen.cache.get("Adapter", "shop", "a7")
        assert found is not None and found["spec"] == {"n": 7}
        found["spec"]["n"] = "changed by a reader"
        again = await seen.cache.get("Adapter", "shop", "a7")
        assert again is not None and again["spec"] == {"n": 7}
        assert await seen.cache.get("Adapter", "shop", "other") is None
        assert await seen.cache.list("Adapter", "elsewhere") == []
        assert reads(seen.server) == 3


async def test_changes_arrive_as_events() -> None:
    async with following() as seen:
        await seen.server.change("Adapter", "a", spec={"n": 1})
        await seen.server.change("Adapter", "a", spec={"n": 2})
        await seen.server.remove("Adapter", "a")
        await seen.told(("a", "created"), ("a", "changed"), ("a", "deleted"))
        assert len(seen.cache.objects("Adapter")) == 0


async def test_a_broken_watch_continues_where_it_ended() -> None:
    async with following() as seen:
        await seen.server.change("Adapter", "a")
        await seen.told(("a", "created"))
        seen.server.held_back = True
        await seen.server.change("Adapter", "b")
        await seen.server.remove("Adapter", "a")
        await seen.server.break_watches()
        await seen.server.release()
        await seen.told(("b", "created"), ("a", "deleted"))
        assert reads(seen.server) == 1, "it was listed again"


@pytest.mark.parametrize("how", ["refused", "event"])
async def test_a_deletion_in_a_gap_of_the_watch_is_noticed(how: str) -> None:
    """The API server no longer has the version at which the watch would continue -> the new list is compared."""
    async with following() as seen:
        for name in ("kept", "gone", "replaced"):
            await seen.server.change("Adapter", name)
        await seen.told(("kept", "created"), ("gone", "created"), ("replaced", "created"))
        seen.server.held_back = True
        await seen.server.remove("Adapter", "gone")
        await seen.server.remove("Adapter", "replaced")
        again = await seen.server.change("Adapter", "replaced")
        await seen.server.change("Adapter", "new")
        seen.server.compacted = seen.server.version
        seen.server.events.clear()
        if how == "refused":
            await seen.server.break_watches()
        else:
            await seen.server.send({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}})
        await seen.told(("gone", "deleted"), ("new", "created"), ("replaced", "changed"))
        held = seen.cache.objects("Adapter").get("shop", "replaced")
        assert held is not None and held.uid == again["metadata"]["uid"]
        assert ("kept", "changed") not in seen.changes and ("kept", "deleted") not in seen.changes


async def test_own_writes_are_known_before_their_events() -> None:
    async with following() as seen:
        await seen.server.change("Adapter", "a", spec={"n": 1})
        await seen.told(("a", "created"))
        seen.server.held_back = True
        await seen.kube.merge_patch("Adapter", "shop", "a", {"spec": {"n": 2}})
        found = await seen.cache.get("Adapter", "shop", "a")
        assert found is not None and found["spec"] == {"n": 2} and ("a", "changed") in seen.changes
        told = len(seen.changes)
        await seen.server.release()
        await seen.server.change("Adapter", "b")
        await seen.told(("b", "created"))
        assert len(seen.changes) == told + 1, "the event of the own write is no change"


async def test_events_in_any_order() -> None:
    """An older event arrives late, and one of a deleted object -> neither brings the old state back."""
    async with following() as seen:
        first = await seen.server.change("Adapter", "a", spec={"n": 1})
        await seen.server.change("Adapter", "a", spec={"n": 2})
        await seen.told(("a", "changed"))
        await seen.server.send({"type": "MODIFIED", "object": first})
        await seen.server.send({"type": "DELETED", "object": first})
        await seen.server.change("Adapter", "mark")
        await seen.told(("mark", "created"))
        found = await seen.cache.get("Adapter", "shop", "a")
        assert found is not None and found["spec"] == {"n": 2}
        last = seen.server.objects["Adapter", "shop", "a"]
        await seen.server.remove("Adapter", "a")
        await seen.told(("a", "deleted"))
        await seen.server.send({"type": "MODIFIED", "object": last})
        await seen.server.change("Adapter", "mark", spec={})
        await seen.told(("mark", "changed"))
        assert await seen.cache.get("Adapter", "shop", "a") is None


async def test_an_object_that_was_created_again_is_held_again() -> None:
    async with following() as seen:
        await seen.server.change("Adapter", "a")
        await seen.server.remove("Adapter", "a")
        again = await seen.server.change("Adapter", "a")
        await seen.until(lambda: version(seen, "a") == int(again["metadata"]["resourceVersion"]))


async def test_bookmarks_move_the_point_at_which_a_watch_continues() -> None:
    async with following() as seen:
        seen.server.version = 500
        bookmark = {"kind": "Adapter", "apiVersion": "graft.dev/v1alpha1", "metadata": {"resourceVersion": "500"}}
        await seen.server.send({"type": "BOOKMARK", "object": bookmark})
        await seen.server.change("Adapter", "a")
        await seen.told(("a", "created"))
        seen.server.compacted = 450
        await seen.server.break_watches()
        await seen.server.change("Adapter", "b")
        await seen.told(("b", "created"))
        assert [int(query["resourceVersion"]) for _, _, query in seen.server.requests if "watch" in query][1] >= 500


async def test_a_silent_watch_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENCE", 0.2)
    async with following() as seen:
        seen.server.held_back = True
        await seen.server.change("Adapter", "a")
        watches = seen.server.count("GET", "adapters")
        await seen.until(lambda: seen.server.count("GET", "adapters") > watches)
        seen.server.held_back = False
        await seen.told(("a", "created"))


async def test_a_store_that_was_restored_from_a_backup() -> None:
    """The API server's versions become smaller -> its older objects replace those that are held."""
    async with following() as seen:
        await seen.server.change("Adapter", "a", spec={"n": 1})
        await seen.server.change("Adapter", "later")
        await seen.told(("a", "created"), ("later", "created"))
        seen.server.version = 40
        seen.server.objects.clear()
        seen.server.events.clear()
        await seen.server.change("Adapter", "a", spec={"n": 0})
        seen.server.events.clear()
        await seen.server.send({"type": "ERROR", "object": {"kind": "Status", "code": 410}})
        await seen.told(("a", "changed"), ("later", "deleted"))
        assert version(seen, "a") == 41


def child(owner: str, **more: Any) -> Object:
    return {"metadata": {"labels": {OWNER_UID: owner}, "annotations": {"big": "x" * 10_000}}, **more}


async def test_of_labelled_objects_only_what_is_read_is_held() -> None:
    """A ConfigMap is read twice -> one request. It changes -> the next read asks once more."""
    async with following(LABELLED) as seen:
        await seen.server.change("ConfigMap", "c", **child("u"), data={"k": "1"})
        await seen.told(("c", "created"))
        held = seen.cache.objects("ConfigMap").get("shop", "c")
        assert held is not None and len(held.data) < 400
        reads = seen.server.count("GET", "configmaps/c")
        for _ in range(2):
            found = await seen.cache.get("ConfigMap", "shop", "c")
            assert found is not None and found["data"] == {"k": "1"}
        assert seen.server.count("GET", "configmaps/c") == reads + 1
        await seen.server.change("ConfigMap", "c", **child("u"), data={"k": "2"})
        await seen.told(("c", "changed"))
        (found,) = await seen.cache.list("ConfigMap", "shop", {OWNER_UID: "u"})
        assert found["data"] == {"k": "2"} and seen.server.count("GET", "configmaps/c") == reads + 2


async def test_an_object_without_the_label_is_not_overlooked() -> None:
    """Somebody's object has the name of a child -> it exists, although it is not followed."""
    async with following(LABELLED) as seen:
        seen.server.held_back = True
        await seen.server.change("ConfigMap", "c", data={"k": "1"})
        assert (await seen.cache.get("ConfigMap", "shop", "c") or {}).get("data") == {"k": "1"}
        assert await seen.cache.get("ConfigMap", "shop", "other") is None


async def test_pods_are_listed_as_metadata_and_followed_as_a_whole() -> None:
    async def before(server: ApiServer) -> None:
        await server.change("Pod", "old", **child("u"), status={"phase": "Running"})

    async with following(RUNS, before=before) as seen:
        await seen.server.change("Pod", "new", **child("u"), status={"phase": "Pending"})
        await seen.told(("new", "created"))
        phases = {item["status"]["phase"] for item in await seen.cache.list("Pod", "shop", {OWNER_UID: "u"})}
        assert phases == {"Running", "Pending"}
        assert seen.server.count("GET", "pods/old") == 1 and seen.server.count("GET", "pods/new") == 0


async def test_a_fresh_list_corrects_what_is_held() -> None:
    """An object was deleted, and the event has not arrived -> after the list nobody reads it from the cache."""
    async with following(RUNS) as seen:
        await seen.server.change("Pod", "p", **child("u"))
        await seen.told(("p", "created"))
        seen.server.held_back = True
        await seen.server.remove("Pod", "p")
        assert len(await seen.cache.list("Pod", "shop", {OWNER_UID: "u"}, metadata_only=True)) == 1
        assert await seen.cache.fresh("Pod", "shop", {OWNER_UID: "u"}, metadata_only=True) == []
        assert await seen.cache.list("Pod", "shop", {OWNER_UID: "u"}) == []


async def test_a_resource_without_its_last_finalizer_is_gone() -> None:
    async with following() as seen:
        marked = {"finalizers": ["f"], "deletionTimestamp": "2026-01-01T00:00:00Z"}
        await seen.server.change("Adapter", "a", metadata=marked)
        await seen.told(("a", "created"))
        seen.server.held_back = True
        await seen.kube.merge_patch("Adapter", "shop", "a", {"metadata": {"finalizers": []}})
        assert await seen.cache.get("Adapter", "shop", "a") is None and ("a", "deleted") in seen.changes


async def test_without_sources_everything_is_read_from_the_api_server() -> None:
    async with api_server() as (server, kube):
        await server.change("Adapter", "a")
        cache = Cache(kube)
        assert await cache.get("Adapter", "shop", "a") is not None and len(await cache.list("Adapter", "shop")) == 1
        assert len(await cache.fresh("Adapter", "shop")) == 1


async def test_all_labels_are_held_only_of_kinds_that_ask_for_it() -> None:
    async def labelled(server: ApiServer) -> None:
        for kind in ("Namespace", "Service"):
            await server.change(kind, "a", metadata={"labels": {"team": "a", OWNER_UID: "u"}})

    plain = Source("Service", listed=False, watched=False)
    async with following(
        Source("Namespace", listed=False, watched=False, every_label=True), plain, before=labelled
    ) as seen:
        held = {
            kind: (await seen.cache.list(kind, metadata_only=True))[0]["metadata"]["labels"]
            for kind in ("Namespace", "Service")
        }
        assert held == {"Namespace": {"team": "a", OWNER_UID: "u"}, "Service": {OWNER_UID: "u"}}


@pytest.mark.parametrize("optional", [True, False])
async def test_a_kind_that_the_cluster_lacks_holds_up_the_start_only_if_it_must_be_there(optional: bool) -> None:
    class Without(Kube):
        async def pages(self, kind: str, *arguments: Any, **named: Any) -> AsyncIterator[Any]:
            if kind == "Tenant":
                raise KubeError(404, "NotFound", "the server could not find the requested resource")
            async for page in super().pages(kind, *arguments, **named):
                yield page

    async with api_server() as (_, kube):
        kube.__class__ = Without
        cache = Cache(kube, [Source("Adapter"), Source("Tenant", optional=optional)])
        tasks = cache.start()
        try:
            async with asyncio.timeout(5):
                await cache.informers["Adapter"].synced.wait()
                if optional:
                    await cache.synced()
                    assert await cache.list("Tenant") == [] and await cache.get("Tenant", None, "a") is None
            assert cache.missing() == ([] if optional else ["Tenant"])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

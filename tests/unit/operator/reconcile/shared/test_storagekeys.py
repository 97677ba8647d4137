"""A namespace asks for its storage key with a label, before its first job. While it works, its key comes back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from graft.artifacts.storage import StorageConfig
from graft.kube import KubeError, Page
from graft.reconcile.shared import storagekeys
from graft.reconcile.shared.access import Trouble
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.storagekeys import Followed, Requests
from worlds.reconciling import SETTINGS


def event(name: str, kind: str = "ADDED", **labels: str) -> dict[str, Any]:
    return {"type": kind, "object": {"metadata": {"name": name, "labels": labels}}}


ASKING = {storagekeys.LABEL: storagekeys.ISSUE}


class Store:
    """An API server and an identity service. Only the namespaces in `bound` allow the operator to write."""

    def __init__(self) -> None:
        self.bound: set[str] = set()
        self.issued: list[str] = []
        self.refused = asyncio.Event()

    async def get(self, kind: str, namespace: str, name: str) -> None:
        if namespace not in self.bound:
            self.refused.set()
            raise KubeError(
                403, "Forbidden", f'secrets is forbidden: User "graft" cannot get resource "secrets" in "{namespace}"'
            )

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self.issued.append(manifest["metadata"]["namespace"])
        return {"metadata": {"resourceVersion": "1"}}

    def has_key(self, tenant: str) -> bool:
        return False

    def user(self, tenant: str) -> str:
        return f"graft-id-{tenant}"

    def accept(self, tenant: str, secret: str) -> None:
        pass

    def draw(self, tenant: str) -> StorageConfig:
        return self.key(tenant, "k", "s")

    def key(self, tenant: str, user: str, secret: str) -> StorageConfig:
        return StorageConfig("http://s3", "r", "graft", f"{tenant}/", user, secret)


@contextlib.asynccontextmanager
async def issuing(requests: Requests, store: Store) -> AsyncIterator[None]:
    task = asyncio.create_task(requests.issue(Context(store, SETTINGS, None, store)))  # type: ignore[arg-type]
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def until(predicate: Any) -> None:
    async with asyncio.timeout(10):
        while not predicate():  # noqa: ASYNC110 - the predicates have no event
            await asyncio.sleep(0.01)


async def test_a_namespace_that_asks_has_a_key_before_its_first_job() -> None:
    requests, store = Requests(), Store()
    store.bound = {"shop", "other"}
    requests.note(event("other"))
    requests.note(event("else", **{storagekeys.LABEL: "no"}))
    requests.note(event("shop", **ASKING))
    async with issuing(requests, store):
        await until(lambda: store.issued)
    assert store.issued == ["shop"]


async def test_the_key_follows_when_the_namespace_is_bound_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storagekeys, "RETRY", 0.02)
    requests, store = Requests(), Store()
    requests.note(event("shop", **ASKING))
    async with issuing(requests, store):
        await store.refused.wait()
        await until(lambda: caplog.records)
        assert "kubectl create rolebinding graft -n shop" in caplog.text
        store.bound = {"shop"}
        await until(lambda: store.issued)
    assert store.issued == ["shop"] and len(caplog.records) == 1


async def test_a_namespace_that_is_deleted_or_asks_no_more_is_forgotten() -> None:
    requests, store = Requests(), Store()
    store.bound = {"gone", "changed", "shop"}
    for name in ("gone", "changed", "shop"):
        requests.note(event(name, **ASKING))
    requests.note(event("gone", "DELETED", **ASKING))
    requests.note(event("changed", "MODIFIED"))
    async with issuing(requests, store):
        await until(lambda: store.issued)
    assert store.issued == ["shop"]


class Watched:
    """An API server with one Secret: a test lists a version of it, and sends events."""

    def __init__(self, version: str = "") -> None:
        self.version = version  # of the Secret in lists; "": it does not exist
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.asked: list[tuple[str, Any, bool]] = []

    async def pages(self, kind: str, *, only: Any, metadata_only: bool, labels: Any) -> AsyncIterator[Page]:
        self.asked.append((kind, only, metadata_only))
        yield Page([self._secret(self.version)] if self.version else [], self.version or "1", 1)

    async def events(self, kind: str, version: str, **how: Any) -> AsyncIterator[dict[str, Any]]:
        assert how["metadata_only"]
        while True:
            yield await self.sent.get()

    def send(self, kind: str, version: str) -> None:
        self.sent.put_nowait({"type": kind, "object": self._secret(version)})

    def _secret(self, version: str) -> dict[str, Any]:
        return {"metadata": {"name": "graft-storage", "namespace": "shop", "resourceVersion": version}}

    async def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def following(
    kube: Watched, monkeypatch: pytest.MonkeyPatch, answers: list[Any], at_work: list[str]
) -> AsyncIterator[tuple[Followed, list[str]]]:
    """Follow namespace shop. `answers`: of the checks of its key, one after the other; None: it is right now."""
    ctx = Context(None, SETTINGS, None, None)  # type: ignore[arg-type]
    ctx.issued["shop"] = "5"
    checked: list[str] = []

    async def ensure(ctx: Context, namespace: str, *, changed: bool) -> Trouble | None:
        assert changed
        checked.append(namespace)
        answer = answers.pop(0) if answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    monkeypatch.setattr(storagekeys, "ensure_credentials", ensure)
    monkeypatch.setattr(storagekeys, "AGAIN", 0.01)
    found = Followed(ctx, kube, lambda namespace: namespace in at_work)  # type: ignore[arg-type]
    for _ in range(2):
        found.follow("shop")
    yield found, checked
    await found.stop()


async def test_a_secret_that_is_deleted_or_changed_is_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    kube = Watched("5")
    async with following(kube, monkeypatch, [], ["shop"]) as (_, checked):
        kube.send("MODIFIED", "5")  # the operator has written it itself
        kube.send("DELETED", "6")
        await until(lambda: checked)
        kube.send("MODIFIED", "7")
        await until(lambda: len(checked) == 2)
    assert checked == ["shop", "shop"] and kube.asked == [("Secret", ("shop", "graft-storage"), True)]


async def test_a_repair_that_fails_is_repeated_and_the_secret_of_a_user_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = Trouble("CredentialsMissing", "Missing entries: bucket")
    failures = [KubeError(409, "Conflict", "changed"), Trouble("StorageUnavailable", "no answer"), missing]
    kube = Watched()
    async with following(kube, monkeypatch, failures, ["shop"]) as (_, checked):
        await until(lambda: not failures)
        kube.send("MODIFIED", "7")
        await until(lambda: len(checked) == 4)
    assert len(checked) == 4


async def test_a_namespace_that_works_no_more_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    kube, at_work = Watched("5"), ["shop"]
    async with following(kube, monkeypatch, [], at_work) as (followed, checked):
        await until(lambda: kube.asked)
        at_work.clear()
        kube.send("DELETED", "6")
        await until(lambda: not followed.namespaces)
    assert checked == []


async def test_no_more_namespaces_are_followed_than_there_are_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storagekeys, "MOST_FOLLOWED", 1)
    async with following(Watched("5"), monkeypatch, [], ["shop", "other"]) as (followed, _):
        followed.follow("other")
        assert followed.namespaces == {"shop"}

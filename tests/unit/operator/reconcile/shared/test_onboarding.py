"""A namespace asks for its storage key with a label, before its first job."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from graft.kube import KubeError
from graft.reconcile.shared import onboarding
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.onboarding import Requests
from worlds.reconciling import SETTINGS


def event(name: str, kind: str = "ADDED", **labels: str) -> dict[str, Any]:
    return {"type": kind, "object": {"metadata": {"name": name, "labels": labels}}}


ASKING = {onboarding.LABEL: onboarding.ISSUE}


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

    async def create(self, manifest: dict[str, Any]) -> None:
        self.issued.append(manifest["metadata"]["namespace"])

    def has_key(self, tenant: str) -> bool:
        return False

    def user(self, tenant: str) -> str:
        return f"graft-id-{tenant}"

    def accept(self, tenant: str, secret: str) -> None:
        pass

    def draw(self, tenant: str) -> Any:
        from graft.artifacts.storage import StorageConfig

        return StorageConfig("http://s3", "r", "graft", f"{tenant}/", "k", "s")


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
    requests.note(event("else", **{onboarding.LABEL: "no"}))
    requests.note(event("shop", **ASKING))
    async with issuing(requests, store):
        await until(lambda: store.issued)
    assert store.issued == ["shop"]


async def test_the_key_follows_when_the_namespace_is_bound_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onboarding, "RETRY", 0.02)
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

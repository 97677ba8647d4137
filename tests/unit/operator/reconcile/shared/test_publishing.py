"""The operator publishes what a job has staged, and is killed meanwhile."""

import asyncio

import pytest
from graft.api import FineTuneJob
from graft.artifacts.publishing import CLAIM
from graft.artifacts.storage import StoreError
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.publishing import Copying, published
from worlds.reconciling import MemoryKube, MemoryStore, context, publish

PREFIX = "shop/adapters/support/1.0.0/"
RUN = "shop/runs/u/"
STAGED = f"{RUN}a/version/"
JOB = FineTuneJob.model_validate({
    "metadata": {"name": "j", "namespace": "shop", "uid": "u", "generation": 1},
    "spec": {"baseModel": "tiny", "dataset": {"train": {"uri": "s3://graft/shop/train.jsonl"}},
             "method": {"lora": {}}, "output": {"adapter": "support"}},
})  # fmt: skip


def staged() -> MemoryStore:
    """Return a store in which a pod has staged its version."""
    store = MemoryStore()
    publish(store, STAGED)
    store.objects_[RUN + CLAIM] = store.objects_.pop(STAGED + "manifest.json")
    return store


async def once(ctx: Context) -> object:
    """Look once. Return what was found, after the copy that it began has ended."""
    found = await published(ctx, JOB, "support", "1.0.0")
    while (running := ctx.transfers.find("u")) is not None and not running.done:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return found


async def test_a_version_is_taken_when_the_staged_files_are_deleted() -> None:
    store = staged()
    ctx = context(MemoryKube(), store)
    assert await once(ctx) == "copying"
    asked = len(store.requests)
    found = await once(ctx)
    assert not isinstance(found, str | None)
    assert store.requests[asked:] == [], "the copy says what it published"
    assert not [key for key in store.objects_ if key.startswith(STAGED)]


@pytest.mark.parametrize("deleted", [0, 1, 2])
async def test_an_operator_that_was_killed_while_it_deleted_staged_files_deletes_them(deleted: int) -> None:
    store = staged()
    await once(context(MemoryKube(), store))
    files = sorted(key for key in staged().objects_ if key.startswith(STAGED))
    store.objects_ |= {key: staged().objects_[key] for key in files[deleted:]}
    before = {key: data for key, data in store.objects_.items() if key.startswith(PREFIX)}
    ctx = context(MemoryKube(), store)
    assert await once(ctx) == "copying"
    assert not isinstance(await once(ctx), str | None)
    assert not [key for key in store.objects_ if key.startswith(STAGED)]
    assert {key: data for key, data in store.objects_.items() if key.startswith(PREFIX)} == before


async def test_a_deletion_that_fails_is_repeated() -> None:
    store, failing = staged(), [True]
    delete = store.delete

    def refuse(key: str) -> None:
        if failing:
            raise StoreError("unavailable", "503")
        delete(key)

    store.delete = refuse  # type: ignore[method-assign]
    ctx = context(MemoryKube(), store)
    copying: Copying = "copying"
    assert await once(ctx) == copying
    with pytest.raises(StoreError, match="503"):
        await once(ctx)
    failing.clear()
    assert await once(ctx) == copying
    assert not isinstance(await once(ctx), str | None)
    assert not [key for key in store.objects_ if key.startswith(STAGED)]

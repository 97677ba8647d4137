"""progress.json is read when its pod has changed or a poll is due, not at each event of the job."""

import time
from typing import Any

import pytest
from graft.api import FineTuneJob
from graft.artifacts import layout
from graft.artifacts.storage import StoreError
from graft.contracts.progress import Progress
from graft.reconcile.finetunejob import reports
from graft.reconcile.shared.context import Context
from worlds.reconciling import MemoryKube, MemoryStore, context

JOB = FineTuneJob.model_validate({
    "metadata": {"name": "tune", "namespace": "shop", "uid": "u"},
    "spec": {
        "baseModel": "tiny", "dataset": {"train": {"uri": "s3://graft/shop/train.jsonl"}},
        "method": {"lora": {}}, "output": {"adapter": "support"},
    },
})  # fmt: skip


KEY = layout.attempt_prefix("shop", "u", "tune-abc") + layout.PROGRESS


def pod(version: int, phase: str = "Running", **state: Any) -> dict[str, Any]:
    states = [{"name": "prepare", "state": state or {"running": {}}}]
    status = {"phase": phase, "initContainerStatuses": states}
    return {"metadata": {"name": "tune-abc", "resourceVersion": str(version)}, "status": status}


def report(step: int) -> bytes:
    found = Progress(attempt="tune-abc", stage="Training", updated_at="2026-01-01T00:00:00Z", step=step)
    return found.json_text().encode()


@pytest.fixture
def store() -> MemoryStore:
    found = MemoryStore()
    found.objects_[KEY] = report(1)
    return found


async def step(ctx: Context, raw: dict[str, Any], *, must: bool = False) -> int | None:
    found = await reports.read(ctx, JOB, raw, must=must)
    return None if found is None else found.step


async def test_an_event_of_another_object_reads_nothing_again(store: MemoryStore) -> None:
    ctx = context(MemoryKube(), store)
    assert [await step(ctx, pod(1)) for _ in range(5)] == [1] * 5
    assert len(store.requests) == 1
    store.objects_[KEY] = report(2)
    assert await step(ctx, pod(2)) == 2  # the pod has changed
    store.objects_[KEY] = report(3)
    ctx.reports["u"] = ctx.reports["u"]._replace(at=time.monotonic() - reports.FRESH)
    assert await step(ctx, pod(2)) == 3  # a poll is due
    assert len(store.requests) == 3


async def test_the_last_report_of_a_pod_that_has_ended_is_read_once(store: MemoryStore) -> None:
    ctx = context(MemoryKube(), store)
    assert await step(ctx, pod(1)) == 1
    store.objects_[KEY] = report(9)
    assert await step(ctx, pod(2, "Succeeded")) == 9
    ctx.reports["u"] = ctx.reports["u"]._replace(at=time.monotonic() - 3600)
    assert await step(ctx, pod(2, "Succeeded")) == 9
    assert len(store.requests) == 2
    reports.forget(ctx, JOB)
    assert not ctx.reports


async def test_a_pod_that_has_not_started_has_reported_nothing(store: MemoryStore) -> None:
    ctx = context(MemoryKube(), store)
    assert await step(ctx, pod(1, "Pending", waiting={"reason": "PodInitializing"})) is None
    assert not store.requests
    assert await step(ctx, pod(2, "Pending", running={})) == 1  # its init container reports, too


async def test_no_answer_of_the_store_is_not_remembered(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(MemoryKube(), store)
    with monkeypatch.context() as broken:

        def fail(*_: Any, **__: Any) -> bytes:
            raise StoreError("unavailable", "no answer")

        broken.setattr(store, "get", fail)
        assert await step(ctx, pod(1)) is None
        with pytest.raises(StoreError):
            await step(ctx, pod(1), must=True)
    assert await step(ctx, pod(1)) == 1


async def test_the_memory_of_reports_is_bounded(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MOST", 3)
    ctx = context(MemoryKube(), store)
    for number in range(10):
        uid = {"metadata": JOB.metadata.model_copy(update={"uid": f"u{number}"})}
        await reports.read(ctx, JOB.model_copy(update=uid), pod(1), must=False)
    assert list(ctx.reports) == ["u7", "u8", "u9"]

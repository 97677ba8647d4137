"""What a reconcile writes to the API server, and what a crash between two writes leaves."""

import copy
from typing import Any

import pytest
from graft.api import FineTuneJob
from graft.api.finetunejob import FineTuneJobStatus
from graft.api.meta import Condition
from graft.kube import KubeError
from graft.manifests.metadata import FINALIZER
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.news import QUIET, News, transitions
from graft.status import condition
from worlds.reconciling import Killed, MemoryStore, MortalKube, Object, context

KIND = "FineTuneJob"


def job(**metadata: Any) -> Object:
    return {
        "apiVersion": "graft.dev/v1alpha1", "kind": KIND,
        "metadata": {"name": "j", "namespace": "shop", "uid": "u", "generation": 1, "resourceVersion": "7"} | metadata,
        "spec": {"baseModel": "tiny", "dataset": {"train": {"uri": "s3://bucket/data"}}, "method": {"lora": {"rank": 4}},
                 "output": {"adapter": "support"}},
    }  # fmt: skip


async def write(ctx: Context, raw: Object, status: Any, reason: str, message: str = "m", **options: Any) -> Any:
    found = FineTuneJobStatus.model_validate(raw.get("status") or {}).model_copy(update={"stage": reason})
    return await ctx.write_status(raw, found, [condition(KIND, "Succeeded", status, reason, message)], **options)


def world(*objects: Object) -> tuple[Context, MortalKube]:
    kube = MortalKube(*objects)
    return context(kube, MemoryStore()), kube


async def test_the_finalizer_and_the_labels_are_one_write() -> None:
    raw = job(labels={"mine": "kept"}, finalizers=["other/one"])
    ctx, kube = world(raw)
    found = await ctx.claim(raw, {"graft.dev/method": "lora"})
    assert found is not None and kube.writes == ["patch"]
    assert found["metadata"]["labels"] == {"mine": "kept", "graft.dev/method": "lora"}
    assert found["metadata"]["finalizers"] == ["other/one", FINALIZER]
    assert await ctx.claim(found, {"graft.dev/method": "lora"}) is found and kube.writes == ["patch"]


async def test_a_resource_that_is_deleted_is_not_claimed() -> None:
    raw = job(deletionTimestamp="2026-01-01T00:00:00Z")
    ctx, kube = world(raw)
    assert await ctx.claim(raw, {"graft.dev/method": "lora"}) is raw and kube.writes == []


@pytest.mark.parametrize("killed", [0, 1])
async def test_an_event_of_an_end_survives_a_kill_and_is_not_repeated(killed: int) -> None:
    """Killed before the Event, or between the Event and the status: afterwards there are one Event and the status."""
    raw = job()
    ctx, kube = world(raw)
    kube.killed = killed
    with pytest.raises(Killed):
        await write(ctx, raw, "True", "Published")
    kube.start()
    restarted = context(kube, MemoryStore())
    await write(restarted, raw, "True", "Published")
    assert list(kube.named.values()) == ["Published"]
    assert raw["status"]["stage"] == "Published"
    count = len(kube.writes)
    await write(restarted, raw, "True", "Published")
    assert len(kube.writes) == count


async def test_an_event_of_progress_is_written_in_the_background() -> None:
    raw = job()
    ctx, kube = world(raw)
    await write(ctx, raw, "Unknown", "Training")
    assert kube.writes == ["status"]
    await ctx.news.stop()
    assert kube.writes == ["status", "event"]


@pytest.mark.parametrize(("status", "reason"), [("Unknown", "Pending"), ("Unknown", "Preparing")])
async def test_what_every_job_goes_through_is_no_event(status: Any, reason: str) -> None:
    raw = job()
    ctx, kube = world(raw)
    await write(ctx, raw, status, reason)
    await ctx.news.stop()
    assert kube.writes == ["status"]


async def test_a_status_that_could_not_be_written_is_no_repetition() -> None:
    raw = job()
    ctx, kube = world(raw)

    async def refused(*_: Any, **__: Any) -> None:
        raise KubeError(500, "InternalError", "no")

    apply, kube.apply_status = kube.apply_status, refused  # type: ignore[method-assign]
    for _ in range(3):
        with pytest.raises(KubeError):
            await write(ctx, raw, "False", "OutOfMemory")
    kube.apply_status = apply  # type: ignore[method-assign]
    await write(ctx, raw, "False", "OutOfMemory")
    assert list(kube.named.values()) == ["OutOfMemory"] and kube.writes.count("count") == 0


async def test_a_status_computed_from_an_older_one_replaces_nothing() -> None:
    """Another operator has written meanwhile. What it knows, for example the length of the data, would be lost."""
    raw = job()
    ctx, _ = world(raw)
    stale = copy.deepcopy(raw)
    await write(ctx, raw, "Unknown", "Training")
    raw["metadata"]["resourceVersion"] = "8"
    with pytest.raises(KubeError) as refused:
        await write(ctx, stale, "Unknown", "Pending")
    assert refused.value.status == 409 and raw["status"]["stage"] == "Training"


async def test_a_transition_that_repeats_is_counted_in_one_event() -> None:
    time = 1000.0
    kube = MortalKube()
    news = News(kube, lambda: time)  # type: ignore[arg-type]

    async def flap(version: int) -> None:
        new = [
            Condition(type="Ready", status="False", reason="StorageUnavailable", message="m", last_transition_time="t")
        ]
        raw = job(resourceVersion=str(version))
        await news.report(transitions(raw, [], new, "2026-11-30T00:00:00Z"))

    for version in range(1, 101):
        await flap(version)
    assert list(kube.named.values()) == [64] and len(kube.writes) == 7  # created, then counted at 2, 4, 8 .. 64
    time += QUIET + 1
    await flap(101)
    assert list(kube.named.values()) == [64, "StorageUnavailable"]


async def test_too_many_waiting_events_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    kube = MortalKube()
    news = News(kube)  # type: ignore[arg-type]
    new = [Condition(type="Succeeded", status="Unknown", reason="Training", message="m", last_transition_time="t")]
    for number in range(1_100):
        news.later(transitions(job(uid=str(number)), [], new, "2026-11-30T00:00:00Z"))
    await news.stop()
    assert len(kube.named) == 1_000 and "one is dropped" in caplog.text


async def test_progress_is_gathered_and_a_transition_is_not() -> None:
    raw = job()
    ctx, kube = world(raw)
    await write(ctx, raw, "Unknown", "Training", "10 %", hurry=False)
    left = await write(ctx, raw, "Unknown", "Training", "11 %", hurry=False)
    assert 0 < left <= 3 and kube.writes.count("status") == 1
    assert await write(ctx, raw, "Unknown", "Publishing", "12 %", hurry=False) is None
    assert kube.writes.count("status") == 2
    raw["metadata"]["generation"] = 2  # observedGeneration must follow a changed spec at once
    assert await write(ctx, raw, "Unknown", "Publishing", "13 %", hurry=False) is None
    assert kube.writes.count("status") == 3
    ctx.written.clear()
    assert await write(ctx, raw, "Unknown", "Publishing", "14 %", hurry=False) is None
    assert kube.writes.count("status") == 4
    FineTuneJob.model_validate(raw)


def test_a_normal_start_of_a_deployment_gives_no_warning() -> None:
    """Everything is applied at once, so the base model is not checked yet. Its own Events say what is wrong with it."""

    def events(old: list[Condition], new: list[Condition]) -> list[tuple[str, str, bool]]:
        found = transitions(job(), old, new, "2026-11-30T00:00:00Z")
        return [(item.condition.type, item.condition.reason, item.warning) for item in found]

    kind = "AdapterDeployment"
    waits = [
        condition(kind, "Accepted", "False", "BaseModelNotReady", "m"),
        condition(kind, "Available", "False", "NotAccepted", "m"),
    ]
    calm = condition(kind, "Degraded", "False", "AsExpected", "m")
    wrong = condition(kind, "Degraded", "True", "NoRoom", "m")
    assert events([], waits) == [("Accepted", "BaseModelNotReady", False)]
    assert events(waits, [*waits, calm]) == []
    assert events([calm], [wrong]) == [("Degraded", "NoRoom", True)]
    assert events([wrong], [calm]) == [("Degraded", "AsExpected", False)]

"""A training that is complete is published, whatever the store answers meanwhile."""

import time
from typing import Any, get_args

import pytest
from botocore.exceptions import ClientError
from graft.api import FineTuneJob
from graft.artifacts import layout
from graft.artifacts.storage import StoreError, Trouble, trouble_of
from graft.kube import KubeError
from graft.reconcile.finetunejob import restart
from graft.reconcile.finetunejob.jobstatus import World, observe
from graft.reconcile.finetunejob.published import read_published, register
from graft.reconcile.shared.context import SOON, Context
from graft.reconcile.shared.folders import FRESH
from graft.status import find
from worlds.reconciling import MemoryKube, MemoryStore, context, publish

COMPLETE = {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
STATUS = {
    "observedGeneration": 1, "stage": "Failed", "resolved": {"version": "1.0.0"},
    "conditions": [{"type": "Succeeded", "status": "False", "reason": "UploadFailed", "message": "m",
                    "observedGeneration": 1, "lastTransitionTime": "2026-01-01T00:00:00Z"}],
}  # fmt: skip


def job(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "graft.dev/v1alpha1", "kind": "FineTuneJob",
        "metadata": {"name": "j", "namespace": "shop", "uid": "u", "generation": 1, "resourceVersion": "7"},
        "spec": {
            "baseModel": "tiny", "dataset": {"train": {"uri": "s3://graft/shop/train.jsonl"}},
            "method": {"lora": {}}, "output": {"adapter": "support"},
        } | spec,
    }  # fmt: skip


class RefusingStore(MemoryStore):
    """A store that answers every read with an error."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__()
        self.trouble: Trouble | None = trouble

    def _find(self, what: str, key: str, bucket: str | None) -> bytes:
        if self.trouble is not None:
            self.requests.append((what, key))
            raise StoreError(self.trouble, f"the store says {self.trouble}")
        return super()._find(what, key, bucket)

    def objects(self, prefix: str) -> list[Any]:
        return []


async def succeeded(ctx: Context, raw: dict[str, Any]) -> Any:
    world = World(
        FineTuneJob.model_validate(raw), children=[dict(COMPLETE, metadata={"name": "j", "labels": {}}, spec={})]
    )
    await read_published(ctx, world, "1.0.0")
    status, observed = observe(world)
    raw["status"] = status.model_dump(mode="json", by_alias=True, exclude_none=True) | {
        "conditions": [item.wire() for item in observed]
    }
    return find(observed, "Succeeded")


@pytest.mark.parametrize("trouble", sorted(set(get_args(Trouble)) - {"missing", "large"}))
async def test_no_error_of_the_store_ends_a_job_that_is_trained(trouble: Trouble) -> None:
    """`missing` says that nothing is staged, and `large` that the files are not those of a job."""
    raw, store, now = job(), RefusingStore(trouble), time.monotonic()
    ctx = context(MemoryKube(raw), store)
    ctx.backoff._clock = lambda: now
    first = await succeeded(ctx, raw)
    assert (first.status, first.reason) == ("Unknown", "Publishing")
    assert trouble in first.message and "the operator retries" in first.message and "free space" in first.message
    asked = len(store.requests)
    again = await succeeded(ctx, raw)  # by an event: the store is not asked, and the message stays
    assert again.message == first.message and len(store.requests) == asked
    pauses = []
    for _ in range(6):
        pauses.append(ctx.backoff.left("u", 1))
        now += pauses[-1]
        await succeeded(ctx, raw)
    assert pauses == sorted(pauses) and pauses[0] < pauses[-1] <= 60
    store.trouble = None
    now += 60
    assert (await succeeded(ctx, raw)).reason == "ResultMissing"  # the store answers now, and nothing is there
    assert ctx.backoff.left("u", 1) == 0


async def test_a_restart_forgets_no_version_while_the_store_refuses_to_say_whether_it_is_published() -> None:
    raw = job(restarts=1) | {"status": STATUS}
    kube = MemoryKube(raw)
    ctx = context(kube, RefusingStore("denied"))
    assert await restart.restart(ctx, raw, FineTuneJob.model_validate(raw)) == SOON
    assert raw["status"] == STATUS


@pytest.mark.parametrize(
    ("status", "code", "trouble"),
    [
        (403, "ExpiredToken", "unavailable"), (400, "ExpiredToken", "unavailable"), (400, "TokenRefreshRequired", "unavailable"),
        (403, "RequestTimeTooSkewed", "unavailable"), (403, "AccessDenied", "denied"), (403, "InvalidAccessKeyId", "denied"),
        (401, "", "denied"),
    ],
)  # fmt: skip
def test_a_key_that_expired_may_be_renewed(status: int, code: str, trouble: Trouble) -> None:
    answer = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert trouble_of(ClientError(answer, "PutObject")) == trouble  # type: ignore[arg-type]


async def test_a_job_that_waited_says_again_what_it_will_publish() -> None:
    """It was accepted, then waited, for example for a quota. The condition Accepted was False meanwhile."""
    raw = job()
    waited = STATUS["conditions"][0] | {"type": "Accepted", "reason": "CreationFailed"}  # type: ignore[index]
    resolved = {"version": "1.0.0", "baseModelUri": "s3://graft/models/tiny"}
    raw["status"] = {"conditions": [waited], "resolved": resolved}
    _, observed = observe(World(FineTuneJob.model_validate(raw)))
    accepted = find(observed, "Accepted")
    assert accepted is not None
    assert accepted.message == "the job will publish support 1.0.0, tuned on s3://graft/models/tiny"


async def test_a_published_manifest_is_read_once_until_the_operator_changes_the_versions() -> None:
    raw, store = job(), MemoryStore()
    prefix = layout.adapter_prefix("shop", "support", "1.0.0")
    publish(store, prefix)
    ctx = context(MemoryKube(raw), store)

    def reads() -> int:
        return sum(key.endswith("manifest.json") for _, key in store.requests)

    for _ in range(3):  # until its Adapter is verified, events of other objects wake the job
        assert (await succeeded(ctx, raw)).reason == "Publishing"
    assert reads() == 1
    ctx.folders.forget("shop", "support")  # a version was published or deleted
    await succeeded(ctx, raw)
    assert reads() == 2
    ctx.folders._clock = lambda: time.monotonic() + 2 * FRESH
    await succeeded(ctx, raw)
    assert reads() == 3


async def test_a_version_whose_adapter_is_refused_is_kept_and_the_user_sees_why() -> None:
    """A quota of Adapters, or an admission webhook. When it allows the Adapter, the operator creates it."""
    raw, refusing = job(), ['admission webhook "w" denied the request: no more Adapters']
    store, kube, created = MemoryStore(), MemoryKube(raw), []

    async def apply(manifest: dict[str, Any]) -> None:
        if refusing:
            raise KubeError(400, "BadRequest", refusing[0])
        created.append(manifest["metadata"]["name"])

    kube.apply = apply  # type: ignore[attr-defined]
    ctx = context(kube, store)
    publish(store, "shop/adapters/support/1.0.0/")
    world = World(
        FineTuneJob.model_validate(raw), children=[COMPLETE | {"metadata": {"name": "j", "labels": {}}, "spec": {}}]
    )
    await read_published(ctx, world, "1.0.0")
    await register(ctx, world)
    waits = find(observe(world)[1], "Succeeded")
    assert waits is not None and (waits.status, waits.reason) == ("Unknown", "Publishing")
    assert refusing[0] in waits.message and "the operator retries" in waits.message
    assert 0 < ctx.backoff.left("u", 1) <= 60
    refusing.clear()
    await register(ctx, world)
    assert created == ["support-1.0.0"]

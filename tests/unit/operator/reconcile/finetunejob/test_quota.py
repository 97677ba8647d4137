"""A job waits while its Tenant has as many training jobs or GPUs as its quota allows."""

import asyncio
from typing import Any

import pytest
from graft.api import FineTuneJob
from graft.api.meta import GPU
from graft.manifests.metadata import OWNER_UID
from graft.reconcile.claims import Claim, claim_of
from graft.reconcile.finetunejob import quota
from graft.reconcile.finetunejob.facts import facts_of
from graft.reconcile.finetunejob.quota import Usage, exceeded, gpus_of
from worlds.reconciling import MemoryKube, MemoryStore, context

Object = dict[str, Any]
FREE = Usage(0, 0, 0)


def team(**quotas: int) -> Claim:
    metadata = {"name": "team", "creationTimestamp": "2026-01-01T00:00:00Z"}
    return claim_of({"metadata": metadata, "spec": {"namespaces": {"names": ["a", "b"]}, "quotas": quotas}})


@pytest.mark.parametrize(
    ("quotas", "usage", "gpus", "reason", "words"),
    [
        ({"trainingJobs": 2}, Usage(1, 0, 0), 0, None, ""),
        ({"trainingJobs": 2}, Usage(2, 0, 0), 0, "QuotaExceeded", "uses 2 of 2 training jobs"),
        ({"trainingJobs": 0}, FREE, 0, "QuotaTooSmall", "may run no training jobs"),
        ({"gpus": 8}, Usage(3, 4, 0), 4, None, ""),
        ({"gpus": 8}, Usage(3, 5, 0), 4, "QuotaExceeded", "uses 5 of 8 GPUs (spec.quotas.gpus), and the job needs 4"),
        ({"gpus": 8}, Usage(3, 8, 0), 0, None, ""),
        ({"gpus": 8}, FREE, 9, "QuotaTooSmall", "needs 9 GPUs, and Tenant team may use 8"),
        ({"gpus": 0}, FREE, 0, None, ""),
        (
            {"trainingJobs": 2, "gpus": 8},
            Usage(2, 8, 0),
            1,
            "QuotaExceeded",
            "training jobs (spec.quotas.trainingJobs), and 8 of 8 GPUs",
        ),
        ({"trainingJobs": 2}, Usage(1, 0, 3), 0, "QuotaExceeded", "has room. Older jobs that wait before this one: 3"),
        ({"trainingJobs": 2}, Usage(2, 0, 999), 0, "QuotaExceeded", "before this one: more than 10"),
    ],
)
def test_what_is_used_and_allowed_decides(quotas: Any, usage: Usage, gpus: int, reason: str | None, words: str) -> None:
    found = exceeded(team(**quotas), usage, gpus, preflight=False)
    assert (found.reason if found else None) == reason
    assert found is None or words in found.message


def test_the_preflight_check_takes_no_gpu() -> None:
    """It finds errors early. The run waits for its GPUs. A job that can never run is refused before."""
    full = Usage(1, 8, 0)
    assert exceeded(team(gpus=8), full, 2, preflight=True) is None
    assert exceeded(team(gpus=8), full, 2, preflight=False) is not None
    found = exceeded(team(gpus=8), FREE, 9, preflight=True)
    assert found is not None and found.reason == "QuotaTooSmall"


def job(name: str, namespace: str = "a", second: int = 0, status: Any = None, **spec: Any) -> Object:
    meta = {
        "name": name,
        "namespace": namespace,
        "uid": f"uid-{name}",
        "creationTimestamp": f"2026-01-01T00:00:{second:02}Z",
    }
    full = {
        "baseModel": "tiny", "dataset": {"train": {"uri": "s3://graft/a/x"}}, "method": {"lora": {}}, "output": {"adapter": "s"},
    }  # fmt: skip
    return {"kind": "FineTuneJob", "metadata": meta, "spec": full | spec} | ({"status": status} if status else {})


def child(of: str, namespace: str = "a", gpus: int = 0, pods: int = 1, over: str = "") -> Object:
    owner = {"uid": f"uid-{of}", "controller": True}
    meta = {"name": of, "namespace": namespace, "labels": {OWNER_UID: f"uid-{of}"}, "ownerReferences": [owner]}
    train = {"name": "train"} | ({"resources": {"limits": {GPU: str(gpus)}}} if gpus else {})
    spec = {"parallelism": pods, "template": {"spec": {"containers": [train]}}}
    status = {"conditions": [{"type": over, "status": "True"}]} if over else {}
    return {"kind": "Job", "metadata": meta, "spec": spec, "status": status}


def said(type_: str, status: str, reason: str) -> Object:
    at = {"message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    return {"conditions": [{"type": type_, "status": status, "reason": reason} | at]}


LINE = said("Accepted", "False", "QuotaExceeded")


async def test_what_exists_in_all_namespaces_of_the_tenant_is_counted() -> None:
    spaces = [{"kind": "Namespace", "metadata": {"name": name, "uid": name}} for name in ("a", "b", "c")]
    tenant = {
        "kind": "Tenant", "metadata": {"name": "team", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"namespaces": {"names": ["a", "b"]}, "quotas": {"trainingJobs": 1}},
    }  # fmt: skip
    kube = MemoryKube(
        *spaces, tenant,
        job("runs"), child("runs", gpus=2),
        job("wide", "b"), child("wide", "b", gpus=4, pods=2),
        job("suspended", suspend=True), child("suspended", gpus=1),
        job("between"), child("between", gpus=1, over="Complete"),
        job("done", status=said("Succeeded", "True", "Published")), child("done", gpus=8),
        job("queued", queue="q"), child("queued", gpus=16),
        job("elsewhere", "c"), child("elsewhere", "c", gpus=32),
        job("older", "b", 1, LINE), job("younger", "a", 30, LINE), job("waits-otherwise", "a", 2, said("Accepted", "False", "BaseModelMissing")),
        job("own", "a", 10, LINE), child("own", gpus=64),
    )  # fmt: skip
    ctx = context(kube, MemoryStore())
    own = FineTuneJob.model_validate(kube.objects["FineTuneJob", "a", "own"])
    assert await quota._usage(ctx, claim_of(tenant), own) == Usage(jobs=3, gpus=2 + 8 + 1, before=1)


async def test_two_jobs_do_not_take_the_same_place() -> None:
    """The second one looks only when the Job of the first one exists."""
    spaces = [{"kind": "Namespace", "metadata": {"name": "a", "uid": "a"}}]
    tenant = {
        "kind": "Tenant",
        "metadata": {"name": "team"},
        "spec": {"namespaces": {"names": ["a"]}, "quotas": {"trainingJobs": 1}},
    }
    kube = MemoryKube(*spaces, tenant, job("one"), job("two", second=1))
    ctx = context(kube, MemoryStore())
    ctx.settings = ctx.settings.model_copy(update={"tenants_enabled": True})
    one, two = (FineTuneJob.model_validate(kube.objects["FineTuneJob", "a", name]) for name in ("one", "two"))
    order: list[str] = []

    async def start(who: FineTuneJob) -> None:
        async with quota.kept(ctx, who, 0, preflight=False) as trouble:
            order.append(f"{who.metadata.name} {'waits' if trouble else 'starts'}")
            await asyncio.sleep(0)
            if trouble is None:
                await kube.create(child(who.metadata.name))

    await asyncio.gather(start(one), start(two))
    assert order == ["one starts", "two waits"]
    ctx.settings = ctx.settings.model_copy(update={"tenants_enabled": False})
    await start(two)
    assert order[-1] == "two starts"


async def test_a_job_with_a_queue_is_left_to_kueue() -> None:
    ctx = context(MemoryKube(), MemoryStore())
    ctx.settings = ctx.settings.model_copy(update={"tenants_enabled": True})
    async with quota.kept(ctx, FineTuneJob.model_validate(job("q", queue="q")), 100, preflight=False) as trouble:
        assert trouble is None


def test_the_gpus_of_all_pods_of_a_job_count() -> None:
    assert gpus_of(child("a", gpus=4, pods=3)) == 12 and gpus_of(child("a")) == 0


def test_a_job_stands_in_line_while_its_status_says_so() -> None:
    assert facts_of(job("a", status=LINE)).waits and not facts_of(job("a")).waits
    over = {"conditions": [*LINE["conditions"], *said("Succeeded", "False", "DeadlineExceeded")["conditions"]]}
    found = facts_of(job("a", status=over))
    assert found.over and not found.waits

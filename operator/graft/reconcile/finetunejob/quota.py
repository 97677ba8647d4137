"""Let a job wait while its Tenant has as many training jobs or GPUs as its quota allows. The oldest job starts first.

Counted is what exists: the Jobs in the Tenant's namespaces. There is no counter that could drift. Jobs with a queue are
left to Kueue. This module starts nothing.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import NamedTuple

from graft.api import FineTuneJob
from graft.api.meta import GPU
from graft.api.quantity import quantity
from graft.kube import Manifest
from graft.manifests.metadata import OWNER_UID
from graft.reconcile.claims import Claim, Space, claim_of, holder, space_of
from graft.reconcile.finetunejob.facts import JobFacts, facts_of
from graft.reconcile.finetunejob.jobstatus import KIND
from graft.reconcile.shared.access import Trouble, tenant_of_namespace
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.jobs import condition_of

# Seconds until a job in the line is reconciled again without an event. The end of another job wakes the next one.
IN_LINE = 60.0
COUNTED = 10  # older jobs that a message counts


class Usage(NamedTuple):
    """What the other jobs of a Tenant take."""

    jobs: int  # that have a Job which has not ended
    gpus: int  # of these
    before: int  # older jobs that wait for the quota


@asynccontextmanager
async def kept(ctx: Context, job: FineTuneJob, gpus: int, *, preflight: bool) -> AsyncIterator[Trouble | None]:
    """Yield why the job must wait, or None: then its Job must be created within the block.

    `gpus`: of all pods of the run. `preflight`: the next Job is the preflight Job, which takes none of them.
    """
    tenant = None if job.spec.queue is not None else await tenant_of_namespace(ctx, job.metadata.namespace)
    if tenant is None or not tenant.limits_jobs:
        yield None
        return
    # Two jobs must not take the same place.
    async with ctx.locks.hold("quota", tenant.tenant):
        yield exceeded(tenant, await _usage(ctx, tenant, job), gpus, preflight=preflight)


def exceeded(tenant: Claim, usage: Usage, gpus: int, *, preflight: bool) -> Trouble | None:
    """Return why a job with these GPUs must wait, or None (PURE)."""
    name, most_jobs, most_gpus = tenant.tenant, tenant.training_jobs, tenant.gpus
    if most_gpus is not None and gpus > most_gpus:
        return Trouble(
            "QuotaTooSmall",
            f"the job needs {gpus} GPUs, and Tenant {name} may use {most_gpus} (spec.quotas.gpus). Ask for fewer in "
            f"spec.resources and spec.nodes, or ask your platform team to raise the quota",
        )
    if most_jobs == 0:
        return Trouble("QuotaTooSmall", f"Tenant {name} may run no training jobs (spec.quotas.trainingJobs is 0)")
    full = []
    if most_jobs is not None and usage.jobs >= most_jobs:
        full.append(f"{usage.jobs} of {most_jobs} training jobs (spec.quotas.trainingJobs)")
    if most_gpus is not None and gpus and not preflight and usage.gpus + gpus > most_gpus:
        full.append(f"{usage.gpus} of {most_gpus} GPUs (spec.quotas.gpus), and the job needs {gpus}")
    if not full and not usage.before:
        return None
    used = f"Tenant {name} uses {', and '.join(full)}" if full else f"Tenant {name} has room"
    # The statuses of a long line must not be written again each time that it moves.
    count = f"{usage.before}" if usage.before <= COUNTED else f"more than {COUNTED}"
    line = f". Older jobs that wait before this one: {count}" if usage.before else ""
    return Trouble("QuotaExceeded", f"{used}{line}. The job starts by itself when jobs of the Tenant have ended")


async def _usage(ctx: Context, tenant: Claim, job: FineTuneJob) -> Usage:
    """Read what the other jobs in all namespaces of a Tenant take."""
    own = (job.metadata.creation_timestamp or "", job.metadata.name, job.metadata.uid)  # its turn
    jobs = gpus = before = 0
    for namespace in await _namespaces(ctx, tenant):
        found: list[JobFacts] = await ctx.cache.every(KIND, facts_of, namespace)
        for other in found:
            if other.uid == job.metadata.uid or other.over or other.kueue:
                continue
            before += other.waits and other.turn < own
            if not ctx.cache.may_have_children("Job", other.uid):  # of most jobs that wait
                continue
            labels = {OWNER_UID: other.uid}
            children = await ctx.cache.list("Job", namespace, labels, owner=other.uid)
            held = [child for child in children if not _is_over(child)]
            jobs += bool(held)
            gpus += sum(map(gpus_of, held))
    return Usage(jobs, gpus, before)


async def _namespaces(ctx: Context, tenant: Claim) -> Iterable[str]:
    """Return the namespaces that a Tenant has."""
    claims = await ctx.cache.every("Tenant", claim_of)
    spaces: list[Space] = await ctx.cache.every("Namespace", space_of)
    asked = [item for item in spaces if tenant.covers(item.name, item.labels)]
    of = ctx.settings.namespace
    return [item.name for item in asked if holder(claims, item.name, item.labels, of) == tenant]


def gpus_of(child: Manifest) -> int:
    """Return the GPUs of all pods of a Job (PURE)."""
    spec = child["spec"]
    containers = spec["template"]["spec"].get("containers") or []
    limits = ((item.get("resources") or {}).get("limits") or {} for item in containers)
    return int(spec.get("parallelism") or 1) * sum(int(quantity(found.get(GPU, 0))) for found in limits)


def _is_over(child: Manifest) -> bool:
    return any(condition_of(child, type_).get("status") == "True" for type_ in ("Complete", "Failed"))

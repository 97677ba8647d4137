"""Restart a FineTuneJob that has failed, after its spec.restarts was raised.

Its Jobs and the progress files of their attempts are deleted. Its checkpoints stay. After that, the job is like one
that has not started. It keeps its UID, so the next Job finds the checkpoints. The status is written last, so an
interrupted restart is repeated.
"""

from graft.api import FineTuneJob
from graft.api.meta import Condition
from graft.artifacts import layout
from graft.artifacts.store import S3Store
from graft.kube import Manifest
from graft.reconcile.finetunejob.jobstatus import KIND, World, unbound
from graft.reconcile.finetunejob.published import read_published
from graft.reconcile.shared import ending
from graft.reconcile.shared.access import Trouble
from graft.reconcile.shared.context import SOON, WAITING, Context
from graft.status import condition


def to_restart(job: FineTuneJob, ended: Condition) -> bool:
    """Return whether a job that has ended must restart (PURE).

    A job that missed a gate does not: it has published its version.
    """
    raised = job.spec.restarts > (job.status.restarts or 0)
    return raised and ended.status == "False" and ended.reason != "GateFailed"


async def restart(ctx: Context, raw: Manifest, job: FineTuneJob) -> float:
    """Do the next step of a restart. Return the seconds until the next reconcile."""
    left = await ending.end_jobs(ctx, job)
    if isinstance(left, Trouble):
        await ctx.write_status(raw, job.status, unbound(job, left))
        return WAITING
    if left is not None:
        return left
    prefix = layout.run_prefix(layout.tenant_of(job.metadata.namespace), job.metadata.uid)
    await ctx.stored(job.metadata.namespace, forget_attempts, prefix)
    # Failures of earlier attempts no longer count: the job may have more memory now. The version is reserved again,
    # because another job may have taken the number. A published version stays reserved: then the next attempt only
    # reports it.
    cleared = ["attempts", "checked", "completion_time", "adapter_ref", "eta_text"]
    world = World(job)
    if job.status.resolved is not None and job.status.resolved.version is not None:
        await read_published(ctx, world, job.status.resolved.version)
    if world.copying or world.delayed is not None:
        return SOON
    if world.published is None:
        cleared.append("resolved")
    status = job.status.model_copy(update={**dict.fromkeys(cleared), "stage": "Pending", "restarts": job.spec.restarts})
    kept_steps = [item.step for item in job.status.checkpoints or []]
    how = (
        f"resumes from the checkpoint of step {kept_steps[-1]}"
        if kept_steps
        else "starts from the beginning, because it has no checkpoint"
    )
    text = f"restart {job.spec.restarts}: the job {how}"
    accepted = [item for item in job.status.conditions if item.type == "Accepted"]
    await ctx.write_status(raw, status, [*accepted, condition(KIND, "Succeeded", "Unknown", "Pending", text)])
    return 0


def forget_attempts(store: S3Store, prefix: str) -> None:
    """Delete the progress files of all attempts below a run's prefix. Raises StoreError."""
    # By the names of the attempts: how many objects a tenant puts below them must not matter.
    for attempt in store.folders(prefix):
        store.delete(f"{prefix}{attempt}/{layout.PROGRESS}")

"""A FineTuneJob that has failed and is to go on: spec.restarts was raised.

Its Jobs go, and what their attempts said of themselves; its checkpoints stay. Then it is as one that has not begun, under the
same UID, so the next Job finds them. The status is written last: a restart that was cut off is done again.
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
from graft.reconcile.shared.context import WAITING, Context
from graft.status import condition


def to_restart(job: FineTuneJob, ended: Condition) -> bool:
    """Whether a job that has ended is to go on (PURE). One that missed a gate has published its version, as Rejected."""
    raised = job.spec.restarts > (job.status.restarts or 0)
    return raised and ended.status == "False" and ended.reason != "GateFailed"


async def restart(ctx: Context, raw: Manifest, job: FineTuneJob) -> float:
    """One step of it; the seconds until the next look."""
    left = await ending.end_jobs(ctx, job)
    if isinstance(left, Trouble):
        await ctx.write_status(raw, job.status, unbound(job, left))
        return WAITING
    if left is not None:
        return left
    prefix = layout.run_prefix(layout.tenant_of(job.metadata.namespace), job.metadata.uid)
    await ctx.blocking(forget_attempts, ctx.store, prefix)
    # What the attempts met no longer counts: where memory ran out, there may be more of it now. And the version is reserved
    # anew, for another job may have taken the number since, unless it is out: then the next attempt has only to say so.
    cleared = ["attempts", "checked", "completion_time", "adapter_ref", "eta_text"]
    world = World(job)
    if job.status.resolved is not None and job.status.resolved.version is not None:
        await read_published(ctx, world, job.status.resolved.version)
    if world.published is None:
        cleared.append("resolved")
    status = job.status.model_copy(update={**dict.fromkeys(cleared), "stage": "Pending", "restarts": job.spec.restarts})
    kept_steps = [item.step for item in job.status.checkpoints or []]
    where = f"the checkpoint of step {kept_steps[-1]}" if kept_steps else "the beginning: there is no checkpoint"
    text = f"restart {job.spec.restarts}: it goes on from {where}"
    accepted = [item for item in job.status.conditions if item.type == "Accepted"]
    await ctx.write_status(raw, status, [*accepted, condition(KIND, "Succeeded", "Unknown", "Pending", text)])
    return 0


def forget_attempts(store: S3Store, prefix: str) -> None:
    """Remove what attempts told of themselves, below a run's prefix. StoreError."""
    for item in list(store.objects(prefix)):
        if item.key.endswith("/" + layout.PROGRESS):
            store.delete(item.key)

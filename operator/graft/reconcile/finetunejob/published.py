"""Find out from the store what a FineTuneJob has published."""

from graft.artifacts import layout
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import InvalidArtifact
from graft.reconcile.finetunejob.jobstatus import World
from graft.reconcile.shared import backoff, publishing
from graft.reconcile.shared.context import Context
from graft.status import find

REMEDY = (
    "The result of the training is kept. If this lasts, check the store, its free space, and the operator's key for it"
)


async def read_published(ctx: Context, world: World, version: str) -> None:
    """Set world.published to the manifest that the job wrote, or world.publish_trouble to why there is none.

    If the operator still copies the files, set world.copying. If the store refuses or does not answer, set world.delayed: the
    training is complete, so no error of the store ends the job, and the operator retries.
    """
    job = world.job
    uid, generation = job.metadata.uid, job.metadata.generation
    if ctx.backoff.left(uid, generation):
        told = find(job.status.conditions, "Succeeded")
        world.delayed = told.message if told is not None else "the operator retries"
        return
    adapter = job.spec.output.adapter
    prefix = layout.adapter_prefix(layout.tenant_of(job.metadata.namespace), adapter, version)
    try:
        found = await publishing.published(ctx, job, adapter, version)
    except InvalidArtifact as error:
        world.publish_trouble = str(error)
        return
    except StoreError as error:
        ctx.backoff.failed(uid, generation, backoff.OUTAGE)
        world.delayed = f"cannot publish the files below {prefix}, the operator retries: {error}. {REMEDY}"
        return
    if found == "copying":
        world.copying = True
        return
    ctx.backoff.forget(uid)
    if found is None:
        return
    manifest, _ = found
    if manifest.job.uid != job.metadata.uid:
        world.publish_trouble = f"another job, {manifest.job.name}, has written {prefix}manifest.json. Create the job again with another spec.output.version"
    elif (manifest.adapter, manifest.version) != (adapter, version):
        world.publish_trouble = f"{prefix}manifest.json is for {manifest.adapter} {manifest.version}, but the job publishes {adapter} {version}. Create the job again with another spec.output.version"
    else:
        world.published = found

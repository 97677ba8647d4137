"""Find out from the store what a FineTuneJob has published, and create its Adapter."""

from graft.artifacts import layout
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import InvalidArtifact
from graft.kube import KubeError
from graft.manifests.adapter import adapter
from graft.reconcile.finetunejob.jobstatus import World
from graft.reconcile.shared import backoff, publishing
from graft.reconcile.shared.access import refusal_of
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
    name = job.spec.output.adapter
    prefix = layout.adapter_prefix(layout.tenant_of(job.metadata.namespace), name, version)
    try:
        found = await publishing.published(ctx, job, name, version, taken=world.adapter is not None)
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
    elif (manifest.adapter, manifest.version) != (name, version):
        world.publish_trouble = f"{prefix}manifest.json is for {manifest.adapter} {manifest.version}, but the job publishes {name} {version}. Create the job again with another spec.output.version"
    else:
        world.published = found


async def register(ctx: Context, world: World) -> None:
    """Create the Adapter of the published version.

    If a quota or an admission policy refuses it, set world.delayed: the version is kept, and the operator retries.
    """
    assert world.published is not None  # noqa: S101
    job, (manifest, digest) = world.job, world.published
    try:
        await ctx.kube.apply(adapter(job, manifest, digest, ctx.store.config.bucket))
    except KubeError as error:
        refused = refusal_of(ctx, job.metadata.namespace, "the Adapter of the published version", error)
        if refused is None:
            raise
        ctx.backoff.failed(job.metadata.uid, job.metadata.generation, backoff.OUTAGE)
        world.delayed = refused.message

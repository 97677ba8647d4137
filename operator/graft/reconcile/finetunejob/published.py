"""Find out from the store what a FineTuneJob has published."""

from graft.artifacts import layout
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import InvalidArtifact
from graft.reconcile.finetunejob.jobstatus import World
from graft.reconcile.shared import publishing
from graft.reconcile.shared.context import Context


async def read_published(ctx: Context, world: World, version: str) -> None:
    """Set world.published to the manifest that the job wrote, or world.publish_trouble to why there is none.

    If the operator still copies the files, set world.copying. Raises StoreError if the store is unavailable.
    """
    job = world.job
    adapter = job.spec.output.adapter
    prefix = layout.adapter_prefix(layout.tenant_of(job.metadata.namespace), adapter, version)
    try:
        found = await publishing.published(ctx, job, adapter, version)
    except InvalidArtifact as error:
        world.publish_trouble = str(error)
        return
    except StoreError as error:
        if error.trouble == "unavailable":
            raise
        world.publish_trouble = f"cannot publish the files below {prefix}: {error}"
        return
    if found is None:
        return
    if found == "copying":
        world.copying = True
        return
    manifest, _ = found
    if manifest.job.uid != job.metadata.uid:
        world.publish_trouble = f"another job, {manifest.job.name}, has written {prefix}manifest.json. Create the job again with another spec.output.version"
    elif (manifest.adapter, manifest.version) != (adapter, version):
        world.publish_trouble = f"{prefix}manifest.json is for {manifest.adapter} {manifest.version}, but the job publishes {adapter} {version}. Create the job again with another spec.output.version"
    else:
        world.published = found

"""Find out from the store what a FineTuneJob has published."""

from graft.artifacts import layout
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.reconcile.finetunejob.jobstatus import World
from graft.reconcile.shared.context import Context


async def read_published(ctx: Context, world: World, version: str) -> None:
    """Set world.published to the manifest that the job wrote, or world.publish_trouble to why there is none.

    Raises StoreError if the store is unavailable.
    """
    job = world.job
    prefix = layout.adapter_prefix(layout.tenant_of(job.metadata.namespace), job.spec.output.adapter, version)
    try:
        manifest, digest = await ctx.blocking(read_manifest, ctx.store, prefix, None)
    except InvalidArtifact as error:
        world.publish_trouble = str(error)
    except StoreError as error:
        if error.trouble == "unavailable":
            raise
        world.publish_trouble = f"cannot read manifest.json below {prefix}: {error}"
    else:
        wanted, found = (job.spec.output.adapter, version), (manifest.adapter, manifest.version)
        if manifest.job.uid == job.metadata.uid and found == wanted:
            world.published = (manifest, digest)
        elif manifest.job.uid == job.metadata.uid:
            world.publish_trouble = f"{prefix}manifest.json is for {' '.join(found)}, but the job publishes {' '.join(wanted)}. Create the job again with another spec.output.version"
        else:
            world.publish_trouble = f"another job, {manifest.job.name}, has written {prefix}manifest.json. Create the job again with another spec.output.version"

"""Publish what the Job of a FineTuneJob or an Adapter has staged, and read what is published.

The copy runs as a transfer, with the operator's key. Only it may write the versions' folders.
"""

from typing import Literal

from graft.api.meta import Resource
from graft.artifacts import layout
from graft.artifacts.manifest import Manifest as AdapterManifest
from graft.artifacts.publishing import publish_staged, staged
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.reconcile.shared.context import Context

WHAT = "publish"  # the kind of transfer
COPYING = "the operator copies the files to the version's folder"
Copying = Literal["copying"]


async def published(
    ctx: Context, resource: Resource, adapter: str, version: str
) -> tuple[AdapterManifest, str] | Copying | None:
    """Return the manifest in the version's folder and its digest. None if there is none, and nothing is staged.

    If the resource's Job has staged the version, start to publish it. Return "copying" until that is done; then the
    resource is reconciled again. Raises StoreError, and InvalidArtifact for files that cannot be published.
    """
    tenant = layout.tenant_of(resource.metadata.namespace)
    prefix = layout.adapter_prefix(tenant, adapter, version)
    try:
        return await ctx.stored(resource.metadata.namespace, read_manifest, prefix, None)
    except StoreError as error:
        if error.trouble != "missing":
            raise
    found = await ctx.stored(resource.metadata.namespace, staged, tenant, resource.metadata.uid)
    if found is None:
        return None
    manifest, claim = found
    if (manifest.adapter, manifest.version) != (adapter, version):
        raise InvalidArtifact("ManifestMismatch", f"the staged files are for {manifest.adapter} {manifest.version}")
    copied = ctx.transfer(resource, WHAT, publish_staged, ctx.store, tenant, prefix, manifest, claim)
    if copied is None:
        return "copying"
    copied.result()
    ctx.folders.forget(resource.metadata.namespace, adapter)
    return await ctx.stored(resource.metadata.namespace, read_manifest, prefix, None)

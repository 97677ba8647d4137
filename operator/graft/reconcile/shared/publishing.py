"""Publish what the Job of a FineTuneJob or an Adapter has staged, and read what is published.

The copy runs as a transfer, with the operator's key. Only it may write the versions' folders.
"""

from typing import Literal

from graft.api.meta import Resource
from graft.artifacts import layout
from graft.artifacts.manifest import Manifest as AdapterManifest
from graft.artifacts.publishing import publish_staged, staged
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import InvalidArtifact, parsed, read_manifest
from graft.reconcile.shared.context import Context

WHAT = "publish"  # the kind of transfer
COPYING = "the operator copies the files to the version's folder"
Copying = Literal["copying"]


async def published(
    ctx: Context, resource: Resource, adapter: str, version: str, *, taken: bool = False
) -> tuple[AdapterManifest, str] | Copying | None:
    """Return the manifest in the version's folder and its digest. None if there is none, and nothing is staged.

    If the resource's Job has staged the version, start to publish it. Return "copying" until that is done, with the
    deletion of the staged files; then the resource is reconciled again. An operator that was killed meanwhile starts
    again. `taken`: the resource has the version already, so all that is done. Raises StoreError, and InvalidArtifact for
    files that cannot be published.
    """
    namespace, uid = resource.metadata.namespace, resource.metadata.uid
    tenant = layout.tenant_of(namespace)
    prefix = layout.adapter_prefix(tenant, adapter, version)
    if (known := ctx.folders.manifest(namespace, adapter, version)) is not None:
        return known
    copied = ctx.transfers.find(uid)
    if copied is not None and copied.what == WHAT and not copied.interrupted:
        if not copied.done:
            return "copying"
        ctx.transfers.forget(uid)
        published = parsed(copied.result())
        ctx.folders.forget(namespace, adapter)
        ctx.folders.found(namespace, adapter, version, *published)
        return published
    there: tuple[AdapterManifest, str] | None = None
    try:
        there = await ctx.stored(namespace, read_manifest, prefix, None)
    except StoreError as error:
        if error.trouble != "missing":
            raise
    attempt = None
    if there is None or (not taken and there[0].job.uid == uid):
        try:
            attempt = await ctx.stored(namespace, staged, tenant, uid)
        except InvalidArtifact:
            if there is None:
                raise
    if attempt is None:
        if there is not None:
            ctx.folders.found(namespace, adapter, version, *there)
        return there
    manifest, claim = attempt
    if (manifest.adapter, manifest.version) != (adapter, version):
        raise InvalidArtifact("ManifestMismatch", f"the staged files are for {manifest.adapter} {manifest.version}")
    ctx.transfer(resource, WHAT, publish_staged, ctx.store, tenant, prefix, manifest, claim)
    return "copying"

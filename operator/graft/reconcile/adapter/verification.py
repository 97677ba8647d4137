"""Verify the stored files of a version: first that all files exist, then every byte of the files that changed.

It runs as a transfer, outside of the reconciles. The operator reads with its own key, so it reads only below the
tenant's own part of its bucket. Messages never contain the digest of a stored file.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from graft.api import Adapter
from graft.api.adapter import AdapterArtifact
from graft.artifacts import layout
from graft.artifacts.archive import SUFFIX, Interrupted
from graft.artifacts.manifest import Manifest, ManifestFile
from graft.artifacts.storage import StoreError
from graft.artifacts.store import ObjectInfo, S3Store
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.verified import Verified

WHAT = "verify"
KIND = "Adapter"


@dataclass(frozen=True)
class Checked:
    """A version whose manifest is valid. `archived`: the missing files exist in compressed form only."""

    manifest: Manifest
    archived: bool = False


Outcome = Checked | InvalidArtifact | StoreError


def outside_namespace(adapter: Adapter, bucket: str) -> InvalidArtifact | None:
    """Return why the operator must not read the files of an Adapter, or None if it may (PURE)."""
    artifact, tenant = adapter.artifact, layout.tenant_of(adapter.metadata.namespace)
    if artifact is None or layout.in_tenants_part(artifact.uri, bucket, tenant):
        return None
    own = layout.s3_uri(bucket, layout.tenant_prefix(tenant))
    return InvalidArtifact(
        "OutsideNamespace",
        f"spec.artifact.uri: {artifact.uri} is outside this namespace's part of the bucket, so the operator does not read it. "
        f"Use files below {own}. To take over files from another bucket, create an Adapter with spec.import.uri",
    )


def own_prefix(adapter: Adapter, artifact: AdapterArtifact | None, bucket: str) -> str | None:
    """Return the prefix of an Adapter's files if it is a folder of this adapter in the operator's bucket, else None (PURE).

    No other files are written or deleted.
    """
    tenant = layout.tenant_of(adapter.metadata.namespace)
    if artifact is None or not layout.in_tenants_part(artifact.uri, bucket, tenant):
        return None
    _, prefix = layout.split_s3_uri(artifact.uri)
    versions = layout.adapter_versions_prefix(tenant, adapter.spec.adapter)
    return prefix if prefix.startswith(versions) and prefix != versions else None


def running(ctx: Context, adapter: Adapter) -> bool:
    """Return whether a verification of the Adapter waits, runs, or has a result that no reconcile has read."""
    return ctx.transfers.has(adapter.metadata.uid, WHAT)


def outcome(ctx: Context, adapter: Adapter) -> Outcome | None:
    """Start the verification of an Adapter, or return its result and forget it. None while it waits or runs."""
    tenant = layout.tenant_of(adapter.metadata.namespace)
    _, prefix = layout.split_s3_uri(adapter.published.uri)
    transfer = ctx.transfer(adapter, WHAT, verify, ctx.store, tenant, prefix, adapter.published.digest, ctx.verified)
    if transfer is None:
        return None
    try:
        checked: Checked = transfer.result()
    except InvalidArtifact as error:
        return error
    except StoreError as error:
        if error.trouble == "missing":
            return InvalidArtifact("ManifestMissing", f"manifest.json does not exist at {adapter.published.uri}")
        return error
    return checked


def verify(
    store: S3Store, tenant: str, prefix: str, digest: str, verified: Verified, stopped: Callable[[], bool]
) -> Checked:
    """Compare the stored files with the manifest that has this digest. Files that have not changed are not read again.

    Raises InvalidArtifact, which names the first file that differs; StoreError; Interrupted.
    """
    manifest = _manifest(store, prefix, digest)
    there: dict[str, ObjectInfo] = {}
    for file in manifest.files:
        if stopped():
            raise Interrupted
        if (found := head(store, prefix + file.name)) is not None:
            there[file.name] = found
    missing = [file.name for file in manifest.files if file.name not in there]
    if missing:
        if all(head(store, prefix + name + SUFFIX) is not None for name in missing):
            return Checked(manifest, archived=True)
        more = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise InvalidArtifact("FileMissing", f"{missing[0]}{more} is not in storage. Upload the files of the version")
    for file in manifest.files:
        if there[file.name].size != file.size:
            text = f"{file.name} has {there[file.name].size} bytes; manifest.json says {file.size}"
            raise InvalidArtifact("DigestMismatch", text)
    for file in manifest.files:
        _compare(store, tenant, there[file.name], file, verified, stopped)
    return Checked(manifest)


def _manifest(store: S3Store, prefix: str, digest: str) -> Manifest:
    try:
        return read_manifest(store, prefix, digest)[0]
    except InvalidArtifact as error:
        if error.reason != "DigestMismatch":
            raise
        text = "manifest.json is not the file with the digest of spec.artifact.digest. Create an Adapter with the digest of the present file"
        raise InvalidArtifact("DigestMismatch", text) from error


def head(store: S3Store, key: str) -> ObjectInfo | None:
    """Return the size and the ETag of an object, or None if it does not exist. Raises StoreError."""
    try:
        return store.head(key)
    except StoreError as error:
        if error.trouble != "missing":
            raise
        return None


def _compare(
    store: S3Store,
    tenant: str,
    found: ObjectInfo,
    file: ManifestFile,
    verified: Verified,
    stopped: Callable[[], bool],
) -> None:
    """Read one file, unless it was read before in the same state. Raises InvalidArtifact if it differs."""
    sha256 = verified.sha256(tenant, found)
    if sha256 is None:
        hasher = hashlib.sha256()
        # The ETag is that of the bytes that are read: otherwise a file that was replaced for a moment would be recorded
        # as verified.
        for chunk in store.chunks(found.key, etag=found.etag):
            if stopped():
                raise Interrupted
            hasher.update(chunk)
        sha256 = hasher.hexdigest()
        verified.add(tenant, found, sha256)
    if sha256 != file.sha256:
        raise InvalidArtifact("DigestMismatch", f"{file.name} has another SHA-256 than manifest.json says")

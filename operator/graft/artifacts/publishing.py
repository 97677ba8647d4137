"""Publish a version: a training pod stages it in the run's folder, and the operator copies it to the version's folder.

The key of a pod cannot write below adapters/, so a pod can neither change nor delete a published version. In the
version's folder, the manifest is written after the files.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from graft.api.patterns import DNS_NAME
from graft.artifacts.archive import Interrupted
from graft.artifacts.layout import MANIFEST, attempt_prefix, run_prefix
from graft.artifacts.manifest import LIMITS, Manifest, digest
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.artifacts.versions import InvalidArtifact
from graft.bounded import OutOfBounds

CLAIM = "version.json"  # in the run's folder: the manifest of the attempt whose files are published


def stage(store: S3Store, prefix: str, files: Mapping[str, Path], manifest: Manifest) -> tuple[Manifest, str]:
    """Upload a version's files for the operator. Return the manifest that is published, and its digest.

    Two attempts of one job may stage at once: one that still runs on a lost node, and the attempt that replaced it. So
    that neither overwrites the other's files, each attempt uploads to its own folder of the run. The first attempt that
    stores its manifest as the run's claim wins, and the others delete their files. So staging may be repeated after an
    attempt was killed at any point. The files of a killed attempt are deleted together with the run.

    Raises StoreError("exists") if another job has published the version below `prefix`.
    """
    tenant, uid = prefix.partition("/")[0], manifest.job.uid
    key, own = run_prefix(tenant, uid) + CLAIM, staging_prefix(tenant, manifest)
    claim = _get(store, prefix + MANIFEST)
    if claim is None:
        claim = _get(store, key)
        if claim is None:
            for name, path in files.items():
                store.upload(own + name, path)
            claim = _put_first(store, key, manifest.to_bytes())
    try:
        winner = Manifest.read(claim)
    except OutOfBounds as error:  # no attempt of this version of Graft wrote it
        raise StoreError("exists", f"another publication of the version: {error}") from error
    if winner.job.uid != uid:
        raise StoreError("exists", f"{prefix} is already published")
    if winner.job.attempt != manifest.job.attempt:
        for name in files:
            store.delete(own + name)
    return winner, digest(claim)


def staging_prefix(tenant: str, manifest: Manifest) -> str:
    """Return where an attempt uploads its files before they are copied to the version's folder."""
    return attempt_prefix(tenant, manifest.job.uid, manifest.job.attempt) + "version/"


def staged(store: S3Store, tenant: str, uid: str) -> tuple[Manifest, bytes] | None:
    """Return the manifest that the attempts of a job have claimed, and its bytes. None if no attempt got that far.

    Raises StoreError, and InvalidArtifact if the claim cannot be one of this job.
    """
    try:
        data = _get(store, run_prefix(tenant, uid) + CLAIM)
    except StoreError as error:
        if error.trouble == "large":
            raise InvalidArtifact("ManifestInvalid", str(error)) from error
        raise
    if data is None:
        return None
    try:
        manifest = Manifest.read(data)
    except OutOfBounds as error:
        raise InvalidArtifact("ManifestInvalid", f"{CLAIM} of the run: {error}") from error
    # The attempt is part of a path, and its writer is less trusted than the reader.
    if manifest.job.uid != uid or re.fullmatch(DNS_NAME, manifest.job.attempt) is None:
        raise InvalidArtifact("ManifestMismatch", f"{CLAIM} of the run is not for this run")
    return manifest, data


def publish_staged(
    store: S3Store, tenant: str, prefix: str, manifest: Manifest, claim: bytes, stopped: Callable[[], bool]
) -> bytes:
    """Copy the staged files to the version's folder, then write the manifest, then delete the staged files. Return the
    manifest in the version's folder.

    It may be repeated. A manifest that is already there stays. Raises InvalidArtifact if a staged file is missing or has
    another size than the manifest says; StoreError; Interrupted. The digests are checked later, where the pods cannot
    change the files any more.
    """
    source = staging_prefix(tenant, manifest)
    published = _get(store, prefix + MANIFEST)
    if published is None:
        for file in manifest.files:
            if stopped():
                raise Interrupted
            try:
                size = store.head(source + file.name).size
            except StoreError as error:
                if error.trouble != "missing":
                    raise
                raise InvalidArtifact("FileMissing", f"{file.name} is not among the files of the run") from error
            if size != file.size:
                raise InvalidArtifact("DigestMismatch", f"{file.name} has {size} bytes, the manifest says {file.size}")
            store.copy(source + file.name, prefix + file.name, size)
        published = _put_first(store, prefix + MANIFEST, claim)
    for file in manifest.files:
        store.delete(source + file.name)
    return published


def _get(store: S3Store, key: str) -> bytes | None:
    try:
        return store.get(key, most=LIMITS.size)
    except StoreError as error:
        if error.trouble != "missing":
            raise
        return None


def _put_first(store: S3Store, key: str, data: bytes) -> bytes:
    """Store `data` unless the object exists. Return the object's content."""
    try:
        store.put(key, data, if_absent=True)
    except StoreError as error:
        if error.trouble != "exists" or (first := _get(store, key)) is None:
            raise
        return first
    return data

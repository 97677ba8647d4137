"""Publish and verify versions of an adapter.

The manifest is written after the files, and no file is trusted before its digest is checked.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from graft.artifacts.layout import MANIFEST, attempt_prefix, run_prefix
from graft.artifacts.manifest import LIMITS, Manifest, ManifestFile, digest
from graft.artifacts.storage import StoreError
from graft.artifacts.store import CHUNK, S3Store
from graft.bounded import OutOfBounds

CLAIM = "version.json"  # in the run's folder: the manifest of the attempt whose files are published


class InvalidArtifact(Exception):
    """The files in storage differ from the manifest or from the Adapter."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def describe_files(files: Mapping[str, Path]) -> list[ManifestFile]:
    """Return the manifest's entries for local files, sorted by name."""
    return [
        ManifestFile(name=name, size=path.stat().st_size, sha256=file_sha256(path))
        for name, path in sorted(files.items())
    ]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def publish(store: S3Store, prefix: str, files: Mapping[str, Path], manifest: Manifest) -> str:
    """Publish a version: first its files, then the manifest if there is none yet. Return the manifest's digest.

    Two attempts of one job may publish at once: one that still runs on a lost node, and the attempt that replaced it.
    So that neither overwrites the other's files, each attempt uploads to its own folder of the run. The first attempt
    that stores its manifest as the run's claim wins. Every attempt then copies the winner's files to the version's
    prefix. So all attempts write the same bytes there, however often and however late they run. At the end, an attempt
    empties its own folder. The files of a killed attempt are deleted together with the run.

    Raises StoreError("exists") if another job has published the version. An attempt does nothing if its own job has
    already published the version. So publishing may be repeated after an attempt was killed at any point.
    """
    tenant = prefix.partition("/")[0]
    published = _get(store, prefix + MANIFEST)
    if published is None:
        own, key = staging_prefix(tenant, manifest), run_prefix(tenant, manifest.job.uid) + CLAIM
        claim = _get(store, key)
        if claim is None:
            for name, path in files.items():
                store.upload(own + name, path)
            claim = _put_first(store, key, manifest.to_bytes())
        published = _copy_claimed(store, tenant, prefix, claim)
        for name in files:
            store.delete(own + name)
    if not _same_run(published, manifest):
        raise StoreError("exists", f"{prefix} is already published")
    return digest(published)


def staging_prefix(tenant: str, manifest: Manifest) -> str:
    """Return where an attempt uploads its files before they are copied to the version's prefix."""
    return attempt_prefix(tenant, manifest.job.uid, manifest.job.attempt) + "version/"


def _get(store: S3Store, key: str) -> bytes | None:
    try:
        return store.get(key, most=LIMITS.size)
    except StoreError as error:
        if error.trouble != "missing":
            raise
        return None


def _copy_claimed(store: S3Store, tenant: str, prefix: str, claim: bytes) -> bytes:
    """Copy the winner's files to the version's prefix and publish its manifest. Return the published manifest."""
    try:
        winner = Manifest.read(claim)
    except OutOfBounds as error:  # no attempt of this version of Graft wrote it
        raise StoreError("exists", f"{CLAIM} in the run's folder holds another publication: {error}") from error
    try:
        for file in winner.files:
            store.copy(staging_prefix(tenant, winner) + file.name, prefix + file.name)
    except StoreError as error:
        # The winner empties its folder after it has published. Then there is nothing to copy, and nothing needs
        # copying.
        if error.trouble != "missing" or (published := _get(store, prefix + MANIFEST)) is None:
            raise
        return published
    return _put_first(store, prefix + MANIFEST, claim)


def _put_first(store: S3Store, key: str, data: bytes) -> bytes:
    """Store `data` unless the object exists. Return the object's content."""
    try:
        store.put(key, data, if_absent=True)
    except StoreError as error:
        if error.trouble != "exists" or (first := _get(store, key)) is None:
            raise
        return first
    return data


def _same_run(existing: bytes, manifest: Manifest) -> bool:
    try:
        return Manifest.read(existing).job.uid == manifest.job.uid
    except OutOfBounds:
        return False


def read_manifest(
    store: S3Store, prefix: str, expected_digest: str | None, bucket: str | None = None
) -> tuple[Manifest, str]:
    """Return the manifest below a prefix and its digest.

    Raises InvalidArtifact if the manifest is invalid or not the expected one.
    """
    try:
        data = store.get(prefix + MANIFEST, bucket, most=LIMITS.size)
    except StoreError as error:
        if error.trouble == "large":
            raise InvalidArtifact("ManifestInvalid", str(error)) from error
        raise
    actual = digest(data)
    if expected_digest is not None and actual != expected_digest:
        raise InvalidArtifact("DigestMismatch", f"manifest.json has the digest {actual}, expected {expected_digest}")
    try:
        return Manifest.read(data), actual
    except OutOfBounds as error:
        raise InvalidArtifact("ManifestInvalid", str(error)) from error


def verify(store: S3Store, prefix: str, expected_digest: str, bucket: str | None = None) -> Manifest:
    """Read every byte of a version and compare it with its manifest.

    Raises InvalidArtifact, which names the first file that differs.
    """
    manifest, _ = read_manifest(store, prefix, expected_digest, bucket)
    for file in manifest.files:
        try:
            sha256, size = store.sha256(prefix + file.name, bucket)
        except StoreError as error:
            if error.trouble == "missing":
                raise InvalidArtifact("FileMissing", f"{file.name} is not in storage") from error
            raise
        if (sha256, size) != (file.sha256, file.size):
            raise InvalidArtifact(
                "DigestMismatch",
                f"{file.name} has {size} bytes, sha256 {sha256}; the manifest says {file.size}, {file.sha256}",
            )
    return manifest

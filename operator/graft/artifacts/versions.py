"""Read and verify published versions of an adapter. No file is trusted before its digest is checked."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from graft.artifacts.layout import MANIFEST
from graft.artifacts.manifest import LIMITS, Manifest, ManifestFile, digest
from graft.artifacts.storage import StoreError
from graft.artifacts.store import CHUNK, S3Store
from graft.bounded import OutOfBounds


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
    return parsed(data)


def parsed(data: bytes) -> tuple[Manifest, str]:
    """Return the manifest in these bytes and its digest. Raises InvalidArtifact."""
    try:
        return Manifest.read(data), digest(data)
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

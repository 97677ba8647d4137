"""Publishing and verifying a version of an adapter: files first, manifest last; every digest before it is believed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from graft.artifacts.layout import MANIFEST
from graft.artifacts.manifest import Manifest, ManifestFile, digest
from graft.artifacts.store import CHUNK, S3Store, StoreError


class InvalidArtifact(Exception):
    """The files in storage are not what the manifest, or the Adapter, says."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def describe_files(files: Mapping[str, Path]) -> list[ManifestFile]:
    """The manifest's entries of local files, by name."""
    return [
        ManifestFile(name=name, size=path.stat().st_size, sha256=file_sha256(path))
        for name, path in sorted(files.items())
    ]


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def publish(store: S3Store, prefix: str, files: Mapping[str, Path], manifest: Manifest) -> str:
    """Upload the files and then, only if there is none yet, the manifest; its digest.

    StoreError("exists") when another run has published the version. Publishing the same manifest again is a no-op, so a run
    that was killed between the write and its answer may repeat it.
    """
    data = manifest.to_bytes()
    try:
        existing = store.get(prefix + MANIFEST)
    except StoreError as error:
        if error.trouble != "missing":
            raise
    else:
        if _same_run(existing, manifest):
            return digest(existing)
        raise StoreError("exists", f"{prefix} is published already")
    for name, path in files.items():
        store.upload(prefix + name, path)
    store.put(prefix + MANIFEST, data, if_absent=True)
    return digest(data)


def _same_run(existing: bytes, manifest: Manifest) -> bool:
    try:
        return Manifest.model_validate_json(existing).job.uid == manifest.job.uid
    except ValidationError:
        return False


def read_manifest(
    store: S3Store, prefix: str, expected_digest: str | None, bucket: str | None = None
) -> tuple[Manifest, str]:
    """The manifest below a prefix and its digest. InvalidArtifact when it is not the expected one or makes no sense."""
    data = store.get(prefix + MANIFEST, bucket)
    actual = digest(data)
    if expected_digest is not None and actual != expected_digest:
        raise InvalidArtifact("DigestMismatch", f"manifest.json is {actual}, expected {expected_digest}")
    try:
        return Manifest.model_validate_json(data), actual
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidArtifact("ManifestInvalid", f"manifest.json: {where}: {first['msg']}") from error


def verify(store: S3Store, prefix: str, expected_digest: str, bucket: str | None = None) -> Manifest:
    """Read every byte of a version and compare it with its manifest. InvalidArtifact names the first file that differs."""
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

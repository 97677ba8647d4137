"""`graft pull VERSION`: copy a published version to a folder, if its signature and every digest are right."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graft.artifacts import archive
from graft.artifacts.layout import MANIFEST, SIGNATURE, adapter_prefix, tenant_of
from graft.artifacts.manifest import Manifest, ManifestFile
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.artifacts.versions import InvalidArtifact
from graft.cli.failure import CliFailure
from graft.cli.verification import SAFE, Verified, explained, verified_manifest

PARTIAL = ".partial"


@dataclass(frozen=True)
class Pulled:
    """A version that was copied, and its folder."""

    verified: Verified
    folder: Path

    @property
    def text(self) -> str:
        return f"{self.verified.text}\nfolder: {self.folder}"

    def wire(self) -> dict[str, object]:
        return self.verified.wire() | {"folder": str(self.folder)}


def pull(store: S3Store, namespace: str, adapter: str, version: str, trusted: dict[str, bytes], folder: Path) -> Pulled:
    """Copy a version from the store to `folder`, which must not exist. It appears when every file is verified.

    Compressed weights are decompressed. Raises CliFailure.
    """
    if folder.exists():
        raise CliFailure(f"{folder} exists", "It is not overwritten. Give another folder with --to.")
    prefix = adapter_prefix(tenant_of(namespace), adapter, version)
    partial = folder.with_name(folder.name + PARTIAL)
    if partial.exists() or partial.is_symlink():
        raise CliFailure(
            f"{partial} exists", "A download may have been killed. Remove it, or give another folder with --to."
        )
    made = False
    try:
        with explained(f"{adapter} {version} in {namespace}"):
            found, manifest = verified_manifest(store, namespace, adapter, version, trusted)
            _check_room(manifest, folder)
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            made = True
            for file in manifest.files:
                _download(store, prefix, file, partial / file.name)
            for name, data in ((MANIFEST, found.manifest), (SIGNATURE, found.signature)):
                (partial / name).write_bytes(data)
        partial.rename(folder)
    except OSError as error:
        raise CliFailure(f"cannot write {folder}: {error}", "Give another folder with --to.") from error
    finally:
        if made:
            shutil.rmtree(partial, ignore_errors=True)
    return Pulled(found, folder)


def _check_room(manifest: Manifest, folder: Path) -> None:
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    if manifest.size_bytes > (free := shutil.disk_usage(there).free):
        raise CliFailure(
            f"the version has {manifest.size_bytes} bytes, but only {free} are free in {there}",
            "Give a folder on another disk with --to.",
        )


def _download(store: S3Store, prefix: str, file: ManifestFile, path: Path) -> None:
    """Write one file while its digest is computed. Raises InvalidArtifact if it differs from the manifest."""
    hasher, size = hashlib.sha256(), 0
    with path.open("xb") as stream:
        for chunk in _chunks(store, prefix, file):
            size += len(chunk)
            if size > file.size:
                break  # the digest is wrong, too
            hasher.update(chunk)
            stream.write(chunk)
    if (hasher.hexdigest(), size) != (file.sha256, file.size):
        raise InvalidArtifact("DigestMismatch", f"{file.name} is not the file in the manifest. {SAFE}")


def _chunks(store: S3Store, prefix: str, file: ManifestFile) -> Iterator[bytes]:
    key = prefix + file.name
    try:
        yield from store.chunks(key)
    except StoreError as error:
        if error.trouble != "missing" or not file.name.endswith(".safetensors"):
            raise
        yield from archive.decompressed(store, key, file)

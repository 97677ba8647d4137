"""Check a published version: that the files in the bucket are those that the operator verified and signed.

The check needs no operator. It trusts the public keys that the user gives. Without them it trusts those that the operator
publishes in the cluster.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from graft.api.adapter import AdapterSignature
from graft.artifacts import archive
from graft.artifacts.layout import MANIFEST, SIGNATURE, adapter_prefix, s3_uri, tenant_of
from graft.artifacts.manifest import LIMITS, Manifest, digest
from graft.artifacts.signing import KeysInvalid, SignatureInvalid, Statement, read_public, verify
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.artifacts.versions import InvalidArtifact
from graft.artifacts.versions import verify as verify_files
from graft.bounded import Limits, OutOfBounds
from graft.cli.failure import CliFailure
from graft.contracts.message import read_as

SIGNATURE_LIMITS = Limits(size=16 * 1024, depth=4, values=64)
SAFE = (
    "Do not use the files. Compare the Adapter's status.signature and status.artifact.digest with the bucket, and check who "
    "may write to the bucket."
)


@dataclass(frozen=True)
class Verified:
    """A version whose signature is right."""

    namespace: str
    adapter: str
    version: str
    digest: str
    key_id: str
    files: int
    size_bytes: int
    manifest: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    compressed: bool = False

    @property
    def text(self) -> str:
        return (
            f"{self.adapter} {self.version} in {self.namespace}: signed by {self.key_id}, {self.digest}\n"
            f"{self.files} files, {self.size_bytes} bytes, every SHA-256 verified"
            f"{'; the weights are compressed' if self.compressed else ''}"
        )

    def wire(self) -> dict[str, object]:
        return {
            "namespace": self.namespace,
            "adapter": self.adapter,
            "version": self.version,
            "digest": self.digest,
            "keyId": self.key_id,
            "files": self.files,
            "sizeBytes": self.size_bytes,
            "compressed": self.compressed,
        }


def split_version(name: str) -> tuple[str, str]:
    """Return (adapter, version) of an Adapter's name. Raises CliFailure."""
    adapter, _, version = name.rpartition("-")
    if not adapter or version.count(".") != 2:
        raise CliFailure(
            f"{name} is not the name of a version", "Give the name of an Adapter, for example support-1.0.0."
        )
    return adapter, version


def trusted_files(paths: Sequence[Path]) -> dict[str, bytes]:
    """Return the public keys in PEM files, by key id."""
    found: dict[str, bytes] = {}
    for path in paths:
        try:
            found |= read_public(path.name, path.read_bytes())
        except (OSError, KeysInvalid) as error:
            raise CliFailure(
                f"cannot use the key file {path}: {error}",
                "Ask the platform team for the public key. This prints it: openssl pkey -in 2026-11-25.key -pubout",
            ) from error
    return found


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise CliFailure for what is wrong with a version, or with the store. `what`: the version, for the message."""
    try:
        yield
    except (SignatureInvalid, InvalidArtifact) as error:
        raise CliFailure(f"{what} is NOT what was verified: {error}", SAFE) from error
    except OutOfBounds as error:
        raise CliFailure(f"{what}: {error}", SAFE) from error
    except StoreError as error:
        remedies = {
            "bucket": "Check the entry bucket of the Secret graft-storage, and that --endpoint is the store that has it.",
            "missing": f"Somebody has deleted it from the store. {SAFE}",
            "denied": "The key in the Secret graft-storage may not read this version. Ask the platform team.",
            "large": SAFE,
        }
        unreachable = "Check that the object store is reachable, or give another URL of it with --endpoint."
        raise CliFailure(f"cannot read {what}: {error}", remedies.get(error.trouble, unreachable)) from error


def verified_manifest(
    store: S3Store, namespace: str, adapter: str, version: str, trusted: dict[str, bytes]
) -> tuple[Verified, Manifest]:
    """Check the signature of a version's manifest. Return the facts about the version, and its manifest.

    Raises SignatureInvalid, InvalidArtifact, OutOfBounds, StoreError and, for a version without a signature, CliFailure.
    """
    prefix = adapter_prefix(tenant_of(namespace), adapter, version)
    try:
        data = store.get(prefix + SIGNATURE, most=SIGNATURE_LIMITS.size)
    except StoreError as error:
        if error.trouble != "missing":
            raise
        raise CliFailure(
            f"the store has no signed version {adapter} {version} of {namespace}",
            "A version has a signature only after its Adapter is Ready. Check it: kubectl get adapters -o wide",
        ) from error
    signature = read_as(AdapterSignature, data, SIGNATURE_LIMITS, SIGNATURE)
    content = store.get(prefix + MANIFEST, most=LIMITS.size)
    uri = s3_uri(store.config.bucket, prefix)
    verify(signature, Statement(namespace, adapter, version, uri, digest(content)), trusted)
    manifest = Manifest.read(content)
    about = (digest(content), signature.key_id, len(manifest.files), manifest.size_bytes)
    return Verified(namespace, adapter, version, *about, manifest=content, signature=data), manifest


def check(store: S3Store, namespace: str, adapter: str, version: str, trusted: dict[str, bytes]) -> Verified:
    """Check the signature, the manifest and every byte of a version in the store. Raises CliFailure."""
    prefix = adapter_prefix(tenant_of(namespace), adapter, version)
    with explained(f"{adapter} {version} in {namespace}"):
        found, manifest = verified_manifest(store, namespace, adapter, version, trusted)
        compressed = archive.is_archived(store, prefix, manifest)
        if compressed:  # of an Archived version, the decompressed weights are compared
            archive.verify(store, prefix, manifest)
        else:
            verify_files(store, prefix, found.digest)
    return replace(found, compressed=compressed)

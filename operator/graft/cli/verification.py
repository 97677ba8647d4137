"""`graft verify VERSION`: check that the files in the bucket are those that the operator verified and signed.

The check needs no operator, and it trusts no statement of the cluster: only the public keys that the user gives.
"""

from collections.abc import Sequence
from pathlib import Path

from graft.api.adapter import AdapterSignature
from graft.artifacts import archive
from graft.artifacts.layout import SIGNATURE, adapter_prefix, s3_uri, tenant_of
from graft.artifacts.signing import KeysInvalid, SignatureInvalid, Statement, read_public, verify
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.artifacts.versions import verify as verify_files
from graft.bounded import Limits, OutOfBounds
from graft.cli.failure import CliFailure
from graft.cli.reports import opened_store
from graft.contracts.message import read_as

SIGNATURE_LIMITS = Limits(size=16 * 1024, depth=4, values=64)
SAFE = (
    "Do not use the files. Compare the Adapter's status.signature and status.artifact.digest with the bucket, and check who "
    "may write to the bucket."
)


def verify_version(
    name: str, keys: Sequence[Path], namespace: str | None, context: str | None, endpoint: str | None
) -> str:
    """Verify a version. Return a text about what was verified. Raises CliFailure if the version is not valid."""
    adapter, _, version = name.rpartition("-")
    if not adapter or version.count(".") != 2:
        raise CliFailure(
            f"{name} is not the name of a version", "Give the name of an Adapter, for example support-1.0.0."
        )
    trusted = trusted_files(keys)
    # Imported here because the package of the cluster's client takes a second to load.
    from graft.cli.cluster import Cluster

    cluster = Cluster(context)
    namespace = namespace or cluster.namespace
    with opened_store(cluster, namespace, endpoint) as store:
        return check(store, namespace, adapter, version, trusted)


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


def check(store: S3Store, namespace: str, adapter: str, version: str, trusted: dict[str, bytes]) -> str:
    """Check the signature, the manifest and every byte of a version in the store.

    Return a text about what was verified.
    """
    prefix = adapter_prefix(tenant_of(namespace), adapter, version)
    what = f"{adapter} {version} in {namespace}"
    try:
        data = store.get(prefix + SIGNATURE, most=SIGNATURE_LIMITS.size)
        signature = read_as(AdapterSignature, data, SIGNATURE_LIMITS, SIGNATURE)
        manifest, digest = read_manifest(store, prefix, None)
        uri = s3_uri(store.config.bucket, prefix)
        verify(signature, Statement(namespace, adapter, version, uri, digest), trusted)
        compressed = archive.is_archived(store, prefix, manifest)
        if compressed:  # of an Archived version, the decompressed weights are compared
            archive.verify(store, prefix, manifest)
        else:
            verify_files(store, prefix, digest)
    except (SignatureInvalid, InvalidArtifact) as error:
        raise CliFailure(f"{what} is NOT what was verified: {error}", SAFE) from error
    except OutOfBounds as error:
        raise CliFailure(f"{what}: {error}", SAFE) from error
    except StoreError as error:
        remedies = {
            "missing": "A version has a signature only after its Adapter is Ready. Check it: kubectl get adapters -o wide",
            "denied": "The key in the Secret graft-storage may not read this version. Ask the platform team.",
            "large": SAFE,
        }
        unreachable = (
            "If the store's address is reachable only inside the cluster, forward a port to the store and give its URL with "
            "--endpoint."
        )
        raise CliFailure(f"cannot read {what}: {error}", remedies.get(error.trouble, unreachable)) from error
    return (
        f"{what}: signed by {signature.key_id}, {digest}\n"
        f"{len(manifest.files)} files, {manifest.size_bytes} bytes, every SHA-256 verified"
        f"{'; the weights are compressed' if compressed else ''}"
    )

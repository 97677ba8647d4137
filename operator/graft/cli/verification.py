"""graft verify VERSION: what is in the bucket is what the operator verified, checked without the operator and without the cluster's word."""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from graft.api.adapter import AdapterSignature
from graft.artifacts import archive
from graft.artifacts.layout import SIGNATURE, adapter_prefix, s3_uri, tenant_of
from graft.artifacts.signing import KeysInvalid, SignatureInvalid, Statement, read_public, verify
from graft.artifacts.store import S3Store, StoreError
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.artifacts.versions import verify as verify_files
from graft.cli.failure import CliFailure
from graft.cli.reports import opened_store

SAFE = "Do not use the files. Compare the Adapter's status.signature and status.artifact.digest, and see who may write the bucket."


def verify_version(
    name: str, keys: Sequence[Path], namespace: str | None, context: str | None, endpoint: str | None
) -> str:
    """What was verified, in words. CliFailure says what is not as it should be."""
    adapter, _, version = name.rpartition("-")
    if not adapter or version.count(".") != 2:
        raise CliFailure(f"{name} is no version of an adapter", "Name an Adapter, for example support-1.0.0.")
    trusted = trusted_files(keys)
    # Imported here: the package of the cluster's client takes a second to load.
    from graft.cli.cluster import Cluster

    cluster = Cluster(context)
    namespace = namespace or cluster.namespace
    with opened_store(cluster, namespace, endpoint) as store:
        return check(store, namespace, adapter, version, trusted)


def trusted_files(paths: Sequence[Path]) -> dict[str, bytes]:
    """The public keys in PEM files, by key id."""
    found: dict[str, bytes] = {}
    for path in paths:
        try:
            found |= read_public(path.name, path.read_bytes())
        except (OSError, KeysInvalid) as error:
            raise CliFailure(
                f"{path} cannot be used: {error}",
                "Ask the platform team for the public key: openssl pkey -in 2026-11-25.key -pubout",
            ) from error
    return found


def check(store: S3Store, namespace: str, adapter: str, version: str, trusted: dict[str, bytes]) -> str:
    """Compare signature, manifest and every byte of a version in the store."""
    prefix = adapter_prefix(tenant_of(namespace), adapter, version)
    what = f"{adapter} {version} in {namespace}"
    try:
        signature = AdapterSignature.model_validate(json.loads(store.get(prefix + SIGNATURE)))
        manifest, digest = read_manifest(store, prefix, None)
        uri = s3_uri(store.config.bucket, prefix)
        verify(signature, Statement(namespace, adapter, version, uri, digest), trusted)
        compressed = archive.is_archived(store, prefix, manifest)
        if compressed:  # the version is Archived, and no less what was verified
            archive.verify(store, prefix, manifest)
        else:
            verify_files(store, prefix, digest)
    except (SignatureInvalid, InvalidArtifact) as error:
        raise CliFailure(f"{what} is NOT what was verified: {error}", SAFE) from error
    except (ValidationError, ValueError) as error:
        raise CliFailure(f"{what}: {SIGNATURE} makes no sense: {error}", SAFE) from error
    except StoreError as error:
        remedies = {
            "missing": "A version has a signature once its Adapter is Ready: kubectl get adapters -o wide",
            "denied": "The key in the Secret graft-storage may not read it; ask the platform team.",
        }
        unreachable = (
            "Where the store's address is the cluster's own, forward a port to it and give its URL with --endpoint."
        )
        raise CliFailure(f"{what} cannot be had: {error}", remedies.get(error.trouble, unreachable)) from error
    return (
        f"{what}: signed by {signature.key_id}, {digest}\n"
        f"{len(manifest.files)} files, {manifest.size_bytes} bytes, every SHA-256 verified"
        f"{'; the weights are compressed' if compressed else ''}"
    )

"""Buckets in tests: an empty one of a real S3 server, and versions that are published at once."""

import base64
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from graft.artifacts.identity import VersityIdentity
from graft.artifacts.manifest import Manifest
from graft.artifacts.publishing import publish_staged, stage, staged
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from graft.manifests.adapter import storage_secret
from testbed.objectstore import s3_server


@contextlib.contextmanager
def empty_bucket() -> Iterator[S3Store]:
    """Run a server during the block. Yield its bucket, opened with the root key."""
    with s3_server() as server:
        store = S3Store(StorageConfig.from_dir(server.secret_dir("bucket")))
        store.create_bucket()
        yield store


def issue(identity: VersityIdentity, tenant: str) -> StorageConfig:
    """Return a new key of a tenant that works. An older one of the tenant stops working."""
    identity.revoke(tenant)
    key = identity.draw(tenant)
    identity.accept(tenant, key.secret_access_key)
    return key


def mount(key: StorageConfig, folder: Path) -> None:
    """Write a key as the kubelet mounts the Secret that has it."""
    for name, value in storage_secret("any", key)["data"].items():
        (folder / name).write_bytes(base64.b64decode(value))


def publish(store: S3Store, prefix: str, files: Mapping[str, Path], manifest: Manifest) -> str:
    """Play the pod that stages a version and the operator that publishes it. Return the digest of the manifest."""
    _, digest = stage(store, prefix, files, manifest)
    play_operator(store, prefix.partition("/")[0], manifest.job.uid)
    return digest


def play_operator(store: S3Store, tenant: str, uid: str) -> None:
    """Publish what a job has staged, as the operator does when its Job is complete."""
    found = staged(store, tenant, uid)
    assert found is not None, f"nothing is staged for the job {uid}"
    manifest, claim = found
    prefix = f"{tenant}/adapters/{manifest.adapter}/{manifest.version}/"
    publish_staged(store, tenant, prefix, manifest, claim, lambda: False)

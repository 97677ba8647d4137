"""Publish a version at once: the test plays the pod that stages it, and the operator that copies it."""

from collections.abc import Mapping
from pathlib import Path

from graft.artifacts.manifest import Manifest
from graft.artifacts.publishing import publish_staged, stage, staged
from graft.artifacts.store import S3Store


def publish(store: S3Store, prefix: str, files: Mapping[str, Path], manifest: Manifest) -> str:
    """Stage and publish a version. Return the digest of the published manifest."""
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

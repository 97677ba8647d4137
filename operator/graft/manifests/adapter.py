"""Build the Adapter resource of a published version, and the Secret with a namespace's storage key."""

import base64
from pathlib import Path

from graft.api import API_VERSION, FineTuneJob
from graft.artifacts.layout import adapter_prefix, s3_uri, tenant_of
from graft.artifacts.manifest import Manifest as AdapterManifest
from graft.artifacts.storage import StorageConfig
from graft.contracts.mounts import STORAGE_SECRET
from graft.manifests.metadata import FINALIZER, Manifest

JOB_UID = "graft.dev/job-uid"
ADAPTER_LABEL = "graft.dev/adapter"
RECIPE = "graft.dev/recipe"


def adapter_name(adapter: str, version: str) -> str:
    return f"{adapter}-{version}"


def adapter(job: FineTuneJob, manifest: AdapterManifest, digest: str, bucket: str) -> Manifest:
    """Return the Adapter of a version that the job published.

    The job does not own it, so the Adapter outlives the job.
    """
    tenant = tenant_of(job.metadata.namespace)
    output = job.spec.output
    lifecycle = {"baseVersions": output.base_versions, "retention": output.retention and output.retention.wire()}
    return {
        "apiVersion": API_VERSION,
        "kind": "Adapter",
        "metadata": {
            "name": adapter_name(manifest.adapter, manifest.version),
            "namespace": job.metadata.namespace,
            "labels": {
                "app.kubernetes.io/managed-by": "graft",
                ADAPTER_LABEL: manifest.adapter,
                JOB_UID: job.metadata.uid,
            },
            "annotations": {RECIPE: manifest.recipe},
            "finalizers": [FINALIZER],
        },
        "spec": {
            "adapter": manifest.adapter,
            "version": manifest.version,
            "baseModel": manifest.base_model.name,
            "method": manifest.method,
            "artifact": {
                "uri": s3_uri(bucket, adapter_prefix(tenant, manifest.adapter, manifest.version)),
                "digest": digest,
            },
            "job": {"name": job.metadata.name, "uid": job.metadata.uid},
            "deletionPolicy": output.deletion_policy,
            **{key: value for key, value in lifecycle.items() if value is not None},
        },
    }


def storage_secret(namespace: str, config: StorageConfig) -> Manifest:
    """Return the Secret that pods mount, with the keys that StorageConfig.from_dir reads."""
    data = {
        "endpoint": config.endpoint,
        "region": config.region,
        "bucket": config.bucket,
        "prefix": config.prefix,
        "access-key-id": config.access_key_id,
        "secret-access-key": config.secret_access_key,
    }
    if config.ca_file:
        data["ca.crt"] = Path(config.ca_file).read_text()
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {
            "name": STORAGE_SECRET,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/managed-by": "graft", "graft.dev/component": "storage"},
        },
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
    }

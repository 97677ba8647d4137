"""What the objects share: names, labels, owners, and a pod that meets Pod Security `restricted`."""

from typing import Any

from graft.api.meta import API_VERSION, GPU_TOLERATION, Placement, Resource, Resources
from graft.contracts import HF_SECRET, STORAGE_DIR, STORAGE_SECRET
from graft.settings import Settings

Manifest = dict[str, Any]

OWNER_UID = "graft.dev/owner-uid"  # on every child: whose reconciler an event of it wakes
OWNER_KIND = "graft.dev/owner-kind"
OWNER_NAME = "graft.dev/owner"
COMPONENT = "graft.dev/component"
FINALIZER = "graft.dev/cleanup"
USER = 65532


def labels(owner: Resource, component: str) -> dict[str, str]:
    """Labels of a child."""
    return {
        "app.kubernetes.io/managed-by": "graft",
        "app.kubernetes.io/part-of": "graft",
        COMPONENT: component,
        OWNER_KIND: type(owner).__name__,
        OWNER_NAME: owner.metadata.name,
        OWNER_UID: owner.metadata.uid,
    }


def owner_reference(owner: Resource) -> Manifest:
    """Makes the garbage collector remove the child after its owner."""
    return {
        "apiVersion": API_VERSION,
        "kind": type(owner).__name__,
        "name": owner.metadata.name,
        "uid": owner.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def child(api_version: str, kind: str, name: str, owner: Resource, component: str) -> Manifest:
    """The head of a child in its owner's namespace."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": owner.metadata.namespace,
            "labels": labels(owner, component),
            "ownerReferences": [owner_reference(owner)],
        },
    }


POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def pod_defaults(settings: Settings, placement: Placement, *, gpus: int = 0) -> Manifest:
    """The part of a pod's spec that all our pods share; no service account token, no service links."""
    spec: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": POD_SECURITY,
    }
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if placement.node_selector:
        spec["nodeSelector"] = placement.node_selector
    tolerations = list(placement.tolerations or [])
    if gpus and GPU_TOLERATION not in tolerations:
        tolerations.append(GPU_TOLERATION)
    if tolerations:
        spec["tolerations"] = [item.wire() for item in tolerations]
    if placement.priority_class_name:
        spec["priorityClassName"] = placement.priority_class_name
    if placement.runtime_class_name:
        spec["runtimeClassName"] = placement.runtime_class_name
    return spec


def container_resources(resources: Resources | None) -> Manifest:
    """As given, or 1 CPU and 4Gi."""
    if resources is None:
        return {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "4Gi"}}
    return resources.wire()


def storage_volume() -> Manifest:
    return {"name": "storage", "secret": {"secretName": STORAGE_SECRET, "defaultMode": 0o440}}


def huggingface_volume() -> Manifest:
    return {"name": "huggingface", "secret": {"secretName": HF_SECRET, "optional": True, "defaultMode": 0o440}}


STORAGE_MOUNTS = [
    {"name": "storage", "mountPath": STORAGE_DIR, "readOnly": True},
    {"name": "huggingface", "mountPath": "/etc/graft/huggingface", "readOnly": True},
]


def field_env(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

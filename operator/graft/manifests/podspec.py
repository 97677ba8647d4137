"""The parts that the specs of all Graft's pods share: Pod Security `restricted`, placement, resources, the mounted
Secrets."""

from graft.api.meta import GPU_TOLERATION, Placement, Resources
from graft.contracts.mounts import HF_SECRET, STORAGE_DIR, STORAGE_SECRET
from graft.manifests.metadata import Manifest
from graft.settings import Settings

USER = 65532
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
    """Return the part of a pod's spec that all Graft's pods share. It has no service account token and no service
    links."""
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
    """Return the given resources. The default is 1 CPU and 4Gi of memory."""
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

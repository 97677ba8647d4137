"""The parts that the specs of all Graft's pods share: Pod Security `restricted`, what keeps containers apart, placement,
resources, the mounted Secrets."""

from graft.api.meta import GPU_TOLERATION, Placement, Resources
from graft.contracts.mounts import HF_SECRET, STORAGE_DIR, STORAGE_SECRET
from graft.manifests.metadata import Manifest
from graft.settings import Settings

POD_SECURITY = {
    "runAsNonRoot": True,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}

# Python must import nothing from a folder that a container can write: neither from its working folder nor from HOME.
# Graft's images set the same variables. vLLM's image does not.
PYTHON_ENV: list[Manifest] = [{"name": "PYTHONSAFEPATH", "value": "1"}, {"name": "PYTHONNOUSERSITE", "value": "1"}]
# torch asks for the user's name. Without these, it fails for a user that the image's /etc/passwd does not list.
USER_ENV: list[Manifest] = [
    {"name": "HOME", "value": "/tmp"},  # noqa: S108 - an emptyDir of the container
    {"name": "USER", "value": "graft"},
    {"name": "LOGNAME", "value": "graft"},
]


def container_defaults(name: str, *, user: int | None = None) -> Manifest:
    """Return the part of a container that all Graft's containers share. No process can write to its working folder.

    Without `user`, the container has the pod's user.
    """
    identity = {} if user is None else {"runAsUser": user, "runAsGroup": user}
    return {
        "name": name,
        "workingDir": "/",
        "securityContext": CONTAINER_SECURITY | identity,
        # A container that does not write why it ended leaves the end of its log.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def pod_security(settings: Settings) -> Manifest:
    """Return the pod's security context. Without a fixed user, the cluster chooses user and group, as OpenShift does."""
    user = settings.run_as_user
    return POD_SECURITY | ({} if user is None else {"runAsUser": user, "runAsGroup": user, "fsGroup": user})


def engine_user(settings: Settings) -> int | None:
    """Return the user of the engine's container.

    The engine answers clients and runs other people's models, so it has neither the credentials nor the user of the
    agent beside it. Both users are in the group of the pod's volumes (fsGroup). If the cluster chooses, both have the
    same user, and only the volumes that each container mounts keep them apart.
    """
    return None if settings.run_as_user is None else settings.run_as_user + 1


def tmp_volume(container: str) -> Manifest:
    """Return the volume of one container's /tmp.

    No other container mounts it, because a program may execute files that it finds there.
    """
    return {"name": f"tmp-{container}", "emptyDir": {}}


def tmp_mount(container: str) -> Manifest:
    """Return the mount of `tmp_volume`."""
    return {"name": f"tmp-{container}", "mountPath": "/tmp"}  # noqa: S108 - an emptyDir of the container


def pod_defaults(settings: Settings, placement: Placement, *, gpus: int = 0) -> Manifest:
    """Return the part of a pod's spec that all Graft's pods share. It has no service account token and no service
    links."""
    spec: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(settings),
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


TOKEN_SECONDS = 3600  # until the kubelet has replaced a token


def storage_volume(settings: Settings) -> Manifest:
    """Return the volume with the namespace's key, or with its role and the pod's own token for it."""
    if not (audience := settings.storage.web_identity_audience):
        return {"name": "storage", "secret": {"secretName": STORAGE_SECRET, "defaultMode": 0o440}}
    token = {"audience": audience, "expirationSeconds": TOKEN_SECONDS, "path": "token"}
    sources = [{"secret": {"name": STORAGE_SECRET}}, {"serviceAccountToken": token}]
    return {"name": "storage", "projected": {"defaultMode": 0o440, "sources": sources}}


def huggingface_volume() -> Manifest:
    return {"name": "huggingface", "secret": {"secretName": HF_SECRET, "optional": True, "defaultMode": 0o440}}


STORAGE_MOUNTS = [
    {"name": "storage", "mountPath": STORAGE_DIR, "readOnly": True},
    {"name": "huggingface", "mountPath": "/etc/graft/huggingface", "readOnly": True},
]


def field_env(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

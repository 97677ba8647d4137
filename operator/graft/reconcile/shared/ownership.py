"""Whose child an object is: by its owner references, never by labels alone (PURE).

Everybody who may create a ConfigMap or a pod may set labels. It does not know what a child contains.
"""

from collections.abc import Mapping
from typing import Any

from graft.contracts.gateway import ROUTES_COMPONENT
from graft.kube import Manifest, owned_by
from graft.manifests.metadata import COMPONENT, OWNER_KIND, OWNER_NAME, OWNER_UID

Key = tuple[str, str, str]  # kind, namespace, name
PARENTS = {"Job", "ReplicaSet"}  # what creates our pods
PLACE = "graft.dev/namespace"  # on routes: the namespace of their owner


def owner_of(kind: str, child: Manifest, known: Mapping[Key, str], operator_namespace: str) -> Key | None:
    """Return the resource that a child belongs to, or None if it belongs to no resource of Graft.

    `known`: the UIDs of the resources. A child is in the namespace of its owner, and its owner references name the owner, or
    for a pod what the owner's controller creates. Only the routes are in the operator's namespace, where owner references do
    not work. No user may write there.
    """
    metadata = child["metadata"]
    labels: dict[str, Any] = metadata.get("labels") or {}
    place = metadata.get("namespace") or ""
    routes = kind == "ConfigMap" and place == operator_namespace and labels.get(COMPONENT) == ROUTES_COMPONENT
    key = (labels.get(OWNER_KIND, ""), labels.get(PLACE, "") if routes else place, labels.get(OWNER_NAME, ""))
    uid = known.get(key)
    if uid is None or labels.get(OWNER_UID) != uid:
        return None
    if routes or owned_by(child, uid) or (kind == "Pod" and is_pod_of(child, key[2])):
        return key
    return None


def is_pod_of(pod: Manifest, owner: str) -> bool:
    """Return whether a Job or ReplicaSet of the resource named `owner` controls the pod."""
    for reference in pod["metadata"].get("ownerReferences") or []:
        name = str(reference.get("name"))
        if reference.get("controller") and reference.get("kind") in PARENTS:
            return name == owner or name.startswith(f"{owner}-")
    return False


def pods_of(jobs: list[Manifest], pods: list[Manifest]) -> list[Manifest]:
    """Return the pods that these Jobs have created."""
    return [pod for pod in pods if any(owned_by(pod, job["metadata"]["uid"]) for job in jobs)]

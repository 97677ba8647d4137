"""Find the owner of a child object by its owner references, never by labels alone (PURE).

Every user who may create a ConfigMap or a pod may set labels. This module does not know what a child contains.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from graft.contracts.gateway import ROUTES_COMPONENT
from graft.kube import Manifest, controller_of, owned_by
from graft.manifests.metadata import COMPONENT, OWNER_KIND, OWNER_NAME, OWNER_UID

Key = tuple[str, str, str]  # kind, namespace, name
PARENTS = {"Job", "ReplicaSet"}  # kinds of the controllers that create our pods
PLACE = "graft.dev/namespace"  # on routes: the namespace of their owner


def owner_of(kind: str, child: Manifest, known: Mapping[Key, str], operator_namespace: str) -> Key | None:
    """Return the resource that a child belongs to, or None if it belongs to no resource of Graft.

    `known`: the UIDs of the resources. A child is in the namespace of its owner, and its owner references name the
    owner. Those of a pod name a Job or a ReplicaSet of the owner. Only the routes are in the operator's namespace,
    where owner references do not work and no user may write.
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


def created_by(parents: Iterable[Manifest], found: Iterable[Manifest]) -> list[Manifest]:
    """Return the objects that these parents control, for example the pods of some Jobs."""
    uids = {parent["metadata"]["uid"] for parent in parents}
    return [item for item in found if controller_of(item) in uids]


def of_deployment(
    found: list[Manifest], sets: list[Manifest], deployment: Manifest | None, owner: str
) -> list[Manifest]:
    """Return the pods of the ReplicaSets of a Deployment that `owner`, a UID, controls. No other pod may serve."""
    if deployment is None or not owned_by(deployment, owner):
        return []
    return created_by(created_by([deployment], sets), found)

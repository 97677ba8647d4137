"""Find the owner of a child object by its owner references, never by labels alone (PURE).

Every user who may create a ConfigMap or a pod may set labels. This module does not know what a child contains.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from graft.contracts.apikeys import API_KEY_COMPONENT
from graft.contracts.gateway import ROUTES_COMPONENT
from graft.kube import Manifest, controller_of, owned_by
from graft.manifests.metadata import COMPONENT, OWNER_KIND, OWNER_NAME, OWNER_UID

Key = tuple[str, str, str]  # kind, namespace, name
PARENTS = {"Job", "ReplicaSet"}  # kinds of the controllers that create our pods
PLACE = "graft.dev/namespace"  # on what gateways read: the namespace of its owner
FOR_GATEWAYS = {ROUTES_COMPONENT, API_KEY_COMPONENT}  # components of the ConfigMaps that gateways read
CLUSTER_WIDE = frozenset({"Tenant"})  # owners without a namespace


def owner_of(kind: str, child: Manifest, known: Mapping[Key, str], operator_namespace: str) -> Key | None:
    """Return the resource that a child belongs to, or None if it belongs to no resource of Graft.

    `known`: the UIDs of the resources.
    """
    claimed = claimed_owner(kind, child, operator_namespace)
    return claimed[0] if claimed is not None and known.get(claimed[0]) == claimed[1] else None


def claimed_owner(kind: str, child: Manifest, operator_namespace: str) -> tuple[Key, str] | None:
    """Return the resource that a child names as its owner, with its UID. None if the child does not name it in all places.

    A child is in the namespace of its owner if that has one, and its owner references name the owner. Those of a pod name a
    Job or a ReplicaSet of the owner. Only what gateways read is in the operator's namespace, where owner references do not work and no
    user may write.
    """
    metadata = child["metadata"]
    labels: dict[str, Any] = metadata.get("labels") or {}
    place = metadata.get("namespace") or ""
    central = kind == "ConfigMap" and place == operator_namespace and labels.get(COMPONENT) in FOR_GATEWAYS
    kind_of_owner = labels.get(OWNER_KIND, "")
    where = labels.get(PLACE, "") if central else "" if kind_of_owner in CLUSTER_WIDE else place
    key = (kind_of_owner, where, labels.get(OWNER_NAME, ""))
    uid = labels.get(OWNER_UID, "")
    if not all((key[0], key[2], uid)):
        return None
    by_reference = {"Pod": is_pod_of, "ReplicaSet": is_set_of}.get(kind)
    if central or owned_by(child, uid) or (by_reference is not None and by_reference(child, key[2])):
        return key, uid
    return None


def is_pod_of(pod: Manifest, owner: str) -> bool:
    """Return whether a Job or ReplicaSet of the resource named `owner` controls the pod."""
    return _controlled(pod, PARENTS, owner)


def is_set_of(replica_set: Manifest, owner: str) -> bool:
    """Return whether a Deployment of the resource named `owner` controls the ReplicaSet."""
    return _controlled(replica_set, {"Deployment"}, owner)


def _controlled(child: Manifest, kinds: set[str], owner: str) -> bool:
    for reference in child["metadata"].get("ownerReferences") or []:
        name = str(reference.get("name"))
        if reference.get("controller") and reference.get("kind") in kinds:
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

"""The names, labels and owner references of every child object."""

from typing import Any

from graft.api.meta import API_VERSION, Resource

Manifest = dict[str, Any]

OWNER_UID = "graft.dev/owner-uid"  # on every child: an event of the child starts a reconcile of this owner
OWNER_KIND = "graft.dev/owner-kind"
OWNER_NAME = "graft.dev/owner"
COMPONENT = "graft.dev/component"
FINALIZER = "graft.dev/cleanup"


def labels(owner: Resource, component: str) -> dict[str, str]:
    """Return the labels of a child."""
    return {
        "app.kubernetes.io/managed-by": "graft",
        "app.kubernetes.io/part-of": "graft",
        COMPONENT: component,
        OWNER_KIND: type(owner).__name__,
        OWNER_NAME: owner.metadata.name,
        OWNER_UID: owner.metadata.uid,
    }


def owner_reference(owner: Resource) -> Manifest:
    """Return the owner reference. With it, the garbage collector deletes the child after its owner."""
    return {
        "apiVersion": API_VERSION,
        "kind": type(owner).__name__,
        "name": owner.metadata.name,
        "uid": owner.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def child(
    api_version: str, kind: str, name: str, owner: Resource, component: str, *, namespace: str | None = None
) -> Manifest:
    """Return a child in its owner's namespace, with apiVersion, kind and metadata only.

    `namespace`: of the child of an owner that has none.
    """
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": namespace or owner.metadata.namespace,
            "labels": labels(owner, component),
            "ownerReferences": [owner_reference(owner)],
        },
    }

"""Build what a Tenant has in each of its namespaces. It does not know which namespaces those are."""

from collections.abc import Mapping

from graft.api import Tenant
from graft.api.tenant import Member
from graft.manifests.metadata import Manifest, child

# Graft's pods meet the strictest level. Without a version, an older and weaker form of it could be set.
POD_SECURITY = {
    "pod-security.kubernetes.io/enforce": "restricted",
    "pod-security.kubernetes.io/enforce-version": "latest",
}
RBAC = "rbac.authorization.k8s.io"
# ClusterRole -> the roles of the members that are bound to it. Each role contains the ones before it.
INCLUDED = {"view": ("view", "edit", "admin"), "edit": ("edit", "admin"), "admin": ("admin",)}


def children(tenant: Tenant, namespace: str, cluster_roles: Mapping[str, str]) -> list[Manifest]:
    """Return all objects of a Tenant in one namespace. Isolation comes before the people. `cluster_roles`: role -> name."""
    return [default_deny(tenant, namespace), *member_bindings(tenant, namespace, cluster_roles)]


def default_deny(tenant: Tenant, namespace: str) -> Manifest:
    """Return the policy by which no pod sends or receives anything. Graft's own policies open what Graft's pods need."""
    name = f"graft-{tenant.metadata.name}-default-deny"
    made = child("networking.k8s.io/v1", "NetworkPolicy", name, tenant, "isolation", namespace=namespace)
    # The empty lists are applied, too: rules that somebody adds are removed.
    closed: Manifest = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [], "egress": []}
    return made | {"spec": closed}


def default_account(namespace: str) -> Manifest:
    """Return the namespace's default service account: pods that name no account get no token.

    Kubernetes creates and owns this account, so it is no child of the Tenant.
    """
    metadata = {"name": "default", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata, "automountServiceAccountToken": False}


def member_bindings(tenant: Tenant, namespace: str, cluster_roles: Mapping[str, str]) -> list[Manifest]:
    """Return the RoleBindings of the members in one namespace. `cluster_roles`: role -> name of the ClusterRole."""
    members, name = tenant.spec.members or [], tenant.metadata.name
    found = []
    for role, included in INCLUDED.items():
        subjects = [_subject(item) for item in members if item.role in included]
        if subjects:
            made = child(f"{RBAC}/v1", "RoleBinding", f"graft-{name}-{role}", tenant, "members", namespace=namespace)
            reference = {"apiGroup": RBAC, "kind": "ClusterRole", "name": cluster_roles[role]}
            found.append(made | {"roleRef": reference, "subjects": subjects})
    return found


def _subject(member: Member) -> Manifest:
    return {"apiGroup": RBAC, "kind": member.kind, "name": member.name}

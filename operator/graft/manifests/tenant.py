"""Build what a Tenant has in each of its namespaces. It does not know which namespaces those are."""

from collections.abc import Mapping

from graft.api import Tenant
from graft.api.tenant import Member
from graft.manifests.metadata import Manifest, child

RBAC = "rbac.authorization.k8s.io"
# ClusterRole -> the roles of the members that are bound to it. Each role contains the ones before it.
INCLUDED = {"view": ("view", "edit", "admin"), "edit": ("edit", "admin"), "admin": ("admin",)}


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

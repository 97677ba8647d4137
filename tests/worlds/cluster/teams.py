"""Tenants in the tests of the cluster: what the platform team writes, and the people of a team."""

from typing import Any

from worlds.cluster.api import Api, Object, Refused
from worlds.cluster.tenant import API, Tenant

RBAC = "rbac.authorization.k8s.io"


def team(tenant: Tenant, name: str, members: Any = None, **spec: Any) -> Object:
    """Create the Tenant resource of a team. Without `namespaces` in the spec, it has the namespace of the test."""
    spec = {"namespaces": {"names": [tenant.name]}} | spec | ({"members": members} if members else {})
    return tenant.api.create({"apiVersion": API, "kind": "Tenant", "metadata": {"name": name}, "spec": spec})


def user(name: str, role: str) -> Object:
    return {"kind": "User", "name": name, "role": role}


def ready(tenant: Tenant, name: str, reason: str, *, says: str = "") -> Object:
    """Wait until the condition Ready of a Tenant has a reason for its present spec. Return the Tenant."""
    seen: Object = {}

    def there() -> bool:
        found = tenant.api.get("Tenant", None, name)
        assert found is not None
        for item in found.get("status", {}).get("conditions", []):
            if item["type"] == "Ready" and item["observedGeneration"] == found["metadata"]["generation"]:
                seen.update(found, condition=item)
                return bool(item["reason"] == reason and says in item["message"])
        return False

    tenant.wait(there, f"Tenant {name} has reason {reason} {says}", explain=lambda: str(seen.get("condition")))
    return seen


def bindings(tenant: Tenant) -> dict[str, list[str]]:
    """Return the people of the namespace's RoleBindings that a Tenant owns: ClusterRole -> names of its subjects."""
    found = {}
    for item in tenant.api.list("RoleBinding", tenant.name):
        owners = item["metadata"].get("ownerReferences") or []
        if any(owner["kind"] == "Tenant" for owner in owners):
            found[item["roleRef"]["name"]] = [subject["name"] for subject in item.get("subjects") or []]
    return found


def may(api: Api, verb: str, resource: str, namespace: str | None = None, name: str = "", group: str = "") -> bool:
    """Ask the API server whether an identity may do something."""
    resource, _, subresource = resource.partition("/")
    asked = {"verb": verb, "group": group, "resource": resource, "subresource": subresource, "name": name}
    asked |= {"namespace": namespace} if namespace else {}
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": asked},
    }
    answer = api.call("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body)
    return bool(answer["status"]["allowed"])


def refused(api: Api, method: str, path: str, body: Any = None, content_type: str = "application/json") -> str:
    """Send a request that the API server must forbid. Return its answer."""
    try:
        api.text(method, path, body, content_type)
    except Refused as error:
        assert error.status == 403, error
        return str(error)
    raise AssertionError(f"{method} {path} is allowed")

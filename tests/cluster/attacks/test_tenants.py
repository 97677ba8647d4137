"""People of a team try to get more from their Tenant than it gives. The real API server answers."""

from collections.abc import Iterator

import pytest
from worlds.cluster.api import Api, Refused
from worlds.cluster.operator_process import ACCOUNT, SYSTEM, from_chart
from worlds.cluster.tenant import Tenant
from worlds.cluster.tenants import RBAC, bindings, may, ready, refused, team, user

TENANTS = "/apis/graft.dev/v1alpha1/tenants"
MERGE = "application/merge-patch+json"


@pytest.fixture
def ada(tenant: Tenant) -> Iterator[str]:
    """Yield the name of a person who is admin of a Tenant, which has the name of the namespace."""
    name = f"ada-{tenant.name}"
    team(tenant, tenant.name, [user(name, "admin")])
    ready(tenant, tenant.name, "AsExpected")
    yield name
    tenant.api.delete("Tenant", None, tenant.name)


def test_an_admin_of_a_tenant_changes_no_tenant_and_no_namespace(tenant: Tenant, calm: Tenant, ada: str) -> None:
    """An admin takes a namespace or a role by changing the Tenant, its status or the labels of a namespace -> forbidden."""
    person = tenant.api.as_user(ada)
    more = {"spec": {"namespaces": {"names": [tenant.name, calm.name]}}}
    refused(person, "PATCH", f"{TENANTS}/{tenant.name}", more, MERGE)
    refused(person, "PATCH", f"{TENANTS}/{tenant.name}/status", {"status": {"namespaces": [calm.name]}}, MERGE)
    refused(person, "DELETE", f"{TENANTS}/{tenant.name}")
    refused(person, "GET", TENANTS)
    refused(person, "POST", TENANTS, {"apiVersion": "graft.dev/v1alpha1", "kind": "Tenant"})
    for name in (tenant.name, calm.name):
        refused(person, "PATCH", f"/api/v1/namespaces/{name}", {"metadata": {"labels": {"team": "b"}}}, MERGE)
    refused(person, "POST", "/api/v1/namespaces", {"metadata": {"name": f"own-{tenant.name}"}})


def test_a_member_has_grafts_roles_and_nothing_else(tenant: Tenant, calm: Tenant, ada: str) -> None:
    """An admin reads other Secrets or another namespace, runs pods, or binds further people -> forbidden."""
    person = tenant.api.as_user(ada)
    assert may(person, "get", "secrets", tenant.name, "graft-storage")
    for verb, resource, name in (
        ("list", "secrets", ""), ("get", "secrets", "other"), ("create", "secrets", ""), ("create", "pods", ""),
        ("create", "pods/exec", ""), ("create", "serviceaccounts/token", "default"), ("patch", "configmaps", ""),
    ):  # fmt: skip
        assert not may(person, verb, resource, tenant.name, name), (verb, resource)
    for verb, resource in (("create", "rolebindings"), ("patch", "rolebindings"), ("bind", "clusterroles")):
        assert not may(person, verb, resource, tenant.name, group=RBAC), (verb, resource)
    for resource in ("finetunejobs", "adapters", "adapterdeployments"):
        assert may(person, "delete", resource, tenant.name, group="graft.dev")
        assert not may(person, "get", resource, calm.name, group="graft.dev")
        assert not may(person, "patch", f"{resource}/status", tenant.name, group="graft.dev")
    assert not may(person, "get", "secrets", calm.name, "graft-storage")


def test_kubernetes_own_admin_of_a_namespace_takes_no_tenant(tenant: Tenant, calm: Tenant, ada: str) -> None:
    """An admin by Kubernetes' own role forges a child of the Tenant in its namespace -> it is removed, and gave no right
    that the admin had not. The Tenant of others is not touched."""
    name = f"kube-admin-{tenant.name}"
    subject = {"apiGroup": RBAC, "kind": "User", "name": name}
    tenant.api.create({
        "apiVersion": f"{RBAC}/v1", "kind": "RoleBinding", "metadata": {"name": "admin", "namespace": calm.name},
        "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": "admin"}, "subjects": [subject],
    })  # fmt: skip
    person = tenant.api.as_user(name)
    ours = tenant.api.list("RoleBinding", tenant.name, "graft.dev/owner-kind=Tenant")[0]
    kept = {key: ours["metadata"][key] for key in ("labels", "ownerReferences")}
    forged = (
        {"apiVersion": f"{RBAC}/v1", "kind": "RoleBinding"}
        | ours
        | {"metadata": kept | {"name": "forged", "namespace": calm.name}, "subjects": [subject]}
    )
    tenant.wait(lambda: may(person, "create", "rolebindings", calm.name, group=RBAC), "the admin is bound")
    with pytest.raises(Refused, match="attempting to grant RBAC permissions not currently held"):
        person.create(forged | {"roleRef": ours["roleRef"] | {"name": "cluster-admin"}})
    person.create(forged | {"roleRef": ours["roleRef"] | {"name": "graft-view"}})
    tenant.wait(lambda: not bindings(calm), "the forged child is deleted")
    assert set(bindings(tenant)) == {"graft-view", "graft-edit", "graft-admin"}
    refused(person, "PATCH", f"/api/v1/namespaces/{calm.name}", {"metadata": {"labels": {"team": "b"}}}, MERGE)


def test_the_operator_binds_people_to_grafts_roles_only(tenant: Tenant) -> None:
    """Whoever has the operator's token binds somebody to another role, or in a namespace that is not bound -> forbidden."""
    operator = tenant.api.as_token(tenant.api.token(SYSTEM, ACCOUNT))
    path = f"/apis/{RBAC}/v1/namespaces/{{}}/rolebindings?dryRun=All"

    def binding(role: str) -> dict[str, object]:
        return {
            "apiVersion": f"{RBAC}/v1", "kind": "RoleBinding", "metadata": {"name": "more"},
            "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": role},
            "subjects": [{"apiGroup": RBAC, "kind": "User", "name": "mallory"}],
        }  # fmt: skip

    operator.call("POST", path.format(tenant.name), binding("graft-edit"))
    for role in ("admin", "edit", "cluster-admin", "graft-tenant-admin", "graft-basemodel-admin"):
        assert "attempting to grant" in refused(operator, "POST", path.format(tenant.name), binding(role))
    refused(operator, "POST", path.format("default"), binding("graft-view"))
    refused(operator, "PATCH", f"{TENANTS}/any", {"spec": {}}, MERGE)


ENFORCE = "pod-security.kubernetes.io/enforce"
RESTRICTED = {ENFORCE: "restricted", f"{ENFORCE}-version": "latest"}
POLICIES = {
    "ValidatingAdmissionPolicy": "validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": "validatingadmissionpolicybindings",
}


@pytest.fixture
def guarded(api: Api) -> Iterator[None]:
    """Install the chart's policy for the operator's writes to namespaces. It concerns nobody else."""
    name = "graft-namespaces"
    objects = [
        item for item in from_chart(POLICIES.keys(), tenants__enabled="true") if item["metadata"]["name"] == name
    ]
    assert [item["kind"] for item in objects] == list(POLICIES)
    root = "/apis/admissionregistration.k8s.io/v1"
    for item in objects:
        api.call("POST", f"{root}/{POLICIES[item['kind']]}", item)
    yield
    for plural in reversed(POLICIES.values()):
        api.call("DELETE", f"{root}/{plural}/{name}")


def test_the_operator_can_only_make_a_namespace_stricter(tenant: Tenant, guarded: None) -> None:
    """Whoever has the operator's token weakens Pod Security, or changes anything else of a namespace -> refused."""
    operator = tenant.api.as_token(tenant.api.token(SYSTEM, ACCOUNT))
    path = f"/api/v1/namespaces/{tenant.name}"

    def refusal(patch: object) -> str:
        try:
            operator.call("PATCH", f"{path}?dryRun=All", {"metadata": patch}, MERGE)
        except Refused as error:
            return str(error)
        return ""

    tenant.wait(lambda: refusal({"labels": {ENFORCE: "privileged"}}), "the policy is in force")
    checked = tenant.api.call(
        "GET", "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/graft-namespaces"
    )
    assert not checked.get("status", {}).get("typeChecking", {}).get("expressionWarnings"), checked
    for level in ("privileged", "baseline", None):
        assert "restricted only" in refusal({"labels": RESTRICTED | {ENFORCE: level}})
    assert "restricted only" in refusal({"labels": RESTRICTED | {f"{ENFORCE}-version": "v1.22"}})
    for labels in ({"team": "b"}, {"pod-security.kubernetes.io/warn": "privileged"}, {"istio-injection": "enabled"}):
        assert "no other label" in refusal({"labels": RESTRICTED | labels})
    for patch in ({"annotations": {"openshift.io/node-selector": "gpu"}}, {"finalizers": ["graft.dev/never"]}):
        assert "nothing but labels" in refusal({"labels": RESTRICTED} | patch)
    assert refusal({"labels": RESTRICTED}) == ""
    refused(operator, "PATCH", "/api/v1/namespaces/default?dryRun=All", {"metadata": {"labels": RESTRICTED}}, MERGE)
    refused(operator, "DELETE", path)
    # The operator itself works under the policy.
    tenant.api.patch("Namespace", None, tenant.name, {"metadata": {"labels": {ENFORCE: "privileged"}}})
    team(tenant, tenant.name)
    ready(tenant, tenant.name, "AsExpected")
    found = tenant.api.get("Namespace", None, tenant.name)
    tenant.api.delete("Tenant", None, tenant.name)
    assert found is not None and found["metadata"]["labels"].items() >= RESTRICTED.items()

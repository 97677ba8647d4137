"""People with the chart's roles, and with Kubernetes' own, try what the roles must not allow. The real API server answers."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from graft.artifacts.store import S3Store
from worlds.cluster.api import Api, Object, Refused
from worlds.cluster.operator_process import ACCOUNT, SYSTEM, from_chart
from worlds.cluster.tenant import BASE, Tenant
from worlds.cluster.tenants import make_base_model

RBAC = "rbac.authorization.k8s.io/v1"
GRAFT = "/apis/graft.dev/v1alpha1"
KINDS = ("finetunejobs", "adapters", "adapterdeployments")
GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


class Person:
    """A user with some roles: in one namespace, or in the whole cluster."""

    def __init__(self, admin: Api, name: str) -> None:
        self._admin, self.name, self.api = admin, name, admin.as_user(name)

    def bind(self, role: str, namespace: str | None = None) -> "Person":
        self._admin.call(
            "POST",
            f"/apis/{RBAC}/" + (f"namespaces/{namespace}/rolebindings" if namespace else "clusterrolebindings"),
            binding(role, self.name, namespace),
        )
        return self

    def may(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> bool:
        """Try a request without effect. Return False if the API server forbids it. Any other refusal raises."""
        query = "" if method == "GET" else ("&" if "?" in path else "?") + "dryRun=All"
        try:
            self.api.text(method, path + query, body, content_type)
        except Refused as error:
            if error.status != 403 or "cannot" not in str(error):
                raise
            return False
        return True


def binding(role: str, user: str, namespace: str | None) -> Object:
    kind = "RoleBinding" if namespace else "ClusterRoleBinding"
    metadata = {"name": f"{user}-{role}"} | ({"namespace": namespace} if namespace else {})
    subjects = [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}]
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role}
    return {"apiVersion": RBAC, "kind": kind, "metadata": metadata, "roleRef": reference, "subjects": subjects}


@pytest.fixture
def person(tenant: Tenant) -> Callable[[str], Person]:
    return lambda name: Person(tenant.api, f"{name}-{tenant.name}")


def inside(namespace: str, resource: str, name: str = "") -> str:
    return f"{GRAFT}/namespaces/{namespace}/{resource}" + (f"/{name}" if name else "")


def core(namespace: str, resource: str, name: str = "") -> str:
    return f"/api/v1/namespaces/{namespace}/{resource}" + (f"/{name}" if name else "")


def denied(who: Person, *requests: tuple[str, str] | tuple[str, str, Any]) -> None:
    """Check that every request is forbidden."""
    allowed = [request for request in requests if who.may(*request)]
    assert not allowed, f"{who.name} may {allowed}"


MERGE = "application/merge-patch+json"


def test_who_may_see_base_models_sees_no_tenant(tenant: Tenant, person: Callable[[str], Person]) -> None:
    """A user with graft-basemodel-view in the whole cluster lists jobs, versions, namespaces or Secrets -> forbidden."""
    who = person("models").bind("graft-basemodel-view")
    assert BASE in {item["metadata"]["name"] for item in who.api.list("BaseModel")}
    denied(
        who,
        *(("GET", f"{GRAFT}/{kind}") for kind in KINDS),
        *(("GET", inside(tenant.name, kind)) for kind in KINDS),
        ("GET", "/api/v1/namespaces"),
        ("GET", core(tenant.name, "secrets")),
        ("GET", core(SYSTEM, "configmaps")),
        ("DELETE", f"{GRAFT}/basemodels/{BASE}"),
    )
    assert not who.may("PATCH", f"{GRAFT}/basemodels/{BASE}", {"spec": {"version": "9.9.9"}}, MERGE)


def test_who_may_see_one_namespace_sees_no_other_and_writes_nothing(
    tenant: Tenant, calm: Tenant, person: Callable[[str], Person]
) -> None:
    """A user with graft-view in a namespace reads another one, its Secrets and ConfigMaps, or writes -> forbidden."""
    who = person("reader").bind("graft-view", tenant.name)
    assert all(who.may("GET", inside(tenant.name, kind)) for kind in KINDS)
    denied(
        who,
        *(("GET", inside(calm.name, kind)) for kind in KINDS),
        *(("GET", f"{GRAFT}/{kind}") for kind in KINDS),
        ("GET", core(tenant.name, "secrets", "graft-storage")),
        ("GET", core(tenant.name, "configmaps")),
        ("GET", core(tenant.name, "pods")),
        ("POST", inside(tenant.name, "finetunejobs"), tenant.job_manifest("mine")),
        ("DELETE", inside(tenant.name, "finetunejobs")),
    )


@pytest.mark.parametrize("roles", [["graft-edit", "graft-view"], ["edit"], ["admin"]], ids=lambda roles: roles[0])
def test_who_may_write_jobs_writes_no_result_and_no_base_model(
    tenant: Tenant, calm: Tenant, person: Callable[[str], Person], store: S3Store, roles: list[str]
) -> None:
    """A user who may write the kinds writes a status, finalizers of owners, BaseModels or another namespace -> forbidden.

    `edit` and `admin` are Kubernetes' own roles, to which the chart adds Graft's.
    """
    who = person("writer")
    for role in roles:
        who.bind(role, tenant.name)
    tenant.wait(lambda: who.may("GET", inside(tenant.name, "adapters")), f"{roles[0]} has Graft's rules")
    who.api.create(tenant.job_manifest("mine"))
    job = inside(tenant.name, "finetunejobs", "mine")
    done = {"status": {"stage": "Succeeded", "checked": True, "resolved": {"version": "9.9.9"}}}
    assert not who.may("PATCH", f"{job}/status", done, MERGE)
    after = who.api.call("PATCH", f"{job}?dryRun=All", done | {"metadata": {"labels": {"a": "b"}}}, MERGE)
    assert after["metadata"]["labels"]["a"] == "b"
    assert after.get("status", {}).get("resolved", {}).get("version") != "9.9.9"
    for kind in KINDS:
        assert not who.may("PATCH", f"{inside(tenant.name, kind, 'mine')}/status", done, MERGE)
        assert not who.may("PUT", f"{inside(tenant.name, kind, 'mine')}/finalizers", {})
    model = {
        "apiVersion": "graft.dev/v1alpha1", "kind": "BaseModel", "metadata": {"name": f"stolen-{tenant.name}"},
        "spec": {"source": f"s3://graft/{calm.name}/adapters/support/1.0.0"},
    }  # fmt: skip
    denied(
        who,
        ("GET", f"{GRAFT}/basemodels"),
        ("POST", f"{GRAFT}/basemodels", model),
        *(("GET", f"{GRAFT}/{kind}") for kind in KINDS),
        *(("GET", inside(calm.name, kind)) for kind in KINDS),
        ("POST", inside(calm.name, "finetunejobs"), calm.job_manifest("mine")),
        ("GET", core(SYSTEM, "configmaps", "graft-demand")),
        ("GET", core(SYSTEM, "secrets", "graft-signing")),
        ("GET", core(calm.name, "secrets", "graft-storage")),
        ("POST", core(SYSTEM, "serviceaccounts", f"{ACCOUNT}/token"), {}),
    )


def test_graft_edit_alone_opens_nothing_but_grafts_kinds(tenant: Tenant, person: Callable[[str], Person]) -> None:
    """A user with graft-edit and no other role reads the key of the store, or writes what pods of Graft read -> forbidden."""
    tenant.job("first")
    tenant.running_pod("first")
    who = person("writer").bind("graft-edit", tenant.name).bind("graft-view", tenant.name)
    patch = {"data": {"job.json": "{}"}}
    assert not who.may("PATCH", core(tenant.name, "configmaps", "first-job"), patch, MERGE)
    forged = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x", "namespace": tenant.name}}
    denied(
        who,
        ("GET", core(tenant.name, "secrets", "graft-storage")),
        ("GET", core(tenant.name, "secrets")),
        ("GET", core(tenant.name, "configmaps", "first-job")),
        ("POST", core(tenant.name, "configmaps"), forged),
        ("GET", core(tenant.name, "pods")),
        ("GET", f"/apis/batch/v1/namespaces/{tenant.name}/jobs"),
        ("POST", f"/apis/{RBAC}/namespaces/{tenant.name}/rolebindings", binding("graft-tenant", who.name, tenant.name)),
    )


def test_an_admin_of_a_namespace_cannot_take_the_operators_rights(
    tenant: Tenant, person: Callable[[str], Person]
) -> None:
    """An admin of a namespace binds the operator's ClusterRole to itself -> the API server refuses the escalation."""
    who = person("admin").bind("admin", tenant.name)
    with pytest.raises(Refused, match="attempting to grant RBAC permissions not currently held") as error:
        who.api.create(binding("graft-operator", who.name, tenant.name))
    assert error.value.status == 403


def test_the_platform_team_for_models_sees_no_tenant(
    tenant: Tenant, person: Callable[[str], Person], store: S3Store
) -> None:
    """A user with graft-basemodel-admin lists what tenants do, or writes a BaseModel's status -> forbidden."""
    who = person("platform").bind("graft-basemodel-admin")
    name = f"own-{tenant.name}"
    make_base_model(who.api, store, name)
    denied(
        who, *(("GET", f"{GRAFT}/{kind}") for kind in KINDS), ("GET", "/api/v1/secrets"), ("GET", "/api/v1/namespaces")
    )
    assert not who.may("PATCH", f"{GRAFT}/basemodels/{name}/status", {"status": {"digest": "sha256:0"}}, MERGE)
    who.api.delete("BaseModel", None, name)


# What specs ask the scheduler for.

FORBIDDEN = {
    "allowedPriorityClasses": {"priorityClassName": "system-cluster-critical"},
    "allowedRuntimeClasses": {"runtimeClassName": "host"},
    "allowedTolerations": {"tolerations": [GPU_TAINT, {"operator": "Exists"}]},
}
ALLOWED = {"runtimeClassName": "nvidia", "tolerations": [GPU_TAINT], "priorityClassName": ""}


def asking(tenant: Tenant, name: str, fields: Object) -> list[Object]:
    """Return one manifest for each place of a spec that asks the scheduler for something."""
    version = {"adapter": name, "version": "1.0.0", "baseModel": BASE, "method": "lora"}
    parents = [{"adapter": "a@1.0.0"}, {"adapter": "b@1.0.0"}]
    bring = {"uri": f"s3://graft/{tenant.name}/brought/"}
    return [
        tenant.job_manifest(name, **fields),
        tenant.resource(
            "AdapterDeployment", name, {"baseModel": BASE, "adapters": [], "routes": [{"model": "m"}]} | fields
        ),
        tenant.resource("Adapter", f"{name}-1.0.0", version | {"compose": {"parents": parents} | fields}),
        tenant.resource("Adapter", f"{name}-1.0.0", version | {"import": bring | fields}),
    ]


@pytest.mark.parametrize("value", FORBIDDEN)
def test_the_operator_creates_no_pod_with_a_priority_or_toleration_of_a_tenants_choice(
    tenant: Tenant, value: str
) -> None:
    """A spec asks for system-cluster-critical, a runtime or all taints -> no pod; the condition names the chart's value."""
    conditions = {"FineTuneJob": "Accepted", "AdapterDeployment": "Accepted", "Adapter": "Ready"}
    for number, manifest in enumerate(asking(tenant, "greedy", FORBIDDEN[value])):
        if number == 2:
            continue  # a composition has the same code, and would wait for its parents
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        tenant.api.create(manifest)
        found = tenant.until(kind, name, conditions[kind], "SchedulingForbidden")
        assert f"tenants.{value}" in found["message"]
    assert not tenant.api.list("Pod", tenant.name) and not tenant.api.list("Job", tenant.name)
    assert not tenant.api.list("Deployment", tenant.name)


@contextlib.contextmanager
def policy(tenant: Tenant) -> Iterator[None]:
    """Install the chart's admission policy for this namespace only. Wait until it is in force."""
    kinds = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    objects = from_chart(kinds)
    assert [item["kind"] for item in objects] == list(kinds)
    name = f"scheduling-{tenant.name}"
    paths = {
        item["kind"]: f"/apis/admissionregistration.k8s.io/v1/{plural}"
        for item, plural in zip(
            objects, ("validatingadmissionpolicies", "validatingadmissionpolicybindings"), strict=True
        )
    }
    objects[1]["spec"] |= {
        "policyName": name,
        "matchResources": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": tenant.name}}},
    }
    for item in objects:
        item["metadata"]["name"] = name
        tenant.api.call("POST", paths[item["kind"]], item)
    try:
        probe = tenant.job_manifest("probe", priorityClassName="system-node-critical")
        tenant.wait(lambda: refusal(tenant, probe) is not None, "the policy is in force")
        checked = tenant.api.call("GET", f"{paths[kinds[0]]}/{name}").get("status", {}).get("typeChecking", {})
        assert not checked.get("expressionWarnings"), checked
        yield
    finally:
        for kind in reversed(kinds):
            tenant.api.call("DELETE", f"{paths[kind]}/{name}")


def refusal(tenant: Tenant, manifest: Object) -> str | None:
    """Return why the API server refuses to create a resource, or None if it would create it."""
    path = inside(tenant.name, f"{manifest['kind'].lower()}s")
    try:
        tenant.api.call("POST", f"{path}?dryRun=All", manifest)
    except Refused as error:
        assert error.status == 422, error
        return str(error)
    return None


def test_the_api_server_refuses_them_at_apply(tenant: Tenant) -> None:
    """The same specs are applied where the chart's policy is installed -> the API server refuses each, with the remedy."""
    with policy(tenant):
        for value, fields in FORBIDDEN.items():
            for manifest in asking(tenant, "greedy", fields):
                told = refusal(tenant, manifest)
                assert told is not None and f"tenants.{value}" in told, json.dumps([told, manifest])
        for manifest in [*asking(tenant, "modest", ALLOWED), *asking(tenant, "plain", {})]:
            assert refusal(tenant, manifest) is None


ANNOTATED = {"podTemplate": {"annotations": {"k8s.v1.cni.cncf.io/networks": "other"}, "labels": {"team": "a"}}}
LABELLED = {"podTemplate": {"labels": {"team": "a"}, "env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}}


def test_a_pod_template_switches_nothing_on_that_the_platform_team_did_not_allow(tenant: Tenant) -> None:
    """A spec annotates its pods for another network -> no pod; the condition, or the API server, names the chart's value."""
    for manifest in asking(tenant, "annotated", ANNOTATED)[:2]:
        tenant.api.create(manifest)
        found = tenant.until(manifest["kind"], "annotated", "Accepted", "SchedulingForbidden")
        assert "tenants.allowedPodAnnotations" in found["message"]
    assert not tenant.api.list("Job", tenant.name) and not tenant.api.list("Deployment", tenant.name)
    with policy(tenant):
        for refused, plain in zip(
            asking(tenant, "other", ANNOTATED)[:2], asking(tenant, "other", LABELLED)[:2], strict=True
        ):
            told = refusal(tenant, refused)
            assert told is not None and "tenants.allowedPodAnnotations" in told
            assert refusal(tenant, plain) is None
            assert "key of a label" in (refusal(tenant, labelled(plain, "graft.dev/owner-uid")) or "")


def labelled(manifest: Object, key: str) -> Object:
    return manifest | {"spec": manifest["spec"] | {"podTemplate": {"labels": {key: "a"}}}}


def test_what_exists_can_still_be_changed_and_deleted(tenant: Tenant) -> None:
    """No attack: resources of an earlier version keep their fields. They can be suspended and changed, but not widened."""
    (job, deployment, *_) = asking(tenant, "old", FORBIDDEN["allowedPriorityClasses"])
    for manifest in (job, deployment):
        tenant.api.create(manifest)
    with policy(tenant):
        assert tenant.api.patch("FineTuneJob", tenant.name, "old", {"spec": {"suspend": True}})["spec"]["suspend"]
        tenant.api.patch("AdapterDeployment", tenant.name, "old", {"spec": {"replicas": 0}})
        with pytest.raises(Refused, match=r"tenants\.allowedPriorityClasses"):
            tenant.api.patch("AdapterDeployment", tenant.name, "old", {"spec": {"priorityClassName": "other"}})
        tenant.api.patch("AdapterDeployment", tenant.name, "old", {"spec": {"priorityClassName": None}})
        tenant.until("AdapterDeployment", "old", "Accepted", "Resolved")
        for kind in ("FineTuneJob", "AdapterDeployment"):
            tenant.api.delete(kind, tenant.name, "old")
            tenant.gone(kind, "old")

"""A Tenant gives its people Graft's roles in its namespaces, and keeps them, on a real API server."""

from collections.abc import Iterator

import pytest
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from worlds.cluster.api import Api, Object, Refused
from worlds.cluster.tenant import BASE, Tenant
from worlds.cluster.tenants import bind, bindings, make_namespace, may, new_tenant, ready, team, user


@pytest.fixture
def teams(tenant: Tenant) -> Iterator[list[str]]:
    """Yield the names of two Tenants of the test. They are deleted afterwards."""
    names = [f"{tenant.name}-{part}" for part in ("first", "second")]
    yield names
    for name in names:
        tenant.api.delete("Tenant", None, name)


def test_members_have_their_role_in_the_namespaces_and_lose_it(tenant: Tenant, calm: Tenant, teams: list[str]) -> None:
    ada, bob, eve = (f"{person}-{tenant.name}" for person in ("ada", "bob", "eve"))
    members = [user(ada, "admin"), user(bob, "edit"), user(eve, "view")]
    team(tenant, teams[0], members, namespaces={"names": [tenant.name, calm.name]})
    found = ready(tenant, teams[0], "AsExpected")
    assert found["status"]["namespaces"] == sorted([tenant.name, calm.name]) and found["status"]["stage"] == "Ready"
    assert bindings(calm) == {"graft-view": [ada, bob, eve], "graft-edit": [ada, bob], "graft-admin": [ada]}

    people = {name: tenant.api.as_user(name) for name in (ada, bob, eve)}
    people[bob].create(tenant.job_manifest("of-bob"))
    assert people[eve].get("FineTuneJob", tenant.name, "of-bob") is not None
    tenant.running_pod("of-bob")
    reads = [
        (may(api, "get", "secrets", tenant.name, "graft-storage"), may(api, "get", "pods/log", tenant.name))
        for api in people.values()
    ]
    assert reads == [(True, True), (False, False), (False, False)]

    # Bob leaves the team, Eve may write, and one of the namespaces leaves.
    members = [user(ada, "admin"), user(eve, "edit")]
    tenant.api.patch("Tenant", None, teams[0], {"spec": {"members": members, "namespaces": {"names": [tenant.name]}}})
    ready(tenant, teams[0], "AsExpected", says="1 namespace,")
    assert bindings(tenant) == {"graft-view": [ada, eve], "graft-edit": [ada, eve], "graft-admin": [ada]}
    tenant.wait(lambda: not bindings(calm), "the namespace that left has no bindings of the Tenant")
    assert may(people[eve], "create", "finetunejobs", tenant.name, group="graft.dev")
    assert not may(people[bob], "get", "finetunejobs", tenant.name, group="graft.dev")

    tenant.api.delete("Tenant", None, teams[0])
    tenant.wait(lambda: not bindings(tenant), "the bindings end with the Tenant")
    assert tenant.get("FineTuneJob", "of-bob")


def test_what_somebody_changes_is_repaired(tenant: Tenant, teams: list[str]) -> None:
    """An admin of the namespace deletes a binding, adds a person to it, or replaces it by one with another role."""
    ada = f"ada-{tenant.name}"
    team(tenant, teams[0], [user(ada, "edit")])
    ready(tenant, teams[0], "AsExpected")
    wanted = {"graft-edit": [ada], "graft-view": [ada]}
    name = f"graft-{teams[0]}-edit"

    def repaired(what: str) -> None:
        tenant.wait(lambda: bindings(tenant) == wanted, f"{what} is repaired", explain=lambda: str(bindings(tenant)))

    tenant.api.delete("RoleBinding", tenant.name, name)
    repaired("a deletion")
    more = [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": person} for person in (ada, "mallory")]
    tenant.api.patch("RoleBinding", tenant.name, name, {"subjects": more})
    repaired("a person")
    live = tenant.get("RoleBinding", name)
    tenant.api.delete("RoleBinding", tenant.name, name)
    kept = {key: live["metadata"][key] for key in ("name", "namespace", "labels", "ownerReferences")}
    forged = live | {"metadata": kept, "roleRef": live["roleRef"] | {"name": "cluster-admin"}, "subjects": more}
    tenant.wait(lambda: _created(tenant.api, forged), "the binding with another role exists")
    repaired("a role")
    tenant.wait(lambda: tenant.get("RoleBinding", name)["roleRef"]["name"] == "graft-edit", "the role is Graft's")


def _created(api: Api, manifest: Object) -> bool:
    """Create an object. The operator may create it first: delete it then, and try again."""
    try:
        api.create(manifest)
    except Refused as error:
        assert error.status == 409, error
        api.delete("RoleBinding", manifest["metadata"]["namespace"], manifest["metadata"]["name"])
        return False
    return True


def test_of_two_tenants_that_ask_for_a_namespace_the_older_has_it(
    tenant: Tenant, calm: Tenant, teams: list[str]
) -> None:
    ada, bob = f"ada-{tenant.name}", f"bob-{tenant.name}"
    first = team(tenant, teams[0], [user(ada, "view")])
    ready(tenant, teams[0], "AsExpected")

    def younger() -> bool:
        made = team(tenant, teams[1], [user(bob, "view")], namespaces={"names": [tenant.name, calm.name]})
        return bool(made["metadata"]["creationTimestamp"] >= first["metadata"]["creationTimestamp"])

    assert younger()
    found = ready(tenant, teams[1], "NamespaceClaimed", says=f"{tenant.name} belongs to Tenant {teams[0]}")
    assert found["status"]["namespaces"] == [calm.name] and found["status"]["stage"] == "Incomplete"
    assert "spec.namespaces" in found["condition"]["message"]
    assert bindings(tenant) == {"graft-view": [ada]} and bindings(calm) == {"graft-view": [bob]}
    tenant.api.patch("Tenant", None, teams[0], {"spec": {"namespaces": {"names": ["elsewhere-entirely"]}}})
    ready(tenant, teams[1], "AsExpected")
    ready(tenant, teams[0], "NamespaceMissing", says="elsewhere-entirely")
    tenant.wait(lambda: bindings(tenant) == {"graft-view": [bob]}, "the namespace is the other Tenant's")


def test_a_namespace_joins_by_its_label_when_it_is_bound(
    api: Api, store: S3Store, tenant: Tenant, teams: list[str], request: pytest.FixtureRequest
) -> None:
    label = {f"team-{tenant.name}": "a"}
    team(tenant, teams[0], [user("ada", "view")], namespaces={"selector": {"matchLabels": label}})
    assert ready(tenant, teams[0], "AsExpected", says="0 namespaces")["status"]["namespaces"] == []
    later = new_tenant(api, store, request)
    api.patch("Namespace", None, later.name, {"metadata": {"labels": label}})
    ready(tenant, teams[0], "NamespaceNotBound", says=f"kubectl create rolebinding graft -n {later.name}")
    assert not bindings(later)
    bind(later)
    found = ready(tenant, teams[0], "AsExpected")
    assert found["status"]["namespaces"] == [later.name] and bindings(later) == {"graft-view": ["ada"]}
    api.patch("Namespace", None, later.name, {"metadata": {"labels": dict.fromkeys(label)}})
    tenant.wait(lambda: not bindings(later), "the namespace left with its label")


def test_a_namespace_is_isolated_and_stays_so(tenant: Tenant, teams: list[str]) -> None:
    """Somebody who may do everything opens it again: the operator closes it."""
    enforce = "pod-security.kubernetes.io/enforce"
    tenant.api.patch("Namespace", None, tenant.name, {"metadata": {"labels": {enforce: "privileged"}}})
    team(tenant, teams[0])
    ready(tenant, teams[0], "AsExpected")

    def secure() -> bool:
        found = tenant.api.get("Namespace", None, tenant.name)
        assert found is not None
        return bool(found["metadata"]["labels"].get(enforce) == "restricted")

    assert secure() and "1 namespace," in ready(tenant, teams[0], "AsExpected")["condition"]["message"]
    root = {"name": "root", "image": "any", "securityContext": {"privileged": True}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "root", "namespace": tenant.name}}
    with pytest.raises(Refused, match=r"violates PodSecurity \"restricted:latest\""):
        tenant.api.create(pod | {"spec": {"containers": [root]}})
    tenant.api.patch("Namespace", None, tenant.name, {"metadata": {"labels": {enforce: "baseline"}}})
    tenant.wait(secure, "Pod Security is restricted again")

    policy = f"graft-{teams[0]}-default-deny"
    before = tenant.get("NetworkPolicy", policy)
    assert before["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for opened in (
        {"egress": [{}], "ingress": [{}]}, {"policyTypes": ["Ingress"]}, {"podSelector": {"matchLabels": {"a": "b"}}},
    ):  # fmt: skip
        tenant.api.patch("NetworkPolicy", tenant.name, policy, {"spec": opened})
        tenant.wait(lambda: tenant.get("NetworkPolicy", policy)["spec"] == before["spec"], f"{opened} is closed again")
    assert tenant.get("ServiceAccount", "default")["automountServiceAccountToken"] is False

    # Graft's pods meet all of it.
    tenant.job("first")
    assert tenant.running_pod("first")


def test_a_model_that_the_tenant_may_not_use_is_refused_until_it_may(tenant: Tenant, teams: list[str]) -> None:
    team(tenant, teams[0], baseModels=["another"])
    ready(tenant, teams[0], "AsExpected")
    tenant.job("first")
    waiting = tenant.until("FineTuneJob", "first", "Accepted", "BaseModelForbidden", says=f"Tenant {teams[0]}")
    assert "spec.baseModels" in waiting["message"] and not tenant.api.list("Job", tenant.name)
    tenant.api.patch("Tenant", None, teams[0], {"spec": {"baseModels": ["another", BASE]}})
    tenant.until("FineTuneJob", "first", "Accepted", "Resolved")
    tenant.running_pod("first")
    store = tenant.tenant_store()
    assert store.get(f"models/{BASE}/config.json")
    tenant.api.patch("Tenant", None, teams[0], {"spec": {"baseModels": ["another"]}})

    def closed() -> bool:
        try:
            store.get(f"models/{BASE}/config.json")
        except StoreError as error:
            return bool(error.trouble == "denied")
        return False

    tenant.wait(closed, "the store refuses the model")
    tenant.api.delete("Tenant", None, teams[0])
    tenant.wait(lambda: not closed(), "without the Tenant, the namespace reads the model as before")


def test_a_namespace_that_is_made_anew_gets_no_key_to_the_files_of_the_old_one(
    api: Api, store: S3Store, tenant: Tenant, teams: list[str], request: pytest.FixtureRequest
) -> None:
    first = new_tenant(api, store, request)
    bind(first)
    team(first, teams[0])
    ready(first, teams[0], "AsExpected")
    api.patch("Namespace", None, first.name, {"metadata": {"labels": {"graft.dev/credentials": "issue"}}})
    first.wait(lambda: api.get("Secret", first.name, "graft-storage"), "the namespace has a key")
    secret = f"{first.name}/datasets/secret.jsonl"
    store.put(secret, b"{}")
    api.delete("Namespace", None, first.name)
    first.wait(lambda: api.get("Namespace", None, first.name) is None, "the namespace is deleted", 60)
    ready(tenant, teams[0], "NamespaceMissing", says=first.name)

    again = make_namespace(api, store, first.name)
    bind(again)
    again.job("first")
    waiting = again.until("FineTuneJob", "first", "Accepted", "PrefixTaken", says=f"Tenant {teams[0]}")
    assert "spec.namespaces.inherit" in waiting["message"]
    assert ready(again, teams[0], "PrefixTaken", says=again.name)["status"]["stage"] == "Incomplete"
    assert api.get("Secret", again.name, "graft-storage") is None and not api.list("Job", again.name)
    api.patch("Tenant", None, teams[0], {"spec": {"namespaces": {"inherit": [again.name]}}})
    again.running_pod("first")
    assert again.tenant_store().get(secret) == b"{}"
    ready(again, teams[0], "AsExpected")


def test_a_job_above_the_quota_waits_and_starts_when_there_is_room(
    tenant: Tenant, calm: Tenant, teams: list[str]
) -> None:
    """The quota is that of all namespaces of the Tenant, and the oldest job starts first."""
    team(tenant, teams[0], namespaces={"names": [tenant.name, calm.name]}, quotas={"trainingJobs": 1, "gpus": 0})
    ready(tenant, teams[0], "AsExpected")
    tenant.job("first")
    pod = tenant.running_pod("first")
    calm.job("second")
    calm.until("FineTuneJob", "second", "Accepted", "QuotaExceeded", says="uses 1 of 1 training jobs")
    tenant.job("third", "other")
    tenant.until("FineTuneJob", "third", "Accepted", "QuotaExceeded", says="Older jobs that wait before this one: 1")
    tenant.job("greedy", "greedy", resources={"limits": {"nvidia.com/gpu": 1}})
    tenant.until("FineTuneJob", "greedy", "Accepted", "QuotaTooSmall", says="needs 1 GPUs")
    assert not calm.api.list("Job", calm.name)

    # A suspended job keeps its place: it would take more than the quota when it resumes.
    tenant.api.patch("FineTuneJob", tenant.name, "first", {"spec": {"suspend": True}})
    tenant.until("FineTuneJob", "first", "Succeeded", "Suspended")
    calm.until("FineTuneJob", "second", "Accepted", "QuotaExceeded")
    tenant.api.patch("FineTuneJob", tenant.name, "first", {"spec": {"suspend": False}})
    pod = tenant.running_pod("first", (pod,))
    tenant.publish_as_trainer("first", pod)
    tenant.end_pod(pod)
    calm.running_pod("second")
    tenant.until("FineTuneJob", "third", "Accepted", "QuotaExceeded", says="uses 1 of 1")
    calm.api.delete("FineTuneJob", calm.name, "second")
    tenant.running_pod("third")

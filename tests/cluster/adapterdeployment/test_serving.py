"""Adapters are added, changed and removed without a restart of the pods.

The order is always the same: load, see it loaded on every replica, shift traffic, unload.
"""

from worlds.cluster.api import Object
from worlds.cluster.fleet import Fleet
from worlds.cluster.tenant import Tenant


def uids(pods: list[Object]) -> list[str]:
    return sorted(pod["metadata"]["uid"] for pod in pods)


def test_adding_an_adapter_restarts_no_pod(tenant: Tenant) -> None:
    tenant.trained("first")
    tenant.trained("other", adapter="sales")
    fleet = Fleet(tenant, "chat")
    before = fleet.serve(["support@1.0.0"], replicas=2)
    sets = tenant.api.list("ReplicaSet", tenant.name)
    generation = tenant.get("Deployment", "chat")["metadata"]["generation"]

    fleet.change(adapters=["support@1.0.0", "sales@1.0.0"])
    fleet.until_wanted("support-1.0.0", "sales-1.0.0")
    fleet.until("Available", "RouteUnavailable")
    for pod in before:
        fleet.agent_says(pod)
    fleet.until("Available", "Serving")
    fleet.until_targets(support="support-1.0.0", sales="sales-1.0.0")
    assert uids(fleet.pods(2)) == uids(before)
    assert [item["metadata"]["uid"] for item in tenant.api.list("ReplicaSet", tenant.name)] == [
        item["metadata"]["uid"] for item in sets
    ]
    assert tenant.get("Deployment", "chat")["metadata"]["generation"] == generation


def test_a_new_version_gets_traffic_when_every_replica_has_it(tenant: Tenant) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    pods = fleet.serve(["support@latest"], replicas=2)
    fleet.until_targets(support="support-1.0.0")

    tenant.trained("second")
    fleet.until_wanted("support-1.0.0", "support-1.0.1")
    assert fleet.targets() == {"support": "support-1.0.0"}
    fleet.agent_says(pods[0])  # one of two replicas has both versions
    fleet.agent_says(pods[1], {"support-1.0.0": "Loaded", "support-1.0.1": "Loading"})
    tenant.wait(
        lambda: [item["loaded"] for item in fleet.status()["adapters"]] == ["1/2"], "one replica has the new version"
    )
    assert fleet.targets() == {"support": "support-1.0.0"}
    assert fleet.wanted_names() == ["support-1.0.0", "support-1.0.1"]
    assert fleet.status()["conditions"][1]["reason"] == "Serving"

    fleet.agent_says(pods[1])
    fleet.until_targets(support="support-1.0.1")
    fleet.until_wanted("support-1.0.1")
    tenant.until("Adapter", "support-1.0.1", "InUse", "Served")
    for pod in pods:
        fleet.agent_says(pod)
    fleet.until("Progressing", "Complete")
    tenant.until("Adapter", "support-1.0.0", "InUse", "NotServed")


def test_the_others_are_served_when_one_adapter_cannot_be_loaded(tenant: Tenant) -> None:
    tenant.trained("first")
    tenant.trained("other", adapter="sales")
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@1.0.0", "sales@1.0.0"])
    (pod,) = fleet.pods(1)
    fleet.until_wanted("support-1.0.0", "sales-1.0.0")
    fleet.agent_says(pod, {"support-1.0.0": "Loaded", "sales-1.0.0": "Failed"}, failure="no module q_proj")
    failed = fleet.until("Progressing", "AdapterFailed")
    assert "sales-1.0.0" in failed["message"] and "EngineRefused: no module q_proj" in failed["message"]
    fleet.until("Available", "RouteUnavailable", says=f"no replica answers {tenant.name}/sales", not_="/support")
    assert fleet.status()["stage"] == "Degraded"
    models = {item["model"].rpartition("/")[2]: item["replicas"] for item in fleet.status()["models"]}
    assert models == {"support": 1, "sales": 0}
    assert not any("--sales-" in name for name in fleet.routes().backends[0].loaded)


def test_a_new_version_that_fails_never_gets_traffic(tenant: Tenant) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    (pod,) = fleet.serve(["support@latest"])
    tenant.trained("second")
    fleet.until_wanted("support-1.0.0", "support-1.0.1")
    fleet.agent_says(pod, {"support-1.0.0": "Loaded", "support-1.0.1": "Failed"}, failure="out of memory")
    fleet.until("Progressing", "AdapterFailed")
    assert fleet.targets() == {"support": "support-1.0.0"}
    assert tenant.condition("AdapterDeployment", "chat", "Available")["reason"] == "Serving"
    assert fleet.status()["stage"] == "Degraded"


def test_a_pod_that_is_not_ready_gets_no_traffic(tenant: Tenant) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    pods = fleet.serve(["support@1.0.0"], replicas=2)
    tenant.wait(lambda: len(fleet.routes().backends) == 2, "both pods are backends")
    fleet.ready(pods[0], False)
    tenant.wait(
        lambda: [item.pod for item in fleet.routes().backends] == [pods[1]["metadata"]["name"]],
        "only the ready pod is a backend",
    )
    assert fleet.until("Available", "Serving")["status"] == "True"
    fleet.ready(pods[1], False)
    fleet.until("Available", "NoReplicaReady")
    assert fleet.routes().unavailable
    fleet.ready(pods[0], True)
    fleet.until("Available", "Serving")


def test_a_replacement_pod_serves_only_after_its_own_agent_reports(tenant: Tenant) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    (old,) = fleet.serve(["support@1.0.0"])
    tenant.api.delete("Pod", tenant.name, old["metadata"]["name"])
    tenant.gone("Pod", old["metadata"]["name"])
    (new,) = fleet.pods(1)
    fleet.until("Available", "RouteUnavailable")
    fleet.agent_says(new)
    fleet.until("Available", "Serving")
    keys = tenant.get("ConfigMap", "chat-residency")["data"]
    assert list(keys) == [new["metadata"]["name"]]


def test_scaling_to_zero_and_back(tenant: Tenant) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    fleet.serve(["support@1.0.0"])
    path = f"/apis/graft.dev/v1alpha1/namespaces/{tenant.name}/adapterdeployments/chat/scale"
    tenant.api.call("PATCH", path, {"spec": {"replicas": 0}}, "application/merge-patch+json")
    fleet.until("Available", "ScaledToZero")
    fleet.pods(0)
    tenant.wait(lambda: fleet.routes().backends == [], "the routes have no backends")
    assert fleet.routes().unavailable == "the deployment is scaled to zero"
    assert fleet.targets() == {"support": "support-1.0.0"}
    tenant.wait(lambda: fleet.status()["stage"] != "Progressing", "the deployment is no longer Progressing")

    tenant.api.call("PATCH", path, {"spec": {"replicas": 1}}, "application/merge-patch+json")
    (pod,) = fleet.pods(1)
    fleet.agent_says(pod)
    fleet.until("Available", "Serving")


def test_an_incompatible_adapter_is_reported_and_the_others_are_served(tenant: Tenant) -> None:
    tenant.trained("first")
    tenant.trained("wide", adapter="wide", rank=128)
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@1.0.0", "wide@latest"])
    (pod,) = fleet.pods(1)
    fleet.until_wanted("support-1.0.0")
    assert "maxLoraRank" in fleet.until("Accepted", "AdapterIncompatible")["message"]
    fleet.agent_says(pod)
    tenant.wait(lambda: fleet.status()["stage"] == "Degraded", "the stage is Degraded")

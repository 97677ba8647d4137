"""The number of pods, which the user, an autoscaler or the next request sets."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from graft.contracts.gateway import DEMAND_CONFIGMAP
from graft.contracts.mounts import ENGINE_PORT
from worlds.cluster.api import Object, Refused
from worlds.cluster.fleet import Fleet
from worlds.cluster.front_door import engine, front_door
from worlds.cluster.operator_process import SYSTEM
from worlds.cluster.tenant import Tenant
from worlds.cluster.tenants import make_base_model

CPU = {"cpuPercent": 70}
SCALED_OBJECT: Object = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "scaledobjects.keda.sh"},
    "spec": {
        "group": "keda.sh",
        "scope": "Namespaced",
        "names": {"kind": "ScaledObject", "plural": "scaledobjects", "singular": "scaledobject"},
        "versions": [
            {
                "name": "v1alpha1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def replicas(tenant: Tenant) -> int:
    return int(tenant.get("Deployment", "chat")["spec"]["replicas"])


def scale(tenant: Tenant, number: int) -> None:
    """Set the replicas through the scale subresource, as an autoscaler does."""
    path = f"/apis/apps/v1/namespaces/{tenant.name}/deployments/chat/scale"
    tenant.api.call("PATCH", path, {"spec": {"replicas": number}}, "application/merge-patch+json")


def engine_flags(tenant: Tenant) -> list[str]:
    (container,) = tenant.get("Deployment", "chat")["spec"]["template"]["spec"]["containers"]
    return list(container["command"])


def test_several_replicas_have_a_disruption_budget_and_run_on_different_nodes(tenant: Tenant) -> None:
    fleet = Fleet(tenant, "chat")
    fleet.deploy([], routes=[{"model": "base"}], replicas=2, shutdownSeconds=60)
    pods = fleet.pods(2)
    budget = tenant.get("PodDisruptionBudget", "chat")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"].items() <= pods[0]["metadata"]["labels"].items()
    spec: Any = pods[0]["spec"]
    assert spec["terminationGracePeriodSeconds"] == 80
    # These nodes have no zone label, as in many on-premises clusters. The pods must run on different nodes nevertheless.
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2

    fleet.change(replicas=1)
    fleet.pods(1)
    tenant.gone("PodDisruptionBudget", "chat")  # with one replica it would block the drain of the node


def test_the_operator_leaves_the_replicas_to_the_autoscaler(tenant: Tenant) -> None:
    fleet = Fleet(tenant, "chat")
    fleet.deploy([], routes=[{"model": "base"}], replicas=3)
    fleet.pods(3)
    fleet.change(autoscaling={"minReplicas": 2, "maxReplicas": 5, "target": CPU | {"requestsPerReplica": 8}})
    tenant.wait(lambda: tenant.api.get("HorizontalPodAutoscaler", tenant.name, "chat"), "the autoscaler exists")
    spec = tenant.get("HorizontalPodAutoscaler", "chat")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 5)
    assert {item["type"] for item in spec["metrics"]} == {"ContainerResource", "External"}
    assert spec["scaleTargetRef"]["name"] == "chat"
    assert replicas(tenant) == 3, "the hand-over must not reset the replicas to the default of 1"

    def claimed() -> list[str]:
        entries = tenant.get("Deployment", "chat")["metadata"]["managedFields"]
        return [item["manager"] for item in entries if "f:replicas" in item["fieldsV1"].get("f:spec", {})]

    tenant.wait(
        lambda: "graft-operator" not in claimed(),
        "the operator no longer owns the field spec.replicas",
        explain=lambda: str(claimed()),
    )
    scale(tenant, 4)
    fleet.pods(4)
    # A new limit rolls the pods and does not change their number.
    fleet.change(limits={"maxLoras": 4, "adaptersPerReplica": 4})
    tenant.wait(lambda: "4" in engine_flags(tenant), "the pod template has the new limit")
    assert replicas(tenant) == 4
    tenant.wait(
        lambda: "behavior" in tenant.get("HorizontalPodAutoscaler", "chat")["spec"],
        "the autoscaler limits how many replicas it removes at once",
    )
    (policy,) = tenant.get("HorizontalPodAutoscaler", "chat")["spec"]["behavior"]["scaleDown"]["policies"]
    assert policy["value"] == 1
    fleet.pods(4)
    tenant.wait(
        lambda: fleet.status()["readyText"] == "4/4", "all replicas are ready", 120, lambda: str(fleet.status())
    )

    fleet.change(autoscaling=None, replicas=1)
    fleet.pods(1)
    tenant.gone("HorizontalPodAutoscaler", "chat")


def test_without_keda_the_condition_names_the_remedy_and_the_models_are_served(tenant: Tenant) -> None:
    fleet = Fleet(tenant, "chat")
    keda = {"provider": "keda", "minReplicas": 1, "maxReplicas": 3}
    fleet.deploy([], routes=[{"model": "base"}], autoscaling=keda | {"target": {"requestsPerReplica": 8}})
    refused = fleet.until("Accepted", "AutoscalerMissing")
    assert "Install KEDA" in refused["message"] and "provider to hpa" in refused["message"]
    (pod,) = fleet.pods(1)
    fleet.agent_says(pod)
    assert fleet.until("Available", "Serving")["status"] == "True"

    tenant.api.call("POST", CRDS, SCALED_OBJECT)
    try:
        fleet.until("Accepted", "Resolved", timeout=60)
        spec = tenant.get("ScaledObject", "chat")["spec"]
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (1, 3)
        (trigger,) = spec["triggers"]
        assert trigger["metadata"]["serverAddress"] == "http://prometheus:9090"
        assert f'deployment_namespace="{tenant.name}"' in trigger["metadata"]["query"]
    finally:
        fleet.change(autoscaling=None)
        tenant.gone("ScaledObject", "chat")
        tenant.api.call("DELETE", f"{CRDS}/scaledobjects.keda.sh")


def test_invalid_autoscaling_is_refused(tenant: Tenant) -> None:
    for spec, message in (
        ({"autoscaling": {"maxReplicas": 3}}, "autoscaling.target"),
        ({"autoscaling": {"minReplicas": 4, "maxReplicas": 3, "target": CPU}}, "minReplicas must not be above"),
        (
            {"autoscaling": {"minReplicas": 0, "maxReplicas": 1, "provider": "keda"}},
            "provider keda does not support minReplicas 0",
        ),
        ({"strategy": "serverless"}, "minReplicas 0"),
        ({"strategy": "dedicated", "autoscaling": {"minReplicas": 0, "maxReplicas": 1}}, "strategy serverless"),
    ):
        with pytest.raises(Refused, match=message):
            Fleet(tenant, "chat").deploy([], routes=[{"model": "base"}], **spec)


def test_an_idle_deployment_scales_to_zero_and_the_next_request_wakes_it(tenant: Tenant) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@1.0.0"], autoscaling={"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 5})
    (pod,) = fleet.pods(1)
    fleet.until_wanted("support-1.0.0")
    fleet.agent_says(pod)
    fleet.until("Available", "Serving")

    asleep = fleet.until("Available", "Asleep")
    assert asleep["status"] == "True" and "wakes it" in asleep["message"]
    fleet.pods(0)
    tenant.wait(lambda: fleet.status()["stage"] == "Asleep", "the stage is Asleep")
    tenant.wait(lambda: fleet.status()["readyText"] == "0/0", "the deployment has no pods")
    assert fleet.status()["sizing"]["strategy"] == "serverless"
    assert fleet.routes().idle_seconds == 5 and fleet.routes().backends == []
    assert fleet.targets() == {"support": "support-1.0.0"}

    address = "127.77.0.1"
    with engine(address, ENGINE_PORT), front_door(tenant.api, "gw-1") as door, ThreadPoolExecutor() as clients:
        first = clients.submit(door.ask, f"{tenant.name}/support")
        (pod,) = fleet.pods(1)  # the operator read the demand from the gateway's ConfigMap
        assert not first.done(), first.result().data
        path = f"/api/v1/namespaces/{tenant.name}/pods/{pod['metadata']['name']}/status"
        where = {"status": {"podIP": address, "podIPs": [{"ip": address}]}}
        tenant.api.call("PATCH", path, where, "application/merge-patch+json")
        fleet.agent_says(pod)
        answer = first.result(60)
        assert answer.status == 200 and answer.json()["graft"]["adapter"] == "support-1.0.0", answer.data
        demand = tenant.api.get("ConfigMap", SYSTEM, DEMAND_CONFIGMAP)
        assert demand is not None
        assert json.loads(demand["data"][f"{tenant.name}.chat.gw-1"])["deployment"] == "chat"
    fleet.until("Available", "Asleep")

    fleet.change(replicas=0)  # the user stopped the deployment, so no request wakes it
    fleet.until("Available", "ScaledToZero")
    tenant.wait(lambda: fleet.routes().idle_seconds is None, "the gateway no longer holds requests for the deployment")
    tenant.api.delete("AdapterDeployment", tenant.name, "chat")
    tenant.gone("AdapterDeployment", "chat")

    def left() -> list[str]:
        found = tenant.api.get("ConfigMap", SYSTEM, DEMAND_CONFIGMAP) or {}
        return [key for key in found.get("data") or {} if key.startswith(f"{tenant.name}.")]

    assert left() == []


def test_a_restarted_operator_wakes_a_deployment_that_was_requested_meanwhile(tenant: Tenant, running: Any) -> None:
    fleet = Fleet(tenant, "chat")
    scaling = {"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 5}
    fleet.deploy([], routes=[{"model": "base"}], autoscaling=scaling)
    fleet.pods(1)
    fleet.until("Available", "Asleep", timeout=90)
    fleet.change(autoscaling=scaling | {"idleSeconds": 60})  # the request still counts after the restart
    fleet.until("Available", "Asleep")
    running.kill9()
    with front_door(tenant.api, "gw-2", hold_seconds=5.0) as door:
        answer = door.ask(f"{tenant.name}/base")
        assert answer.status == 503, answer.data
        assert answer.headers["Retry-After"] == "10"
    running.start()
    fleet.pods(1)


def test_a_terminating_pod_leaves_the_routes_at_once(tenant: Tenant) -> None:
    fleet = Fleet(tenant, "chat")
    fleet.deploy([], routes=[{"model": "base"}], replicas=2)
    pods = fleet.pods(2)
    for pod in pods:
        fleet.agent_says(pod)
    tenant.wait(lambda: len(fleet.routes().backends) == 2, "both pods are backends")
    going = pods[0]["metadata"]["name"]
    tenant.api.patch("Pod", tenant.name, going, {"metadata": {"finalizers": ["graft.test/still-answering"]}})
    tenant.api.delete("Pod", tenant.name, going)
    tenant.wait(
        lambda: going not in [item.pod for item in fleet.routes().backends], "the terminating pod has left the routes"
    )
    assert tenant.get("Pod", going)["metadata"]["deletionTimestamp"], (
        "the pod must still exist, because a finalizer holds it"
    )
    tenant.api.patch("Pod", tenant.name, going, {"metadata": {"finalizers": None}})
    tenant.gone("Pod", going)


def test_new_base_model_files_roll_the_pods_one_by_one(tenant: Tenant) -> None:
    base = make_base_model(tenant.api, tenant.store, f"base-{tenant.name}"[:60].strip("-"))
    fleet = Fleet(tenant, "chat")
    fleet.deploy([], baseModel=base, routes=[{"model": "base"}], replicas=2)
    before = {pod["metadata"]["uid"] for pod in fleet.pods(2)}

    def digest() -> str:
        command = tenant.get("Deployment", "chat")["spec"]["template"]["spec"]["initContainers"][0]["command"]
        return str(command[command.index("--digest") + 1])

    old = digest()
    spec = tenant.api.get("BaseModel", None, base)
    assert spec is not None
    tenant.api.delete("BaseModel", None, base)
    tenant.store.put(f"models/{base}/model-2.safetensors", b"more weights")
    tenant.api.create({key: spec[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": {"name": base}})
    tenant.wait(lambda: digest() != old, "the pod template has the new digest")
    rolling = tenant.get("Deployment", "chat")["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxUnavailable": 0, "maxSurge": 1}

    def replaced() -> bool:
        alive = [
            pod
            for pod in tenant.pods(tenant.get("AdapterDeployment", "chat"))
            if not pod["metadata"].get("deletionTimestamp")
        ]
        return len(alive) == 2 and not before & {pod["metadata"]["uid"] for pod in alive}

    tenant.wait(replaced, "both pods are replaced")

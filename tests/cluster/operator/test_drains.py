"""Drains evict pods through the API. Budgets keep the pods that serve, and let those go that crash."""

from typing import Any

import pytest
from worlds.cluster.api import Api, Object, Refused
from worlds.cluster.fleet import Fleet
from worlds.cluster.operator_process import from_chart
from worlds.cluster.tenant import Tenant

REFUSED = 429


def evict(api: Api, pod: Object) -> int:
    """Evict a pod, as `kubectl drain` does. Return the HTTP status."""
    meta = {key: pod["metadata"][key] for key in ("name", "namespace")}
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta}
    try:
        api.call("POST", f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/eviction", body)
    except Refused as error:
        return error.status
    return 201


def crash(api: Api, pod: Object) -> None:
    """Write the status of a pod whose containers crash again and again, as the kubelet does."""
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting failed container"}}
    containers = [
        {
            "name": item["name"],
            "image": item["image"],
            "imageID": "",
            "ready": False,
            "restartCount": 7,
            "state": waiting,
        }
        for item in pod["spec"]["containers"]
    ]
    conditions = [{"type": kind, "status": "False"} for kind in ("Ready", "ContainersReady")]
    status = {"containerStatuses": containers, "conditions": conditions}
    api.patch_status("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"], status)


def drained(tenant: Tenant, budget: str, labels: str) -> None:
    """Check what a drain of two replicas may do while they are ready, and while both crash."""
    api = tenant.api

    def pods() -> list[Object]:
        found = api.list("Pod", tenant.name, labels)
        return [pod for pod in found if pod.get("status", {}).get("phase") == "Running"]

    def healthy(count: int) -> bool:
        found = tenant.get("PodDisruptionBudget", budget).get("status", {})
        return bool(len(pods()) == 2 and found.get("expectedPods") == 2 and found.get("currentHealthy") == count)

    tenant.wait(lambda: healthy(2), f"{budget} counts two ready pods", explain=lambda: str(pods()))
    first, second = pods()
    crash(api, first)
    tenant.wait(lambda: healthy(1), f"{budget} counts one ready pod")
    assert evict(api, second) == REFUSED  # it alone serves
    assert evict(api, first) == 201
    tenant.wait(lambda: healthy(2), f"{budget} counts two ready pods again")
    both = pods()
    for pod in both:
        crash(api, pod)
    tenant.wait(lambda: healthy(0), f"{budget} counts no ready pod")
    assert [evict(api, pod) for pod in both] == [201, 201]


def test_serving_pods_that_crash_do_not_block_a_drain(tenant: Tenant) -> None:
    tenant.trained("first")
    owner = Fleet(tenant, "desk").deploy(["support@1.0.0"], replicas=2, engine="transformers")
    tenant.wait(lambda: tenant.api.get("PodDisruptionBudget", tenant.name, "desk"), "the deployment has a budget")
    drained(tenant, "desk", f"graft.dev/owner-uid={owner['metadata']['uid']},graft.dev/component=serving")


@pytest.mark.parametrize("component", ["gateway", "operator"])
def test_pods_of_the_chart_that_crash_do_not_block_a_drain(tenant: Tenant, component: str) -> None:
    """The objects of the chart, in the tenant's namespace: only their pods matter here."""
    values: dict[str, Any] = {f"{component}__replicas": "2"}
    name = f"graft-{component}"
    made = from_chart({"Deployment", "PodDisruptionBudget", "ServiceAccount"}, **values)
    for item in made:
        if item["metadata"]["name"] == name:
            item["metadata"]["namespace"] = tenant.name
            tenant.api.create(item)
    drained(tenant, name, f"app.kubernetes.io/component={component}")
    tenant.api.delete("Deployment", tenant.name, name)

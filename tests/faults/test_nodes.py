"""Pods that are evicted, lost with their node, or started twice (rows 15 and 16).

The Eviction API, the Job controller and the deletion of a lost node's pods are the API server's and the controllers'. The
kubelet and the training containers are played.
"""

import json

import pytest
from graft.contracts.progress import Reason
from worlds.cluster.tenant import Tenant
from worlds.faults.bed import Bed


def published_by(bed: Bed, tenant: Tenant) -> str:
    """Return the pod whose version was published."""
    manifest = bed.store.get(f"{tenant.name}/adapters/support/1.0.0/manifest.json")
    return str(json.loads(manifest)["job"]["attempt"])


@pytest.mark.seconds(15)
def test_a_preemption_while_the_operator_is_killed_costs_no_retry(bed: Bed) -> None:
    tenant = bed.new_life().tenant
    tenant.job("moved", retries=0)
    first = tenant.running_pod("moved")
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": first, "namespace": tenant.name}}
    bed.operator.kill9()
    tenant.api.call("POST", f"/api/v1/namespaces/{tenant.name}/pods/{first}/eviction", eviction)
    tenant.fail_pod(first, Reason.INTERRUPTED, "The pod was stopped.", "")  # as after the kubelet's SIGTERM
    bed.healthy()
    second = tenant.running_pod("moved", but=(first,))
    tenant.publish_as_trainer("moved", second)
    tenant.end_pod(second)
    tenant.until("FineTuneJob", "moved", "Succeeded", "Published")
    assert published_by(bed, tenant) == second
    assert len(tenant.api.list("Job", tenant.name)) == 1


@pytest.mark.seconds(15)
@pytest.mark.parametrize("lost_is_first", [False, True])
def test_of_two_pods_that_run_at_once_the_first_publishes(bed: Bed, lost_is_first: bool) -> None:
    """The node is cut off, its pod is deleted by force, and another pod starts. The lost pod still writes to the store."""
    tenant = bed.new_life().tenant
    tenant.job("moved")
    lost = tenant.running_pod("moved")
    tenant.progress("moved", lost, stage="Training", step=1, total_steps=2, percent=50)
    # As the pod garbage collector does. The Job controller replaces no pod that may still run.
    target = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC"}
    tenant.api.patch_status("Pod", tenant.name, lost, {"phase": "Failed", "conditions": [target]})
    path = f"/api/v1/namespaces/{tenant.name}/pods/{lost}"
    tenant.api.call("DELETE", path, {"gracePeriodSeconds": 0, "propagationPolicy": "Background"})
    second = tenant.running_pod("moved", but=(lost,))
    order = (lost, second) if lost_is_first else (second, lost)
    for pod in order:
        tenant.publish_as_trainer("moved", pod, weights=pod.encode() * 100)
    tenant.end_pod(second)
    tenant.until("FineTuneJob", "moved", "Succeeded", "Published")
    assert published_by(bed, tenant) == order[0]
    prefix = f"{tenant.name}/adapters/support/1.0.0/"
    assert bed.store.get(f"{prefix}adapter_model.safetensors") == order[0].encode() * 100
    tenant.until("Adapter", "support-1.0.0", "Ready", "Verified")
    assert not [item.key for item in bed.store.objects(f"{tenant.name}/runs/") if "/version/" in item.key]


@pytest.mark.seconds(60)
def test_a_job_continues_on_another_node_when_its_node_is_deleted(bed: Bed) -> None:
    tenant = bed.new_life().tenant
    tenant.job("moved")
    lost = tenant.running_pod("moved")
    node = tenant.get("Pod", lost)["spec"]["nodeName"]
    path = f"/api/v1/nodes/{node}"
    manifest = tenant.api.call("GET", path)
    tenant.api.call("DELETE", path)
    tenant.wait(lambda: tenant.api.get("Pod", tenant.name, lost) is None, "the lost pod is deleted", 150)
    second = tenant.running_pod("moved", but=(lost,))
    kept = {key: manifest["metadata"][key] for key in ("name", "labels", "annotations")}
    tenant.api.call(
        "POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": kept, "status": manifest["status"]}
    )
    tenant.publish_as_trainer("moved", second)
    tenant.end_pod(second)
    tenant.until("FineTuneJob", "moved", "Succeeded", "Published")
    assert published_by(bed, tenant) == second

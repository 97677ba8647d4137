"""A tenant who makes the operator, the gateway's routes or the store act for them: refused on a real API server and store."""

import copy
import json
from typing import Any

import pytest
from graft.api import AdapterDeployment
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.contracts.progress import EXIT_CODES, Reason, Termination
from graft.manifests.routes import routes_name
from worlds.cluster.api import Api, Object
from worlds.cluster.fleet import Fleet
from worlds.cluster.operator_process import SYSTEM, OperatorProcess
from worlds.cluster.settled import settled
from worlds.cluster.tenant import BASE, Tenant
from worlds.cluster.tenants import make_base_model

SELECTOR = {
    "pod-template-hash",
    "controller-uid",
    "job-name",
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-name",
}


def impostor(tenant: Tenant, real: Object, name: str, **metadata: Any) -> Object:
    """Create a pod with Graft's labels and the spec of one of our pods, as everybody who may create pods can.

    It lacks the labels of the controller's own selector: with them Kubernetes itself would adopt the pod.
    """
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": tenant.name} | metadata}
    labels = {key: value for key, value in real["metadata"]["labels"].items() if key not in SELECTOR}
    pod["metadata"] |= {"labels": labels, "annotations": real["metadata"].get("annotations", {})}
    spec = copy.deepcopy(real["spec"])
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        container["volumeMounts"] = [
            item for item in container.get("volumeMounts", []) if "serviceaccount" not in item["mountPath"]
        ]
    spec["volumes"] = [item for item in spec.get("volumes", []) if not item["name"].startswith("kube-api-access")]
    tenant.api.create(pod | {"spec": spec})
    tenant.wait(lambda: tenant.get("Pod", name).get("status", {}).get("phase") == "Running", f"{name} runs")
    return tenant.get("Pod", name)


def test_a_pod_with_our_labels_becomes_no_backend(tenant: Tenant) -> None:
    """A user creates a pod with the labels of a serving pod, ready and with a residency -> no route leads to it."""
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    (real,) = fleet.serve(["support@1.0.0"])
    owner = real["metadata"]["ownerReferences"][0]
    forged = [
        impostor(tenant, real, "chat-0"),
        impostor(tenant, real, "chat-1", ownerReferences=[owner | {"controller": False, "blockOwnerDeletion": False}]),
    ]
    for pod in forged:
        fleet.ready(pod, True)
        fleet.agent_says(pod)
    settled(tenant)
    assert [item.pod for item in fleet.routes().backends] == [real["metadata"]["name"]]
    status = fleet.status()
    assert [item["pod"] for item in status["replicaStatus"]] == [real["metadata"]["name"]]
    assert status["readyText"] == "1/1"


def test_a_deployment_without_its_finalizer_leaves_no_routes(tenant: Tenant, running: OperatorProcess) -> None:
    """A user removes the finalizer and deletes a deployment, also while the operator is down -> its routes are deleted.

    Otherwise they would lead to addresses that other tenants' pods get later, and fill the gateway's table.
    """
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    fleet.serve(["support@1.0.0"])
    name = routes_name(AdapterDeployment.model_validate(tenant.get("AdapterDeployment", "chat")))

    def routes() -> Object | None:
        return tenant.api.get("ConfigMap", SYSTEM, name)

    for down in (False, True):
        tenant.wait(lambda: routes() is not None, "the routes exist")
        if down:
            running.stop()
        tenant.api.patch("AdapterDeployment", tenant.name, "chat", {"metadata": {"finalizers": None}})
        tenant.api.delete("AdapterDeployment", tenant.name, "chat")
        if tenant.api.get("AdapterDeployment", tenant.name, "chat") is not None:
            tenant.api.patch("AdapterDeployment", tenant.name, "chat", {"metadata": {"finalizers": None}})
        tenant.gone("AdapterDeployment", "chat")
        if down:
            assert routes() is not None
            running.start()
        tenant.wait(lambda: routes() is None, "the routes are deleted")
        if not down:
            fleet.deploy(["support@1.0.0"])


def test_a_pod_with_a_jobs_labels_neither_ends_nor_advances_it(tenant: Tenant) -> None:
    """A user creates a pod with the labels of a training pod that failed -> the job goes on as its own pod does."""
    tenant.job("first")
    real = tenant.get("Pod", tenant.running_pod("first"))
    impostor(tenant, real, "zzz-first")
    text = Termination(reason=Reason.DATASET_INVALID, message="forged", remedy="forged").json_text()
    tenant.end_pod("zzz-first", EXIT_CODES[Reason.DATASET_INVALID], text)
    settled(tenant)
    status = tenant.status("FineTuneJob", "first")
    assert "forged" not in json.dumps(status) and "zzz" not in json.dumps(status)
    tenant.publish_as_trainer("first", real["metadata"]["name"])
    tenant.end_pod(real["metadata"]["name"])
    tenant.until("FineTuneJob", "first", "Succeeded", "Published")


def test_a_version_in_another_bucket_is_neither_read_nor_signed(tenant: Tenant, store: S3Store) -> None:
    """An Adapter names a version in a bucket that only the operator can read -> nothing of it is told or written."""
    tenant.trained("first")
    real = tenant.get("Adapter", "support-1.0.0")
    prefix = real["spec"]["artifact"]["uri"].removeprefix("s3://graft/")
    other = f"private-{tenant.name}"
    store.client.create_bucket(Bucket=other)
    for item in store.objects(prefix):
        store.client.put_object(Bucket=other, Key=item.key.replace("1.0.0", "6.6.6"), Body=store.get(item.key))
    manifest = json.loads(store.get(prefix + "manifest.json")) | {"version": "6.6.6"}
    store.client.put_object(
        Bucket=other, Key=prefix.replace("1.0.0", "6.6.6") + "manifest.json", Body=json.dumps(manifest)
    )
    before = sorted(item.key for item in store.objects("", other))
    digest = "sha256:" + "0" * 64
    artifact = {"uri": f"s3://{other}/{prefix.replace('1.0.0', '6.6.6')}", "digest": digest}
    spec = {"adapter": "support", "version": "6.6.6", "baseModel": BASE, "method": "lora", "artifact": artifact}
    tenant.api.create(tenant.resource("Adapter", "support-6.6.6", spec | {"deletionPolicy": "Delete"}))
    tenant.until("Adapter", "support-6.6.6", "Ready", "OutsideNamespace")
    settled(tenant)
    told = tenant.status("Adapter", "support-6.6.6")
    assert not {"metrics", "score", "signature", "sizeBytes", "baseModelDigest"} & set(told)
    tenant.api.delete("Adapter", tenant.name, "support-6.6.6")
    tenant.gone("Adapter", "support-6.6.6")
    assert sorted(item.key for item in store.objects("", other)) == before


def test_a_restricted_base_model_is_closed_to_other_keys(
    tenant: Tenant, calm: Tenant, api: Api, store: S3Store
) -> None:
    """A pod reads a base model that is restricted to another namespace with its own key -> the store refuses it."""
    name = make_base_model(api, store, f"secret-{tenant.name}", allowedNamespaces=[tenant.name])
    key = f"models/{name}/config.json"
    tenant.wait(
        lambda: (api.get("BaseModel", None, name) or {}).get("status", {}).get("stage") == "Ready", "it is Ready"
    )
    for one in (tenant, calm):
        one.job("first")
        one.running_pod("first")
    mine, theirs = tenant.tenant_store(), calm.tenant_store()
    assert mine.get(key).startswith(b"{") and list(mine.objects(f"models/{name}/"))
    assert theirs.get(f"models/{BASE}/config.json").startswith(b"{")
    for call in (
        lambda: theirs.get(key),
        lambda: list(theirs.objects(f"models/{name}/")),
        lambda: list(theirs.objects("models/")),
    ):
        with pytest.raises(StoreError) as error:
            call()
        assert error.value.trouble == "denied"
    api.patch("BaseModel", None, name, {"spec": {"allowedNamespaces": [calm.name]}})
    tenant.wait(lambda: allowed(theirs, key) and not allowed(mine, key), "the rights follow the BaseModel")
    api.delete("BaseModel", None, name)
    tenant.wait(lambda: not allowed(theirs, key), "nobody may read the files of a deleted BaseModel")


def allowed(store: S3Store, key: str) -> bool:
    try:
        store.get(key)
    except StoreError:
        return False
    return True

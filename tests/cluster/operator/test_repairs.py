"""Children that are deleted or changed by hand come back within 10 s. Those of serving: test_applied.py."""

import base64
import json
from collections.abc import Callable

import pytest
from graft.artifacts.storage import StoreError
from graft.contracts.mounts import STORAGE_SECRET
from graft.manifests.metadata import OWNER_UID
from worlds.cluster.api import Object
from worlds.cluster.fleet import Fleet
from worlds.cluster.operator_process import SYSTEM, OperatorProcess
from worlds.cluster.settled import settled
from worlds.cluster.tenant import BASE, Tenant

WITHIN = 10  # seconds. The resync comes after minutes


def body(found: Object | None) -> Object | None:
    """Return what an object says, without what the API server adds."""
    return None if found is None else {key: found.get(key) for key in ("data", "spec") if key in found}


def comes_back(tenant: Tenant, kind: str, namespace: str, name: str, patch: Object) -> None:
    """Delete a child, and then change it. Check both times that it is as before within 10 s."""
    wanted = body(tenant.api.get(kind, namespace, name))
    assert wanted is not None, f"{kind} {name} does not exist"

    def repaired(what: str, act: Callable[[], object]) -> None:
        act()
        tenant.wait(
            lambda: body(tenant.api.get(kind, namespace, name)) == wanted,
            f"{kind} {name} that was {what} is as before",
            WITHIN,
            lambda: json.dumps(body(tenant.api.get(kind, namespace, name))),
        )

    repaired("deleted", lambda: tenant.api.delete(kind, namespace, name))
    repaired("changed", lambda: tenant.api.patch(kind, namespace, name, patch))


def test_the_children_of_a_running_job_come_back(tenant: Tenant) -> None:
    tenant.job("run")
    pod = tenant.running_pod("run")
    settled(tenant)
    comes_back(tenant, "ConfigMap", tenant.name, "run-job", {"data": {"job.json": "{}"}})
    comes_back(tenant, "NetworkPolicy", tenant.name, "run-training", {"spec": {"ingress": [{}]}})
    assert [item["metadata"]["name"] for item in tenant.pods(tenant.get("FineTuneJob", "run"))] == [pod]


def test_the_job_of_a_run_and_the_service_of_its_pods_come_back(tenant: Tenant) -> None:
    """Several pods find each other through a Service. The run goes on in a new pod, from its last checkpoint."""
    tenant.job("wide", nodes=2, resources={"requests": {"cpu": "100m", "memory": "128Mi"}})
    first = tenant.running_pod("wide")
    settled(tenant)
    (job,) = tenant.api.list("Job", tenant.name)
    name = job["metadata"]["name"]
    (service,) = tenant.api.list("Service", tenant.name)
    comes_back(
        tenant, "Service", tenant.name, service["metadata"]["name"], {"spec": {"publishNotReadyAddresses": False}}
    )

    def parallel() -> int:
        found = tenant.api.get("Job", tenant.name, name)
        return int(found["spec"]["parallelism"]) if found is not None else 0

    tenant.api.patch("Job", tenant.name, name, {"spec": {"parallelism": 0}})
    tenant.wait(lambda: parallel() == 2, "the Job has its pods again", WITHIN)
    tenant.api.patch("Job", tenant.name, name, {"metadata": {"labels": {OWNER_UID: None}}})
    tenant.wait(
        lambda: OWNER_UID in tenant.get("Job", name)["metadata"]["labels"], "the Job has its labels again", WITHIN
    )
    assert tenant.get("Job", name)["metadata"]["uid"] == job["metadata"]["uid"]
    tenant.api.delete("Job", tenant.name, name)
    tenant.wait(
        lambda: (
            (found := tenant.api.get("Job", tenant.name, name)) is not None
            and found["metadata"]["uid"] != job["metadata"]["uid"]
        ),
        "there is a Job again",
        WITHIN,
    )
    assert tenant.running_pod("wide", but=(first,)) != first


def test_the_children_of_a_version_that_is_made_without_training_come_back(tenant: Tenant) -> None:
    source = {"uri": f"s3://graft/{tenant.name}/datasets/theirs/"}
    tenant.api.create(
        tenant.resource(
            "Adapter",
            "theirs-1.0.0",
            {"adapter": "theirs", "version": "1.0.0", "baseModel": BASE, "method": "lora", "import": source},
        )
    )
    tenant.running_pod("theirs-1.0.0", kind="Adapter")
    settled(tenant)
    (job,) = tenant.api.list("Job", tenant.name)
    (policy,) = tenant.api.list("NetworkPolicy", tenant.name)
    (file,) = (
        item
        for item in tenant.api.list("ConfigMap", tenant.name)
        if OWNER_UID in (item["metadata"].get("labels") or {})
    )
    comes_back(tenant, "NetworkPolicy", tenant.name, policy["metadata"]["name"], {"spec": {"ingress": [{}]}})
    comes_back(tenant, "ConfigMap", tenant.name, file["metadata"]["name"], {"data": {"job.json": "{}"}})
    tenant.api.delete("Job", tenant.name, job["metadata"]["name"])
    tenant.wait(
        lambda: any(item["metadata"]["uid"] != job["metadata"]["uid"] for item in tenant.api.list("Job", tenant.name)),
        "there is a Job again",
        WITHIN,
    )


def test_the_key_of_a_namespace_at_work_comes_back(tenant: Tenant) -> None:
    """A Secret that is deleted, or whose key is changed, gets a new key, and the old one works no more. What else is
    changed in it comes back, and the key stays."""
    tenant.job("run")
    tenant.running_pod("run")
    key_comes_back(tenant)


def test_the_key_of_a_namespace_with_a_deployment_comes_back_also_after_a_restart(
    tenant: Tenant, running: OperatorProcess
) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "desk")
    fleet.deploy(["support@1.0.0"], replicas=0, engine="transformers")
    fleet.routes()
    running.stop()
    tenant.api.delete("Secret", tenant.name, STORAGE_SECRET)
    running.start()
    tenant.wait(lambda: tenant.api.get("Secret", tenant.name, STORAGE_SECRET), "the Secret is there again", WITHIN)
    key_comes_back(tenant)


def key_comes_back(tenant: Tenant) -> None:
    object_key = f"{tenant.name}/datasets/train.jsonl"

    def data() -> dict[str, str]:
        return dict((tenant.api.get("Secret", tenant.name, STORAGE_SECRET) or {}).get("data") or {})

    def usable() -> bool:
        try:
            tenant.tenant_store().put(object_key, b"{}")
        except (StoreError, AssertionError):
            return False
        return True

    tenant.wait(usable, "the key works", WITHIN)
    nonsense = base64.b64encode(b"a key of thirty characters, wrong").decode()
    for act in (
        lambda: tenant.api.delete("Secret", tenant.name, STORAGE_SECRET),
        lambda: tenant.api.patch("Secret", tenant.name, STORAGE_SECRET, {"data": {"secret-access-key": nonsense}}),
        lambda: tenant.api.patch("Secret", tenant.name, STORAGE_SECRET, {"data": {"access-key-id": None}}),
    ):
        old, before = tenant.tenant_store(), data()
        act()
        tenant.wait(lambda before=before: data().keys() == before.keys() and usable(), "a key works again", WITHIN)
        assert data()["secret-access-key"] not in {before["secret-access-key"], nonsense}
        with pytest.raises(StoreError, match=r"SignatureDoesNotMatch|InvalidAccessKeyId"):
            old.put(object_key, b"{}")
    before = data()
    tenant.api.patch("Secret", tenant.name, STORAGE_SECRET, {"data": {"bucket": nonsense, "session-token": nonsense}})
    tenant.wait(lambda: data() == before, "the entries are as before", WITHIN)


def test_the_routes_come_back(tenant: Tenant) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "desk")
    fleet.serve(["support@1.0.0"], engine="transformers")
    fleet.routes()
    settled(tenant)
    found = fleet.find_routes()
    assert found is not None
    comes_back(tenant, "ConfigMap", SYSTEM, found["metadata"]["name"], {"data": {"routes.json": "{}"}})

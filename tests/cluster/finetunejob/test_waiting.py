"""The objects that jobs and deployments wait for. They continue by themselves once the objects exist."""

import pytest
from graft.artifacts.store import S3Store
from worlds.cluster.api import Api
from worlds.cluster.fleet import Fleet
from worlds.cluster.operator_process import OperatorProcess
from worlds.cluster.tenant import Tenant
from worlds.cluster.tenants import bind, make_base_model, new_tenant


def test_a_job_waits_for_its_base_model(tenant: Tenant) -> None:
    name = f"late-{tenant.name}"
    tenant.job("early", baseModel=name)
    waiting = tenant.until("FineTuneJob", "early", "Accepted", "BaseModelMissing")
    assert waiting["status"] == "False" and name in waiting["message"]
    assert tenant.status("FineTuneJob", "early")["stage"] == "Waiting"

    make_base_model(tenant.api, tenant.store, name)
    tenant.until("FineTuneJob", "early", "Accepted", "Resolved")
    tenant.running_pod("early")
    assert tenant.job_file("early").base_model.name == name


def test_a_deployment_waits_for_its_base_model(tenant: Tenant) -> None:
    name = f"late-{tenant.name}"
    fleet = Fleet(tenant, "chat")
    fleet.deploy([], baseModel=name, routes=[{"model": "plain"}])
    fleet.until("Accepted", "BaseModelMissing")
    assert fleet.status()["stage"] == "Waiting"
    make_base_model(tenant.api, tenant.store, name)
    fleet.until("Available", "Serving")
    assert fleet.targets() == {"plain": None}


def test_a_base_model_without_weights_reports_the_missing_weights(tenant: Tenant) -> None:
    name = f"empty-{tenant.name}"
    tenant.store.put(f"models/{name}/config.json", b"{}")
    source = {"source": f"s3://graft/models/{name}"}
    tenant.api.create(
        {"apiVersion": "graft.dev/v1alpha1", "kind": "BaseModel", "metadata": {"name": name}, "spec": source}
    )
    tenant.job("early", baseModel=name)
    # Before the BaseModel is checked, the reason is the same, with another message.
    tenant.until("FineTuneJob", "early", "Accepted", "BaseModelNotReady", says="no safetensors weights")


def test_a_base_model_that_the_namespace_may_not_use_is_refused(tenant: Tenant) -> None:
    name = make_base_model(tenant.api, tenant.store, f"private-{tenant.name}", allowedNamespaces=["somebody-else"])
    tenant.job("curious", baseModel=name)
    refused = tenant.until("FineTuneJob", "curious", "Accepted", "BaseModelForbidden")
    assert tenant.name in refused["message"] and "allowedNamespaces" in refused["message"]
    assert tenant.api.list("Job", tenant.name) == []

    tenant.api.patch("BaseModel", None, name, {"spec": {"allowedNamespaces": ["somebody-else", tenant.name]}})
    tenant.until("FineTuneJob", "curious", "Accepted", "Resolved")


def test_a_dataset_of_another_namespace_is_refused(tenant: Tenant) -> None:
    tenant.job("thief", dataset={"train": {"uri": "s3://graft/somebody-else/train.jsonl"}})
    refused = tenant.until("FineTuneJob", "thief", "Accepted", "DatasetOutsideNamespace")
    assert f"s3://graft/{tenant.name}/" in refused["message"]
    assert tenant.api.list("Job", tenant.name) == []


@pytest.fixture
def unbound(
    api: Api, store: S3Store, running: OperatorProcess, base_model: str, request: pytest.FixtureRequest
) -> Tenant:
    return new_tenant(api, store, request)


def test_an_unbound_namespace_gets_the_command_that_binds_it(unbound: Tenant) -> None:
    tenant = unbound
    tenant.job("hopeful")
    fleet = Fleet(tenant, "chat")
    fleet.deploy([], routes=[{"model": "plain"}])
    refused = tenant.until("FineTuneJob", "hopeful", "Accepted", "NamespaceNotBound")
    command = f"kubectl create rolebinding graft -n {tenant.name} --clusterrole=graft-tenant"
    assert command in refused["message"] and "graft-system:graft-operator" in refused["message"]
    fleet.until("Accepted", "NamespaceNotBound")
    assert tenant.api.list("Secret", tenant.name) == []

    bind(tenant)
    tenant.until("FineTuneJob", "hopeful", "Accepted", "Resolved")
    tenant.running_pod("hopeful")
    fleet.until("Available", "Serving")


def quota(tenant: Tenant, resource: str, amount: int = 0) -> str:
    """Limit a resource to `amount` objects and wait until the quota is in force. Return the path of the quota."""
    path = f"/api/v1/namespaces/{tenant.name}/resourcequotas"
    manifest = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "few"},
        "spec": {"hard": {resource: str(amount)}},
    }
    tenant.api.call("POST", path, manifest)
    tenant.wait(lambda: tenant.api.call("GET", f"{path}/few").get("status", {}).get("hard"), "the quota is in force")
    return f"{path}/few"


def test_an_exceeded_job_quota_is_reported_and_the_job_continues_later(tenant: Tenant) -> None:
    path = quota(tenant, "count/jobs.batch")
    tenant.job("many")
    refused = tenant.until("FineTuneJob", "many", "Accepted", "CreationFailed")
    assert "exceeded quota" in refused["message"]
    tenant.api.call("DELETE", path)
    tenant.running_pod("many")
    assert tenant.job_file("many").output.version == "1.0.0"


def test_a_quota_of_one_job_is_enough_for_the_preflight_and_the_run(tenant: Tenant) -> None:
    quota(tenant, "count/jobs.batch", 1)
    tenant.job("many", resources=None)
    tenant.pass_preflight("many", examples=10, maxTokens=100)
    tenant.running_pod("many")
    status = tenant.status("FineTuneJob", "many")
    assert status["checked"] and status["dataset"]["maxTokens"] == 100  # the preflight pod no longer exists
    assert [job["metadata"]["name"] for job in tenant.api.list("Job", tenant.name)] == ["many"]


def test_an_exceeded_pod_quota_is_reported(tenant: Tenant) -> None:
    quota(tenant, "pods")
    tenant.job("many")
    refused = tenant.until("FineTuneJob", "many", "Succeeded", "QuotaExceeded")
    assert "exceeded quota" in refused["message"]

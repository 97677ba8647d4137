"""The objects and files that are deleted with a resource, and those that stay."""

from graft.artifacts.identity import VersityIdentity
from graft.artifacts.store import S3Store
from graft.contracts.progress import Reason
from graft.reconcile.shared.storerights import installation_name
from testbed.objectstore import S3Server
from worlds.cluster.fleet import Fleet
from worlds.cluster.operator_process import SYSTEM
from worlds.cluster.tenant import Tenant
from worlds.cluster.tenants import bind


def keys(store: S3Store, prefix: str) -> list[str]:
    return [item.key.removeprefix(prefix) for item in store.objects(prefix)]


def test_deleting_a_running_job_keeps_the_published_adapters(tenant: Tenant) -> None:
    assert tenant.trained("done") == "support-1.0.0"
    tenant.job("unfinished")
    pod = tenant.running_pod("unfinished")
    tenant.progress("unfinished", pod, stage="Training", step=1, total_steps=2, percent=50)
    assert keys(tenant.store, f"{tenant.name}/runs/") != []

    tenant.api.delete("FineTuneJob", tenant.name, "unfinished")
    tenant.api.delete("FineTuneJob", tenant.name, "done")
    tenant.gone("FineTuneJob", "unfinished")
    tenant.gone("FineTuneJob", "done")
    assert tenant.api.list("Job", tenant.name) == [] and tenant.api.list("Pod", tenant.name) == []
    assert keys(tenant.store, f"{tenant.name}/runs/") == []
    tenant.gone("ConfigMap", "unfinished-job")
    tenant.gone("NetworkPolicy", "unfinished-training")
    assert tenant.status("Adapter", "support-1.0.0")["stage"] == "Ready"
    assert "manifest.json" in keys(tenant.store, f"{tenant.name}/adapters/support/1.0.0/")


def test_a_job_that_never_started_can_be_deleted(tenant: Tenant) -> None:
    tenant.job("waiting", baseModel="nowhere")
    tenant.until("FineTuneJob", "waiting", "Accepted", "BaseModelMissing")
    tenant.api.delete("FineTuneJob", tenant.name, "waiting")
    tenant.gone("FineTuneJob", "waiting")


def test_a_job_can_be_created_again_with_the_same_name(tenant: Tenant) -> None:
    tenant.job("twice")
    first = tenant.get("FineTuneJob", "twice")["metadata"]["uid"]
    tenant.running_pod("twice")
    tenant.api.delete("FineTuneJob", tenant.name, "twice")
    tenant.gone("FineTuneJob", "twice")
    assert tenant.trained("twice") == "support-1.0.0"
    owner = tenant.get("Job", "twice")["metadata"]["ownerReferences"][0]["uid"]
    assert owner == tenant.get("FineTuneJob", "twice")["metadata"]["uid"] != first


def test_deleting_a_served_adapter_waits_for_its_deployment(tenant: Tenant) -> None:
    tenant.trained("first", output={"adapter": "support", "deletionPolicy": "Delete"})
    tenant.trained("other", adapter="sales")
    fleet = Fleet(tenant, "chat")
    (pod,) = fleet.serve(["support@1.0.0", "sales@1.0.0"])
    tenant.until("Adapter", "support-1.0.0", "InUse", "Served")

    tenant.api.delete("Adapter", tenant.name, "support-1.0.0")
    tenant.wait(lambda: tenant.status("Adapter", "support-1.0.0")["stage"] == "Deleting", "the deletion waits")
    tenant.until("Adapter", "support-1.0.0", "InUse", "Served", says="served by chat")
    assert fleet.targets()["support"] == "support-1.0.0"
    assert "manifest.json" in keys(tenant.store, f"{tenant.name}/adapters/support/1.0.0/")

    fleet.change(adapters=["sales@1.0.0"])
    fleet.until_wanted("sales-1.0.0")
    fleet.agent_says(pod)
    tenant.gone("Adapter", "support-1.0.0")
    assert keys(tenant.store, f"{tenant.name}/adapters/support/1.0.0/") == []
    assert fleet.targets() == {"sales": "sales-1.0.0"}


def test_retained_files_outlive_their_adapter(tenant: Tenant) -> None:
    tenant.trained("first")
    tenant.api.delete("Adapter", tenant.name, "support-1.0.0")
    tenant.gone("Adapter", "support-1.0.0")
    assert "manifest.json" in keys(tenant.store, f"{tenant.name}/adapters/support/1.0.0/")


def test_deleting_a_deployment_deletes_all_its_objects(tenant: Tenant) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    fleet.serve(["support@1.0.0"])
    tenant.api.delete("AdapterDeployment", tenant.name, "chat")
    tenant.gone("AdapterDeployment", "chat")
    assert fleet.find_routes() is None
    names = (("Deployment", "chat"), ("ConfigMap", "chat-wanted"), ("ConfigMap", "chat-residency"))
    for kind, name in (
        *names,
        ("Role", "chat-agent"),
        ("ServiceAccount", "chat-agent"),
        ("NetworkPolicy", "chat-serving"),
    ):
        tenant.gone(kind, name)
    tenant.wait(lambda: not tenant.api.list("ReplicaSet", tenant.name), "the ReplicaSets are deleted")
    tenant.until("Adapter", "support-1.0.0", "InUse", "NotServed")


def test_a_deletion_in_an_unbound_namespace_reports_the_missing_binding(tenant: Tenant) -> None:
    tenant.job("orphan")
    tenant.running_pod("orphan")
    tenant.api.delete("RoleBinding", tenant.name, "graft")
    tenant.api.delete("FineTuneJob", tenant.name, "orphan")
    tenant.until("FineTuneJob", "orphan", "Accepted", "NamespaceNotBound")
    bind(tenant)
    tenant.gone("FineTuneJob", "orphan")
    assert tenant.api.list("Job", tenant.name) == []


def test_deleting_a_namespace_revokes_its_credential_and_does_not_get_stuck(
    tenant: Tenant, calm: Tenant, s3: S3Server
) -> None:
    cluster = tenant.api.get("Namespace", None, "kube-system") or {}
    identity = VersityIdentity(tenant.store, s3.endpoint, installation_name(cluster["metadata"]["uid"], SYSTEM))
    calm.job("elsewhere")
    calm.running_pod("elsewhere")
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    fleet.serve(["support@1.0.0"])
    tenant.job("unfinished")
    pod = tenant.running_pod("unfinished")
    assert tenant.name in identity.tenants()

    tenant.api.delete("Namespace", None, tenant.name)
    tenant.wait(lambda: "deletionTimestamp" in tenant.get("Pod", pod)["metadata"], "the training pod is stopped")
    tenant.fail_pod(pod, Reason.INTERRUPTED, "The pod was stopped.", "")  # as after the kubelet's SIGTERM
    tenant.wait(
        lambda: tenant.api.get("Namespace", None, tenant.name) is None, "the namespace is deleted", timeout=90,
        explain=lambda: str((tenant.api.get("Namespace", None, tenant.name) or {}).get("status")),
    )  # fmt: skip
    tenant.wait(lambda: tenant.name not in identity.tenants(), "its key is revoked")
    policy = tenant.store.client.get_bucket_policy(Bucket="graft")["Policy"]
    assert f"Own{tenant.name}" not in policy and f"Own{calm.name}" in policy
    calm.tenant_store().put(f"{calm.name}/datasets/train.jsonl", b"{}")
    assert fleet.find_routes() is None

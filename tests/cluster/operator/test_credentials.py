"""The key of a namespace gives access to its own prefix in the bucket, and to nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from worlds.cluster.api import Refused
from worlds.cluster.operator_process import ACCOUNT, SYSTEM
from worlds.cluster.tenant import BASE, Tenant
from worlds.cluster.tenants import bind, new_tenant


@pytest.fixture
def neighbour(tenant: Tenant, request: pytest.FixtureRequest) -> Tenant:
    """Return a second namespace, which has its own key and one file."""
    other = new_tenant(tenant.api, tenant.store, request)
    bind(other)
    other.job("there")
    other.running_pod("there")
    other.store.put(f"{other.name}/adapters/secret/1.0.0/manifest.json", b"{}")
    return other


def denied(call: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(StoreError) as error:
        call(*arguments)
    assert error.value.trouble == "denied", error.value


def test_a_key_gives_access_to_its_own_prefix_only(tenant: Tenant, neighbour: Tenant) -> None:
    tenant.job("here")
    tenant.running_pod("here")
    store = tenant.tenant_store()
    own, other = f"{tenant.name}/datasets/train.jsonl", f"{neighbour.name}/adapters/secret/1.0.0/manifest.json"
    store.put(own, b"{}")
    assert store.get(own) == b"{}"
    assert [item.key for item in store.objects(f"{tenant.name}/datasets/")] == [own]
    assert store.get("models/tiny/config.json").startswith(b"{")

    denied(store.get, other)
    denied(store.put, other, b"mine")
    denied(store.put, f"{neighbour.name}/new.json", b"mine")
    denied(store.put, "models/tiny/config.json", b"mine")
    denied(store.put, f"{tenant.name}x/new.json", b"mine")
    denied(lambda: list(store.objects(f"{neighbour.name}/")))
    denied(lambda: list(store.objects("")))
    denied(store.put, f"{tenant.name}/adapters/support/1.0.0/manifest.json", b"mine")  # only the operator publishes
    denied(store._call, "delete_object", own)
    denied(store.delete_prefix, f"{tenant.name}/datasets/")
    store.put(f"{tenant.name}/runs/uid/pod/checkpoints/step-000001/rank-0000.json", b"{}")
    assert store.delete_prefix(f"{tenant.name}/runs/uid/") == 1  # a run may delete its own checkpoints
    denied(store._call, "delete_object", f"{neighbour.name}/runs/uid/progress.json")
    assert tenant.store.get(other) == b"{}" and tenant.store.get(own) == b"{}"
    with pytest.raises(Exception, match=r"AccessDenied|403"):
        store.client.put_bucket_policy(Bucket="graft", Policy="{}")


def test_the_first_dataset_can_be_uploaded_before_the_first_job(tenant: Tenant) -> None:
    assert tenant.api.get("Secret", tenant.name, "graft-storage") is None
    tenant.api.patch("Namespace", None, tenant.name, {"metadata": {"labels": {"graft.dev/credentials": "issue"}}})
    tenant.wait(lambda: tenant.api.get("Secret", tenant.name, "graft-storage"), "the namespace has a key")
    store = tenant.tenant_store()
    tenant.wait(lambda: works(store, f"{tenant.name}/datasets/train.jsonl"), "the store accepts the key")


def test_a_key_is_mounted_as_a_file_and_never_set_as_a_variable(tenant: Tenant) -> None:
    tenant.job("here")
    pod = tenant.get("Pod", tenant.running_pod("here"))
    mounts = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert mounts["storage"]["secret"]["secretName"] == "graft-storage"
    for container in pod["spec"]["initContainers"] + pod["spec"]["containers"]:
        assert not [item for item in container["env"] if "secretKeyRef" in (item.get("valueFrom") or {})]


def test_a_deleted_secret_is_issued_again_for_the_next_job(tenant: Tenant) -> None:
    tenant.job("first")
    tenant.running_pod("first")
    old = tenant.tenant_store()
    tenant.api.delete("Secret", tenant.name, "graft-storage")
    tenant.job("second")
    tenant.running_pod("second")
    new = tenant.tenant_store()
    assert new.config.secret_access_key != old.config.secret_access_key
    key = f"{tenant.name}/datasets/train.jsonl"
    tenant.wait(lambda: works(new, key), "the new key works")
    denied(old.put, key, b"{}")


def works(store: S3Store, key: str) -> bool:
    try:
        store.put(key, b"{}")
    except StoreError:
        return False
    return True


def test_a_secret_that_the_platform_team_created_is_not_changed(tenant: Tenant) -> None:
    manifest = {"apiVersion": "v1", "kind": "Secret", "stringData": {"bucket": "graft"}}
    tenant.api.create(manifest | {"metadata": {"name": "graft-storage", "namespace": tenant.name}})
    tenant.job("here")
    waiting = tenant.until("FineTuneJob", "here", "Accepted", "CredentialsMissing")
    assert "access-key-id" in waiting["message"]
    assert set(tenant.get("Secret", "graft-storage")["data"]) == {"bucket"}


def test_an_adapter_that_points_at_another_namespace_is_invalid(tenant: Tenant, neighbour: Tenant) -> None:
    artifact = {"uri": f"s3://graft/{neighbour.name}/adapters/secret/1.0.0/", "digest": "sha256:" + "0" * 64}
    spec = {"adapter": "secret", "version": "1.0.0", "baseModel": BASE, "method": "lora", "artifact": artifact}
    tenant.api.create(tenant.resource("Adapter", "secret-1.0.0", spec | {"deletionPolicy": "Delete"}))
    tenant.until("Adapter", "secret-1.0.0", "Ready", "OutsideNamespace")
    tenant.api.delete("Adapter", tenant.name, "secret-1.0.0")
    tenant.gone("Adapter", "secret-1.0.0")
    assert tenant.store.get(f"{neighbour.name}/adapters/secret/1.0.0/manifest.json") == b"{}"


def test_the_operator_has_no_more_rights_than_it_needs(tenant: Tenant) -> None:
    operator = tenant.api.as_token(tenant.api.token(SYSTEM, ACCOUNT))
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x", "namespace": "default"}}
    for call in (
        lambda: operator.list("Secret"),
        lambda: operator.list("Secret", tenant.name),
        lambda: operator.get("Secret", tenant.name, "other"),
        lambda: operator.get("Secret", "default", "graft-storage"),
        lambda: operator.create(config_map),
        lambda: operator.delete("FineTuneJob", "default", "x"),
        lambda: operator.list("CoreEvent"),
        lambda: operator.delete("ServiceAccount", "default", "default"),
    ):
        with pytest.raises(Refused) as error:
            call()
        assert error.value.status == 403
